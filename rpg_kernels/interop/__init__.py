"""Reading what other implementations wrote."""

from rpg_kernels.interop import official

__all__ = ["official"]
