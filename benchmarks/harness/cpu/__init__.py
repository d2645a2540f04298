"""The suites of CPU kernels: many banks and batches of a layer beside its dense weight, and a
whole decoder. docs/cpu.md shows what they measured."""
