"""y = Ŵ[indices] and dw = scale·Gᵀ·(dy at indices) by the compiled CPU kernels.

Signatures are those of the reference, and so are the bits, forward always and backward wherever the
reference's scratch holds whole rows. Rows are written where they are wanted, and read where they
lie, by the kernels that unpack and pack: no copy of them is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels import native, settings
from rpg_kernels.backends.cpu import rules
from rpg_kernels.backends.reference.accumulate import bank_accumulator
from rpg_kernels.law.placement import Placement, parse


def embedding(bank: Tensor, table: Tensor | None, indices: Tensor, placement: str) -> Tensor:
    """indices int32 or int64, any shape -> ``[*indices.shape, dim]`` in the bank's dtype.

    Raises:
        RuntimeError: a weight that these kernels do not read.
    """
    p = _checked("embedding", placement)
    y = bank.new_empty((*indices.shape, p.selected_shape[1]))
    flat, region, cut = _rows(p, indices)
    native.unpack(p.law, bank.contiguous(), y, p.scale, region, flat, cut)
    return y


def embedding_bank_grad(
    dy: Tensor, indices: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype
) -> Tensor:
    """dy ``[*indices.shape, dim]`` -> dw ``[slots, granularity]`` of ``dtype``.

    Summed in float32 (float64 for float64) in the order of the indices, whatever the number of
    threads. Numbers of slots, 2 to 5 times 4 bytes for each of at most 8192 blocks, count as
    scratch; with less of it fewer are made at a time.

    Raises:
        RuntimeError: a weight that these kernels do not read.
    """
    p = _checked("embedding_bank_grad", placement)
    dw = bank_accumulator(p, dy.device, dtype)
    flat, region, cut = _rows(p, indices)
    scratch = settings.scratch_bytes("cpu")
    native.pack(p.law, dy.contiguous(), dw, p.scale, region, flat, scratch, cut)
    return dw.to(dtype)


def _checked(op: str, placement: str) -> Placement:
    reason = rules.unsupported_lookup(placement)
    if reason:
        raise RuntimeError(f"backend: got 'cpu' for {op}, which cannot run: {reason}")
    return parse(placement)


def _rows(p: Placement, indices: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, int]]:
    """Row numbers int64 ``[rows]``, then region and cut as native.unpack and native.pack want."""
    flat = indices.reshape(-1).long()
    c = p.block_columns
    region = (p.selection[0][0], flat.numel(), 1, p.matrix.run_blocks, c.low, c.count)
    return flat, region, (c.first, c.length)
