"""The CUDA back end for small batches; on CPU tensors, for tests, the same kernels as ``simt``."""
