"""The unit law: the packing law for banks whose slots are read several times close together.

A *unit* is some rows, and some taps of a convolution, of one channel block. All its positions read
one *window*, consecutive slots of the ring, and each slot of it ``laps`` times. Positions that read
the same slot share its product with x, so a layer needs 1/laps of the dense multiplications. Units
are sized to the layer. ``docs/unit_law.md`` is the specification, and this file is the definition
in PyTorch: int64 tensors hold uint32 values. For one layer, whose rows are cut in *octets* of 8::

    i      = the octet's number in its unit, tap by tap
    use    = first use of the unit + shuffle(i)     # uses count the ring's octets, laps at a time
    octet  = use / laps
    slot   = (8 * octet + residue(row of the octet)) mod slots
    sign   = a bit of sign_word(position)

Uses are numbered through all layers and never wrapped: every octet of the ring is used ``laps``
times, then the next. ``shuffle`` is another permutation in each unit. The 8 rows of an octet read 8
neighbouring slots, in an order of their own.

This is law version 3, fixed by golden vectors: its values never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from rpg_kernels import _checks
from rpg_kernels.law.geometry import VirtualMatrix
from rpg_kernels.law.ring import MAX_BAND, LayerLaw, Permutation, sign_word

UNIT_LAW = 3  # version of this law
OCTET = 8  # rows that read neighbouring slots
MAX_LAPS = 64
MAX_WINDOW = 4096
MAX_UNIT = 2**10  # octets of a unit that is aimed at; the largest has twice as many
MAX_START = 2**62  # in elements
MAX_BLOCKS = MAX_BAND // OCTET  # of a row
WINDOW, WINDOW_OF_TAPS = 256, 64  # slots that are aimed at: of units of one tap, and of several

_ROUNDS = 16
# Numbers of words beyond those of signs: of an octet, of a column, of a unit's round 0.
_OCTET_WORD, _TURN_WORD, _ROUND_WORD = 16, 17, 18
_M16 = 0xFFFF


def check_windows(window: int | None, laps: int) -> None:
    """Refuse windows and laps that the law does not know.

    Args:
        window: slots that the law aims at in a window, a multiple of 8 from 8 to 4096; None for
            its own choice.
        laps: times that a unit reads each slot of its window, 1 to 64.

    Raises:
        TypeError, ValueError: with the argument, what was got and what was wanted.

    Example:
        >>> check_windows(None, 4)
        >>> check_windows(100, 4)
        Traceback (most recent call last):
        ValueError: window: got 100, wanted a multiple of 8 from 8 to 4096
    """
    _checks.integer("laps", laps, 1, MAX_LAPS)
    if window is None:
        return
    _checks.integer("window", window, -(2**63), 2**63)
    if not OCTET <= window <= MAX_WINDOW or window % OCTET:
        raise _checks.fail("window", window, f"a multiple of 8 from 8 to {MAX_WINDOW}")
    if window // OCTET * laps > MAX_UNIT:
        most = MAX_UNIT // laps * OCTET
        raise _checks.fail("window", window, f"at most {most} slots with {laps} laps")


def taps_of_unit(taps: int, laps: int) -> int:
    """Taps of a unit where nothing else is asked for: the largest divisor of all, up to ``laps``.

    Example:
        >>> taps_of_unit(9, 4), taps_of_unit(9, 16), taps_of_unit(25, 4), taps_of_unit(1, 4)
        (3, 9, 1, 1)
    """
    return max(t for t in range(1, min(taps, laps) + 1) if taps % t == 0)


@lru_cache(maxsize=4096)
def groups_of(octets: int, taps: int, laps: int, window: int | None) -> int:
    """Into how many groups of octets the rows are cut, each a unit for every taps of a column.

    Units of ``window`` slots are aimed at. Those that fill whole windows exactly are preferred,
    from half to twice that size: where several do, the one that is nearest by ratio, then the
    larger.

    Args:
        octets: of rows.
        taps, laps: of a unit.
        window: slots that are aimed at, or None.

    Example:
        >>> [groups_of(rows // 8, 1, 4, None) for rows in (64, 1000, 4096, 11008)]
        [1, 1, 4, 8]
        >>> groups_of(512 // 8, 9, 9, None), groups_of(512 // 8, 3, 4, None)
        (8, 8)
    """
    if window is None:
        window = WINDOW if taps == 1 else WINDOW_OF_TAPS
    aim, total = min(window // OCTET * laps, MAX_UNIT), octets * taps
    exact = [
        size
        for size in range(min(octets, 2 * aim // taps), 0, -1)
        if 2 * size * taps >= aim and octets % size == 0 and size * taps % laps == 0
    ]
    if exact:
        # Quotients of small whole numbers: as floats they are equal exactly where they are equal.
        nearest = min(exact, key=lambda size: _ratio(size * taps, aim))
        return octets // nearest
    return min(octets, max(1, (2 * total + aim) // (2 * aim)))


def _ratio(a: int, b: int) -> float:
    return max(a, b) / min(a, b)


def alignment(block: int, laps: int) -> int:
    """What a layer's start must be a multiple of, in elements: it begins with an octet's first use.

    Example:
        >>> alignment(64, 4)
        2048
    """
    return OCTET * block * laps


def span_of(matrix: VirtualMatrix) -> int:
    """Uses in elements that a layer takes: its rows are padded to octets.

    Example:
        >>> span_of(VirtualMatrix((10, 64), 64)), 10 * 64
        (1024, 640)
    """
    return -(-matrix.rows // OCTET) * OCTET * matrix.blocks * matrix.block


def place(shape: Sequence[int], granularity: int, laps: int, cursor: int) -> tuple[int, int]:
    """The addresses in elements where a layer starts and ends; the next cursor is the end.

    Example:
        >>> place((100, 64), 64, 4, cursor=0), place((16, 128), 64, 4, cursor=6656)
        ((0, 6656), (8192, 10240))
    """
    matrix = VirtualMatrix(tuple(shape), granularity)
    step = alignment(matrix.block, laps)
    start = -(-cursor // step) * step
    return start, start + span_of(matrix)


def check_layer(start: int, matrix: VirtualMatrix, taps: int, laps: int) -> None:
    """Refuse a layer that the law cannot lay out.

    Args:
        start: the layer's address, in elements.
        matrix: the layer.
        taps, laps: of a unit.

    Raises:
        TypeError, ValueError: out of range, not aligned, an end beyond 2^63, or taps that do not
            divide those of the layer.

    Example:
        >>> check_layer(2048, VirtualMatrix((100, 64), 64), taps=1, laps=4)
        >>> check_layer(64, VirtualMatrix((100, 64), 64), taps=1, laps=4)
        Traceback (most recent call last):
        ValueError: start: got 64, wanted a multiple of 2048 elements
    """
    _checks.integer("start", start, 0, MAX_START)
    step = alignment(matrix.block, laps)
    if start % step:
        raise _checks.fail("start", start, f"a multiple of {step} elements")
    if matrix.blocks > MAX_BLOCKS:
        raise _checks.fail("shape", matrix.shape, f"at most {MAX_BLOCKS} blocks per row")
    end = start + span_of(matrix)
    if end >= 2**63:
        got = f"{matrix.shape} from address {start}"
        raise _checks.fail("shape", got, f"an end below 2^63, not {end}")
    _checks.integer("taps", taps, 1, min(matrix.runs, laps))
    if matrix.runs % taps:
        raise _checks.fail("taps", taps, f"a divisor of the layer's {matrix.runs}")


@dataclass(frozen=True)
class UnitLaw(LayerLaw):
    """The unit law of one layer: N rows of ``blocks`` blocks, on a ring of ``slots`` slots.

    Args:
        seed, layer, rows, blocks, granularity, slots, reflect, permute: as LayerLaw; permute False
            leaves columns, groups and units in order.
        start: the layer's address in uses of octets, not wrapped; a multiple of ``laps``.
        laps: times that a unit reads each slot of its window.
        window: slots of a window that are aimed at; None for the law's own choice.
        runs: taps of the layer, each of blocks / runs blocks.
        taps: of a unit; divides ``runs``.

    Example:
        >>> law = UnitLaw(0, 0, 1024, 16, 64, 704, 0, "vector", True, laps=4, window=None,
        ...               runs=1, taps=1)
        >>> slots = law.slot(torch.arange(1024), torch.tensor(5))
        >>> slots.unique(return_counts=True)[1].unique(), len(slots.unique())
        (tensor([4]), 256)
    """

    laps: int
    window: int | None
    runs: int
    taps: int

    @cached_property
    def rows_per_band(self) -> int:
        """All rows, or the largest power of two of rows that stays within 2^31 positions."""
        if -(-self.rows // OCTET) * OCTET * self.blocks <= MAX_BAND:
            return self.rows
        return 1 << ((MAX_BAND // self.blocks).bit_length() - 1)

    @property
    def columns(self) -> int:
        """Of units: channel blocks times parts of the taps."""
        return self.blocks // self.taps

    def octets(self, band: int) -> int:
        """Octets of rows in a band; the last one may have fewer than 8."""
        rows = min(self.rows_per_band, self.rows - band * self.rows_per_band)
        return -(-rows // OCTET)

    def groups(self, band: int) -> int:
        """Groups of octets in a band: units of a column."""
        return groups_of(self.octets(band), self.taps, self.laps, self.window)

    def first(self, band: int) -> int:
        """The number of a band's first use."""
        return self.start + band * (self.rows_per_band // OCTET) * self.blocks

    def permutation(self, band: int) -> Permutation:
        """The bijection of a band's columns."""
        return Permutation(self.columns, self.seed, self.layer, band)

    def _word(self, x: Tensor, band: int, number: int) -> Tensor:
        return sign_word(x, self.seed, self.layer, band, number)

    def _turn(self, column: Tensor, band: int) -> Tensor:
        """The group that comes first in a column."""
        if not self.permute:
            return torch.zeros_like(column)
        word = self._word(column, band, _TURN_WORD)
        return word.mul_(self.groups(band)).bitwise_right_shift_(32)

    def _first_octet(self, group: Tensor, band: int) -> Tensor:
        """Groups differ by at most one octet; the larger come first."""
        size, larger = divmod(self.octets(band), self.groups(band))
        return group * size + group.clamp(max=larger)

    def _group_of(self, octet: Tensor, band: int) -> Tensor:
        size, larger = divmod(self.octets(band), self.groups(band))
        of_smaller = (octet - larger * (size + 1)).div_(size, rounding_mode="floor") + larger
        return torch.where(octet < larger * (size + 1), octet // (size + 1), of_smaller)

    def _size(self, group: Tensor, band: int) -> Tensor:
        """Octets of rows of a group."""
        size, larger = divmod(self.octets(band), self.groups(band))
        return (group < larger).long() + size

    def _shuffle(
        self, x: Tensor, size: Tensor, unit: Tensor, band: int, *, inverse: bool
    ) -> Tensor:
        """A permutation of [0, size) for each unit: swap-or-not on 16-bit numbers.

        A round pairs x with (offset - x) mod size and swaps on the upper bit of an affine function
        of the larger one, with a factor and a summand of the unit.
        """
        if not self.permute:
            return x.clone()
        rounds = range(_ROUNDS)
        for j in reversed(rounds) if inverse else rounds:
            word = self._word(unit, band, _ROUND_WORD + j)
            offset = (word >> 16).mul_(size).bitwise_right_shift_(16)
            low = word.bitwise_and_(_M16)
            summand = (low << 8 | low >> 8).bitwise_and_(_M16)
            partner = offset - x
            partner += (partner >> 63).bitwise_and_(size)
            larger = torch.maximum(x, partner)
            swap = larger.mul_(low | 1).add_(summand).bitwise_right_shift_(15).bitwise_and_(1)
            x = x + swap * (partner - x)
        return x

    def number(self, n: Tensor, b: Tensor, band: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(column, group, i, q): of row n of the band and block b.

        ``i`` is the octet's number in its unit, tap by tap; ``q`` its number in the band.
        """
        run_blocks = self.blocks // self.runs
        octets, taps = self.octets(band), self.taps
        tap, channel = b.div(run_blocks, rounding_mode="floor"), b % run_blocks
        column = tap.div(taps, rounding_mode="floor") * run_blocks + channel
        octet = n.div(OCTET, rounding_mode="floor")
        group = self._group_of(octet, band)
        first = self._first_octet(group, band)
        i = (tap % taps) * self._size(group, band) + octet - first
        return column, group, i, (column * octets + first) * taps + i

    def unit(self, column: Tensor, group: Tensor, band: int) -> tuple[Tensor, Tensor]:
        """(first use, octets) of units; uses are counted from the band's first."""
        first = self._first_octet(group, band)
        turned = (first - self._first_octet(self._turn(column, band), band)) % self.octets(band)
        place = self.permutation(band).forward(column.clone()) if self.permute else column
        first = (place * self.octets(band) + turned) * self.taps
        return first, self._size(group, band) * self.taps

    def use(self, column: Tensor, group: Tensor, i: Tensor, band: int) -> Tensor:
        """The use of octet i of a unit, counted from the band's first."""
        first, size = self.unit(column, group, band)
        number = column * self.groups(band) + group
        return first + self._shuffle(i, size, number, band, inverse=False)

    def slot(self, n: Tensor, b: Tensor) -> Tensor:
        """Slot of each position.

        Args:
            n, b: int64 row and block numbers, broadcast against each other.

        Returns:
            int64 slots in [0, slots), of the broadcast shape.
        """
        n, b = torch.broadcast_tensors(n, b)
        out = torch.empty_like(n, memory_format=torch.contiguous_format)
        for band, mask in self._by_band(n):
            chosen = ... if mask is None else mask
            row = n[chosen] - band * self.rows_per_band
            column, group, i, q = self.number(row, b[chosen], band)
            use = self.use(column, group, i, band).add_(self.first(band))
            octet = use.div_(self.laps, rounding_mode="floor")
            row = row % OCTET
            if self.permute:
                row = _residue(row, self._word(q, band, _OCTET_WORD))
            out[chosen] = (octet * OCTET + row) % self.slots
        return out

    def sign_words(self, n: Tensor, b: Tensor) -> Tensor:
        """uint32 sign words (in int64) of each position: broadcast shape + [words].

        With reflect ``"vector"`` there is one word, and its bit 31 is the sign: bit ``p mod 32`` of
        a word that 32 positions share.
        """
        n, b = torch.broadcast_tensors(n, b)
        words = 1 if self.reflect == "vector" else self.words
        out = n.new_empty((*n.shape, words))
        for band, mask in self._by_band(n):
            chosen = ... if mask is None else mask
            row = n[chosen] - band * self.rows_per_band
            p = self.number(row, b[chosen], band)[3].mul_(OCTET).add_(row % OCTET)
            for w in range(words):
                if self.reflect == "vector":
                    shared = sign_word(p >> 5, self.seed, self.layer, band, 0)
                    word = shared.bitwise_left_shift_(31 - (p & 31)).bitwise_and_(0xFFFFFFFF)
                else:
                    word = sign_word(p, self.seed, self.layer, band, w)
                out[..., w][chosen] = word
        return out

    def positions(self, slot: int) -> Tensor:
        """The inverse: every position that reads a slot.

        Returns:
            int64 [uses, 2] of (row, block), in the order of bands, then of uses.

        Raises:
            IndexError: slot is not in [0, slots).
        """
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot: got {slot}, wanted 0 to {self.slots - 1}")
        found = []
        for band in range(-(-self.rows // self.rows_per_band)):
            first, total = self.first(band), self.octets(band) * self.blocks
            low, high = first // self.laps, (first + total - 1) // self.laps + 1  # octets
            nearest = OCTET * low + (slot - OCTET * low) % self.slots
            read = torch.arange(nearest, max(nearest, OCTET * high), self.slots)
            use = (read // OCTET * self.laps - first)[:, None] + torch.arange(self.laps)
            inside = (use >= 0) & (use < total)
            found.append(
                self._at(use[inside], (read % OCTET)[:, None].expand_as(use)[inside], band)
            )
        return torch.cat(found)

    def _at(self, use: Tensor, place: Tensor, band: int) -> Tensor:
        """Rows and blocks [count, 2] that are a use of a band and read a place of its octet."""
        octets, taps, run_blocks = self.octets(band), self.taps, self.blocks // self.runs
        column = use.div(octets * taps, rounding_mode="floor")
        rest = use - column * octets * taps
        column = self.permutation(band).inverse(column) if self.permute else column
        turn = self._first_octet(self._turn(column, band), band)
        rest = (rest + turn * taps) % (octets * taps)
        group = self._group_of(rest.div(taps, rounding_mode="floor"), band)
        first, size = self._first_octet(group, band), self._size(group, band)
        unit = column * self.groups(band) + group
        i = self._shuffle(rest - first * taps, size * taps, unit, band, inverse=True)
        q = (column * octets + first) * taps + i
        row = _row_of_residue(place, self._word(q, band, _OCTET_WORD)) if self.permute else place
        n = (first + i % size) * OCTET + row
        tap = column.div(run_blocks, rounding_mode="floor") * taps + i.div(
            size, rounding_mode="floor"
        )
        found = torch.stack(
            (n + band * self.rows_per_band, tap * run_blocks + column % run_blocks), -1
        )
        rows = min(self.rows_per_band, self.rows - band * self.rows_per_band)
        return found[n < rows]  # the rest is padding


def _residue(row: Tensor, word: Tensor) -> Tensor:
    """What row of an octet reads which of its 8 slots: bits of the octet's word say."""
    return ((row ^ word >> 29) - word).mul_(word >> 3 | 1).bitwise_and_(OCTET - 1)


def _row_of_residue(place: Tensor, word: Tensor) -> Tensor:
    """The inverse: an odd number is its own inverse modulo 8."""
    return (place * (word >> 3 | 1)).add_(word).bitwise_and_(OCTET - 1) ^ word >> 29
