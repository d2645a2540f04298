"""The map of a layer written out, for experiments: which bank element, and with which sign."""

from __future__ import annotations

import torch
from torch import Tensor

from rpg_kernels.law.geometry import VirtualMatrix
from rpg_kernels.law.placement import Placement


def explicit_map(placement: Placement) -> tuple[Tensor, Tensor]:
    """Index and sign of every entry of a whole weight, of 16 bytes for each and more meanwhile.

    Args:
        placement: of a packing law; its selection and its scale are left out.

    Returns:
        index, sign: int64 in [0, dof) and float32 ±1, of the placement's shape; the weight is
        ``scale * sign * bank.flatten()[index]``.

    Raises:
        TypeError: the placement has a table.

    Example:
        >>> from rpg_kernels.law.generator import Generator
        >>> g = Generator(slots=70, granularity=8, reflect="vector", laps=1)
        >>> index, sign = explicit_map(Placement(g, 0, 0, (8, 4, 3, 3), 1.0))
        >>> index.shape, int(index.max()) < 560, sorted(set(sign.flatten().tolist()))
        (torch.Size([8, 4, 3, 3]), True, [-1.0, 1.0])
    """
    law, matrix = placement.law, placement.matrix
    n, b = torch.arange(matrix.rows)[:, None], torch.arange(matrix.blocks)
    element = torch.arange(matrix.block)
    index = law.slot(n, b)[..., None] * matrix.block + element
    sign = 1 - 2 * law.negative(n, b).float()
    return _to_torch(index, matrix), _to_torch(sign, matrix)


def _to_torch(entries: Tensor, matrix: VirtualMatrix) -> Tensor:
    """[rows, blocks, block] of the virtual matrix in torch's layout, without padding."""
    runs = entries.reshape(matrix.rows, matrix.runs, -1)[..., : matrix.run]
    by_tap = runs.reshape(matrix.rows, matrix.taps, matrix.channels)
    return by_tap.transpose(1, 2).reshape(matrix.shape).contiguous()
