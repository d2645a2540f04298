"""When the compiled CPU kernels multiply with tiles of a gathered weight, and in which steps."""

from __future__ import annotations

import torch

from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.cpu.lanes import PRODUCTS, Family
from rpg_kernels.backends.cpu.processor import dense_gain
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import Placement, parse

BLOCKS = (16, 32, 64, 128)
# A tile is gathered once for so many rows of x.
_MOST_LANES, _LEAST_LANES = 256, 16
# Dense products in 16 bits are faster than these in fp32 where the processor has instructions for
# them, beyond so many rows of x.
LOW_BATCH = 32


class Tiles(Family):
    """Every row has products of its own; a tile of Ŵ is gathered and multiplied as a dense one."""

    name = "tile_linear"

    def unsupported(self, op: str, placement: str) -> str:
        """Why a product with a weight cannot run here, or "".

        Example:
            >>> p = Placement(Generator(100, 4, "vector"), 0, 0, (6, 16), 1.0)
            >>> TILES.unsupported("linear", p.to_json())
            'the CPU kernels gather blocks of 16 to 128 elements, not of 4'
        """
        p = parse(placement)
        if op not in PRODUCTS:
            return f"the CPU kernels gather no weights for {op}"
        if not isinstance(p.generator, Generator):
            return "the CPU kernels read weights of a packing law, not of a table"
        if p.matrix.block not in BLOCKS:
            return f"the CPU kernels gather blocks of 16 to 128 elements, not of {p.matrix.block}"
        return ""

    def lanes(self, op: str, p: Placement, batch: int) -> list[int]:
        """Powers of two from what holds the batch."""
        most = min(_MOST_LANES, max(_LEAST_LANES, 1 << (batch - 1).bit_length()))
        return [most >> i for i in range((most // _LEAST_LANES).bit_length())]

    def suits(self, op: str, dtype: torch.dtype, batch: int, placement: str) -> bool:
        """Where no other kernels do."""
        return True

    def faster(
        self,
        op: str,
        dtype: torch.dtype,
        batch: int,
        placement: str,
        bank_dtype: torch.dtype | None = None,
    ) -> bool:
        """Unless dense products have instructions that these have not."""
        return batch <= LOW_BATCH or dense_gain(dtype) == 1

    def multiplications(self, op: str, placement: str, stored: StoredValues | None = None) -> int:
        """Those of the dense product."""
        rows, columns = parse(placement).shape
        return int(rows * columns)

    def what(self, placement: str) -> str:
        """That nothing is shared."""
        return "tiles of the weight are gathered and multiplied, as few rows share a slot"


TILES = Tiles()
