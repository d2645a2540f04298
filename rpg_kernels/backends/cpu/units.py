"""What the compiled CPU kernels run of the unit law, when they are taken, and in which steps."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from rpg_kernels import native
from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.cpu.lanes import PRODUCTS, Family
from rpg_kernels.backends.cpu.processor import DOT_GAIN, TILE_GAIN, dense_gain
from rpg_kernels.backends.cpu.selection import elements_of_blocks, groups_with_rows
from rpg_kernels.law.placement import Placement, parse
from rpg_kernels.law.unit import OCTET, UnitLaw

BLOCKS = (16, 32, 64, 128)
FEW = 4  # rows of x up to which the bank is read as it is stored
FEW_BLOCK = 32  # that this takes
# Up to so many rows of x the bank's traffic decides; beyond them sharing must pay for additions,
# and for dense products in 16 bits where the processor has instructions for them.
SMALL_BATCH, GAIN = 32, 1.5
# By how much pairs make the forward faster where the processor multiplies them: a prediction. They
# halve the products, and neither the additions nor the copies.
PAIRS_GAIN = 1.5
# Backward the sums of so many rows, rounded to bfloat16 as pairs want them, cost what rounding the
# weight does, to two hundredths; those of fewer cost more (docs/decisions.md).
ROUNDED_READS = 3
FORWARD = ("linear", "conv2d")
# Where dense products in bfloat16 are those of tiles (AMX) the reference multiplies fast, but has
# to unpack. Where so many rows share a product these kernels are faster: forward up to so many rows
# of x for each row that shares it, on one thread and on several; bank gradients also where more
# share, input gradients always.
TILED_READS, TILED_SHARED = 2, 8
TILED_BATCH = (40, 128)
_MOST_LANES, _LEAST_LANES = 64, 16


class Units(Family):
    """Rows that read one slot share its product with x."""

    name = "unit_linear"

    def unsupported(self, op: str, placement: str) -> str:
        """Why a product with a weight of the unit law cannot run here, or "".

        Example:
            >>> from rpg_kernels.law.generator import Generator
            >>> p = Placement(Generator(100, 8, "vector", laps=2), 0, 0, (6, 16), 1.0)
            >>> UNITS.unsupported("linear", p.to_json())
            'products of law 3 are shared for blocks of 16 to 128 elements, not of 8'
        """
        p = parse(placement)
        if not isinstance(p.law, UnitLaw):
            return "only weights of law 3 have units"
        if op not in PRODUCTS:
            return f"the CPU kernels have no {op} of law 3"
        if p.matrix.block not in BLOCKS:
            return (
                "products of law 3 are shared for blocks of 16 to 128 elements, "
                f"not of {p.matrix.block}"
            )
        if p.law.rows_per_band < p.law.rows:
            return "products of law 3 are shared in weights of at most 2^31 blocks"
        if p.law.taps > 1:
            return "products of taps are shared by convolutions alone"
        return ""

    def lanes(self, op: str, p: Placement, batch: int) -> list[int]:
        """Powers of two; up to ``FEW`` rows all of them."""
        if self._few(op, p, batch):
            return [1 << (batch - 1).bit_length()]
        most = min(_MOST_LANES, max(_LEAST_LANES, 1 << (batch - 1).bit_length()))
        return [most >> i for i in range((most // _LEAST_LANES).bit_length())]

    def pairs(
        self, op: str, dtype: torch.dtype, bank_dtype: torch.dtype, batch: int, placement: str
    ) -> bool:
        """See ``pairs``; the kernel for few rows knows none."""
        found = pairs(op, dtype, bank_dtype, placement)
        return found and not self._few(op, parse(placement), batch)

    @staticmethod
    def _few(op: str, p: Placement, batch: int) -> bool:
        """Whether the kernel for few rows runs a call."""
        return op == "linear" and batch <= FEW and p.matrix.block % FEW_BLOCK == 0

    def suits(self, op: str, dtype: torch.dtype, batch: int, placement: str) -> bool:
        """Where rows share enough, or the batch is small."""
        return batch <= SMALL_BATCH or reads(placement) >= GAIN

    def faster(
        self,
        op: str,
        dtype: torch.dtype,
        batch: int,
        placement: str,
        bank_dtype: torch.dtype | None = None,
    ) -> bool:
        """Where rows share more than dense products in 16 bits are faster."""
        if batch <= SMALL_BATCH:
            return True
        if dense_gain(dtype) == TILE_GAIN and _takes_pairs(dtype, bank_dtype):
            return _faster_beside_tiles(op, batch, reads(placement))
        return reads(placement) >= least_reads(op, dtype, bank_dtype, placement)

    def multiplications(self, op: str, placement: str, stored: StoredValues | None = None) -> int:
        """See ``multiplications``."""
        return multiplications(placement, stored)

    def what(self, placement: str) -> str:
        """How many rows share a product."""
        shared = reads(placement)
        return f"the product of a slot is shared by the rows that read it, {shared:.3g} on average"


def _faster_beside_tiles(op: str, batch: int, shared: float) -> bool:
    if shared < TILED_READS:
        return False
    if op == "linear_input_grad" or batch <= TILED_BATCH[native.threads() > 1] * shared:
        return True
    return op == "linear_bank_grad" and shared >= TILED_SHARED


def _takes_pairs(dtype: torch.dtype, bank_dtype: torch.dtype | None) -> bool:
    """Whether there is an instruction for products of such activations and such a bank."""
    banks = (None, torch.bfloat16, torch.float32)
    return dtype == torch.bfloat16 and bank_dtype in banks and native.multiplies_pairs()


UNITS = Units()


def pairs(op: str, dtype: torch.dtype, bank_dtype: torch.dtype | None, placement: str) -> bool:
    """Whether a call multiplies pairs: in bfloat16 where the processor has an instruction for them.

    A bank in float32, as under autocast, is rounded while it is read, as autocast rounds a dense
    weight.

    Args:
        op: operator name.
        dtype: of the activations.
        bank_dtype: of the bank, or of its gradient; None is that of the activations.
        placement: of the weight.
    """
    if not _takes_pairs(dtype, bank_dtype):
        return False
    return op in FORWARD or reads(placement) >= ROUNDED_READS


def least_reads(
    op: str, dtype: torch.dtype, bank_dtype: torch.dtype | None, placement: str
) -> float:
    """How many rows must share a product, beyond small batches."""
    gain = dense_gain(dtype)
    # Where dense products are those of tiles (AMX), additions count more than any product.
    ours = gain == DOT_GAIN and pairs(op, dtype, bank_dtype, placement)
    return GAIN * gain / (PAIRS_GAIN if ours else 1.0)


@lru_cache(maxsize=4096)
def reads(placement: str) -> float:
    """How many selected weights share a product, on average over the windows of a layer.

    Example:
        >>> from rpg_kernels.law.generator import Generator
        >>> g = Generator(1024, 64, "vector", laps=4)
        >>> p = Placement(g, 0, 0, (4096, 64), 1.0)
        >>> reads(p.to_json()), reads(p.select(0, range(0, 4096, 2)).to_json())
        (4.0, 2.0)
    """
    return parse(placement).numel / multiplications(placement)


def _windows(law: UnitLaw, columns: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The first octet of the ring, unwrapped, and the number of octets in windows of units of some
    columns and groups, ``[columns, groups]``; counted from where the layer begins."""
    column, group = columns.repeat_interleave(len(groups)), groups.repeat(len(columns))
    use, size = law.unit(column, group, 0)
    before = use % law.laps  # a layer begins with an octet's first use
    octets = (before + size + law.laps - 1).div(law.laps, rounding_mode="floor")
    first = use.div(law.laps, rounding_mode="floor")
    return first.view(len(columns), len(groups)), octets.view(len(columns), len(groups))


def slots_multiplied(
    law: UnitLaw, columns: Tensor, groups: Tensor, stored: StoredValues | None
) -> Tensor:
    """Slots in windows of units of some columns and groups, less those that a stored bank does not
    have, summed over the groups."""
    octet, octets = _windows(law, columns, groups)
    count = octets * OCTET
    if stored is None or stored.places is None:
        return count.sum(1)
    present = (stored.places >= 0).cpu().repeat_interleave(law.slots // len(stored))
    until = torch.cat((torch.zeros(1, dtype=torch.int64), present.repeat(2).cumsum(0)))
    first = (octet + law.start // law.laps % law.slots).mul(OCTET) % law.slots
    rounds, rest = count.div(law.slots, rounding_mode="floor"), count % law.slots
    return (rounds * until[law.slots] + until[first + rest] - until[first]).sum(1)


def multiplications(placement: str, stored: StoredValues | None = None) -> int:
    """For one row of the batch or output pixel; the padding of blocks, of images and of vectors of
    the batch is not counted.

    Forward all slots of a window are multiplied that the bank has; backward those that are read,
    which are others only where the rows are no multiple of 8 or not all selected: this is not
    counted either.

    Args:
        placement: of the weight.
        stored: the bank, where its values are stored in fewer bytes.

    Example:
        >>> from rpg_kernels.law.generator import Generator
        >>> g = Generator(1024, 64, "vector", laps=4)
        >>> p = Placement(g, 0, 0, (4096, 64), 1.0)
        >>> multiplications(p.to_json()), multiplications(p.select(1, range(0, 64, 2)).to_json())
        (65536, 32768)
    """
    plain = stored is None or stored.places is None
    return _of_whole_bank(placement) if plain else _multiplications(placement, stored)


@lru_cache(maxsize=4096)
def _of_whole_bank(placement: str) -> int:
    return _multiplications(placement, None)


def _multiplications(placement: str, stored: StoredValues | None) -> int:
    p = parse(placement)
    law = p.law
    assert isinstance(law, UnitLaw)
    columns = torch.arange(law.columns)
    slots = slots_multiplied(law, columns, groups_with_rows(p), stored)
    return int((slots * elements_of_blocks(p)[columns % p.matrix.run_blocks]).sum())
