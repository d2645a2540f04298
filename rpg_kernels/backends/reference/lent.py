"""Tiles for kernels that another back end lends: whole rows, or whole columns.

Such kernels need no scratch for the law and round a weight once to the dtype of the product. Parts
are cut along the dimension that the product does not sum over, so that no partial results have to
be added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from rpg_kernels import settings
from rpg_kernels.backends.reference.tiles import Tile, row_spans
from rpg_kernels.law.placement import Placement, split


def row_tiles(
    p: Placement, dtype: torch.dtype, device: torch.device, groups: int = 1
) -> Iterator[Tile]:
    """Some rows each, all columns: whole groups of a convolution, or within one.

    Args:
        p: the weight; one of its rows must fit the scratch limit.
        dtype: that it is unpacked in.
        device: whose limit counts.
        groups: of a convolution.
    """
    height = _fitting(p, 0, dtype, device)
    for row, count in row_spans(p.selected_shape[0], height, groups):
        yield Tile(row, 0, p.narrow(0, row, count))


def column_tiles(
    p: Placement, dtype: torch.dtype, device: torch.device, groups: int = 1
) -> Iterator[Tile]:
    """All rows of a group, some columns each: whole blocks of them where more than one fits.

    Args:
        p, dtype, device, groups: as for ``row_tiles``; one column of a group must fit.
    """
    per_group = p.selected_shape[0] // groups
    for group in range(groups):
        rows = p.narrow(0, group * per_group, per_group)
        width, block = _fitting(rows, 1, dtype, device), p.matrix.block
        if p.matrix.by_tap and width > block:
            width -= width % block
        for column, count in split(p.selected_shape[1], width):
            yield Tile(group * per_group, column, rows.narrow(1, column, count))


def _fitting(p: Placement, dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows (dim 0) or columns (dim 1) of p whose weights fit the scratch limit; at least one."""
    limit = settings.scratch_bytes(device.type)
    one = math.prod(p.selected_shape) // p.selected_shape[dim] * dtype.itemsize
    return min(p.selected_shape[dim], max(1, limit // one))
