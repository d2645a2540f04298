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
    # A slot whose scale is too small for float32 becomes zeros, as one of zeros is.
    inverse = torch.where(scales > 0, 1 / scales.double(), 0)
    codes = values.double().mul_(inverse.unsqueeze(1)).clamp_(-top, top)
    if dtype == torch.int8:
        codes.round_()
    return codes.to(dtype), scales


class _Straight(torch.autograd.Function):
    """Rounded values, whose gradient is that of the values (straight-through)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Backward needs nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _StraightOnce(torch.autograd.Function):
    """The same, of values that backward lets go of. Compilers and transforms cannot see that."""

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
        activations: one of ``ACTIVATIONS``: what products will do with x once the bank is stored.
            Training leaves x as it is.
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
        rounded: Tensor
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            rounded = _Straight.apply(values, self._rounded(values))  # type: ignore[no-untyped-call]
            return rounded
        if not (torch.is_grad_enabled() and values.requires_grad):
            return self._rounded(values)
        made = self._made
        if made is None or made[0] is not values or made[1] != values._version:
            rounded = _StraightOnce.apply(  # type: ignore[no-untyped-call]
                values, self._rounded(values), self
            )
            made = self._made = values, values._version, rounded
        return made[2]

    def _rounded(self, values: Tensor) -> Tensor:
        codes, scales = round_slots(values, FORMS[self.form])
        return (codes.float() * scales.unsqueeze(1)).to(values.dtype)
