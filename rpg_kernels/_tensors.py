"""Small questions about tensors that several layers ask."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW_PRECISION = (torch.bfloat16, torch.float16)


def empty_image(x: Tensor, shape: Sequence[Any], device: str | None = None) -> Tensor:
    """Empty ``[B, C, H, W]`` in x's dtype: channels_last where x is only that, else contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    plain = not channels_last or x.is_contiguous()
    return torch.empty(
        tuple(shape),
        dtype=x.dtype,
        device=device or x.device,
        memory_format=torch.contiguous_format if plain else torch.channels_last,
    )


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared; valid while the tensor lives."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")
