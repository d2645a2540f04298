"""y = x·Ŵᵀ + bias, dx = dy·Ŵ and dw = scale·Gᵀ·(dyᵀ·x) by the compiled CPU kernels.

Signatures are those of the reference. Sums are fp32, results rounded once. Results depend on the
number of threads in rounding at most; for a given number all are the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels import native
from rpg_kernels.backends.cpu import factored, lanes_linear, rules
from rpg_kernels.backends.cpu.int8 import INT8
from rpg_kernels.backends.cpu.lanes import Family
from rpg_kernels.backends.cpu.memory import workspace
from rpg_kernels.law.placement import Placement, parse


def linear(
    x: Tensor, bank: Tensor, table: Tensor | None, bias: Tensor | None, placement: str
) -> Tensor:
    """x ``[..., K]`` -> ``[..., N]`` in x's dtype.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    p = parse(placement)
    batch = x.numel() // p.selected_shape[1]
    if rules.in_int8("linear", batch, placement, bank):
        return lanes_linear.linear(INT8, x, bank, bias, placement)
    taken = _family("linear", x.dtype, batch, placement)
    if taken:
        return lanes_linear.linear(taken, x, bank, bias, placement)
    y = x.new_empty((*x.shape[:-1], p.shape[0]))
    step = factored.check("linear", placement, batch)
    if not batch:
        return y
    x, bank = x.contiguous(), bank.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    address = 0 if bias is None else bias.data_ptr()
    _call("linear", p, step, batch, native.given_bank(bank), *_typed(x), address, y.data_ptr())
    return y


def linear_input_grad(dy: Tensor, bank: Tensor, table: Tensor | None, placement: str) -> Tensor:
    """dy ``[..., N]`` -> dx ``[..., K]`` in dy's dtype.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    taken = _of_gradient("linear_input_grad", dy, placement)
    return lanes_linear.linear_input_grad(taken, dy, bank, placement)


def linear_bank_grad(
    dy: Tensor,
    x: Tensor,
    table: Tensor | None,
    placement: str,
    dtype: torch.dtype,
    total: Tensor | None = None,
) -> Tensor:
    """dy ``[..., N]``, x ``[..., K]`` -> dw ``[slots, granularity]`` of ``dtype``, summed in fp32;
    or ``total``, which it is added to.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    taken = _of_gradient("linear_bank_grad", dy, placement)
    return lanes_linear.linear_bank_grad(taken, dy, x, placement, dtype, total)


def linear_grads(
    dy: Tensor,
    bank: Tensor,
    table: Tensor | None,
    x: Tensor,
    placement: str,
    dtype: torch.dtype,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both gradients, (dx, dw), where the same kernels make them; or ``total`` for dw.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    taken = _of_gradient("linear_input_grad", dy, placement)
    return lanes_linear.linear_grads(taken, dy, bank, x, placement, dtype, total)


def _of_gradient(op: str, dy: Tensor, placement: str) -> Family:
    taken = _family(op, dy.dtype, dy.numel() // parse(placement).selected_shape[0], placement)
    assert taken is not None  # the factored kernels have no gradients
    return taken


def _family(op: str, dtype: torch.dtype, batch: int, placement: str) -> Family | None:
    rules.check_weight(op, placement)
    return rules.family(op, dtype, batch, placement)


def _typed(tensor: Tensor) -> tuple[int, int]:
    """Address and dtype of a contiguous tensor, which the caller keeps."""
    return tensor.data_ptr(), native.dtype_code(tensor.dtype)


def _call(op: str, p: Placement, step: factored.Steps, batch: int, *tensors: object) -> None:
    """Run a kernel; what all of them take comes after the tensors."""
    memory = workspace(step.workspace)
    getattr(native.layer_law(p.law), op)(
        *tensors,
        batch,
        p.shape[1],
        p.scale,
        step.threads,
        step.batch_tile,
        step.tiles,
        memory.data_ptr(),
    )
