"""Parts of a weight that fit in scratch, unpacked by a kernel, and their adjoint."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rpg_kernels import settings
from rpg_kernels.backends.reference.tiles import pack_tile
from rpg_kernels.backends.triton import unpack
from rpg_kernels.law.placement import Placement, Range, split

tile = unpack.tile


def rows(
    p: Placement, dtype: torch.dtype, device: torch.device, groups: int = 1
) -> Iterator[Range]:
    """(offset, count) of row spans that fit the scratch limit: whole groups, or within one.

    Args:
        p: the weight.
        dtype: that it is unpacked in.
        device: whose limit counts.
        groups: of a convolution.

    Raises:
        RuntimeError: not even one row fits.
    """
    total = p.selected_shape[0]
    height = _fitting(p, 0, dtype, device)
    per_group = total // groups
    if height >= per_group:
        yield from split(total, height - height % per_group)
        return
    for group in range(groups):
        for offset, count in split(per_group, height):
            yield group * per_group + offset, count


def columns(p: Placement, dtype: torch.dtype, device: torch.device) -> Iterator[Range]:
    """(offset, count) of column spans that fit the scratch limit; blocks are cut at the ends only.

    Raises:
        RuntimeError: not even one column fits.
    """
    width, block = _fitting(p, 1, dtype, device), p.matrix.block
    if p.matrix.by_tap and width > block:
        width -= width % block
    yield from split(p.selected_shape[1], width)


def add(grad: Tensor, dense: Tensor, table: Tensor | None, p: Placement) -> None:
    """grad += scale · Gᵀ · dense; by the inverse law, or for a table by the reference."""
    if table is None:
        unpack.add(grad, dense, p)
    else:
        pack_tile(grad, dense.contiguous(), table, p)


def _fitting(p: Placement, dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows (dim 0) or columns (dim 1) of p whose weights fit the scratch limit."""
    limit = settings.scratch_bytes(device.type)
    one = math.prod(p.selected_shape) // p.selected_shape[dim] * dtype.itemsize
    if one > limit:
        raise RuntimeError(
            f"scratch_limit: got {limit} bytes, wanted at least {one} for the vendor back end of a "
            f"virtual weight {list(p.selected_shape)}"
        )
    return min(p.selected_shape[dim], limit // one)
