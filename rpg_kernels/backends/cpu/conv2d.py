"""y = conv2d(x, Ŵ) + bias by the compiled CPU kernel of linear layers, over output pixels.

x is read in whatever strides it has; Ŵ and the matrix of patches never exist. Sums are fp32, the
result is rounded once. The gradients are the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rpg_kernels import native
from rpg_kernels._tensors import empty_image
from rpg_kernels.backends.cpu import factored, rules
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
    p = parse(placement)
    kernel = p.shape[2:]
    size = conv_output(x.shape[2:], kernel, stride, padding, dilation)
    y = empty_image(x, (x.shape[0], p.shape[0], *size))
    rules.check_weight("conv2d", placement, groups)
    step = factored.check("conv2d", placement, y.numel() // p.shape[0])
    if not y.numel():
        return y
    bank = bank.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    memory = workspace(step.workspace)
    native.layer_law(p.law).conv2d(
        bank.data_ptr(),
        native.dtype_code(bank.dtype),
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
