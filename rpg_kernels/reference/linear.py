"""Reference y = x·Ŵᵀ + bias, dx = dy·Ŵ and dw = scale·Gᵀ·(dyᵀ·x), one tile of Ŵ at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels.placement import parse
from rpg_kernels.reference.accumulate import (
    backward_bytes,
    bank_accumulator,
    cast_tile,
    forward_bytes,
)
from rpg_kernels.reference.tiles import pack_tile, tiles


def linear(
    x: Tensor, bank: Tensor, table: Tensor | None, bias: Tensor | None, placement: str
) -> Tensor:
    """x ``[..., K]`` -> ``[..., N]``."""
    p = parse(placement)
    rows = x.reshape(-1, x.shape[-1])
    y = rows.new_empty((rows.shape[0], p.selected_shape[0]))
    bank = bank.contiguous()
    for tile in tiles(p, x.device, forward_bytes(p, bank, x)):
        weight = cast_tile(bank, table, tile.placement, x.dtype)
        part = y[:, tile.rows]
        if tile.column:
            torch.addmm(part, rows[:, tile.columns], weight.t(), out=part)
        else:
            torch.mm(rows[:, tile.columns], weight.t(), out=part)
    if bias is not None:
        y.add_(bias.to(y.dtype))
    return y.view(*x.shape[:-1], y.shape[-1])


def linear_input_grad(dy: Tensor, bank: Tensor, table: Tensor | None, placement: str) -> Tensor:
    """dy ``[..., N]`` -> dx ``[..., K]``."""
    p = parse(placement)
    rows = dy.reshape(-1, dy.shape[-1])
    dx = rows.new_zeros((rows.shape[0], p.selected_shape[1]))
    bank = bank.contiguous()
    for tile in tiles(p, dy.device, forward_bytes(p, bank, dy)):
        weight = cast_tile(bank, table, tile.placement, dy.dtype)
        part = dx[:, tile.columns]
        torch.addmm(part, rows[:, tile.rows], weight, out=part)
    return dx.view(*dy.shape[:-1], dx.shape[-1])


def linear_bank_grad(
    dy: Tensor, x: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype
) -> Tensor:
    """dy ``[..., N]``, x ``[..., K]`` -> dw ``[slots, granularity]``."""
    p = parse(placement)
    dy_rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    grad = bank_accumulator(p, dy.device, dtype)
    for tile in tiles(p, dy.device, backward_bytes(p, dy, grad)):
        dense = dy_rows[:, tile.rows].t() @ x_rows[:, tile.columns]
        pack_tile(grad, dense, table, tile.placement)
    return grad.to(dtype)
