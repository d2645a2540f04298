"""Reference y = x·Ŵᵀ + bias, dx = dy·Ŵ and dw = scale·Gᵀ·(dyᵀ·x), one tile of Ŵ at a time.

Tiles are unpacked and packed by PyTorch, or by ``kernels`` that another back end lends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.reference.accumulate import (
    backward_bytes,
    bank_accumulator,
    cast_tile,
    gradient_tiles,
    product_tiles,
)
from rpg_kernels.backends.reference.tiles import pack_tile
from rpg_kernels.backends.registry import TileKernels
from rpg_kernels.law.placement import parse

SMALLEST = 2.0**-120  # of rows that are rounded to int8; 127 / SMALLEST is finite in float32


def linear(
    x: Tensor,
    bank: Tensor,
    table: Tensor | None,
    bias: Tensor | None,
    placement: str,
    kernels: TileKernels | None = None,
) -> Tensor:
    """x ``[..., K]`` -> ``[..., N]``; rows of x are rounded first where the bank says so."""
    if isinstance(bank, StoredValues) and bank.rounds_rows:
        wide = torch.promote_types(x.dtype, torch.float32)
        values = StoredValues(bank.codes, bank.scales, bank.places, wide)
        return linear(rounded_rows(x.to(wide)), values, table, bias, placement, kernels).to(x.dtype)
    p = parse(placement)
    bank = bank.contiguous()
    cut, dtype = product_tiles(p, bank, x, 1, kernels)
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty((*x.shape[:-1], p.selected_shape[0]), dtype=dtype)
    out = y.view(-1, y.shape[-1])
    for tile in cut:
        part, operand = out[:, tile.rows], rows[:, tile.columns].to(dtype)
        added = part if tile.column else None if bias is None else bias[tile.rows].to(dtype)
        _product(added, operand, cast_tile(bank, table, tile.placement, dtype, kernels).t(), part)
    return y.to(x.dtype)


def rounded_rows(x: Tensor) -> Tensor:
    """x ``[..., K]``, each row rounded to int8 and back: a whole number from -127 to 127, to the
    nearest with ties to even, times the row's step, max ``|x|`` / 127.

    A row that stays below 2^-120 becomes zeros, one that holds an infinity or a NaN becomes NaN.

    Example:
        >>> rounded_rows(torch.tensor([[127.0, 0.4, -2.6], [0.0, 0.0, 0.0]])).tolist()
        [[127.0, 0.0, -3.0], [0.0, 0.0, 0.0]]
    """
    most = x.abs().amax(-1, keepdim=True)
    finite = most.isfinite()
    codes = (x * (127 / most)).round().where(finite & (most >= SMALLEST), 0)
    return codes * (most / 127).where(finite, torch.nan)


def linear_input_grad(
    dy: Tensor,
    bank: Tensor,
    table: Tensor | None,
    placement: str,
    kernels: TileKernels | None = None,
) -> Tensor:
    """dy ``[..., N]`` -> dx ``[..., K]``."""
    p = parse(placement)
    bank = bank.contiguous()
    cut, dtype = product_tiles(p, bank, dy, 0, kernels)
    rows = dy.reshape(-1, dy.shape[-1])
    dx = dy.new_empty((*dy.shape[:-1], p.selected_shape[1]), dtype=dtype)
    out = dx.view(-1, dx.shape[-1])
    for tile in cut:
        part, operand = out[:, tile.columns], rows[:, tile.rows].to(dtype)
        added = part if tile.row else None
        _product(added, operand, cast_tile(bank, table, tile.placement, dtype, kernels), part)
    return dx.to(dy.dtype)


def linear_bank_grad(
    dy: Tensor,
    x: Tensor,
    table: Tensor | None,
    placement: str,
    dtype: torch.dtype,
    kernels: TileKernels | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """dy ``[..., N]``, x ``[..., K]`` -> dw ``[slots, granularity]``; or ``total``, which it is
    added to."""
    p = parse(placement)
    dy_rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    grad = bank_accumulator(p, dy.device, dtype, total)
    pack = pack_tile if kernels is None else kernels.pack_tile
    for tile in gradient_tiles(p, dy, backward_bytes(p, dy, grad), kernels):
        pack(grad, dy_rows[:, tile.rows].t() @ x_rows[:, tile.columns], table, tile.placement)
    return grad.to(dtype) if total is None else total


def _product(added: Tensor | None, a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = added + a · b."""
    if added is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(added, a, b, out=out)
