"""y = x·Ŵᵀ + bias, dx = dy·Ŵ and dw = scale·Gᵀ·(dyᵀ·x) by the CUDA kernels for small batches.

On CUDA tensors, or on CPU tensors by the same sources. Signatures are those of the reference. Sums
are fp32, in a fixed order, results rounded once: the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels.backends.cuda import launch, rules
from rpg_kernels.law.placement import parse


def linear(
    x: Tensor, bank: Tensor, table: Tensor | None, bias: Tensor | None, placement: str
) -> Tensor:
    """x ``[..., K]`` -> ``[..., N]`` in x's dtype.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    p = parse(placement)
    rows = p.shape[0]
    y = x.new_empty((*x.shape[:-1], rows))
    batch = y.numel() // rows
    launches = rules.check("linear", placement, x.device, x.dtype, batch, bank)
    if launches:
        ((_, plan),) = launches
        ring = launch.ring(bank, x.dtype)
        bias = None if bias is None else bias.float().contiguous()
        launch.run("linear", p, plan, batch, x.dtype, (ring, x.contiguous(), bias, y))
    return y


def linear_input_grad(dy: Tensor, bank: Tensor, table: Tensor | None, placement: str) -> Tensor:
    """dy ``[..., N]`` -> dx ``[..., K]`` in dy's dtype.

    Some rows of dy at a time, where the sums of all of them exceed the scratch limit.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    p = parse(placement)
    columns = p.shape[1]
    dx = dy.new_empty((*dy.shape[:-1], columns))
    batch = dx.numel() // columns
    launches = rules.check("linear_input_grad", placement, dy.device, dy.dtype, batch, bank)
    if launches:
        ring, a, out = launch.ring(bank, dy.dtype), dy.contiguous(), dx.view(batch, columns)
        a = a.view(batch, p.shape[0])
        for part, plan in launches:
            operands = (ring, a[part], out[part])
            launch.run("linear_input_grad", p, plan, part.stop - part.start, dy.dtype, operands)
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
    launches = rules.check("linear_bank_grad", placement, dy.device, dy.dtype, batch, None)
    shape = (p.generator.slots, p.generator.granularity)
    if not launches:
        return dy.new_zeros(shape, dtype=dtype)
    ((_, plan),) = launches
    dw = dy.new_empty(shape, dtype=torch.float32)
    operands = (dy.contiguous(), x.contiguous(), dw)
    launch.run("linear_bank_grad", p, plan, batch, dy.dtype, operands)
    return dw.to(dtype)
