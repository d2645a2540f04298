"""Reference convolution and its gradients, one tile of Ŵ at a time.

A tile of one group convolves that group's channels; a tile of whole groups convolves theirs.
Padding is explicit here: ``functional.conv2d`` resolves "same" and "valid". Tiles are unpacked and
packed by PyTorch, or by ``kernels`` that another back end lends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg_kernels._tensors import empty_image, for_strided_pointwise
from rpg_kernels.backends.reference.accumulate import (
    backward_bytes,
    bank_accumulator,
    cast_tile,
    gradient_tiles,
    product_tiles,
)
from rpg_kernels.backends.reference.tiles import Tile, pack_tile
from rpg_kernels.backends.registry import TileKernels
from rpg_kernels.law.placement import Placement, parse


@dataclass(frozen=True)
class _Geometry:
    """Geometry of a convolution, as torch takes it."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        return torch.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, groups: int, mask: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dweight, dbias) of what mask asks for."""
        if mask[1] and math.prod(weight.shape[2:]) == 1 and max(self.stride) > 1:
            x = for_strided_pointwise(x)
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            dy,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            groups,
            mask,
        )
        return result


def _groups_of(tile: Tile, p: Placement, groups: int) -> tuple[int, slice]:
    """(groups in the tile, its slice of x's channels)."""
    rows, channels = p.selected_shape[:2]
    per_group = rows // groups
    first = tile.row // per_group
    count = max(1, tile.placement.selected_shape[0] // per_group)
    if count > 1:
        return count, slice(first * channels, (first + count) * channels)
    base = first * channels
    return 1, slice(base + tile.columns.start, base + tile.columns.stop)


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _in_format_of(x: Tensor, part: Tensor) -> Tensor:
    """part with exactly the strides that the operator's fake promises."""
    if part.stride() == empty_image(x, part.shape, device="meta").stride():
        return part
    return empty_image(x, part.shape).copy_(part)


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
    kernels: TileKernels | None = None,
) -> Tensor:
    """x ``[B, C, H, W]`` -> ``[B, out, H', W']`` in x's memory format."""
    p = parse(placement)
    geometry = _Geometry(stride, padding, dilation)
    bank = bank.contiguous()
    cut, dtype = product_tiles(p, bank, x, 1, kernels, groups)
    y: Tensor | None = None
    for tile in cut:
        count, channels = _groups_of(tile, p, groups)
        added = None if bias is None or tile.column else bias[tile.rows].to(dtype)
        part = geometry.forward(
            x[:, channels].to(dtype),
            cast_tile(bank, table, tile.placement, dtype, kernels, _channels_last(x)),
            added,
            count,
        )
        if tile.placement == p:
            return _in_format_of(x, part)
        if y is None:
            shape = (part.shape[0], p.selected_shape[0], *part.shape[2:])
            y = empty_image(x.to(dtype), shape)
        if tile.column:
            y[:, tile.rows] += part
        else:
            y[:, tile.rows] = part
    assert y is not None
    return y.to(x.dtype)


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
    kernels: TileKernels | None = None,
) -> Tensor:
    """dy ``[B, out, H', W']`` -> dx of ``input_size`` in dy's memory format."""
    p = parse(placement)
    geometry = _Geometry(stride, padding, dilation)
    bank = bank.contiguous()
    cut, dtype = product_tiles(p, bank, dy, 0, kernels, groups)
    dx: Tensor | None = None
    for tile in cut:
        count, channels = _groups_of(tile, p, groups)
        size = (input_size[0], channels.stop - channels.start, *input_size[2:])
        like = dy.new_empty(1, dtype=dtype).expand(size)
        part, _, _ = geometry.backward(
            dy[:, tile.rows].to(dtype),
            like,
            cast_tile(bank, table, tile.placement, dtype, kernels, _channels_last(dy)),
            count,
            [True, False, False],
        )
        if tile.placement == p:
            return _in_format_of(dy, part)
        if dx is None:
            dx = empty_image(dy.to(dtype), input_size).zero_()
        dx[:, channels] += part
    assert dx is not None
    return dx.to(dy.dtype)


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
    kernels: TileKernels | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """dy ``[B, out, H', W']``, x ``[B, C, H, W]`` -> dw ``[slots, granularity]``; or ``total``,
    which it is added to."""
    p = parse(placement)
    geometry = _Geometry(stride, padding, dilation)
    grad = bank_accumulator(p, dy.device, dtype, total)
    bytes_per_weight = backward_bytes(p, dy, grad)
    if dy.dtype not in (torch.float32, torch.bfloat16):
        bytes_per_weight += dy.element_size()  # torch's plain path copies the placeholder below
    pack = pack_tile if kernels is None else kernels.pack_tile
    for tile in gradient_tiles(p, dy, bytes_per_weight, kernels, groups):
        count, channels = _groups_of(tile, p, groups)
        like = dy.new_empty(1).expand(tile.placement.selected_shape)
        mask = [False, True, False]
        pack(
            grad,
            geometry.backward(dy[:, tile.rows], x[:, channels], like, count, mask)[1],
            table,
            tile.placement,
        )
    return grad.to(dtype) if total is None else total
