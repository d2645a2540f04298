"""Rounding a bank's values to codes of 8 bits: one scale per slot, symmetric, nearest.

    scale = max |w| / top        codes = round(w / scale)        w ≈ scale · codes

``top`` is 127 of int8, and 448 of float8_e4m3fn. A slot of zeros has scale 0 and codes 0. The error
of an element is at most half a step: scale / 2 in int8, 1/16 of the element in float8_e4m3fn or
2^-10 scales near zero.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor

from rpg_kernels._stored import StoredValues

FORMS = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
_TOP = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def round_slots(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes ``[slots, granularity]`` of ``dtype`` and scales float32 ``[slots]``.

    Args:
        values: finite ``[slots, granularity]``.
        dtype: one of ``FORMS``.

    Example:
        >>> codes, scales = round_slots(torch.tensor([[1.27, -0.5], [0.0, 0.0]]), torch.int8)
        >>> codes.tolist(), [round(scale, 4) for scale in scales.tolist()]
        ([[127, -50], [0, 0]], [0.01, 0.0])
    """
    values = values.detach().float()
    top = _TOP[dtype]
    scales = values.abs().amax(dim=1) / top
    # Of a slot whose scale is too small for float32, as of one of zeros, nothing is left.
    inverse = torch.where(scales > 0, 1 / scales.double(), 0)
    codes = values.double().mul_(inverse.unsqueeze(1)).clamp_(-top, top)
    if dtype == torch.int8:
        codes.round_()
    return codes.to(dtype), scales


class _Straight(torch.autograd.Function):
    """Rounded values, whose gradient is that of the values (straight-through)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor, rounding: Rounding) -> Tensor:
        ctx.rounding = ref(rounding)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rounding = ctx.rounding()
        if rounding is not None:
            rounding.forget()
        return grad, None, None


class Rounding:
    """What a bank does with its values before they are used, in training with rounding.

    All layers of a forward pass read the same rounded values; the next pass, after a backward or a
    change of the values, makes new ones. They take the memory of one more bank.

    Args:
        form: one of ``FORMS``.
        activations: what products will do with x once the bank is stored.
    """

    def __init__(self, form: str, activations: str) -> None:
        self.form, self.activations = form, activations
        self._made: tuple[object, int, Tensor] | None = None

    def forget(self) -> None:
        """Let go of the rounded values."""
        self._made = None

    def __getstate__(self) -> dict[str, Any]:
        return {"form": self.form, "activations": self.activations, "_made": None}

    def __call__(self, values: Tensor) -> Tensor:
        """scale · codes ``[slots, granularity]`` in the dtype of the values."""
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and values.requires_grad):
            return _rounded(values, self)
        made = self._made
        if made is None or made[0] is not values or made[1] != values._version:
            made = self._made = values, values._version, _rounded(values, self)
        return made[2]


def _rounded(values: Tensor, rounding: Rounding) -> Tensor:
    codes, scales = round_slots(values, FORMS[rounding.form])
    dense = StoredValues(codes, scales, None, values.dtype).dense()
    result: Tensor = _Straight.apply(values, dense, rounding)  # type: ignore[no-untyped-call]
    return result
