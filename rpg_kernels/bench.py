"""Moved out of the package; importing it says where to."""

raise ImportError(
    "rpg_kernels.bench moved to benchmarks.harness, which is in the source checkout and not in the "
    "package: run `python -m benchmarks.harness` there"
)
