"""Registered torch operators (namespace ``rpg_kernels``), one file per operation."""

from rpg_kernels.ops import conv2d, embedding, linear, unpack

__all__ = ["conv2d", "embedding", "linear", "unpack"]
