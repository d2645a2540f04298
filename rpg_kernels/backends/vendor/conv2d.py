"""Convolution and its gradients by the vendor's library; signatures are those of the reference.

The forward and the bank gradient unpack some rows at a time, the input gradient some columns, so
that no partial results have to be added up. Padding is explicit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rpg_kernels._tensors import empty_image
from rpg_kernels.backends.reference.accumulate import bank_accumulator
from rpg_kernels.backends.vendor import chunks
from rpg_kernels.law.placement import Placement, parse


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _spans(p: Placement, x: Tensor, groups: int) -> Iterator[tuple[int, slice, slice, Placement]]:
    """(groups, rows of the weight, channels of the input, placement) of parts that fit."""
    total, channels = p.selected_shape[:2]
    per_group = total // groups
    for row, height in chunks.rows(p, x.dtype, x.device, groups):
        first, count = row // per_group, max(1, height // per_group)
        inputs = slice(first * channels, (first + count) * channels)
        yield count, slice(row, row + height), inputs, p.narrow(0, row, height)


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
        RuntimeError: the scratch limit is below one row of the weight.
    """
    p = parse(placement)
    y: Tensor | None = None
    for count, rows, inputs, part in _spans(p, x, groups):
        w = chunks.tile(bank, table, part, x.dtype, _channels_last(x))
        added = None if bias is None else bias[rows].to(x.dtype)
        result = torch.conv2d(x[:, inputs], w, added, stride, padding, dilation, count)
        del w  # before the next is made
        if y is None:
            y = empty_image(x, (x.shape[0], p.selected_shape[0], *result.shape[2:]))
            if part == p and result.stride() == y.stride():
                return result
        y[:, rows] = result
        del result
    assert y is not None
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
        RuntimeError: the scratch limit is below one column of one group of the weight.
    """
    p = parse(placement)
    total, channels = p.selected_shape[:2]
    per_group = total // groups
    dx = empty_image(dy, input_size)
    for group in range(groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        of_group = p.narrow(0, rows.start, per_group)
        for column, width in chunks.columns(of_group, dy.dtype, dy.device):
            first = group * channels + column
            like = dy.new_empty(1).expand(input_size[0], width, *input_size[2:])
            w = chunks.tile(
                bank, table, of_group.narrow(1, column, width), dy.dtype, _channels_last(dy)
            )
            geometry = (stride, padding, dilation, False, [0, 0], 1)
            dx[:, first : first + width] = torch.ops.aten.convolution_backward(
                dy[:, rows], like, w, None, *geometry, [True, False, False]
            )[0]
            del w
    return dx


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
) -> Tensor:
    """dy ``[B, out, H', W']``, x ``[B, C, H, W]`` -> dw ``[slots, granularity]`` of ``dtype``.

    Raises:
        RuntimeError: the scratch limit is below one row of the weight.
    """
    p = parse(placement)
    grad = bank_accumulator(p, dy.device, dtype)
    for count, rows, inputs, part in _spans(p, dy, groups):
        like = dy.new_empty(1).expand(part.selected_shape)
        geometry = (stride, padding, dilation, False, [0, 0], count)
        dense = torch.ops.aten.convolution_backward(
            dy[:, rows], x[:, inputs], like, None, *geometry, [False, True, False]
        )[1]
        chunks.add(grad, dense, table, part)
        del dense
    return grad.to(dtype)
