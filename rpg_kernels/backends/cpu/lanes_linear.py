"""y = x·Ŵᵀ + bias, dx = dy·Ŵ and dw = scale·Gᵀ·(dyᵀ·x) by kernels that take the batch in lanes.

Those of ``units`` share the product of a slot with x between the rows that read it, forward and
backward: a layer needs 1/laps of the dense multiplications. Those of ``tiles`` share nothing and
gather the weight. Sums are fp32, results rounded once. Results depend on the number of threads in
rounding, and on nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels import native
from rpg_kernels.backends.cpu.lanes import Family
from rpg_kernels.backends.cpu.memory import workspace
from rpg_kernels.backends.cpu.selection import of_part
from rpg_kernels.law.placement import Placement, parse


def linear(family: Family, x: Tensor, bank: Tensor, bias: Tensor | None, placement: str) -> Tensor:
    """x ``[..., K]`` -> ``[..., N]`` in x's dtype.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    p = parse(placement)
    y = x.new_empty((*x.shape[:-1], p.selected_shape[0]))
    batch = y.numel() // p.selected_shape[0]
    pairs = family.pairs("linear", x.dtype, bank.dtype, batch, placement)
    step = family.check("linear", placement, batch, pairs)
    if not batch:
        return y
    x, bank = x.contiguous(), bank.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    memory = workspace(step.workspace)
    getattr(native.layer_law(p.law), family.name)(
        native.given_bank(bank),
        *_typed(x),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        batch,
        p.shape[1],
        p.scale,
        step.threads,
        step.lanes,
        memory.data_ptr(),
        family.products(step.pairs),
        *of_part(placement),
    )
    return y


def linear_input_grad(family: Family, dy: Tensor, bank: Tensor, placement: str) -> Tensor:
    """dy ``[..., N]`` -> dx ``[..., K]`` in dy's dtype.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    p = parse(placement)
    dx = dy.new_empty((*dy.shape[:-1], p.selected_shape[1]))
    _run(family, "linear_input_grad", placement, dy, None, bank, dx, None, bank.dtype)
    return dx


def linear_bank_grad(
    family: Family,
    dy: Tensor,
    x: Tensor,
    placement: str,
    dtype: torch.dtype,
    total: Tensor | None = None,
) -> Tensor:
    """dy ``[..., N]``, x ``[..., K]`` -> dw ``[slots, granularity]`` of ``dtype``, summed in fp32;
    or ``total``, which it is added to.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    dw = bank_sum(dy, parse(placement), total)
    _run(family, "linear_bank_grad", placement, dy, x, None, None, dw, dtype)
    return dw.to(dtype) if total is None else total


def linear_grads(
    family: Family,
    dy: Tensor,
    bank: Tensor,
    x: Tensor,
    placement: str,
    dtype: torch.dtype,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both gradients, (dx, dw), with what they have in common made once; or ``total`` for dw.

    Raises:
        RuntimeError: a weight that these kernels do not read, or too little scratch.
    """
    p = parse(placement)
    dx = dy.new_empty((*dy.shape[:-1], p.selected_shape[1]))
    dw = bank_sum(dy, p, total)
    _run(family, "linear_grads", placement, dy, x, bank, dx, dw, dtype)
    return dx, dw.to(dtype) if total is None else total


def bank_sum(dy: Tensor, p: Placement, total: Tensor | None) -> Tensor:
    """What kernels add a bank gradient to, fp32 ``[slots, granularity]``: ``total``, or zeros."""
    if total is not None:
        return total
    return dy.new_zeros((p.generator.slots, p.generator.granularity), dtype=torch.float32)


def _run(
    family: Family,
    op: str,
    placement: str,
    dy: Tensor,
    x: Tensor | None,
    bank: Tensor | None,
    dx: Tensor | None,
    dw: Tensor | None,
    bank_dtype: torch.dtype,
) -> None:
    """Fill dx, which takes a bank, and add to dw, which takes x."""
    p = parse(placement)
    batch = dy.numel() // p.selected_shape[0]
    step = family.check(
        op, placement, batch, family.pairs(op, dy.dtype, bank_dtype, batch, placement)
    )
    if not batch:
        return
    dy = dy.contiguous()
    bank = None if bank is None else bank.contiguous()
    x = None if x is None else x.contiguous()
    memory = workspace(step.workspace)
    getattr(native.layer_law(p.law), f"{family.name}_grads")(
        native.given_bank(bank),
        dy.data_ptr(),
        0 if x is None else x.data_ptr(),
        native.dtype_code(dy.dtype),
        0 if dx is None else dx.data_ptr(),
        0 if dw is None else dw.data_ptr(),
        batch,
        p.shape[1],
        p.scale,
        step.threads,
        step.lanes,
        memory.data_ptr(),
        step.pairs,
        *of_part(placement),
    )


def _typed(tensor: Tensor) -> tuple[int, int]:
    """Address and dtype of a contiguous tensor, which the caller keeps."""
    return tensor.data_ptr(), native.dtype_code(tensor.dtype)
