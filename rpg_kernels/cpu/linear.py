"""y = x·Ŵᵀ + bias, dx = dy·Ŵ and dw = scale·Gᵀ·(dyᵀ·x) by the compiled CPU kernels.

Signatures are those of the reference. Sums are fp32, results rounded once. The forward and the
bank gradient depend on the number of threads in rounding, the others not at all; for a given
number all are the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels import native
from rpg_kernels.cpu import config
from rpg_kernels.placement import parse


def linear(
    x: Tensor, bank: Tensor, table: Tensor | None, bias: Tensor | None, placement: str
) -> Tensor:
    """x ``[..., K]`` -> ``[..., N]`` in x's dtype.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    p = parse(placement)
    rows, columns = p.shape
    y = x.new_empty((*x.shape[:-1], rows))
    batch = y.numel() // rows
    step = config.check("linear", placement, batch)
    if not batch:
        return y
    x, bank = x.contiguous(), bank.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    memory = config.workspace(step)
    native.layer_law(p.law).linear(
        bank.data_ptr(),
        native.dtype_code(bank.dtype),
        x.data_ptr(),
        native.dtype_code(x.dtype),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        batch,
        columns,
        p.scale,
        step.threads,
        step.batch_tile,
        step.tiles,
        memory.data_ptr(),
    )
    return y


def linear_input_grad(dy: Tensor, bank: Tensor, table: Tensor | None, placement: str) -> Tensor:
    """dy ``[..., N]`` -> dx ``[..., K]`` in dy's dtype.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    p = parse(placement)
    columns = p.shape[1]
    dx = dy.new_empty((*dy.shape[:-1], columns))
    batch = dx.numel() // columns
    step = config.check("linear_input_grad", placement, batch)
    if not batch:
        return dx
    dy, bank = dy.contiguous(), bank.contiguous()
    memory = config.workspace(step)
    native.layer_law(p.law).linear_input_grad(
        bank.data_ptr(),
        native.dtype_code(bank.dtype),
        dy.data_ptr(),
        native.dtype_code(dy.dtype),
        dx.data_ptr(),
        batch,
        columns,
        p.scale,
        step.threads,
        step.batch_tile,
        step.tiles,
        memory.data_ptr(),
    )
    return dx


def linear_bank_grad(
    dy: Tensor, x: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype
) -> Tensor:
    """dy ``[..., N]``, x ``[..., K]`` -> dw ``[slots, granularity]`` of ``dtype``, summed in fp32.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    p = parse(placement)
    rows, columns = p.shape
    batch = dy.numel() // rows
    step = config.check("linear_bank_grad", placement, batch)
    dw = dy.new_zeros((p.generator.slots, p.generator.granularity), dtype=torch.float32)
    if not batch:
        return dw.to(dtype)
    dy, x = dy.contiguous(), x.contiguous()
    memory = config.workspace(step)
    native.layer_law(p.law).linear_bank_grad(
        dy.data_ptr(),
        x.data_ptr(),
        native.dtype_code(dy.dtype),
        dw.data_ptr(),
        batch,
        columns,
        p.scale,
        step.threads,
        step.batch_tile,
        step.tiles,
        memory.data_ptr(),
    )
    return dw.to(dtype)
