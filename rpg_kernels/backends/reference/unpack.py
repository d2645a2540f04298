"""Reference Ŵ = scale · G · w in torch's layout, and its adjoint scale · Gᵀ · dŴ."""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels.backends.reference.accumulate import (
    backward_bytes,
    bank_accumulator,
    forward_bytes,
)
from rpg_kernels.backends.reference.tiles import pack_tile, tiles, unpack_tile
from rpg_kernels.law.placement import parse


def unpack(bank: Tensor, table: Tensor | None, placement: str) -> Tensor:
    """bank ``[slots, granularity]`` -> ``[rows, columns, *kernel]``, contiguous."""
    p = parse(placement)
    out = bank.new_empty(p.selected_shape)
    bank = bank.contiguous()
    for tile in tiles(p, bank.device, forward_bytes(p, bank, bank.dtype)):
        out[tile.rows, tile.columns] = unpack_tile(bank, table, tile.placement)
    return out


def pack(dense: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype) -> Tensor:
    """dense ``[rows, columns, *kernel]`` -> ``[slots, granularity]`` of ``dtype``."""
    p = parse(placement)
    grad = bank_accumulator(p, dense.device, dtype)
    for tile in tiles(p, dense.device, backward_bytes(p, dense, grad)):
        part = dense[tile.rows, tile.columns]
        pack_tile(
            grad,
            part.clone(memory_format=torch.contiguous_format),
            table,
            tile.placement,
        )
    return grad.to(dtype)
