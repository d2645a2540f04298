"""The window law: the packing law for banks that are read window by window.

A window is consecutive slots, few enough for a GPU's shared memory or a CPU's first-level cache. A
*unit* of the virtual matrix, ``laps * window`` consecutive positions, draws all its slots from one
window. So memory is read ``laps`` times less often than in law 1, and at random only inside a
window. ``docs/window_law.md`` is the specification, and this file is the definition in PyTorch:
int64 tensors hold uint32 values. For one layer::

    p    = order(n, b)         # up to 4096 rows of a column, then those of the next column
    z    = address(p)          # each unit of consecutive p gets a cell of consecutive z
    cell, lap, j = z / (laps * window), z / window, z mod window
    slot = (cell * window + scramble(lap, j)) mod slots
    sign = a bit of sign_word(p)

Addresses z count the uses of the ring through all layers and are never wrapped. The ``laps *
window`` addresses of a cell read one window ``laps`` times, and consecutive cells read consecutive
windows of the ring. ``scramble`` is a permutation of the window, another one in each lap. The
places that 8 neighbouring rows of a column read differ modulo 8, which is what keeps shared memory
free of bank conflicts.

This is law version 2, fixed by golden vectors: its values never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg_kernels import _checks
from rpg_kernels.law.geometry import VirtualMatrix
from rpg_kernels.law.ring import MAX_BAND, LayerLaw, Permutation, sign_word
from rpg_kernels.law.scramble import Scramble

WINDOW_LAW = 2  # version of this law
STRIP = 4096  # most rows of a strip, which is cut column by column
ALIGN = 64  # rows of a stretch; layers start at multiples of it
MIN_WINDOW, MAX_WINDOW = ALIGN, 2**15
MAX_LAPS = 64
MAX_START = 2**62  # in elements

_M32 = 0xFFFFFFFF
_POWERS = tuple(1 << i for i in range(STRIP.bit_length()))  # heights of strips


def check_window(window: int, laps: int, slots: int) -> None:
    """Refuse windows and laps that the law does not know.

    Args:
        window: slots of a window, a power of two from 64 to 32768 and at most the ring.
        laps: times that a unit reads each slot of its window, 1 to 64.
        slots: slots on the ring.

    Raises:
        TypeError, ValueError: with the argument, what was got and what was wanted.

    Example:
        >>> check_window(256, 4, slots=704)
        >>> check_window(100, 4, slots=704)
        Traceback (most recent call last):
        ValueError: window: got 100, wanted a power of two (a multiple of 8) from 64 to 32768
    """
    wanted = f"a power of two (a multiple of 8) from {MIN_WINDOW} to {MAX_WINDOW}"
    _checks.integer("window", window, -(2**63), 2**63)
    if not MIN_WINDOW <= window <= MAX_WINDOW or window & (window - 1):
        raise _checks.fail("window", window, wanted)
    if window > slots:
        raise _checks.fail("window", window, f"at most the ring's {slots} slots")
    _checks.integer("laps", laps, 1, MAX_LAPS)


def alignment(rows: int) -> int:
    """What a layer's start must be a multiple of, in blocks, so that laps hold stretches whole.

    Example:
        >>> alignment(4096), alignment(100), alignment(10)
        (64, 64, 8)
    """
    return min(ALIGN, 1 << (rows.bit_length() - 1))


def place(shape: Sequence[int], granularity: int, cursor: int) -> tuple[int, int]:
    """The addresses in elements where a layer starts and ends; the next cursor is the end.

    Example:
        >>> place((100, 64), 64, cursor=0), place((10, 100), 64, cursor=6400)
        ((0, 6400), (6400, 7520))
    """
    matrix = VirtualMatrix(tuple(shape), granularity)
    step = alignment(matrix.rows) * matrix.block
    start = -(-cursor // step) * step
    return start, start + matrix.span


def check_start(start: int, matrix: VirtualMatrix) -> None:
    """Refuse addresses at which a layer cannot begin.

    Args:
        start: the layer's address, in elements.
        matrix: the layer.

    Raises:
        TypeError, ValueError: out of range, not aligned, or an end beyond 2^63.

    Example:
        >>> check_start(4096, VirtualMatrix((100, 64), 64))
        >>> check_start(64, VirtualMatrix((100, 64), 64))
        Traceback (most recent call last):
        ValueError: start: got 64, wanted a multiple of 4096 elements
    """
    _checks.integer("start", start, 0, MAX_START)
    step = alignment(matrix.rows) * matrix.block
    if start % step:
        raise _checks.fail("start", start, f"a multiple of {step} elements")
    if start + matrix.span >= 2**63:
        got = f"{matrix.shape} from address {start}"
        raise _checks.fail("shape", got, f"an end below 2^63, not {start + matrix.span}")


@dataclass(frozen=True)
class WindowLaw(LayerLaw):
    """The window law of one layer: N rows of ``blocks`` blocks, on a ring of ``slots`` slots.

    Args:
        seed, layer, rows, blocks, granularity, slots, reflect, permute: as LayerLaw; permute False
            leaves units and laps in order.
        start: the layer's address in blocks, 0 to 2^62, not wrapped; a multiple of
            ``alignment(rows)``.
        window: slots of this granularity in a window, a power of two from 64.
        laps: times that a unit reads each slot of its window.

    Example:
        >>> law = WindowLaw(0, 0, 64, 16, 64, 704, 0, "vector", True, window=256, laps=4)
        >>> slots = law.slot(torch.arange(64)[:, None], torch.arange(16))
        >>> slots.unique(return_counts=True)[1].unique(), int(slots.max())
        (tensor([4]), 255)
    """

    window: int
    laps: int

    @property
    def cell(self) -> int:
        """Addresses of a cell, and positions of a unit."""
        return self.laps * self.window

    @property
    def scramble(self) -> Scramble:
        """The permutation of a window in each lap."""
        return Scramble(self.window, self.seed)

    def rows_in(self, band: int) -> int:
        """Rows of a band."""
        return min(self.rows_per_band, self.rows - band * self.rows_per_band)

    def first(self, band: int) -> int:
        """The address of a band's first position."""
        return self.start + band * self.rows_per_band * self.blocks

    def head(self, band: int) -> int:
        """Positions of a band before its first unit: they finish a cell that began before."""
        return min(-self.first(band) % self.cell, self.rows_in(band) * self.blocks)

    def units(self, band: int) -> int:
        """Units of a band."""
        return (self.rows_in(band) * self.blocks - self.head(band)) // self.cell

    def permutation(self, band: int) -> Permutation:
        """The bijection of a band's units; the trivial one where a band has none."""
        return Permutation(max(1, self.units(band)), self.seed, self.layer, band)

    def order(self, n: Tensor, b: Tensor, band: int) -> Tensor:
        """p: the number of the position of row n of a band and block b.

        First come strips of 4096 rows, then strips of 2048, 1024 ... rows, the binary digits of
        what is left. A strip is numbered column by column, and a column row by row.
        """
        height = _strip_height(n, self.rows_in(band))
        return (n - n % height) * self.blocks + b * height + n % height

    def from_order(self, p: Tensor, band: int) -> tuple[Tensor, Tensor]:
        """Row of the band and block of number p: the inverse of ``order``."""
        rows = self.rows_in(band)
        height = torch.full_like(p, STRIP)
        base = p // (STRIP * self.blocks) * STRIP
        for power in _POWERS[:-1]:
            if rows & power:
                top = rows // (2 * power) * (2 * power)
                inside = (p >= top * self.blocks) & (p < (top + power) * self.blocks)
                height[inside], base[inside] = power, top
        rest = p - base * self.blocks
        return base + rest % height, rest // height

    def address(self, p: Tensor, band: int, *, inverse: bool = False) -> Tensor:
        """z - first(band) of number p, or with ``inverse`` p of such an address."""
        if not self.permute or self.units(band) == 0:
            return p.clone()
        unit = (p - self.head(band)).div_(self.cell, rounding_mode="floor")
        whole = (unit >= 0) & (unit < self.units(band))
        permutation = self.permutation(band)
        change = permutation.inverse if inverse else permutation.forward
        out = p.clone()
        # A unit holds many positions: its number is permuted once for all of them.
        unit, of_position = unit[whole].unique(return_inverse=True)
        out[whole] += ((change(unit) - unit) * self.cell)[of_position]
        return out

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
            p = self.order(n[chosen] - band * self.rows_per_band, b[chosen], band)
            z = self.address(p, band).add_(self.first(band))
            lap, j = z // self.window, z % self.window
            place = self.scramble.forward(lap, j) if self.permute else j
            out[chosen] = (lap // self.laps * self.window + place) % self.slots
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
            p = self.order(n[chosen] - band * self.rows_per_band, b[chosen], band)
            for w in range(words):
                if self.reflect == "vector":
                    shared = sign_word(p >> 5, self.seed, self.layer, band, 0)
                    word = shared.bitwise_left_shift_(31 - (p & 31)).bitwise_and_(_M32)
                else:
                    word = sign_word(p, self.seed, self.layer, band, w)
                out[..., w][chosen] = word
        return out

    def positions(self, slot: int) -> Tensor:
        """The inverse: every position that reads a slot.

        Returns:
            int64 [uses, 2] of (row, block), in the order of addresses.

        Raises:
            IndexError: slot is not in [0, slots).
        """
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot: got {slot}, wanted 0 to {self.slots - 1}")
        total = self.rows * self.blocks
        low = self.start // self.cell * self.window  # unwrapped slots of the layer's windows
        high = ((self.start + total - 1) // self.cell + 1) * self.window
        nearest = low + (slot - low) % self.slots
        ring = torch.arange(nearest, max(nearest, high), self.slots)
        laps = (ring // self.window)[:, None] * self.laps + torch.arange(self.laps)
        place = (ring % self.window)[:, None].expand_as(laps)
        j = self.scramble.inverse(laps, place) if self.permute else place
        z = (laps * self.window + j).flatten()
        z = z[(z >= self.start) & (z < self.start + total)].sort().values
        per_band = self.rows_per_band * self.blocks
        found = []
        for band in ((z - self.start) // per_band).unique().tolist():
            here = z[(z - self.start) // per_band == band] - self.first(band)
            n, b = self.from_order(self.address(here, band, inverse=True), band)
            found.append(torch.stack((n + band * self.rows_per_band, b), -1))
        return torch.cat(found) if found else z.new_empty((0, 2))


def _strip_height(n: Tensor, rows: int) -> Tensor:
    """Rows of row n's strip: the highest bit in which n and rows differ, at most 4096."""
    differ = n ^ rows
    height = torch.ones_like(n)
    for power in _POWERS[1:]:
        height = torch.where(differ >= power, power, height)
    return height


def layer_law(
    shape: Sequence[int],
    *,
    slots: int,
    granularity: int,
    window: int,
    laps: int,
    seed: int = 0,
    layer: int = 0,
    start: int = 0,
    reflect: str = "vector",
    permute: bool = True,
) -> tuple[VirtualMatrix, WindowLaw]:
    """The geometry and the law of a layer, from the fields of a generator and a placement.

    Args:
        shape: torch's shape of the weight.
        slots, granularity, window: of the bank; slots and window count whole bank slots.
        laps, seed, reflect, permute: of the generator.
        layer, start: number of the layer, and its address in elements, as ``place`` gives it.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """
    _checks.integer("slots", slots, 1, _checks.INT32_MAX)
    check_window(window, laps, slots)
    matrix = VirtualMatrix(tuple(shape), granularity)
    if slots * granularity // matrix.block > MAX_BAND:
        got = f"{slots} of {granularity} elements read in blocks of {matrix.block}"
        raise _checks.fail("slots", got, f"at most {MAX_BAND} blocks")
    check_start(start, matrix)
    ratio = granularity // matrix.block
    law = WindowLaw(
        seed=seed,
        layer=layer,
        rows=matrix.rows,
        blocks=matrix.blocks,
        granularity=matrix.block,
        slots=slots * ratio,
        start=start // matrix.block,
        reflect=reflect,
        permute=permute,
        window=window * ratio,
        laps=laps,
    )
    return matrix, law
