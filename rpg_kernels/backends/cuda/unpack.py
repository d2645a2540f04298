"""Ŵ = scale · G · w and its adjoint scale · Gᵀ · dŴ by the CUDA kernels, each byte moved once.

Signatures are those of the reference. Sums are fp32, in the order of addresses: the same bits
every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels.backends.cuda import launch, rules
from rpg_kernels.law.placement import Placement, parse


def unpack(bank: Tensor, table: Tensor | None, placement: str) -> Tensor:
    """bank ``[slots, granularity]`` -> ``[rows, columns, *kernel]``, contiguous.

    Raises:
        RuntimeError: a weight that these kernels do not read.
    """
    p = _checked("unpack", placement, bank)
    dense = bank.new_empty(p.shape)
    launch.move("unpack", p, launch.ring(bank, bank.dtype), dense)  # aligned
    return dense


def pack(dense: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype) -> Tensor:
    """dense ``[rows, columns, *kernel]`` -> ``[slots, granularity]`` of ``dtype``, fp32 sums.

    Raises:
        RuntimeError: a weight that these kernels do not read.
    """
    p = _checked("pack", placement, dense)
    shape = (p.generator.slots, p.generator.granularity)
    grad = dense.new_empty(shape, dtype=torch.float32)
    launch.move("pack", p, dense.contiguous(), grad)
    return grad.to(dtype)


def _checked(op: str, placement: str, x: Tensor) -> Placement:
    reason = rules.unsupported_weight(op, placement)
    if reason:
        name = rules.gpu(x.device).backend
        raise RuntimeError(f"backend: got {name!r} for {op}, which cannot run: {reason}")
    return parse(placement)
