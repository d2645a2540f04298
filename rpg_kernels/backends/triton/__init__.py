"""The Triton back end: tensor-core kernels that unpack weights inside their tiles."""
