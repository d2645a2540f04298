"""Reference y = x·Ŵᵀ + bias, dx = dy·Ŵ and dw = scale·Gᵀ·(dyᵀ·x), one tile of Ŵ at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels.placement import parse
from rpg_kernels.reference.accumulate import (
    backward_bytes,
    bank_accumulator,
    cast_tile,
    product,
)
from rpg_kernels.reference.tiles import pack_tile, tiles


def linear(
    x: Tensor, bank: Tensor, table: Tensor | None, bias: Tensor | None, placement: str
) -> Tensor:
    """x ``[..., K]`` -> ``[..., N]``."""
    p = parse(placement)
    bank = bank.contiguous()
    bytes_per_weight, dtype = product(p, bank, x, summed=1)
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty((*x.shape[:-1], p.selected_shape[0]), dtype=dtype)
    out = y.view(-1, y.shape[-1])
    for tile in tiles(p, x.device, bytes_per_weight):
        weight = cast_tile(bank, table, tile.placement, dtype)
        part, operand = out[:, tile.rows], rows[:, tile.columns].to(dtype)
        if tile.column:
            torch.addmm(part, operand, weight.t(), out=part)
        elif bias is not None:
            torch.addmm(bias[tile.rows].to(dtype), operand, weight.t(), out=part)
        else:
            torch.mm(operand, weight.t(), out=part)
    return y.to(x.dtype)


def linear_input_grad(dy: Tensor, bank: Tensor, table: Tensor | None, placement: str) -> Tensor:
    """dy ``[..., N]`` -> dx ``[..., K]``."""
    p = parse(placement)
    bank = bank.contiguous()
    bytes_per_weight, dtype = product(p, bank, dy, summed=0)
    rows = dy.reshape(-1, dy.shape[-1])
    dx = dy.new_empty((*dy.shape[:-1], p.selected_shape[1]), dtype=dtype)
    out = dx.view(-1, dx.shape[-1])
    for tile in tiles(p, dy.device, bytes_per_weight):
        weight = cast_tile(bank, table, tile.placement, dtype)
        part, operand = out[:, tile.columns], rows[:, tile.rows].to(dtype)
        if tile.row:
            torch.addmm(part, operand, weight, out=part)
        else:
            torch.mm(operand, weight, out=part)
    return dx.to(dy.dtype)


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
