"""How often the factored CPU kernels multiply a weight with an activation.

They take a column of blocks in pieces, rows that read one window or the whole ring. A piece of more
rows than slots is multiplied slot by slot, any other row by row. Where pieces end,
``csrc/cpu/walk.h`` says, and the buffers of its callers. Multiplications with the padding of blocks
and of vectors of the batch are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from rpg_kernels.law.placement import Placement, parse
from rpg_kernels.law.ring import LayerLaw
from rpg_kernels.law.window import STRIP, WindowLaw

RING_ROWS = 1 << 14  # rows of a column of a whole ring that are tabulated together
RING_SUMS = 1 << 16  # floats of sums, of all rows of x that are multiplied at once


class _Strip(NamedTuple):
    band: int
    row: int  # of the layer
    first: int  # positions of the strips before
    height: int


class _Piece(NamedTuple):
    block: int
    row: int  # of the layer
    rows: int


@lru_cache(maxsize=4096)
def of_row(placement: str, lanes: int, threads: int) -> int:
    """Multiplications for one row of the batch, or one pixel.

    Args:
        placement: of a weight that they read.
        lanes: rows of x that are multiplied at once.
        threads: parts that columns are dealt to.

    Example:
        >>> from rpg_kernels.law.generator import Generator
        >>> windows = Generator(1024, 64, "vector", window=256, laps=4)
        >>> of_row(Placement(windows, 0, 0, (4096, 64), 1.0).to_json(), 16, 1)
        65536
        >>> 4096 * 64 // 65536
        4
    """
    p = parse(placement)
    law, total = p.law, 0
    slots = law.window if isinstance(law, WindowLaw) else law.slots
    for piece in _pieces(p, lanes, threads):
        total += min(piece.rows, slots) * _elements(p, piece.block)
    return total


def _elements(p: Placement, block: int) -> int:
    """Elements of a block that are weights."""
    m = p.matrix
    return min(m.block, m.run - block % m.run_blocks * m.block)


def _pieces(p: Placement, lanes: int, threads: int) -> Iterator[_Piece]:
    law = p.law
    if isinstance(law, WindowLaw):
        return _pieces_by_column(law, threads)
    return _ring_pieces(law, RING_SUMS // lanes)


def _ring_pieces(law: LayerLaw, most: int) -> Iterator[_Piece]:
    for band in range(0, law.rows, law.rows_per_band):
        end = min(band + law.rows_per_band, law.rows)
        for strip in range(band, end, most):
            after = min(strip + most, end)
            for row in range(strip, after, RING_ROWS):
                for block in range(law.blocks):
                    yield _Piece(block, row, min(RING_ROWS, after - row))


def _strips(law: WindowLaw) -> list[_Strip]:
    out, first, band = [], 0, 0
    while band * law.rows_per_band < law.rows:
        row, left = band * law.rows_per_band, law.rows_in(band)
        while left:
            height = min(STRIP, 1 << (left.bit_length() - 1))
            out.append(_Strip(band, row, first, height))
            row, left, first = row + height, left - height, first + height * law.blocks
        band += 1
    return out


def _pieces_by_column(law: WindowLaw, threads: int) -> Iterator[_Piece]:
    """Of each thread's columns: units, at most a buffer at a time."""
    strips = _strips(law)
    for part in range(threads):
        begin, end = (_split(law, strips, which, threads) for which in (part, part + 1))
        for strip in strips:
            low, high = max(begin, strip.first), min(end, strip.first + _positions(law, strip))
            p, last = low - strip.first, high - strip.first
            in_band = strip.first - law.blocks * strip.band * law.rows_per_band
            while p < last:
                count = min(_unit_end(law, strip.band, in_band + p) - in_band, last, p + STRIP) - p
                yield from _cut(law, strip, p, count)
                p += count


def _positions(law: WindowLaw, strip: _Strip) -> int:
    return strip.height * law.blocks


def _split(law: WindowLaw, strips: list[_Strip], part: int, threads: int) -> int:
    """The position, at the beginning of a column, at which a part begins."""
    total = law.rows * law.blocks
    wanted = total * part // threads
    for strip in strips:
        if wanted < strip.first + _positions(law, strip):
            return strip.first + (wanted - strip.first) // strip.height * strip.height
    return total


def _unit_end(law: WindowLaw, band: int, p: int) -> int:
    """Where the unit of a band's position p ends; what is no unit ends with the band or before."""
    head = law.head(band)
    end = head if p < head else head + ((p - head) // law.cell + 1) * law.cell
    return min(end, law.rows_in(band) * law.blocks)


def _cut(law: WindowLaw, strip: _Strip, p: int, count: int) -> Iterator[_Piece]:
    """Positions of a strip that read one window, column by column."""
    end = p + count
    while p < end:
        block, row = divmod(p, strip.height)
        size = min(strip.height - row, end - p)
        yield _Piece(block, strip.row + row, size)
        p += size
