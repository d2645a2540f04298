"""Moved out of the package; importing it says where to."""

raise ImportError(
    "rpg_kernels.demo moved to examples.demo, which is in the source checkout and not in the "
    "package: run `python -m examples.demo` there"
)
