"""Unpacking has no product that a vendor's library could do: Triton's kernels."""

from rpg_kernels.backends.triton.unpack import pack, unpack

__all__ = ["pack", "unpack"]
