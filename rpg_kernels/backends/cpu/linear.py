"""y = x·Ŵᵀ + bias, dx = dy·Ŵ and dw = scale·Gᵀ·(dyᵀ·x) by the compiled CPU kernels.

Signatures are those of the reference. Sums are fp32, results rounded once. The forward and the
bank gradient depend on the number of threads in rounding, the others not at all; for a given
number all are the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels import native
from rpg_kernels.backends.cpu import factored, lanes_linear, rules
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
    batch = x.numel() // p.shape[1]
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
    _call("linear", p, step, batch, *_typed(bank), *_typed(x), address, y.data_ptr())
    return y


def linear_input_grad(dy: Tensor, bank: Tensor, table: Tensor | None, placement: str) -> Tensor:
    """dy ``[..., N]`` -> dx ``[..., K]`` in dy's dtype.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    p = parse(placement)
    batch = dy.numel() // p.shape[0]
    taken = _family("linear_input_grad", dy.dtype, batch, placement)
    if taken:
        return lanes_linear.linear_input_grad(taken, dy, bank, placement)
    dx = dy.new_empty((*dy.shape[:-1], p.shape[1]))
    step = factored.check("linear_input_grad", placement, batch)
    if not batch:
        return dx
    dy, bank = dy.contiguous(), bank.contiguous()
    _call("linear_input_grad", p, step, batch, *_typed(bank), *_typed(dy), dx.data_ptr())
    return dx


def linear_bank_grad(
    dy: Tensor, x: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype
) -> Tensor:
    """dy ``[..., N]``, x ``[..., K]`` -> dw ``[slots, granularity]`` of ``dtype``, summed in fp32.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    p = parse(placement)
    batch = dy.numel() // p.shape[0]
    taken = _family("linear_bank_grad", dy.dtype, batch, placement)
    if taken:
        return lanes_linear.linear_bank_grad(taken, dy, x, placement, dtype)
    step = factored.check("linear_bank_grad", placement, batch)
    dw = dy.new_zeros((p.generator.slots, p.generator.granularity), dtype=torch.float32)
    if not batch:
        return dw.to(dtype)
    dy, x = dy.contiguous(), x.contiguous()
    _call("linear_bank_grad", p, step, batch, dy.data_ptr(), *_typed(x), dw.data_ptr())
    return dw.to(dtype)


def linear_grads(
    dy: Tensor, bank: Tensor, table: Tensor | None, x: Tensor, placement: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both gradients, (dx, dw), where the same kernels make them.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    batch = dy.numel() // parse(placement).shape[0]
    taken = _family("linear_input_grad", dy.dtype, batch, placement)
    assert isinstance(taken, Family)  # ``Cpu.both_grads`` has asked
    return lanes_linear.linear_grads(taken, dy, bank, x, placement, dtype)


def _family(op: str, dtype: torch.dtype, batch: int, placement: str) -> Family | None:
    rules.check_weight(op, placement)
    return rules.family(op, dtype, batch, placement)


def _typed(tensor: Tensor) -> tuple[int, int]:
    """Address and dtype of a contiguous tensor, which the caller keeps."""
    return tensor.data_ptr(), native.dtype_code(tensor.dtype)


def _call(op: str, p: Placement, step: factored.Steps, batch: int, *tensors: int) -> None:
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
