"""Operators y = x·Ŵᵀ + bias, dx = dy·Ŵ and dw = scale·Gᵀ·(dyᵀ·x), closed under derivatives.

``linear_grads`` is dx and dw together, which some back ends make for less.

Shapes: x ``[..., K]``, dy ``[..., N]``, Ŵ ``[N, K]``, bank and dw ``[slots, granularity]``,
table int32 ``[entries]`` or None, bias ``[N]`` or None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpg_kernels import _checks
from rpg_kernels._bank_sums import node_of, sum_of
from rpg_kernels.backends import dispatch
from rpg_kernels.law.placement import Placement, parse
from rpg_kernels.ops import _library as lib


def _matrix(placement: str) -> tuple[Placement, int, int]:
    p = parse(placement)
    if len(p.shape) != 2:
        raise _checks.fail("weight", f"shape {list(p.shape)}", "a virtual weight [N, K]")
    rows, columns = p.selected_shape
    return p, rows, columns


def _last_size(argument: str, x: Tensor, size: int) -> None:
    if x.dim() < 1 or x.shape[-1] != size:
        raise _checks.fail(argument, f"shape {list(x.shape)}", f"shape [..., {size}]")


def _check(
    x: Tensor, bank: Tensor, table: Tensor | None, bias: Tensor | None, placement: str
) -> None:
    p, rows, columns = _matrix(placement)
    lib.check_bank("bank", bank, p)
    lib.check_table(table, p, bank.device)
    _last_size("x", x, columns)
    lib.check_operand("x", x, bank)
    lib.check_bias(bias, x, bank, rows)


def _fake(
    x: Tensor, bank: Tensor, table: Tensor | None, bias: Tensor | None, placement: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], parse(placement).selected_shape[0]))


def _check_input_grad(dy: Tensor, bank: Tensor, table: Tensor | None, placement: str) -> None:
    p, rows, _ = _matrix(placement)
    lib.check_bank("bank", bank, p)
    lib.check_table(table, p, bank.device)
    _last_size("dy", dy, rows)
    lib.check_operand("dy", dy, bank)


def _fake_input_grad(dy: Tensor, bank: Tensor, table: Tensor | None, placement: str) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], parse(placement).selected_shape[1]))


def _check_bank_grad(
    dy: Tensor, x: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype
) -> None:
    p, rows, columns = _matrix(placement)
    lib.check_table(table, p, dy.device)
    _last_size("dy", dy, rows)
    _last_size("x", x, columns)
    if dy.shape[:-1] != x.shape[:-1]:
        raise _checks.fail("dy", f"shape {list(dy.shape)}", f"x's {list(x.shape[:-1])} and {rows}")
    lib.check_device("x", x, dy.device)
    if x.dtype != dy.dtype:
        raise TypeError(f"x: got {x.dtype}, wanted {dy.dtype}, as dy")
    lib.check_bank_grad_dtype("dy", dtype, dy)


def _fake_bank_grad(
    dy: Tensor, x: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype
) -> Tensor:
    g = parse(placement).generator
    return dy.new_empty((g.slots, g.granularity), dtype=dtype)


lib.define(
    "linear(Tensor x, Tensor bank, Tensor? table, Tensor? bias, str placement, str backend)"
    " -> Tensor",
    _check,
    _fake,
)
lib.define(
    "linear_input_grad(Tensor dy, Tensor bank, Tensor? table, str placement, str backend)"
    " -> Tensor",
    _check_input_grad,
    _fake_input_grad,
)
lib.define(
    "linear_bank_grad(Tensor dy, Tensor x, Tensor? table, str placement, ScalarType dtype,"
    " str backend) -> Tensor",
    _check_bank_grad,
    _fake_bank_grad,
)

_op = torch.ops.rpg_kernels


def _check_grads(
    dy: Tensor, bank: Tensor, table: Tensor | None, x: Tensor, placement: str, dtype: torch.dtype
) -> None:
    _check_input_grad(dy, bank, table, placement)
    _check_bank_grad(dy, x, table, placement, dtype)


def _fake_grads(
    dy: Tensor, bank: Tensor, table: Tensor | None, x: Tensor, placement: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dx = _fake_input_grad(dy, bank, table, placement)
    return dx, _fake_bank_grad(dy, x, table, placement, dtype)


def _grads(
    dy: Tensor,
    bank: Tensor,
    table: Tensor | None,
    x: Tensor,
    placement: str,
    dtype: torch.dtype,
    backend: str,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """At once where the back end can, otherwise one after the other; no dw but what is added to
    ``total`` where there is one."""
    bank_grad = (dy, x, table, placement, dtype)
    both = dispatch.both_grads(
        lib.call("linear_input_grad", (dy, bank, table, placement), backend),
        lib.call("linear_bank_grad", bank_grad, backend),
    )
    if both is not None:
        dx, dw = both(dy, bank, table, x, placement, dtype, total=total)
        return dx, dw if total is None else None
    dx = _op.linear_input_grad(dy, bank, table, placement, backend)
    return dx, lib.bank_grad("linear_bank_grad", bank_grad, backend, total)


lib.define(
    "linear_grads(Tensor dy, Tensor bank, Tensor? table, Tensor x, str placement,"
    " ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _check_grads,
    _fake_grads,
    run=_grads,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bank, table, bias, ctx.placement, ctx.backend = inputs
    needs_x, needs_bank, _, needs_bias, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if needs_bank else None, bank if needs_x else None, table)
    ctx.bank_dtype, ctx.node = bank.dtype, node_of(bank) if needs_bank else None
    ctx.bias_dtype = bias.dtype if needs_bias else None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, bank, table = ctx.saved_tensors
    dx = dbank = dbias = None
    of_bank = (ctx.placement, ctx.bank_dtype, ctx.backend)
    if bank is not None and x is not None:
        total = sum_of(ctx.node, dy, bank, x)
        if total is None:
            dx, dbank = _op.linear_grads(dy, bank, table, x, *of_bank)
        else:
            operands = (dy, bank, table, x, *of_bank[:-1])
            dx, dbank = lib.adding("linear_grads", _grads, operands, ctx.backend, total)
    elif bank is not None:
        dx = _op.linear_input_grad(dy, bank, table, ctx.placement, ctx.backend)
    elif x is not None:
        of_x = (dy, x, table, ctx.placement, ctx.bank_dtype)
        dbank = lib.bank_grad("linear_bank_grad", of_x, ctx.backend, sum_of(ctx.node, dy, x))
    if ctx.bias_dtype is not None:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
    return dx, dbank, None, dbias, None, None


def _setup_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, bank, table, ctx.placement, ctx.backend = inputs
    needs_dy, needs_bank, *_ = ctx.needs_input_grad
    ctx.save_for_backward(dy if needs_bank else None, bank if needs_dy else None, table)
    ctx.bank_dtype = bank.dtype


def _backward_input_grad(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    dy, bank, table = ctx.saved_tensors
    ddy = dbank = None
    if bank is not None:
        ddy = _op.linear(ddx, bank, table, None, ctx.placement, ctx.backend)
    if dy is not None:
        dbank = _op.linear_bank_grad(dy, ddx, table, ctx.placement, ctx.bank_dtype, ctx.backend)
    return ddy, dbank, None, None, None


def _setup_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dy, bank, table, x, ctx.placement, ctx.dtype, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # often only one of the two is differentiated
    ctx.save_for_backward(dy, bank, table, x)


def _backward_grads(
    ctx: Any, ddx: Tensor | None, dgrad: Tensor | None
) -> tuple[Tensor | None, ...]:
    dy, bank, table, x = ctx.saved_tensors
    needs_dy, needs_bank, _, needs_x, *_ = ctx.needs_input_grad
    how = (ctx.placement, ctx.backend)
    ddy = dbank = dx = None
    if ddx is not None and needs_dy:
        ddy = _op.linear(ddx, bank, table, None, *how)
    if ddx is not None and needs_bank:
        dbank = _op.linear_bank_grad(dy, ddx, table, ctx.placement, ctx.dtype, ctx.backend)
    if dgrad is not None and needs_dy:
        of_bank = _op.linear(x, dgrad, table, None, *how)
        ddy = of_bank if ddy is None else ddy + of_bank
    if dgrad is not None and needs_x:
        dx = _op.linear_input_grad(dy, dgrad, table, *how)
    return ddy, dbank, None, dx, None, None, None


def _setup_bank_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, table, ctx.placement, _, ctx.backend = inputs
    needs_dy, needs_x, *_ = ctx.needs_input_grad
    ctx.save_for_backward(dy if needs_x else None, x if needs_dy else None, table)


def _backward_bank_grad(ctx: Any, dgrad: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, table = ctx.saved_tensors
    how = (ctx.placement, ctx.backend)
    ddy = None if x is None else _op.linear(x, dgrad, table, None, *how)
    dx = None if dy is None else _op.linear_input_grad(dy, dgrad, table, *how)
    return ddy, dx, None, None, None, None


lib.differentiate("linear", _backward, _setup)
lib.differentiate("linear_input_grad", _backward_input_grad, _setup_input_grad)
lib.differentiate("linear_bank_grad", _backward_bank_grad, _setup_bank_grad)
lib.differentiate("linear_grads", _backward_grads, _setup_grads)
lib.autocast("linear")
