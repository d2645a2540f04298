"""Operators y = conv2d(x, Ŵ) + bias, its input gradient and its bank gradient; ``conv2d_grads``
is both gradients together, which some back ends make for less.

Closed under derivatives. Shapes: x ``[B, C, H, W]``, y and dy ``[B, out, H', W']``,
Ŵ ``[out, C/groups, kh, kw]``, bank and dw ``[slots, granularity]``, table int32 ``[entries]`` or
None, bias ``[out]`` or None. Padding is explicit and symmetric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rpg_kernels import _checks
from rpg_kernels._bank_sums import node_of, sum_of
from rpg_kernels._tensors import empty_image
from rpg_kernels.backends import dispatch
from rpg_kernels.law.geometry import conv_output
from rpg_kernels.law.placement import Placement, parse
from rpg_kernels.ops import _library as lib

_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"


def _kernel(placement: str, groups: int) -> tuple[Placement, int, int]:
    """(placement, out, in) of a 4-dimensional virtual weight that can be grouped so."""
    p = parse(placement)
    if len(p.shape) != 4:
        wanted = "a virtual weight [out, in/groups, kh, kw]"
        raise _checks.fail("weight", f"shape {list(p.shape)}", wanted)
    out, channels = p.selected_shape[:2]
    if groups < 1 or out % groups:
        raise _checks.fail("groups", groups, f"a divisor of the {out} out-channels")
    return p, out, channels * groups


def _check_geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    for name, pair, low in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(pair) != 2 or min(pair) < low:
            raise _checks.fail(name, list(pair), f"two ints of at least {low}")


def _output_size(
    size: Sequence[int],
    p: Placement,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """H', W' of an input H, W."""
    kernel = p.selected_shape[2:]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padded = [s + 2 * q for s, q in zip(size, padding, strict=True)]
    if any(s < r for s, r in zip(padded, reach, strict=True)):
        raise _checks.fail("x", f"padded size {padded}", f"at least the kernel's {reach}")
    return conv_output(size, kernel, stride, padding, dilation)


def _channels(argument: str, x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        wanted = f"shape [B, {channels}, H, W]"
        raise _checks.fail(argument, f"shape {list(x.shape)}", wanted)


def _check(
    x: Tensor,
    bank: Tensor,
    table: Tensor | None,
    bias: Tensor | None,
    placement: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    p, out, channels = _kernel(placement, groups)
    _check_geometry(stride, padding, dilation)
    lib.check_bank("bank", bank, p)
    lib.check_table(table, p, bank.device)
    _channels("x", x, channels)
    lib.check_operand("x", x, bank)
    lib.check_bias(bias, x, bank, out)
    _output_size(x.shape[2:], p, stride, padding, dilation)


def _fake(
    x: Tensor,
    bank: Tensor,
    table: Tensor | None,
    bias: Tensor | None,
    placement: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    p = parse(placement)
    size = _output_size(x.shape[2:], p, stride, padding, dilation)
    return empty_image(x, (x.shape[0], p.selected_shape[0], *size))


def _check_output(
    dy: Tensor,
    input_size: Sequence[int],
    p: Placement,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    size = _output_size(input_size[2:], p, stride, padding, dilation)
    wanted = [input_size[0], p.selected_shape[0], *size]
    if list(dy.shape) != wanted:
        raise _checks.fail("dy", f"shape {list(dy.shape)}", f"shape {wanted}")


def _check_input_grad(
    dy: Tensor,
    bank: Tensor,
    table: Tensor | None,
    input_size: Sequence[int],
    placement: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    p, _, channels = _kernel(placement, groups)
    _check_geometry(stride, padding, dilation)
    lib.check_bank("bank", bank, p)
    lib.check_table(table, p, bank.device)
    if len(input_size) != 4 or input_size[1] != channels:
        raise _checks.fail("input_size", list(input_size), f"[B, {channels}, H, W]")
    lib.check_operand("dy", dy, bank)
    _check_output(dy, input_size, p, stride, padding, dilation)


def _fake_input_grad(
    dy: Tensor,
    bank: Tensor,
    table: Tensor | None,
    input_size: Sequence[int],
    *rest: Any,
) -> Tensor:
    return empty_image(dy, input_size)


def _check_bank_grad(
    dy: Tensor,
    x: Tensor,
    table: Tensor | None,
    placement: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
) -> None:
    p, _, channels = _kernel(placement, groups)
    _check_geometry(stride, padding, dilation)
    lib.check_table(table, p, dy.device)
    _channels("x", x, channels)
    lib.check_device("x", x, dy.device)
    if x.dtype != dy.dtype:
        raise TypeError(f"x: got {x.dtype}, wanted {dy.dtype}, as dy")
    lib.check_bank_grad_dtype("dy", dtype, dy)
    _check_output(dy, x.shape, p, stride, padding, dilation)


def _fake_bank_grad(
    dy: Tensor, x: Tensor, table: Tensor | None, placement: str, *rest: Any
) -> Tensor:
    g = parse(placement).generator
    return dy.new_empty((g.slots, g.granularity), dtype=rest[-1])


lib.define(
    "conv2d(Tensor x, Tensor bank, Tensor? table, Tensor? bias, str placement,"
    f" {_GEOMETRY}, str backend) -> Tensor",
    _check,
    _fake,
)
lib.define(
    "conv2d_input_grad(Tensor dy, Tensor bank, Tensor? table, SymInt[] input_size,"
    f" str placement, {_GEOMETRY}, str backend) -> Tensor",
    _check_input_grad,
    _fake_input_grad,
)
lib.define(
    f"conv2d_bank_grad(Tensor dy, Tensor x, Tensor? table, str placement, {_GEOMETRY},"
    " ScalarType dtype, str backend) -> Tensor",
    _check_bank_grad,
    _fake_bank_grad,
)

_op = torch.ops.rpg_kernels


def _check_grads(
    dy: Tensor,
    bank: Tensor,
    table: Tensor | None,
    x: Tensor,
    placement: str,
    *how: Any,
) -> None:
    _check_input_grad(dy, bank, table, x.shape, placement, *how[:-1])
    _check_bank_grad(dy, x, table, placement, *how)


def _fake_grads(
    dy: Tensor, bank: Tensor, table: Tensor | None, x: Tensor, placement: str, *how: Any
) -> tuple[Tensor, Tensor]:
    dx = _fake_input_grad(dy, bank, table, x.shape, placement)
    return dx, _fake_bank_grad(dy, x, table, placement, *how)


def _grads(
    dy: Tensor,
    bank: Tensor,
    table: Tensor | None,
    x: Tensor,
    placement: str,
    *how: Any,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """At once where the back end can, otherwise one after the other; no dw but what is added to
    ``total`` where there is one."""
    *geometry, dtype, backend = how
    input_grad = (dy, bank, table, x.shape, placement, *geometry)
    bank_grad = (dy, x, table, placement, *geometry, dtype)
    both = dispatch.both_grads(
        lib.call("conv2d_input_grad", input_grad, backend),
        lib.call("conv2d_bank_grad", bank_grad, backend),
    )
    if both is not None:
        dx, dw = both(dy, bank, table, x, placement, *geometry, dtype, total=total)
        return dx, dw if total is None else None
    dx = _op.conv2d_input_grad(*input_grad, backend)
    return dx, lib.bank_grad("conv2d_bank_grad", bank_grad, backend, total)


lib.define(
    "conv2d_grads(Tensor dy, Tensor bank, Tensor? table, Tensor x, str placement,"
    f" {_GEOMETRY}, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _check_grads,
    _fake_grads,
    run=_grads,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bank, table, bias, ctx.placement, *ctx.geometry, ctx.backend = inputs
    needs_x, needs_bank, _, needs_bias, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if needs_bank else None, bank if needs_x else None, table)
    ctx.input_size, ctx.bank_dtype = x.shape, bank.dtype
    ctx.node = node_of(bank) if needs_bank else None
    ctx.bias_dtype = bias.dtype if needs_bias else None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, bank, table = ctx.saved_tensors
    how = (ctx.placement, *ctx.geometry)
    dx = dbank = dbias = None
    if bank is not None and x is not None:
        of_both = (dy, bank, table, x, *how, ctx.bank_dtype)
        total = sum_of(ctx.node, dy, bank, x)
        if total is None:
            dx, dbank = _op.conv2d_grads(*of_both, ctx.backend)
        else:
            dx, dbank = lib.adding("conv2d_grads", _grads, of_both, ctx.backend, total=total)
    elif bank is not None:
        dx = _op.conv2d_input_grad(dy, bank, table, ctx.input_size, *how, ctx.backend)
    elif x is not None:
        operands = (dy, x, table, *how, ctx.bank_dtype)
        dbank = lib.bank_grad("conv2d_bank_grad", operands, ctx.backend, sum_of(ctx.node, dy, x))
    if ctx.bias_dtype is not None:
        dbias = dy.sum((0, 2, 3)).to(ctx.bias_dtype)
    return dx, dbank, None, dbias, None, None, None, None, None, None


def _setup_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, bank, table, _, ctx.placement, *ctx.geometry, ctx.backend = inputs
    needs_dy, needs_bank, *_ = ctx.needs_input_grad
    ctx.save_for_backward(dy if needs_bank else None, bank if needs_dy else None, table)
    ctx.bank_dtype, ctx.node = bank.dtype, node_of(bank) if needs_bank else None


def _backward_input_grad(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    dy, bank, table = ctx.saved_tensors
    how = (ctx.placement, *ctx.geometry)
    ddy = dbank = None
    if bank is not None:
        ddy = _op.conv2d(ddx, bank, table, None, *how, ctx.backend)
    if dy is not None:
        operands = (dy, ddx, table, *how, ctx.bank_dtype)
        total = sum_of(ctx.node, dy, ddx)
        dbank = lib.bank_grad("conv2d_bank_grad", operands, ctx.backend, total)
    return ddy, dbank, None, None, None, None, None, None, None, None


def _setup_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dy, bank, table, x, ctx.placement, *ctx.geometry, ctx.dtype, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # often only one of the two is differentiated
    ctx.save_for_backward(dy, bank, table, x)


def _backward_grads(
    ctx: Any, ddx: Tensor | None, dgrad: Tensor | None
) -> tuple[Tensor | None, ...]:
    dy, bank, table, x = ctx.saved_tensors
    needs_dy, needs_bank, _, needs_x, *_ = ctx.needs_input_grad
    how = (ctx.placement, *ctx.geometry)
    ddy = dbank = dx = None
    if ddx is not None and needs_dy:
        ddy = _op.conv2d(ddx, bank, table, None, *how, ctx.backend)
    if ddx is not None and needs_bank:
        dbank = _op.conv2d_bank_grad(dy, ddx, table, *how, ctx.dtype, ctx.backend)
    if dgrad is not None and needs_dy:
        of_bank = _op.conv2d(x, dgrad, table, None, *how, ctx.backend)
        ddy = of_bank if ddy is None else ddy + of_bank
    if dgrad is not None and needs_x:
        dx = _op.conv2d_input_grad(dy, dgrad, table, x.shape, *how, ctx.backend)
    return ddy, dbank, None, dx, None, None, None, None, None, None, None


def _setup_bank_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, table, ctx.placement, *ctx.geometry, _, ctx.backend = inputs
    needs_dy, needs_x, *_ = ctx.needs_input_grad
    ctx.save_for_backward(dy if needs_x else None, x if needs_dy else None, table)
    ctx.input_size = x.shape


def _backward_bank_grad(ctx: Any, dgrad: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, table = ctx.saved_tensors
    how = (ctx.placement, *ctx.geometry, ctx.backend)
    ddy = None if x is None else _op.conv2d(x, dgrad, table, None, *how)
    dx = None if dy is None else _op.conv2d_input_grad(dy, dgrad, table, ctx.input_size, *how)
    return ddy, dx, None, None, None, None, None, None, None, None


lib.differentiate("conv2d", _backward, _setup)
lib.differentiate("conv2d_input_grad", _backward_input_grad, _setup_input_grad)
lib.differentiate("conv2d_bank_grad", _backward_bank_grad, _setup_bank_grad)
lib.differentiate("conv2d_grads", _backward_grads, _setup_grads)
lib.autocast("conv2d")
