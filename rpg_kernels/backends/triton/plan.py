"""What a call prepares on the host: the bank as an operand, rows of a launch, entries in scratch.

What grows with a layer comes from ``scratch`` and stays within the scratch limit. Not counted:
the law's words, 768 bytes per layer and band, which are kept, and copies of a bank that is not
contiguous.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rpg_kernels import _checks, settings
from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.triton import entry_table, stored, unit_law
from rpg_kernels.backends.triton import law as law_1
from rpg_kernels.backends.triton.config import products_read_shared, whole, whole_weight
from rpg_kernels.backends.triton.rules import interpreted
from rpg_kernels.law.generator import TableGenerator
from rpg_kernels.law.placement import Placement
from rpg_kernels.law.ring import LayerLaw
from rpg_kernels.law.unit import UnitLaw

if interpreted():
    from rpg_kernels.backends.triton import interpreter

    interpreter.repair()

INT32_MAX = 2**31 - 1
# A copy of the bank is made for a layer that reads so many weights for each of its elements.
# Predicted: a copy takes 2 ps per element, converting in the tile 0.12 ps per weight.
COPY_FROM = 16
MAX_ROWS = 1 << 30  # of the batch in one launch, so that their numbers stay int32


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory that a call frees before it returns; callers count its bytes first."""
    return torch.empty(shape, dtype=dtype, device=device)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@dataclass(frozen=True)
class Operand:
    """The bank as kernels read it.

    Args:
        ring: codes ``[slots, block]``, or ``[2 * slots, block]`` holding [v, -v].
        sign: how the sign of a weight is found: "none", "folded", "entry" or "element".
        pairs: two elements may be read as one aligned uint32.
        left: bytes of the scratch limit that remain.
        scale: what products with ``ring`` are still to be multiplied by.
    """

    ring: stored.Ring
    sign: str
    pairs: bool
    left: int
    scale: float


def sign_kind(p: Placement) -> str:
    """Where a placement's signs are when nothing is folded."""
    if isinstance(p.generator, TableGenerator):
        return "entry"
    kinds = {"none": "none", "vector": "entry", "element": "element"}
    return kinds[p.generator.reflect]


def operand(bank: Tensor, p: Placement, dtype: torch.dtype, m: int, block_m: int) -> Operand:
    """The bank in the dtype of the product, with vector signs folded, where that pays.

    A copy is made when the dtype differs, or to fold the signs when several tiles of the batch
    read them; it holds [v, -v] under "vector". It is at most 4 bytes per degree of freedom in 16
    bits, counts as a bank and not as scratch, and is freed after the call. There is none where
    tiles read few weights for each element of the bank (COPY_FROM), or where scratch is forbidden:
    then tiles convert and sign what they read. A bank that is kept in fewer bytes is never copied.

    Args:
        bank: ``[slots, granularity]``, or StoredValues.
        p: the weight.
        dtype: of the product.
        m: rows of the batch.
        block_m: of a tile of the batch; tiles read the same weights one after the other.
    """
    left, sign = settings.scratch_bytes(bank.device.type), sign_kind(p)
    whole_ring = stored.ring_of(bank, p.matrix.block)
    if isinstance(bank, StoredValues):
        return Operand(whole_ring, sign, False, left, p.scale)
    ring = whole_ring.codes
    foldable = sign == "entry" and not isinstance(p.generator, TableGenerator)
    # The reference rounds scale * w, and fp16 may hold that but not w.
    scale_of_copy = p.scale if dtype != bank.dtype else 1.0
    tiles = cdiv(whole(m), block_m)
    if left > 0 and whole_weight(p.numel) * tiles >= COPY_FROM * ring.numel():
        if foldable and (tiles > 1 or dtype != bank.dtype):
            copy = ring.new_empty((2 * ring.shape[0], ring.shape[1]), dtype=dtype)
            positive, negative = copy.chunk(2)
            _cast(ring, scale_of_copy, positive)
            torch.neg(positive, out=negative)
            ring, sign = copy, "folded"
        elif dtype != bank.dtype:
            ring = _cast(ring, scale_of_copy, ring.new_empty(ring.shape, dtype=dtype))
    low = ring.dtype == dtype and dtype.itemsize == 2
    pairs = low and sign in ("entry", "element") and ring.data_ptr() % 16 == 0
    pairs = pairs and products_read_shared(bank.device)  # mma.sync would reorder every pair
    scale = 1.0 if ring.dtype != bank.dtype else p.scale
    return Operand(stored.Ring(ring), sign, pairs, left, scale)


def _cast(ring: Tensor, scale: float, out: Tensor) -> Tensor:
    """out = scale * ring, rounded once."""
    return out.copy_(ring) if scale == 1.0 else torch.mul(ring, scale, out=out)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes a hundred times as long on the host."""
    return -(-a // b)


def unit(dtype: torch.dtype, *sizes: int) -> int:
    """Elements in 16 bytes where all sizes are multiples of that, otherwise 1.

    Triton itself looks for multiples of 16 only, so that it would read rows of 1000 one by one.

    Example:
        >>> unit(torch.float16, 1000, 8), unit(torch.float16, 1000, 4), unit(torch.float32, 4)
        (8, 1, 4)
    """
    whole = 16 // dtype.itemsize
    return whole if all(size % whole == 0 for size in sizes) else 1


def vectors(p: Placement, rows: Tensor | None, columns: Tensor | None) -> bool:
    """Whether a matrix product's operands and result are read and written 16 bytes at a time.

    Args:
        p: the weight.
        rows, columns: operands ``[batch, rows]`` and ``[batch, columns]``; None for the result,
            which is contiguous.
    """
    dtype = (columns if rows is None else rows).dtype  # type: ignore[union-attr]
    sizes = [*p.selected_shape, p.block_columns.first]
    for operand in (rows, columns):
        if operand is not None:
            if operand.stride(1) != 1 or operand.data_ptr() % 16:
                return False
            sizes.append(operand.stride(0))
    return unit(dtype, *sizes) > 1


def rows_that_fit(left: int, rows: int, blocks: int, block_n: int) -> int:
    """Rows of a launch whose entries, 4 bytes for each of ``blocks``, fit in ``left`` bytes.

    Whole tiles of ``block_n`` rows, spread evenly over the launches; 0 where not even one fits.

    Example:
        >>> rows_that_fit(16 << 20, 14336, 256, 128)
        14336
        >>> rows_that_fit(8 << 20, 14336, 256, 128)
        7168
    """
    fits = left // (4 * blocks)
    if fits >= rows:
        return rows
    fits -= fits % block_n
    if fits == 0:
        return 0
    even = -(-rows // -(-rows // fits))
    return min(fits, -(-even // block_n) * block_n)


@dataclass(frozen=True)
class LaunchRows:
    """Rows of one launch, all in one band of the law.

    Args:
        row: first row, counted from the selection's.
        rows: how many.
        row0: first row, counted from the band's.
        words: the law's vector, ``[192]``; of no meaning for a table.
        rounds: Feistel and swap-or-not rounds of the band, and LAW (entries.py).
        band: its number.
    """

    row: int
    rows: int
    row0: int
    words: Tensor
    rounds: tuple[int, int, int]
    band: int


def launches(p: Placement, device: torch.device, at_most: int = INT32_MAX) -> Iterator[LaunchRows]:
    """The selected rows in order, cut where the law's bands end and after ``at_most`` rows."""
    first, rows = p.selection[0]
    table = isinstance(p.generator, TableGenerator)
    height = first + rows if table else p.law.rows_per_band
    row = 0
    while row < rows:
        band, row0 = divmod(first + row, height)
        count = min(rows - row, height - row0, at_most)
        if table:
            yield LaunchRows(row, count, 0, _no_law(device), (0, 0, 1), band)
        else:
            yield LaunchRows(row, count, row0, *_law(p.law, band, device), band)
        row += count


def _law(law: LayerLaw, band: int, device: torch.device) -> tuple[Tensor, tuple[int, int, int]]:
    """(words, rounds) of a band, in any law."""
    if isinstance(law, UnitLaw):
        return unit_law.law_words(law, band, device), unit_law.rounds(law, band)
    return law_1.law_words(law, band, device), law_1.rounds(law, band)


@lru_cache(maxsize=64)
def _no_law(device: torch.device) -> Tensor:
    """What stands in for the law's vector where a table is read."""
    return torch.zeros(law_1.LAW_WORDS, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Entries:
    """Where a launch finds its entries: SOURCE, the tensor, and the stride between its blocks."""

    source: str
    tensor: Tensor
    stride: int

    def law_of(self, launch: LaunchRows, sign: str) -> dict[str, int]:
        """ROUNDS, SWAP_ROUNDS and LAW, those of law 1 without rounds where a kernel does not need
        them: it is not compiled anew for layers that differ in them alone.

        Args:
            launch: the launch.
            sign: how the kernel finds signs; those of elements need the position in the law.
        """
        rounds, swap_rounds, law = launch.rounds
        if self.source != "law":
            rounds, swap_rounds = 0, 0
            law = law if sign == "element" else 1
        return {"ROUNDS": rounds, "SWAP_ROUNDS": swap_rounds, "LAW": law}


def entries_of_table(table: Tensor, p: Placement, launch: LaunchRows) -> Entries:
    """A view of the table that begins at the launch's first row."""
    if not table.is_contiguous():
        raise _checks.fail("table", f"strides {table.stride()}", "a contiguous table")
    first = p.start + (p.selection[0][0] + launch.row) * p.matrix.blocks
    return Entries("table", table[first:], 0)


def entries_in_line(launch: LaunchRows) -> Entries:
    """The law, evaluated where it is needed."""
    return Entries("law", launch.words, 0)


def entries_in_scratch(
    p: Placement, launch: LaunchRows, low: int, count: int, sign: str
) -> Entries:
    """4 * rows * runs * count bytes of scratch: blocks low .. low + count of every run."""
    matrix = p.matrix
    out = scratch((matrix.runs * count, launch.rows), torch.int32, launch.words.device)
    runs = (matrix.runs, matrix.run_blocks)
    law = launch.rounds[2]
    entry_table.write(out, launch.words, launch.row0, matrix.blocks, low, sign, law, *runs)
    return Entries("scratch", out, launch.rows)
