"""Writers of the tables in docs/: what compilers make of the kernels, and what that predicts."""
