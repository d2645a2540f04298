"""Dtypes and bytes of the reference: what a tile costs, and where bank gradients add up."""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels._tensors import LOW_PRECISION
from rpg_kernels.backends.reference.tiles import fitting_size, unpack_tile
from rpg_kernels.law.placement import Placement


def _copies(p: Placement) -> int:
    """Arrays of a tile's size alive at once: one, and one more where it must be rearranged."""
    matrix = p.matrix
    padded = matrix.run % matrix.block != 0 or p.selection[1] != (0, matrix.channels)
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
        if size is None or size[summed] < p.selected_shape[summed]:
            return forward_bytes(p, bank, torch.float32), torch.float32
    return bytes_per_weight, x.dtype


def backward_bytes(p: Placement, dy: Tensor, grad: Tensor) -> int:
    """Scratch per weight of a tile's gradient; its cast to the accumulator is part of the law's."""
    cast = grad.element_size() if dy.dtype != grad.dtype else 0
    return _copies(p) * dy.element_size() + cast


def cast_tile(bank: Tensor, table: Tensor | None, p: Placement, dtype: torch.dtype) -> Tensor:
    """A tile of the weight in torch's layout, in the dtype of the product."""
    return unpack_tile(bank, table, p).to(dtype)


def bank_accumulator(p: Placement, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros ``[slots, granularity]``: fp32 for banks up to fp32, fp64 for fp64."""
    g = p.generator
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.zeros((g.slots, g.granularity), device=device, dtype=accumulate)
