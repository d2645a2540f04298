"""What a change in place of a virtual weight does to its scale.

The values are the bank's, so a weight can only be multiplied by a number, or be given a standard
deviation: initialisers that draw around 0 do that. Each entry of ``CHANGES`` is called with the
weight and the function's arguments and returns the new scale, or None when no scale does what is
asked. ``erfinv_`` and ``clamp_`` are steps of truncated normal draws, as timm and others write
them: uniform values, the inverse distribution function, a factor, and a cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rpg_kernels.bank.virtual_weight import VirtualWeight


def _scale(vw: VirtualWeight, std: float) -> float:
    """The scale that gives a standard deviation, with the values that the bank has now."""
    return std / vw.bank.spread()


def _times(vw: VirtualWeight, factor: float) -> float | None:
    return vw.scale * factor


def _over(vw: VirtualWeight, divisor: float) -> float | None:
    return vw.scale / divisor


def _plus(vw: VirtualWeight, other: float, alpha: float = 1) -> float | None:
    return vw.scale if other * alpha == 0 else None


def _normal(
    vw: VirtualWeight, mean: float = 0.0, std: float = 1.0, generator: Any = None
) -> float | None:
    return _scale(vw, std) if mean == 0 else None


def _uniform(
    vw: VirtualWeight,
    from_: float = 0.0,
    to: float = 1.0,
    generator: Any = None,
    **names: float,
) -> float | None:
    low, high = names.get("from", names.get("a", from_)), names.get("b", to)
    return _scale(vw, high / math.sqrt(3)) if low == -high else None


def _kaiming(
    vw: VirtualWeight,
    a: float = 0,
    mode: Any = "fan_in",
    nonlinearity: Any = "leaky_relu",
    generator: Any = None,
) -> float | None:
    init, shape = torch.nn.init, torch.empty(vw.shape, device="meta")
    fan = init._calculate_correct_fan(shape, mode)
    return _scale(vw, init.calculate_gain(nonlinearity, a) / math.sqrt(fan))


def _erfinv(vw: VirtualWeight) -> float | None:
    """Of a uniform weight, as torch draws truncated normal values: sqrt(mean(erfinv(u)²))."""
    bound = min(abs(vw.scale) / _scale(vw, 1.0) * math.sqrt(3), 1.0)
    middle = (torch.arange(4096, dtype=torch.float64, device="cpu") + 0.5) / 4096 * bound
    return _scale(vw, float(torch.erfinv(middle).square().mean().sqrt()))


def _clamp(vw: VirtualWeight, min: float, max: float) -> float | None:
    """Of values just drawn, cutting off what is rare leaves the standard deviation as it is."""
    if vw.bank.is_trained():
        return None
    return vw.scale if -min == max >= 1.9 * abs(vw.scale) * vw.bank.init_std else None


CHANGES: dict[str, Callable[..., float | None]] = {
    "mul_": _times,
    "__imul__": _times,
    "multiply_": _times,
    "div_": _over,
    "__itruediv__": _over,
    "divide_": _over,
    "add_": _plus,
    "sub_": _plus,
    "neg_": lambda vw: -vw.scale,
    "normal_": _normal,
    "uniform_": _uniform,
    "kaiming_normal_": _kaiming,
    "kaiming_uniform_": _kaiming,
    "erfinv_": _erfinv,
    "clamp_": _clamp,
}
