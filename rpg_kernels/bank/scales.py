"""Rules for a layer's standard deviation at initialisation, and the scale that gives it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rpg_kernels import _checks
from rpg_kernels.bank.config import SCALES


def layer_std(
    rule: str, shape: Sequence[int], *, lookup: bool = False, weight: Tensor | None = None
) -> float:
    """The standard deviation that a layer's weight should have at initialisation.

    ``"match"`` looks at the weight there is, but must not depend on the random draw: a model
    built again from another seed has to get the same scales, or its state dict would silently
    mean another network. So the first usual rule that the weight agrees with, to sampling error,
    is taken: torch's default 1 / sqrt(3 · fan_in) (1 for an embedding), then Kaiming fan-in and
    fan-out, LeCun, Xavier, 0.02 and 0.01. Only a weight that agrees with none (trained, say)
    gives its own root mean square.

    Args:
        rule: ``"fan_out"`` (Kaiming, sqrt(2 / (out · kernel))), ``"fan_in"`` (sqrt(2 / (in/groups
            · kernel))) or ``"match"``; without values, or with zeros only, torch's default.
        shape: torch's shape of the weight.
        lookup: an embedding. It has no fan; every rule but a matched weight gives 1.
        weight: the weight to match, or None.

    Raises:
        ValueError: unknown rule, or a weight to match that is not finite.

    Source: He et al. 2015; the paper (section 4) uses fan_out over 512·3·3 for the bank.

    Example:
        >>> round(layer_std("fan_out", (512, 512, 3, 3)), 4), layer_std("fan_in", (4, 200))
        (0.0208, 0.1)
        >>> layer_std("match", (300, 200), weight=torch.randn(300, 200) * 0.02)
        0.02
    """
    _checks.choice("scale", rule, SCALES)
    kernel = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * kernel, shape[0] * kernel
    default = 1.0 if lookup else 1 / math.sqrt(3 * fan_in)
    if rule == "match":
        usual = [default, math.sqrt(2 / fan_in), math.sqrt(2 / fan_out), 1 / math.sqrt(fan_in)]
        usual += [math.sqrt(2 / (fan_in + fan_out)), 0.02, 0.01]
        return default if weight is None else _matched(weight, usual)
    if lookup:
        return default
    return math.sqrt(2 / (fan_out if rule == "fan_out" else fan_in))


def _matched(weight: Tensor, usual: Sequence[float]) -> float:
    """The first usual value within sampling error of the weight's root mean square, or that."""
    if weight.device.type == "meta":
        return usual[0]
    rms = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
    rms /= math.sqrt(weight.numel())
    if not math.isfinite(rms):
        raise _checks.fail("weight", f"root mean square {rms}", "finite values")
    if rms == 0:
        return usual[0]
    # Five standard errors of the root mean square of normal draws, 1 / sqrt(2 n) each.
    tolerance = 5 / math.sqrt(2 * weight.numel())
    return next((std for std in usual if abs(rms / std - 1) < tolerance), rms)
