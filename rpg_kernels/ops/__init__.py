"""Registered torch operators (namespace ``rpg_kernels``), one file per operation."""

from rpg_kernels.ops import _flops, _vmap, conv2d, embedding, linear, stored, unpack

_vmap.register()
_flops.register()
stored.register()

__all__ = ["conv2d", "embedding", "linear", "stored", "unpack"]
