"""A bank that is drawn anew by a rule that looks at its shape, before anything has trained it.

``for p in model.parameters(): if p.dim() > 1: nn.init.xavier_uniform_(p)`` is what many programs
do. A bank ``[slots, granularity]`` is no matrix that multiplies anything, so the rule's standard
deviation means nothing for it; and each layer's scale assumes ``init_std``. Such a bank is brought
back to ``init_std``, so that the layers keep theirs, with a warning. Of another first change that
takes the values far from ``init_std`` only a warning is given.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from rpg_kernels import _checks

if TYPE_CHECKING:
    from rpg_kernels.bank.bank_state import BankState

_ENOUGH = 1024  # elements; of fewer, too many standard deviations are alike
_WIDE = 8  # of a narrower bank the rules give standard deviations near 1, which people mean
_NEAR = 0.05
_FAR = 1.5


def parameter_of(bank: BankState) -> nn.Parameter | None:
    """The values, where torch counts their versions; None where it does not, or there are none."""
    weight = bank._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.is_meta or weight.is_inference():
        return None
    return weight


def scale_back_if_redrawn(bank: BankState) -> None:
    """Bring values that have changed for the first time back to ``init_std`` if need be."""
    drawn, weight = bank._drawn, parameter_of(bank)
    bank.trained()  # whatever it is: the next change is someone's training
    if weight is None or weight is not drawn or weight.grad is not None:
        return
    fan_out, fan_in = weight.shape
    count = fan_out * fan_in
    near = min(_NEAR, 5 / math.sqrt(2 * count))
    with torch.no_grad():
        std = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) / math.sqrt(count)
    rules = [2 / (fan_in + fan_out), 2 / fan_in, 2 / fan_out, 1 / fan_in, 1 / (3 * fan_in)]
    like = any(abs(std / math.sqrt(rule) - 1) < near for rule in rules)
    off = std / bank.init_std
    if like and abs(off - 1) >= 2 * _NEAR and count >= _ENOUGH and fan_in >= _WIDE:
        with torch.no_grad():
            weight.mul_(1 / off)
        bank.watch_for_other_rules()
        _checks.warn(
            f"the parameter bank was drawn anew with standard deviation {std:.3g}, by a rule for "
            f"matrices; it was brought back to its own, {bank.init_std:.3g}, which the scales of "
            "the layers assume; bank.reset_parameters() draws a bank anew"
        )
    elif not 1 / _FAR < off < _FAR:
        _checks.warn(
            f"the values of the parameter bank were changed before anything trained them: their "
            f"root mean square is {std:.3g}, while the scales of the layers assume "
            f"{bank.init_std:.3g}, so that the layers' weights are {off:.3g} times what they were; "
            "bank.reset_parameters() draws a bank anew"
        )
