"""Maps from virtual weights to bank elements: the packing law, and what it is compared with.

A map is a function ``index_and_sign(ring, shape, layer, start)``. It says for every entry of a
layer's weight, in torch's layout, which bank element it reads and with which sign. Any map can be
tried by adding one here: training knows nothing but the two tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.accuracy.rows import HASHED, LAW, UNSIGNED, Row
from rpg_kernels import Generator
from rpg_kernels.law.explicit import explicit_map
from rpg_kernels.law.placement import place


@dataclass(frozen=True)
class Ring:
    """What a map may depend on: the row's settings, the size of the bank, and the run's seed."""

    row: Row
    dof: int
    seed: int


@dataclass(frozen=True)
class Entries:
    """Where a layer's weights are read.

    Args:
        index: int64, of the layer's shape; elements of the bank.
        sign: float32, of the layer's shape; +1 or -1.
        end: ring address behind the layer, where the next may start; not wrapped around.
    """

    index: Tensor
    sign: Tensor
    end: int


Map = Callable[[Ring, tuple[int, ...], int, int], Entries]


def law(ring: Ring, shape: tuple[int, ...], layer: int, start: int) -> Entries:
    """The packing law, as ``ParameterBank.place`` lays layers out."""
    row = ring.row
    generator = Generator(
        slots=ring.dof // row.granularity,
        granularity=row.granularity,
        reflect=row.reflect,
        permute=row.permute,
        window=row.window,
        laps=row.laps,
        seed=ring.seed,
    )
    placement, end = place(generator, layer, start, shape, taps=row.taps)
    return Entries(*explicit_map(placement), end)


def hashed(ring: Ring, shape: tuple[int, ...], layer: int, start: int) -> Entries:
    """HashedNet (Chen et al., 2015): every weight an independent element with its own sign.

    Ideal hashing, and one bank for all layers where the paper has one each: the comparison is at
    equal degrees of freedom, and a bank of its own for each layer would only be smaller.
    """
    index, generator = _independent(ring, shape, layer)
    sign = torch.randint(0, 2, shape, generator=generator).mul(2).sub(1).float()
    return Entries(index, sign, start + math.prod(shape))


def unsigned(ring: Ring, shape: tuple[int, ...], layer: int, start: int) -> Entries:
    """Random weight sharing: every weight an independent element, no signs."""
    index, _ = _independent(ring, shape, layer)
    return Entries(index, torch.ones(shape), start + math.prod(shape))


def _independent(ring: Ring, shape: tuple[int, ...], layer: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(1_000_003 * ring.seed + layer)
    return torch.randint(0, ring.dof, shape, generator=generator), generator


MAPS: dict[str, Map] = {LAW: law, HASHED: hashed, UNSIGNED: unsigned}
