"""Compiled kernels for CPU tensors: products of slots are shared by the rows that read them."""
