"""Rules for a layer's standard deviation at initialisation, and the scale that gives it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rpg_kernels import _checks
from rpg_kernels.config import SCALES


def layer_std(
    rule: str, shape: Sequence[int], *, lookup: bool = False, weight: Tensor | None = None
) -> float:
    """The standard deviation that a layer's weight should have at initialisation.

    Args:
        rule: ``"fan_out"`` (Kaiming, sqrt(2 / (out · kernel))), ``"fan_in"`` (sqrt(2 / (in/groups
            · kernel))) or ``"match"``: the root mean square of ``weight``; where there are no
            values, or only zeros, that of torch's own default, 1 / sqrt(3 · fan_in).
        shape: torch's shape of the weight.
        lookup: an embedding. It has no fan; every rule but a matched weight gives 1, torch's
            default.
        weight: the weight to match, or None.

    Raises:
        ValueError: unknown rule, or a weight to match that is not finite.

    Source: He et al. 2015; the paper (section 4) uses fan_out over 512·3·3 for the bank.

    Example:
        >>> round(layer_std("fan_out", (512, 512, 3, 3)), 4), layer_std("fan_in", (4, 200))
        (0.0208, 0.1)
    """
    _checks.choice("scale", rule, SCALES)
    kernel = math.prod(shape[2:])
    if rule == "match" and weight is not None and weight.device.type != "meta":
        rms = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
        rms /= math.sqrt(weight.numel())
        if not math.isfinite(rms):
            raise _checks.fail("weight", f"root mean square {rms}", "finite values")
        if rms > 0:
            return rms
    if lookup:
        return 1.0
    if rule == "fan_out":
        return math.sqrt(2 / (shape[0] * kernel))
    fan_in = shape[1] * kernel
    return math.sqrt(2 / fan_in) if rule == "fan_in" else 1 / math.sqrt(3 * fan_in)
