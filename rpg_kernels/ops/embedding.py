"""Operator y = Ŵ[indices] and its bank gradient, closed under derivatives.

Shapes: Ŵ ``[rows, dim]``, indices int32 or int64 of any shape, y and dy ``[*indices.shape, dim]``,
bank and the gradient ``[slots, granularity]``, table int32 ``[entries]`` or None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpg_kernels import _checks
from rpg_kernels._bank_sums import node_of, sum_of
from rpg_kernels.law.placement import Placement, parse
from rpg_kernels.ops import _library as lib


def _check_indices(indices: Tensor, p: Placement, device: torch.device) -> None:
    if len(p.shape) != 2:
        raise _checks.fail("weight", f"shape {list(p.shape)}", "a virtual weight [rows, dim]")
    lib.check_device("indices", indices, device)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices: got {indices.dtype}, wanted int32 or int64")


def _check_range(indices: Tensor, p: Placement) -> None:
    """Before a launch: a row that does not exist would be computed without any complaint."""
    rows = p.selected_shape[0]
    if indices.numel() == 0:
        return
    if indices.device.type == "cuda":  # without waiting for the device, as torch does
        torch._assert_async(((indices >= 0) & (indices < rows)).all())
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= rows:
        got = low if low < 0 else high
        raise IndexError(f"indices: got {got}, wanted 0 to {rows - 1}")


def _check(bank: Tensor, table: Tensor | None, indices: Tensor, placement: str) -> None:
    p = parse(placement)
    lib.check_bank("bank", bank, p)
    lib.check_table(table, p, bank.device)
    _check_indices(indices, p, bank.device)


def _fake(bank: Tensor, table: Tensor | None, indices: Tensor, placement: str) -> Tensor:
    return bank.new_empty((*indices.shape, parse(placement).selected_shape[1]))


def _check_bank_grad(
    dy: Tensor, indices: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype
) -> None:
    p = parse(placement)
    _check_indices(indices, p, dy.device)
    wanted = (*indices.shape, p.selected_shape[1])
    if dy.shape != wanted:
        raise _checks.fail("dy", f"shape {list(dy.shape)}", f"shape {list(wanted)}")
    lib.check_dtype("dy", dy.dtype)
    lib.check_table(table, p, dy.device)
    lib.check_bank_grad_dtype("dy", dtype, dy)


def _fake_bank_grad(
    dy: Tensor, indices: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype
) -> Tensor:
    g = parse(placement).generator
    return dy.new_empty((g.slots, g.granularity), dtype=dtype)


def _range(bank: Tensor, table: Tensor | None, indices: Tensor, placement: str) -> None:
    _check_range(indices, parse(placement))


def _range_bank_grad(
    dy: Tensor, indices: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype
) -> None:
    _check_range(indices, parse(placement))


lib.define(
    "embedding(Tensor bank, Tensor? table, Tensor indices, str placement, str backend) -> Tensor",
    _check,
    _fake,
    values=_range,
)
lib.define(
    "embedding_bank_grad(Tensor dy, Tensor indices, Tensor? table, str placement,"
    " ScalarType dtype, str backend) -> Tensor",
    _check_bank_grad,
    _fake_bank_grad,
    values=_range_bank_grad,
)

_op = torch.ops.rpg_kernels


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    bank, table, indices, ctx.placement, ctx.backend = inputs
    ctx.save_for_backward(indices, table)
    ctx.bank_dtype, ctx.node = bank.dtype, node_of(bank)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    indices, table = ctx.saved_tensors
    operands = (dy, indices, table, ctx.placement, ctx.bank_dtype)
    total = sum_of(ctx.node, dy, indices)
    dbank = lib.bank_grad("embedding_bank_grad", operands, ctx.backend, total)
    return dbank, None, None, None, None


def _setup_bank_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, indices, table, ctx.placement, _, ctx.backend = inputs
    ctx.save_for_backward(indices, table)
    ctx.dtype = dy.dtype


def _backward_bank_grad(ctx: Any, dgrad: Tensor) -> tuple[Tensor | None, ...]:
    indices, table = ctx.saved_tensors
    ddy = _op.embedding(dgrad, table, indices, ctx.placement, ctx.backend).to(ctx.dtype)
    return ddy, None, None, None, None, None


lib.differentiate("embedding", _backward, _setup)
lib.differentiate("embedding_bank_grad", _backward_bank_grad, _setup_bank_grad)
