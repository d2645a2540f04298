"""y = conv2d(x, Ŵ) + bias and its gradients by the compiled CPU kernels.

Of law 1 the forward alone, by the kernel of linear layers, over output pixels; of law 3 all
three, see ``unit_conv2d``. Images are read in whatever strides they have; Ŵ and the matrix of
patches never exist. Sums are fp32, the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rpg_kernels import native
from rpg_kernels._tensors import empty_image
from rpg_kernels.backends.cpu import factored, rules, unit_conv2d
from rpg_kernels.backends.cpu.memory import workspace
from rpg_kernels.law.geometry import conv_output
from rpg_kernels.law.placement import parse


def conv2d(
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
    """x ``[B, C, H, W]`` -> ``[B, out, H', W']`` in x's memory format.

    Raises:
        RuntimeError: a weight that this kernel does not read, groups, or too little scratch.
    """
    rules.check_weight("conv2d", placement, groups)
    if rules.convolves_units("conv2d", placement):
        return unit_conv2d.conv2d(
            x, bank, bias, placement, unit_conv2d.tuples(stride, padding, dilation)
        )
    p = parse(placement)
    kernel = p.shape[2:]
    size = conv_output(x.shape[2:], kernel, stride, padding, dilation)
    y = empty_image(x, (x.shape[0], p.shape[0], *size))
    step = factored.check("conv2d", placement, y.numel() // p.shape[0])
    if not y.numel():
        return y
    bank = bank.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    memory = workspace(step.workspace)
    native.layer_law(p.law).conv2d(
        native.given_bank(bank),
        x.data_ptr(),
        native.dtype_code(x.dtype),
        x.shape,
        x.stride(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        not y.is_contiguous(),
        kernel,
        p.matrix.by_tap,
        stride,
        padding,
        dilation,
        p.scale,
        step.parts,
        step.threads,
        step.batch_tile,
        step.tiles,
        memory.data_ptr(),
    )
    return y


def conv2d_input_grad(
    dy: Tensor,
    bank: Tensor,
    table: Tensor | None,
    input_size: Sequence[int],
    placement: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """dy ``[B, out, H', W']`` -> dx of ``input_size`` in dy's memory format.

    Raises:
        RuntimeError: a weight that these kernels do not read, groups, or too little scratch.
    """
    rules.check_weight("conv2d_input_grad", placement, groups)
    geometry = unit_conv2d.tuples(stride, padding, dilation)
    return unit_conv2d.conv2d_input_grad(dy, bank, input_size, placement, geometry)


def conv2d_bank_grad(
    dy: Tensor,
    x: Tensor,
    table: Tensor | None,
    placement: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    total: Tensor | None = None,
) -> Tensor:
    """dy ``[B, out, H', W']``, x ``[B, C, H, W]`` -> dw ``[slots, granularity]`` of ``dtype``, or
    ``total``, which it is added to.

    Raises:
        RuntimeError: a weight that these kernels do not read, groups, or too little scratch.
    """
    rules.check_weight("conv2d_bank_grad", placement, groups)
    geometry = unit_conv2d.tuples(stride, padding, dilation)
    return unit_conv2d.conv2d_bank_grad(dy, x, placement, geometry, dtype, total)


def conv2d_grads(
    dy: Tensor,
    bank: Tensor,
    table: Tensor | None,
    x: Tensor,
    placement: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both gradients, (dx, dw), of law 3; or ``total`` for dw, which it is added to.

    Raises:
        RuntimeError: a weight that these kernels do not read, groups, or too little scratch.
    """
    rules.check_weight("conv2d_input_grad", placement, groups)
    geometry = unit_conv2d.tuples(stride, padding, dilation)
    return unit_conv2d.conv2d_grads(dy, bank, x, placement, geometry, dtype, total)
