"""The packing law, version 1: which bank slot, and with which sign, a virtual weight reads.

The law gives each position of a layer's virtual matrix, row n and block b, a slot, and each element
of the block a sign. It knows nothing of tiles, devices or dtypes. ``docs/law.md`` is its
specification, and this file is its definition in PyTorch: int64 tensors hold uint32 values, so that
the same steps can be written in 32-bit arithmetic elsewhere and give the same bits.

For one layer::

    band  = n // rows_per_band                     # a band has at most 2^31 positions
    q     = (n - band * rows_per_band) * blocks + b
    q'    = π(q)                                    # a keyed bijection of [0, Q), see Permutation
    slot  = (start + band * rows_per_band * blocks + q') mod slots
    sign  = bit of sign_word(q)                     # see sign_bits; never looks at the slot

Source: Wang et al., "Compact and Optimal Deep Learning with Recurrent Parameter Generators"
(WACV 2023), section 3: W_i = G_i w with G_i a permutation, a reflection and even sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

REFLECT = ("element", "vector", "none")
LAW_VERSION = 1
MAX_BAND = 2**31
WORD_BITS = 32

_M32 = 0xFFFFFFFF
_M64 = 0xFFFFFFFFFFFFFFFF
_GOLDEN64 = 0x9E3779B97F4A7C15
_SIGN_KEY = 128  # sign word w uses keys 128 + 2w and 129 + 2w; the permutation uses keys below 96


def mix64(z: int) -> int:
    """The splitmix64 finaliser: a bijection of 64-bit integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _M64
    return z ^ (z >> 31)


@lru_cache(maxsize=4096)
def keys(seed: int, layer: int, band: int, first: int, count: int) -> tuple[int, ...]:
    """``count`` 32-bit keys of the splitmix64 stream that belongs to (seed, layer, band).

    Example:
        >>> keys(seed=0, layer=0, band=0, first=0, count=2)
        (556823690, 214405049)
    """
    state = 0
    for word in (seed, layer, band):
        state = mix64((state + word + _GOLDEN64) & _M64)
    return tuple(mix64((state + (first + i + 1) * _GOLDEN64) & _M64) >> 32 for i in range(count))


@lru_cache(maxsize=4096)
def most_square_factors(size: int) -> tuple[int, int]:
    """``(A, B)`` with ``A * B == size``, ``A >= B`` and B as large as possible.

    Example:
        >>> most_square_factors(4096 * 16), most_square_factors(20011)
        ((256, 256), (20011, 1))
    """
    minor = math.isqrt(size)
    while size % minor:
        minor -= 1
    return size // minor, minor


def _round(x: Tensor, key: int, size: int) -> Tensor:
    """The round function f of docs/law.md: a value in [0, size) from a uint32 hash of x."""
    h = x.bitwise_xor(key)
    h.mul_(0x7FEB352D).bitwise_and_(_M32)
    h.bitwise_xor_(h >> 15)
    h.mul_(0x846CA68B).bitwise_and_(_M32)
    return h.mul_(size).bitwise_right_shift_(32)


def _wrap_(x: Tensor, size: int) -> Tensor:
    """In place: x + size where x is negative; x lies in [-size, size)."""
    return x.add_((x >> 63).bitwise_and_(size))


@dataclass(frozen=True)
class Permutation:
    """A keyed bijection of ``[0, size)``, the same on every machine.

    Numbers are written with two digits, ``q = i * B + j``, of the most square product
    ``A * B == size``, and sent through an alternating mixed-radix Feistel network. Two numbers
    keep their difference with probability B^(-rounds/2), which must stay well below 1/size: 6
    rounds when A <= 2B (8 when B is below 128), 10 up to A = B^2, 12 up to A = B^3. With a more
    lopsided product, or B below 12 (so for every prime size), swap-or-not, exact on any size:
    24 rounds up to a size of 2^16, 48 above.

    Args:
        size: how many numbers are permuted, 1 to 2^31.
        seed, layer, band: what the keys are derived from.

    Example:
        >>> p = Permutation(size=7, seed=0, layer=0)
        >>> sorted(p.forward(torch.arange(7)).tolist())
        [0, 1, 2, 3, 4, 5, 6]
        >>> p.inverse(p.forward(torch.arange(7))).tolist()
        [0, 1, 2, 3, 4, 5, 6]
    """

    size: int
    seed: int
    layer: int
    band: int = 0

    @cached_property
    def rounds(self) -> int:
        """Feistel rounds, or 0 for swap-or-not."""
        major, minor = most_square_factors(self.size)
        if minor < 12 or major > minor**3:
            return 0
        if major > 2 * minor:
            return 12 if major > minor**2 else 10
        return 8 if minor < 128 else 6

    @property
    def swap_rounds(self) -> int:
        """Rounds of swap-or-not where that is used."""
        return 24 if self.size <= 1 << 16 else 48

    def forward(self, q: Tensor) -> Tensor:
        """q' = π(q) for int64 numbers of positions, of any shape."""
        if not self.rounds:
            return self._swap_or_not(q, reverse=False)
        major, minor = most_square_factors(self.size)
        i = q.div(minor, rounding_mode="floor")
        j = q - i * minor
        for r, key in enumerate(keys(self.seed, self.layer, self.band, 0, self.rounds)):
            if r % 2 == 0:
                _wrap_(j.add_(_round(i, key, minor)).sub_(minor), minor)
            else:
                _wrap_(i.add_(_round(j, key, major)).sub_(major), major)
        return i.mul_(minor).add_(j)

    def inverse(self, q: Tensor) -> Tensor:
        """The numbers q whose π(q) is given."""
        if not self.rounds:
            return self._swap_or_not(q, reverse=True)
        major, minor = most_square_factors(self.size)
        i = q.div(minor, rounding_mode="floor")
        j = q - i * minor
        round_keys = keys(self.seed, self.layer, self.band, 0, self.rounds)
        for r in reversed(range(self.rounds)):
            if r % 2 == 0:
                _wrap_(j.sub_(_round(i, round_keys[r], minor)), minor)
            else:
                _wrap_(i.sub_(_round(j, round_keys[r], major)), major)
        return i.mul_(minor).add_(j)

    def _swap_or_not(self, q: Tensor, *, reverse: bool) -> Tensor:
        """Each round pairs x with (k - x) mod size and swaps the pair on one hash bit."""
        rounds = self.swap_rounds
        round_keys = keys(self.seed, self.layer, self.band, 0, 2 * rounds)
        x = q.clone()
        for r in reversed(range(rounds)) if reverse else range(rounds):
            offset = (round_keys[2 * r] * self.size) >> 32
            partner = _wrap_(offset - x, self.size)
            swap = _round(torch.maximum(x, partner), round_keys[2 * r + 1], 2)
            x.add_(swap.mul_(partner.sub_(x)))
        return x


def sign_word(q: Tensor, seed: int, layer: int, band: int, word: int) -> Tensor:
    """32 sign bits of position q of a band: ``word`` covers elements 32*word to 32*word + 31."""
    k0, k1 = keys(seed, layer, band, _SIGN_KEY + 2 * word, 2)
    h = q.bitwise_xor(k0)
    h.bitwise_xor_(h >> 17)
    h.mul_(0xED5AD4BB).bitwise_and_(_M32)
    h.bitwise_xor_(h >> 11).bitwise_xor_(k1)
    h.mul_(0xAC4C1B51).bitwise_and_(_M32)
    h.bitwise_xor_(h >> 15)
    h.mul_(0x31848BAB).bitwise_and_(_M32)
    return h.bitwise_xor_(h >> 14)


def sign_bits(element: Tensor) -> Tensor:
    """Which bit of its sign word belongs to each element (reflect ``"element"``).

    Neighbours share a shift: bits 15 - i and 31 - i are those of pair i, so that kernels that pack
    two 16-bit numbers get both signs at once as ``(word << i) & 0x80008000``. With ``"vector"``
    bit 31 of word 0 is the sign of the whole block.

    Example:
        >>> sign_bits(torch.tensor([0, 1, 2, 3, 31, 32])).tolist()
        [15, 31, 14, 30, 16, 15]
    """
    e = element % WORD_BITS
    return 15 - e // 2 + 16 * (e % 2)


@dataclass(frozen=True)
class LayerLaw:
    """The packing law of one layer: N rows of ``blocks`` blocks on a ring of ``slots`` slots.

    Args:
        seed: of the generating matrix, 0 to 2^63 - 1.
        layer: number of the layer.
        rows, blocks: shape of the virtual matrix in blocks; blocks at most 2^31.
        granularity: elements per block and per slot, 1 to 128.
        slots: slots of this granularity on the ring.
        start: first slot of the layer's segment.
        reflect: ``"element"``, ``"vector"`` or ``"none"``.
        permute: False leaves the positions in order (an ablation of the paper).
    """

    seed: int
    layer: int
    rows: int
    blocks: int
    granularity: int
    slots: int
    start: int
    reflect: str
    permute: bool

    @cached_property
    def rows_per_band(self) -> int:
        """All rows, or the largest power of two of rows that stays within 2^31 positions."""
        if self.rows * self.blocks <= MAX_BAND:
            return self.rows
        return 1 << ((MAX_BAND // self.blocks).bit_length() - 1)

    @cached_property
    def words(self) -> int:
        """Sign words per block."""
        return -(-self.granularity // WORD_BITS)

    def permutation(self, band: int) -> Permutation:
        """The bijection π of one band."""
        rows = min(self.rows_per_band, self.rows - band * self.rows_per_band)
        return Permutation(rows * self.blocks, self.seed, self.layer, band)

    def _by_band(self, n: Tensor) -> Iterator[tuple[int, Tensor | None]]:
        """(band, mask of the positions in it); the mask is None when there is one band only."""
        if self.rows_per_band == self.rows:
            yield 0, None
            return
        bands = n.div(self.rows_per_band, rounding_mode="floor")
        for band in bands.unique().tolist():
            yield band, bands == band

    def slot(self, n: Tensor, b: Tensor) -> Tensor:
        """Slot of each position.

        Args:
            n, b: int64 numbers of rows and blocks, broadcast against each other.

        Returns:
            int64 slots in [0, slots), of the broadcast shape.
        """
        n, b = torch.broadcast_tensors(n, b)
        out = torch.empty_like(n, memory_format=torch.contiguous_format)
        for band, mask in self._by_band(n):
            first = band * self.rows_per_band
            q = (n if mask is None else n[mask]).sub(first).mul_(self.blocks)
            q.add_(b if mask is None else b[mask])
            if self.permute:
                q = self.permutation(band).forward(q)
            q.add_((self.start + first * self.blocks) % self.slots).remainder_(self.slots)
            if mask is None:
                return q
            out[mask] = q
        return out

    def sign_words(self, n: Tensor, b: Tensor) -> Tensor:
        """uint32 sign words (in int64) of each position: broadcast shape + [words]."""
        n, b = torch.broadcast_tensors(n, b)
        words = 1 if self.reflect == "vector" else self.words
        out = n.new_empty((*n.shape, words))
        for band, mask in self._by_band(n):
            first = band * self.rows_per_band
            q = (n if mask is None else n[mask]).sub(first).mul_(self.blocks)
            q.add_(b if mask is None else b[mask])
            for w in range(words):
                h = sign_word(q, self.seed, self.layer, band, w)
                if mask is None:
                    out[..., w] = h
                else:
                    out[..., w][mask] = h
        return out

    def negative(self, n: Tensor, b: Tensor) -> Tensor:
        """True where a virtual weight is the negative of its bank element.

        Returns:
            bool, broadcast shape of n and b + [granularity].
        """
        shape = (*torch.broadcast_shapes(n.shape, b.shape), self.granularity)
        if self.reflect == "none":
            return torch.zeros(shape, dtype=torch.bool, device=n.device)
        words = self.sign_words(n, b)
        if self.reflect == "vector":
            return (words >> 31).bool().expand(shape)
        e = torch.arange(self.granularity, device=n.device)
        return ((words[..., e // WORD_BITS] >> sign_bits(e)) & 1).bool()

    def positions(self, slot: int) -> Tensor:
        """The inverse: every position that reads a slot.

        Returns:
            int64 [uses, 2] of (row, block), in the order of passes around the ring.

        Raises:
            IndexError: slot is not in [0, slots).
        """
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot: got {slot}, wanted 0 to {self.slots - 1}")
        total = self.rows * self.blocks
        first_use = (slot - self.start) % self.slots
        ring = torch.arange(first_use, max(first_use, total), self.slots)
        per_band = self.rows_per_band * self.blocks
        found = []
        for band in range(-(-total // per_band)):
            first = band * per_band
            q = ring[(ring >= first) & (ring < first + per_band)] - first
            if self.permute:
                q = self.permutation(band).inverse(q)
            n = q.div(self.blocks, rounding_mode="floor")
            found.append(torch.stack((n + band * self.rows_per_band, q - n * self.blocks), -1))
        return torch.cat(found)
