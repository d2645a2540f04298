"""Reference row lookup y = Ŵ[indices] and its bank gradient, some rows at a time.

Only the rows that are looked up are evaluated, each as often as it occurs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels.backends.reference.accumulate import (
    backward_bytes,
    bank_accumulator,
    forward_bytes,
)
from rpg_kernels.backends.reference.tiles import (
    column_spans,
    pack_tile,
    tile_size,
    unpack_tile,
)
from rpg_kernels.law.placement import parse, split


def embedding(bank: Tensor, table: Tensor | None, indices: Tensor, placement: str) -> Tensor:
    """indices int32 or int64, any shape -> ``[*indices.shape, dim]`` in the bank's dtype."""
    p = parse(placement)
    flat = indices.reshape(-1).long()
    y = bank.new_empty((*indices.shape, p.selected_shape[1]))
    out = y.view(flat.numel(), y.shape[-1])
    bank = bank.contiguous()
    rows, columns = tile_size(p, bank.device, forward_bytes(p, bank, bank.dtype))
    for column, width in column_spans(p, columns):
        part = p.narrow(1, column, width)
        for row, height in split(flat.numel(), rows):
            lookup = flat[row : row + height]
            view = out[row : row + height, column : column + width]
            view.copy_(unpack_tile(bank, table, part, lookup))
    return y


def embedding_bank_grad(
    dy: Tensor,
    indices: Tensor,
    table: Tensor | None,
    placement: str,
    dtype: torch.dtype,
    total: Tensor | None = None,
) -> Tensor:
    """dy ``[*indices.shape, dim]`` -> dw ``[slots, granularity]``; or ``total``, which it is added
    to."""
    p = parse(placement)
    flat = indices.reshape(-1).long()
    gradient = dy.reshape(flat.numel(), p.selected_shape[1])
    grad = bank_accumulator(p, dy.device, dtype, total)
    rows, columns = tile_size(p, dy.device, backward_bytes(p, dy, grad))
    for column, width in column_spans(p, columns):
        part = p.narrow(1, column, width)
        for row, height in split(flat.numel(), rows):
            view = gradient[row : row + height, column : column + width]
            pack_tile(grad, view.clone(), table, part, flat[row : row + height])
    return grad.to(dtype) if total is None else total
