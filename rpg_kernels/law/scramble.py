"""How the window law (``window.py``) reads a window: a permutation of its places in each lap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rpg_kernels.law.ring import sign_word

OCTET = 8  # rows of a block column whose places differ modulo 8

_M32 = 0xFFFFFFFF
_RING = 2**64 - 1  # the "layer" whose keys scramble the ring; real layers stay below 2^63
_OCTET_WORD, _FACTOR_WORD, _SUMMAND_WORD = 0, 1, 2


@dataclass(frozen=True)
class Scramble:
    """The permutation of a window in each lap, with keys from the lap's number.

    ``j = 8 o + r`` counts the addresses of a lap: r is a row of octet o. With words of 32 bits from
    the octet and from the pair (lap, c)::

        c = ((r ^ t) - k) * m mod 8                         # t, k, m odd: bits of the octet's word
        A = o; in each round: A = A * m' + k' mod 2^bits; A ^= A >> shift     # m', k': of (lap, c)
        place = 8 A + c

    So the places of an octet have all residues modulo 8, those of a pair of its rows both parities,
    and the octets of a lap meet every place once.

    Args:
        window: blocks of a window, a power of two from 64.
        seed: of the generating matrix.

    Example:
        >>> import torch
        >>> s = Scramble(window=64, seed=0)
        >>> j = torch.arange(64)
        >>> place = s.forward(torch.tensor(5), j)
        >>> place.sort().values.equal(j), s.inverse(torch.tensor(5), place).equal(j)
        (True, True)
    """

    window: int
    seed: int

    @property
    def bits(self) -> int:
        """Bits of an octet's number."""
        return (self.window // OCTET).bit_length() - 1

    @property
    def rounds(self) -> int:
        """Multiply-and-shift rounds."""
        return 7 if self.bits >= 5 else 8

    def _word(self, x: Tensor, number: int) -> Tensor:
        return sign_word(x.bitwise_and(_M32), self.seed, _RING, 0, number)

    def _residue(self, lap: Tensor, o: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t, m, k of each octet."""
        word = self._word(lap * (self.window // OCTET) + o, _OCTET_WORD)
        return word >> 29, (word >> 3).bitwise_or_(1), word

    def _keys(self, lap: Tensor, c: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Factor and summand of each round."""
        x = lap * OCTET + c
        factors, summands = self._word(x, _FACTOR_WORD), self._word(x, _SUMMAND_WORD)
        for r in range(self.rounds):
            yield (factors >> 4 * r).bitwise_or_(1), summands >> 4 * r

    def forward(self, lap: Tensor, j: Tensor) -> Tensor:
        """The place that address j of a lap reads; int64 tensors, broadcast."""
        mask, shift = self.window // OCTET - 1, max(1, self.bits // 2)
        o, r = j >> 3, j & 7
        t, m, k = self._residue(lap, o)
        c = ((r ^ t) - k).mul_(m).bitwise_and_(7)
        a = o
        for factor, summand in self._keys(lap, c):
            a = (a * factor).add_(summand).bitwise_and_(mask)
            a.bitwise_xor_(a >> shift)
        return a * OCTET + c

    def inverse(self, lap: Tensor, place: Tensor) -> Tensor:
        """The address j of a lap that reads a place; int64 tensors, broadcast."""
        mask, shift = self.window // OCTET - 1, max(1, self.bits // 2)
        a, c = place >> 3, place & 7
        for factor, summand in reversed(list(self._keys(lap, c))):
            high = a
            for _ in range(shift, self.bits, shift):  # undoes a ^= a >> shift from the top down
                high = a ^ (high >> shift)
            a = (high - summand).mul_(_odd_inverse(factor, mask)).bitwise_and_(mask)
        t, m, k = self._residue(lap, a)
        return a * OCTET + ((c * m).add_(k).bitwise_and_(7) ^ t)


def _odd_inverse(x: Tensor, mask: int) -> Tensor:
    """y with x * y = 1 modulo mask + 1, by Newton's iteration: each step doubles the right bits."""
    x = x & mask
    y = x  # right in 3 bits: an odd square is 1 modulo 8
    for _ in range(3):  # 24 bits, and masks have at most 19
        y = (y * (2 - x * y)) & mask
    return y
