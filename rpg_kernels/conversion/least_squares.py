"""The bank that is nearest to given dense weights.

min over w of sum_l |scale_l · G_l · w - W_l|². Each virtual weight reads one bank element, so the
normal equations are diagonal: w = sum_l scale_l · G_lᵀ · W_l  /  sum_l scale_l² · uses_l.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rpg_kernels import settings
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.law.placement import split

_PART = 1 << 22  # weights of a layer looked at together


def fit_bank(
    bank: ParameterBank, layers: dict[str, tuple[VirtualWeight, Tensor, int | None]]
) -> dict[str, float]:
    """Set the bank to the least-squares solution; elements that nothing reads stay as they are.

    Args:
        bank: the bank to set, in place.
        layers: name -> (virtual weight, dense weight of its shape, row that the layer masks or
            None). A virtual weight that stands under several names (tied layers) counts once.

    Returns:
        name -> relative residual |scale · G · w - W| / |W| (0 when W is 0 and met exactly).
    """
    op = torch.ops.rpg_kernels
    double = torch.float64
    backend = settings.forced_backend()
    table = bank.table
    once = {id(vw): (vw, dense, masked) for vw, dense, masked in layers.values()}
    ones = torch.ones(bank.weight.shape, dtype=double, device=bank.weight.device)
    with torch.no_grad():
        target, uses = torch.zeros_like(ones), torch.zeros_like(ones)
        for vw, dense, masked in once.values():
            for part, rows in _parts(vw, masked):
                target += op.pack(dense[rows].to(double), table, part.spec, double, backend)
                signs = op.unpack(ones, table, part.spec, backend)
                uses += op.pack(signs, table, part.spec, double, backend)
        fitted = torch.where(uses > 0, target / uses, bank.weight.to(double))
        bank.weight.copy_(fitted)
        return {name: _residual(*layer) for name, layer in layers.items()}


def _residual(vw: VirtualWeight, dense: Tensor, masked: int | None) -> float:
    missed = norm = 0.0
    for part, rows in _parts(vw, masked):
        wanted = dense[rows].to(torch.float64)
        missed += float((part.unpack().to(torch.float64) - wanted).square().sum())
        norm += float(wanted.square().sum())
    return math.sqrt(missed / norm) if norm > 0 else math.sqrt(missed)


def _parts(vw: VirtualWeight, masked: int | None) -> Iterator[tuple[VirtualWeight, slice]]:
    """Some rows at a time; a masked row reads as zero whatever the bank holds, and is left out."""
    rows = vw.shape[0]
    at_most = max(1, _PART * rows // vw.numel())
    spans = [(0, rows)] if masked is None else [(0, masked), (masked + 1, rows)]
    for low, high in spans:
        for offset, count in split(high - low, at_most):
            yield vw.narrow(0, low + offset, count), slice(low + offset, low + offset + count)
