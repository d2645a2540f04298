"""Memory right before a page that nobody may touch: who reads or writes beyond it dies."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_NOBODY = 0  # PROT_NONE


def moved(tensor: Tensor) -> Tensor:
    """The same elements in the same strides, the last of them at the end of a page."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in sizes)
    count = extent * tensor.element_size()
    whole = -(-count // PAGE) * PAGE
    memory = mmap.mmap(-1, whole + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address + whole), ctypes.c_size_t(PAGE), _NOBODY):
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=extent, offset=whole - count)
    flat.copy_(tensor.as_strided((extent,), (1,)))
    return flat.as_strided(tensor.shape, tensor.stride())
