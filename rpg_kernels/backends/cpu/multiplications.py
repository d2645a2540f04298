"""How often the factored CPU kernels multiply a weight with an activation.

They take a column of blocks in pieces of rows. A piece of more rows than the ring has slots is
multiplied slot by slot, any other row by row. Where pieces end, ``csrc/cpu/walk.h`` says, and the
buffers of its callers. Multiplications with the padding of blocks and of vectors of the batch are
not counted.
"""

from __future__ import annotations

from functools import lru_cache

from rpg_kernels.law.placement import parse

RING_ROWS = 1 << 14  # rows of a column that are tabulated together
RING_SUMS = 1 << 16  # floats of sums, of all rows of x that are multiplied at once


@lru_cache(maxsize=4096)
def of_row(placement: str, lanes: int) -> int:
    """Multiplications for one row of the batch, or one pixel.

    Args:
        placement: of a weight that they read.
        lanes: rows of x that are multiplied at once.

    Example:
        >>> from rpg_kernels.law.generator import Generator
        >>> from rpg_kernels.law.placement import Placement
        >>> ring = Generator(1024, 64, "vector")
        >>> of_row(Placement(ring, 0, 0, (4096, 64), 1.0).to_json(), 16)
        65536
        >>> 4096 * 64 // 65536
        4
    """
    p = parse(placement)
    law, strip, products = p.law, RING_SUMS // lanes, 0
    for band in range(0, law.rows, law.rows_per_band):
        end = min(band + law.rows_per_band, law.rows)
        for first in range(band, end, strip):
            after = min(first + strip, end)
            for row in range(first, after, RING_ROWS):
                products += min(RING_ROWS, after - row, law.slots)
    return products * (p.matrix.numel // p.matrix.rows)
