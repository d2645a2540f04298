"""y = x·Ŵᵀ + bias, dx = dy·Ŵ and dw = scale·Gᵀ·(dyᵀ·x) by the vendor's matrix products.

Signatures are those of the reference. The forward unpacks some rows at a time and the input
gradient some columns, so that neither has to add up partial products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels.backends.reference.accumulate import bank_accumulator
from rpg_kernels.backends.vendor import chunks
from rpg_kernels.law.placement import parse


def linear(
    x: Tensor, bank: Tensor, table: Tensor | None, bias: Tensor | None, placement: str
) -> Tensor:
    """x ``[..., K]`` -> ``[..., N]`` in x's dtype.

    Raises:
        RuntimeError: the scratch limit is below one row of the weight.
    """
    p = parse(placement)
    count, width = p.selected_shape
    y = x.new_empty((*x.shape[:-1], count))
    a, out = x.reshape(-1, width), y.view(-1, count)
    for row, height in chunks.rows(p, x.dtype, x.device):
        part = out[:, row : row + height]
        w = chunks.tile(bank, table, p.narrow(0, row, height), x.dtype).t()
        if bias is None:
            torch.mm(a, w, out=part)
        else:
            torch.addmm(bias[row : row + height].to(x.dtype), a, w, out=part)
        del w  # before the next is made
    return y


def linear_input_grad(dy: Tensor, bank: Tensor, table: Tensor | None, placement: str) -> Tensor:
    """dy ``[..., N]`` -> dx ``[..., K]`` in dy's dtype.

    Raises:
        RuntimeError: the scratch limit is below one column of the weight.
    """
    p = parse(placement)
    count, width = p.selected_shape
    dx = dy.new_empty((*dy.shape[:-1], width))
    a, out = dy.reshape(-1, count), dx.view(-1, width)
    for column, part in chunks.columns(p, dy.dtype, dy.device):
        w = chunks.tile(bank, table, p.narrow(1, column, part), dy.dtype)
        torch.mm(a, w, out=out[:, column : column + part])
        del w
    return dx


def linear_bank_grad(
    dy: Tensor, x: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype
) -> Tensor:
    """dy ``[..., N]``, x ``[..., K]`` -> dw ``[slots, granularity]`` of ``dtype``.

    The product is rounded to dy's dtype, as a dense layer's gradient is; sums over the bank are
    fp32, in a fixed order.

    Raises:
        RuntimeError: the scratch limit is below one row of the weight.
    """
    p = parse(placement)
    count, width = p.selected_shape
    grad = bank_accumulator(p, dy.device, dtype)
    a, b = dy.reshape(-1, count), x.reshape(-1, width)
    for row, height in chunks.rows(p, dy.dtype, dy.device):
        dense = a[:, row : row + height].t() @ b
        chunks.add(grad, dense, table, p.narrow(0, row, height))
        del dense
    return grad.to(dtype)
