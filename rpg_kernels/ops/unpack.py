"""Operators unpack, Ŵ = scale · G · w, and its adjoint pack, scale · Gᵀ · dŴ: one another's
derivative.

Shapes: bank and the result of pack ``[slots, granularity]``, Ŵ in torch's layout
``[rows, columns, *kernel]``, table int32 ``[entries]`` or None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpg_kernels import _checks
from rpg_kernels.law.placement import parse
from rpg_kernels.ops import _library as lib


def _check(bank: Tensor, table: Tensor | None, placement: str) -> None:
    p = parse(placement)
    lib.check_bank("bank", bank, p)
    lib.check_table(table, p, bank.device)


def _fake(bank: Tensor, table: Tensor | None, placement: str) -> Tensor:
    return bank.new_empty(parse(placement).selected_shape)


def _check_pack(dense: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype) -> None:
    p = parse(placement)
    if tuple(dense.shape) != p.selected_shape:
        wanted = f"shape {list(p.selected_shape)}"
        raise _checks.fail("dense", f"shape {list(dense.shape)}", wanted)
    lib.check_dtype("dense", dense.dtype)
    lib.check_table(table, p, dense.device)
    lib.check_bank_grad_dtype("dense", dtype, dense)


def _fake_pack(dense: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype) -> Tensor:
    g = parse(placement).generator
    return dense.new_empty((g.slots, g.granularity), dtype=dtype)


lib.define(
    "unpack(Tensor bank, Tensor? table, str placement, str backend) -> Tensor", _check, _fake
)
lib.define(
    "pack(Tensor dense, Tensor? table, str placement, ScalarType dtype, str backend) -> Tensor",
    _check_pack,
    _fake_pack,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    bank, table, ctx.placement, ctx.backend = inputs
    ctx.save_for_backward(table)
    ctx.bank_dtype = bank.dtype


def _backward(ctx: Any, dense: Tensor) -> tuple[Tensor | None, ...]:
    (table,) = ctx.saved_tensors
    dbank = torch.ops.rpg_kernels.pack(dense, table, ctx.placement, ctx.bank_dtype, ctx.backend)
    return dbank, None, None, None


def _setup_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dense, table, ctx.placement, _, ctx.backend = inputs
    ctx.save_for_backward(table)
    ctx.dtype = dense.dtype


def _backward_pack(ctx: Any, dgrad: Tensor) -> tuple[Tensor | None, ...]:
    (table,) = ctx.saved_tensors
    ddense = torch.ops.rpg_kernels.unpack(dgrad, table, ctx.placement, ctx.backend)
    return ddense.to(ctx.dtype), None, None, None, None


lib.differentiate("unpack", _backward, _setup)
lib.differentiate("pack", _backward_pack, _setup_pack)
