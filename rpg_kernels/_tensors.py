"""Small questions about tensors that several layers ask."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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


def for_strided_pointwise(x: Tensor) -> Tensor:
    """The input of a strided 1x1 convolution, copied where oneDNN's backward cannot be trusted.

    Of images on a CPU, channels last and of fewer channels than it takes at a time (8, or 16 with
    AVX-512), that of oneDNN 3.12 gives wrong weight gradients, or writes past its own memory
    (uxlfoundation/oneDNN, issue 6035). Of contiguous images it does neither.

    Args:
        x: ``[B, C, H, W]``.
    """
    if x.device.type != "cpu" or x.shape[1] >= 16 or x.stride(1) > 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def refuse_forward_mode() -> None:
    """Operators have no forward-mode derivatives, and torch would drop the tangents silently.

    Raises:
        RuntimeError: in ``torch.func.jvp`` and what is made of it, or in a dual level.
    """
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "forward-mode differentiation of rpg operators is not supported: for a product of a "
            "Jacobian and a vector use torch.autograd.functional.jvp, which differentiates "
            "backward twice; for a whole Jacobian torch.func.jacrev, and for a Hessian "
            "torch.func.jacrev of torch.func.jacrev"
        )
