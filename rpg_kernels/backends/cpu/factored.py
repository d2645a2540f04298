"""Compiled CPU kernels of law 1: when they are taken, and in which steps of the batch.

A column of blocks is taken in pieces, and a piece of more rows than the ring has slots is
multiplied slot by slot; they keep sums of 1 to 16 rows of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from rpg_kernels import native, settings
from rpg_kernels._tensors import LOW_PRECISION
from rpg_kernels.backends.cpu import multiplications
from rpg_kernels.backends.cpu.multiplications import RING_ROWS, RING_SUMS
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import parse
from rpg_kernels.law.unit import UnitLaw

PRODUCTS = ("linear", "conv2d")
BLOCKS = (32, 64)  # each takes ten seconds to compile, for every instruction set

# Up to so many rows of x, or where a product is shared by so many rows, sums of a few rows of x are
# faster than gathered tiles.
FEW, TILE_GAIN = 8, 16
# The reference also prepares a convolution's weight, which few pixels do not pay for.
CONV_GAIN, CONV_PIXELS = 1.5, 64
LOW_CONV_GAIN, LOW_CONV_PIXELS = 4, 1024

_ALIGNMENT = 64  # of a part's memory
_TILES = ((16, 4), (16, 2), (16, 1), (8, 1), (4, 1), (1, 1))


@lru_cache(maxsize=4096)
def unsupported(op: str, placement: str) -> str:
    """Why a product with a weight cannot run here, or "".

    Example:
        >>> from rpg_kernels.law.placement import Placement
        >>> p = Placement(Generator(100, 8, "vector"), 0, 0, (6, 16), 1.0)
        >>> unsupported("linear", p.to_json())
        'the CPU kernels read blocks of 32 or 64 elements, not of 8'
    """
    p = parse(placement)
    if op not in PRODUCTS:
        return f"the CPU kernels have no {op} of law 1"
    if not isinstance(p.generator, Generator):
        return "the CPU kernels read weights of a packing law, not of a table"
    if isinstance(p.law, UnitLaw):
        return f"the CPU kernels have no {op} of law 3"
    if p.matrix.block not in BLOCKS:
        return f"the CPU kernels read blocks of 32 or 64 elements, not of {p.matrix.block}"
    return ""


def gain(placement: str, lanes: int) -> float:
    """Rows of a column over slots that they read: how many share a product; 1 where none do.

    Args:
        placement: of the weight.
        lanes: rows of x at a time; the kernel keeps sums of so many, which bounds its columns.

    Example:
        >>> from rpg_kernels.law.placement import Placement
        >>> ring = Generator(1024, 64, "vector")
        >>> gain(Placement(ring, 0, 0, (4096, 64), 1.0).to_json(), lanes=1)
        4.0
    """
    law = parse(placement).law
    height = min(law.rows, RING_ROWS, RING_SUMS // lanes)
    return max(1.0, height / law.slots)


def faster(op: str, dtype: torch.dtype, batch: int, placement: str) -> bool:
    """Whether a call is faster here than in the reference, and than with gathered tiles.

    Args:
        op: operator name.
        dtype: of the activations.
        batch: rows of x; of an image its pixels.
        placement: of the weight.
    """
    step = steps(op, batch, placement)
    if step is None:
        return False
    shared = gain(placement, step.batch_tile * step.tiles)
    if op == "conv2d":
        return _convolves(dtype, batch, shared)
    return batch <= FEW or shared >= TILE_GAIN


def _convolves(dtype: torch.dtype, pixels: int, shared: float) -> bool:
    few = pixels <= CONV_PIXELS
    if dtype not in LOW_PRECISION:
        return few or shared >= CONV_GAIN
    many_laps = shared >= LOW_CONV_GAIN and pixels <= LOW_CONV_PIXELS
    return many_laps or (few and shared >= CONV_GAIN)


def what(op: str, batch: int, placement: str) -> str:
    """What these kernels do in a call that they can run.

    Args:
        op, batch, placement: as for ``faster``.
    """
    step = check(op, placement, batch)
    shared = gain(placement, step.batch_tile * step.tiles)
    if shared == 1:
        return "every row has products of its own, as no slot is read by several"
    return f"the product of a slot is shared by the rows that read it, {shared:.3g} on average"


@dataclass(frozen=True)
class Steps:
    """How a call goes through its batch, and the memory that it takes.

    Args:
        batch_tile: rows of the batch at a time: 1, 4, 8 or 16.
        tiles: that are multiplied with what is tabulated once.
        threads: parts that columns are dealt to.
        workspace: bytes in all.
        scratch: of them, what the scratch limit counts: all but copies of activations.
        parts: that the pixels of a convolution are dealt to; each has ``threads`` threads.
    """

    batch_tile: int
    tiles: int
    threads: int
    workspace: int
    scratch: int
    parts: int = 1


def steps(op: str, batch: int, placement: str) -> Steps | None:
    """The fastest steps, by a rough count, whose scratch the limit allows; or None."""
    limit = settings.scratch_bytes("cpu")
    batch = batch if op == "conv2d" else min(batch, 64)
    return _steps(op, batch, placement, limit, native.threads())


@lru_cache(maxsize=4096)
def _steps(op: str, batch: int, placement: str, limit: int, threads: int) -> Steps | None:
    able = [step for step in _choices(op, placement, threads) if step.scratch <= limit]
    return min(able, key=lambda step: _cost(op, batch, placement, step), default=None)


def _cost(op: str, batch: int, placement: str, step: Steps) -> float:
    """Time of a call, in tables: each pass makes them once, and each lane adds and multiplies."""
    lanes = step.batch_tile * step.tiles
    lane = 0.05 + 0.6 / gain(placement, lanes)
    if op == "conv2d":  # a part is whole tiles, and only those that are there are multiplied
        tiles = -(-batch // (step.batch_tile * step.parts))
        waits = 1 if step.threads == 1 else 3  # threads of one part meet three times a pass
        return (-(-tiles // step.tiles) * waits + tiles * step.batch_tile * lane) / step.threads
    return -(-batch // lanes) * (1 + lanes * lane) / step.threads


def smallest(op: str, placement: str) -> int:
    """Scratch in bytes of the smallest steps."""
    return min(step.scratch for step in _choices(op, placement, 1))


def _choices(op: str, placement: str, threads: int) -> list[Steps]:
    p = parse(placement)
    law: Any = native.layer_law(p.law)
    workspace = getattr(law, f"{op}_workspace")
    out = []
    while True:
        for tile, tiles in _TILES:
            if op == "conv2d":
                out += _conv2d_choices(workspace, threads, tile, tiles)
                continue
            total, activations = workspace(p.shape[1], threads, tile, tiles)
            out.append(Steps(tile, tiles, threads, total, total - activations))
        if threads == 1:
            return out
        threads = -(-threads // 2)


def _conv2d_choices(workspace: Any, threads: int, tile: int, tiles: int) -> list[Steps]:
    """Threads dealt to pixels first, since those need not wait for each other."""
    out, parts = [], threads
    while True:
        of_part, activations = workspace(threads // parts, tile, tiles)
        of_part = -(-of_part // _ALIGNMENT) * _ALIGNMENT
        total, scratch = parts * of_part, parts * (of_part - activations)
        out.append(Steps(tile, tiles, threads // parts, total, scratch, parts))
        if parts == 1:
            return out
        parts = -(-parts // 2)


def check(op: str, placement: str, batch: int) -> Steps:
    """The steps of a call.

    Raises:
        RuntimeError: the weight cannot be read here, or the scratch limit is too small.
    """
    reason = unsupported(op, placement)
    if reason:
        raise RuntimeError(f"backend: got 'cpu' for {op}, which cannot run: {reason}")
    step = steps(op, batch, placement)
    if step is None:
        raise RuntimeError(
            f"scratch_limit: got {settings.scratch_bytes('cpu')} bytes, wanted at least "
            f"{smallest(op, placement)} for the cpu back end of a virtual weight "
            f"{list(parse(placement).shape)}"
        )
    return step


def multiplications_of_row(op: str, placement: str, batch: int) -> int | None:
    """For one row of x; None where the scratch limit is too small."""
    step = steps(op, batch, placement)
    if step is None:
        return None
    return multiplications.of_row(placement, step.batch_tile * step.tiles)
