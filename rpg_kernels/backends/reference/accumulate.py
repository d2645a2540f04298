"""Dtypes and bytes of the reference: its tiles, what one costs, where bank gradients add up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rpg_kernels._tensors import LOW_PRECISION
from rpg_kernels.backends.reference import lent
from rpg_kernels.backends.reference.tiles import Tile, fitting_size, tiles, unpack_tile
from rpg_kernels.backends.registry import TileKernels
from rpg_kernels.law.placement import Placement


def _copies(p: Placement) -> int:
    """Arrays of a tile's size alive at once: one, and one more where it must be rearranged."""
    matrix = p.matrix
    padded = matrix.run % matrix.block != 0 or p.columns != (0, matrix.channels)
    return 2 if padded or matrix.taps > 1 or not matrix.by_tap else 1


def forward_bytes(p: Placement, bank: Tensor, dtype: torch.dtype) -> int:
    """Scratch per weight of a tile that is unpacked, and cast when the product needs another."""
    cast = dtype.itemsize if dtype != bank.dtype else 0
    return _copies(p) * bank.element_size() + cast


def product(p: Placement, bank: Tensor, x: Tensor, summed: int) -> tuple[int, torch.dtype]:
    """(scratch per weight, dtype) of the tiles' products with x.

    Products of tiles that add up are computed and summed in fp32 when x is of low precision, so
    that the result is rounded once, as by a matmul of the whole weight.

    Args:
        p: the weight.
        bank: what it is read from.
        x: the other operand.
        summed: the dimension of the weight that the product sums over, 0 or 1.
    """
    bytes_per_weight = forward_bytes(p, bank, x.dtype)
    if x.dtype in LOW_PRECISION:
        size = fitting_size(p, x.device, bytes_per_weight)
        whole = p.selected_shape[0], p.hull(1)[1]
        if size is None or size[summed] < whole[summed]:
            return forward_bytes(p, bank, torch.float32), torch.float32
    return bytes_per_weight, x.dtype


def product_tiles(
    p: Placement,
    bank: Tensor,
    x: Tensor,
    summed: int,
    kernels: TileKernels | None,
    groups: int = 1,
) -> tuple[Iterator[Tile], torch.dtype]:
    """(tiles, dtype) of the products with x; arguments as for ``product``.

    Args:
        kernels: that unpack the tiles, lent by another back end; None for PyTorch.
        groups: of a convolution.
    """
    if kernels is not None:
        cut = lent.column_tiles if summed == 0 else lent.row_tiles
        return cut(p, x.dtype, x.device, groups), x.dtype
    bytes_per_weight, dtype = product(p, bank, x, summed)
    return tiles(p, x.device, bytes_per_weight, groups), dtype


def gradient_tiles(
    p: Placement,
    dy: Tensor,
    bytes_per_weight: int,
    kernels: TileKernels | None,
    groups: int = 1,
) -> Iterator[Tile]:
    """Tiles of the weight's gradient; arguments as for ``product_tiles``."""
    if kernels is not None:
        return lent.row_tiles(p, dy.dtype, dy.device, groups)
    return tiles(p, dy.device, bytes_per_weight, groups)


def backward_bytes(p: Placement, dy: Tensor, grad: Tensor) -> int:
    """Scratch per weight of a tile's gradient; its cast to the accumulator is part of the law's."""
    cast = grad.element_size() if dy.dtype != grad.dtype else 0
    return _copies(p) * dy.element_size() + cast


def cast_tile(
    bank: Tensor,
    table: Tensor | None,
    p: Placement,
    dtype: torch.dtype,
    kernels: TileKernels | None,
    channels_last: bool = False,
) -> Tensor:
    """A tile of the weight in torch's layout, in the dtype of the product.

    Args:
        bank, table, p: as for ``unpack_tile``.
        dtype: of the product.
        kernels: that unpack it; None for PyTorch.
        channels_last: columns innermost in memory, where lent kernels write it.
    """
    if kernels is not None:
        return kernels.unpack_tile(bank, table, p, dtype, channels_last)
    return unpack_tile(bank, table, p).to(dtype)


def bank_accumulator(
    p: Placement, device: torch.device, dtype: torch.dtype, total: Tensor | None = None
) -> Tensor:
    """What a bank gradient is added to: ``total`` where there is one, or zeros ``[slots,
    granularity]``, fp32 for banks up to fp32, fp64 for fp64."""
    if total is not None:
        return total
    g = p.generator
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.zeros((g.slots, g.granularity), device=device, dtype=accumulate)
