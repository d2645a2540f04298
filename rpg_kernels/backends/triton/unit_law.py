"""The unit law in Triton: device functions on positions p, and the words that they read.

docs/unit_law.md is its specification, rpg_kernels/law/unit.py its definition. A position is
p = 8 q + row, row of an octet of 8 rows; octets q of a band are numbered unit by unit, in a unit
tap by tap. Signs are those of p. Two values of the constant ``LAW`` tell this law from law 1:

    3        the unit law
    -3       the unit law with columns, groups and units in order (permute False)

Uses of octets are never wrapped, but a band has at most 2^28 of them: they are counted from the
band's first, and what lies before is reduced on the host. So everything here is uint32. Most of the
work is the shuffle of a unit, 16 rounds of about 20 lane-instructions.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels.backends.triton import law as device_law
from rpg_kernels.backends.triton.law import LAW_WORDS
from rpg_kernels.law import unit as definition
from rpg_kernels.law.ring import keys, most_square_factors
from rpg_kernels.law.unit import OCTET, UnitLaw

UNITS, UNITS_IN_ORDER = 3, -3
_IN_ORDER = tl.constexpr(UNITS_IN_ORDER)
_ROUNDS = tl.constexpr(definition._ROUNDS)
_KEYS = 128  # where the keys of the unit law's own words begin, and then its numbers
_NUMBERS = 164
# Numbers of these words as sign_word counts them, which finds two keys for each from 16 on.
_OCTET_WORD = tl.constexpr((_KEYS - 16) // 2)
_TURN_WORD = tl.constexpr((_KEYS - 16) // 2 + 1)
_ROUND_WORD = tl.constexpr((_KEYS - 16) // 2 + 2)
# Where each number stands, beside those that law 1 has too: _SIZE is of the columns, and _BASE the
# slot where the octet of the band's first use begins. Those of three words have their divider.
_COLUMN = tl.constexpr(_NUMBERS)  # octets of a column, of all its taps; three words
_TAPS = tl.constexpr(_NUMBERS + 3)  # of a unit; three words
_RUN_BLOCKS = tl.constexpr(_NUMBERS + 6)  # three words
_SMALL = tl.constexpr(_NUMBERS + 9)  # octets of rows of a smaller group; three words
_LARGE = tl.constexpr(_NUMBERS + 12)  # of a larger one, which has one more; three words
_LAPS = tl.constexpr(_NUMBERS + 15)  # three words
_OCTETS = tl.constexpr(_NUMBERS + 18)  # of rows
_GROUPS = tl.constexpr(_NUMBERS + 19)
_LARGER = tl.constexpr(_NUMBERS + 20)  # how many groups are larger; they come first
_OFFSET = tl.constexpr(_NUMBERS + 21)  # of the band's first use among those of its octet
_USES = tl.constexpr(_NUMBERS + 22)  # of the band

_SLOTS, _BASE = device_law._SLOTS, device_law._BASE
_law_word, _sign_word = device_law.law_word, device_law.sign_word
_divide, _add_mod, _sub_mod = device_law._divide, device_law._add_mod, device_law._sub_mod
_permute, _unpermute = device_law.permute, device_law.unpermute


@functools.lru_cache(maxsize=65536)
def rounds(law: UnitLaw, band: int = 0) -> tuple[int, int, int]:
    """(Feistel rounds, swap-or-not rounds, LAW), the compile-time part of a band's law."""
    if not law.permute:
        return 0, 0, UNITS_IN_ORDER
    if law.columns < 2:
        return 0, 0, UNITS
    p = law.permutation(band)
    return (p.rounds, 0, UNITS) if p.rounds else (0, p.swap_rounds, UNITS)


@functools.cache
def law_words(law: UnitLaw, band: int, device: torch.device) -> Tensor:
    """int32 ``[LAW_WORDS]`` on a device: what the device functions read as ``law_ptr``.

    Kept for good: a captured CUDA graph goes on reading them.

    Raises:
        RuntimeError: a stream is being captured, and these words are not on the device yet.
    """
    p, octets, groups = law.permutation(band), law.octets(band), law.groups(band)
    major, minor = most_square_factors(p.size)
    size, larger = divmod(octets, groups)
    octet, offset = divmod(law.first(band), law.laps)
    words = [0] * LAW_WORDS
    words[:9] = [
        p.size,
        major,
        minor,
        *device_law.divider(minor),
        *_divisor(law.slots),
        OCTET * octet % law.slots,
    ]
    words[9:11] = rounds(law, band)[:2]
    words[16:24] = keys(law.seed, law.layer, band, 128, 8)
    drawn = device_law.round_words(p)
    words[32 : 32 + len(drawn)] = drawn
    own = 2 * (2 + definition._ROUNDS)
    words[_KEYS : _KEYS + own] = keys(
        law.seed, law.layer, band, 128 + 2 * definition._OCTET_WORD, own
    )
    numbers = [
        *_divisor(octets * law.taps),
        *_divisor(law.taps),
        *_divisor(law.blocks // law.runs),
        *_divisor(size),
        *_divisor(size + 1),
        *_divisor(law.laps),
        octets,
        groups,
        larger,
        offset,
        octets * law.blocks,
    ]
    words[_NUMBERS : _NUMBERS + len(numbers)] = numbers
    return device_law.on_device(words, device)


def _divisor(number: int) -> tuple[int, int, int]:
    """The three words of a number that is divided by."""
    return (number, *device_law.divider(number))


@triton.jit
def _over(x, law_ptr, word):
    """x // the number at a word, which its divider follows; x at most 2^31."""
    return _divide(x, _law_word(law_ptr, word + 1), _law_word(law_ptr, word + 2))


@triton.jit
def _first_octet(group, law_ptr):
    """Octets of rows before a group."""
    smaller = group * _law_word(law_ptr, _SMALL)
    return smaller + tl.minimum(group, _law_word(law_ptr, _LARGER))


@triton.jit
def _group(octet, law_ptr):
    """(group, its first octet, its size) of octets of rows."""
    larger = _law_word(law_ptr, _LARGER)
    end = larger * _law_word(law_ptr, _LARGE)
    group = tl.where(
        octet < end, _over(octet, law_ptr, _LARGE), larger + _over(octet - end, law_ptr, _SMALL)
    )
    size = _law_word(law_ptr, _SMALL) + (group < larger).to(tl.uint32)
    return group, _first_octet(group, law_ptr), size


@triton.jit
def _column(q, law_ptr):
    """(column, number in it) of octets of the band, or of uses of the band."""
    column = _over(q, law_ptr, _COLUMN)
    return column, q - column * _law_word(law_ptr, _COLUMN)


@triton.jit
def order(n, b, law_ptr):
    """p of row n of the band and block b, uint32 of their common shape."""
    n = n.to(tl.uint32)
    b = (tl.full([], 0, tl.uint32) + b).to(tl.uint32)
    taps, run_blocks = _law_word(law_ptr, _TAPS), _law_word(law_ptr, _RUN_BLOCKS)
    tap = _over(b, law_ptr, _RUN_BLOCKS)
    part = _over(tap, law_ptr, _TAPS)
    column = part * run_blocks + b - tap * run_blocks
    octet = n >> 3
    _, first, size = _group(octet, law_ptr)
    i = (tap - part * taps) * size + octet - first
    q = (column * _law_word(law_ptr, _OCTETS) + first) * taps + i
    return (q << 3) | (n & 7)


@triton.jit
def row_and_block(p, law_ptr):
    """(n, b) of positions p of the band, int32: the inverse of ``order``."""
    taps, run_blocks = _law_word(law_ptr, _TAPS), _law_word(law_ptr, _RUN_BLOCKS)
    column, rest = _column(p >> 3, law_ptr)
    group, first, size = _group(_over(rest, law_ptr, _TAPS), law_ptr)
    i = rest - first * taps
    larger = group < _law_word(law_ptr, _LARGER)
    tap = tl.where(larger, _over(i, law_ptr, _LARGE), _over(i, law_ptr, _SMALL))
    n = ((first + i - tap * size) << 3) | (p & 7)
    part = _over(column, law_ptr, _RUN_BLOCKS)
    b = (part * taps + tap) * run_blocks + column - part * run_blocks
    return n.to(tl.int32), b.to(tl.int32)


@triton.jit
def vector_word(p, law_ptr):
    """A word whose bit 31 is the sign of positions p: 32 of them share what is computed."""
    return _sign_word(p >> 5, law_ptr, 0) << (31 - (p & 31))


@triton.jit
def _turned(column, law_ptr):
    """The octet of rows that comes first in a column."""
    word = _sign_word(column, law_ptr, _TURN_WORD)
    return _first_octet(tl.umulhi(word, _law_word(law_ptr, _GROUPS)), law_ptr)


@triton.jit
def _shuffle(x, size, unit, law_ptr, INVERSE: tl.constexpr):
    """A permutation of [0, size) for each unit: swap-or-not on 16-bit numbers."""
    for j in range(_ROUNDS):
        r = j
        if INVERSE:
            r = _ROUNDS - 1 - j
        word = _sign_word(unit, law_ptr, _ROUND_WORD + r)
        partner = _sub_mod(((word >> 16) * size) >> 16, x, size)
        low = word & 0xFFFF
        summand = ((low << 8) | (low >> 8)) & 0xFFFF
        swap = ((tl.maximum(x, partner) * (low | 1) + summand) >> 15) & 1
        x = tl.where(swap != 0, partner, x)
    return x


@triton.jit
def slot_of(p, law_ptr, ROUNDS: tl.constexpr, SWAP_ROUNDS: tl.constexpr, LAW: tl.constexpr):
    """Slot of positions p: uint32 of p's shape."""
    use, place = p >> 3, p & 7
    if LAW != _IN_ORDER:
        taps, octets = _law_word(law_ptr, _TAPS), _law_word(law_ptr, _OCTETS)
        word = _sign_word(use, law_ptr, _OCTET_WORD)
        place = (((place ^ (word >> 29)) - word) * ((word >> 3) | 1)) & 7
        column, rest = _column(use, law_ptr)
        group, first, size = _group(_over(rest, law_ptr, _TAPS), law_ptr)
        unit = column * _law_word(law_ptr, _GROUPS) + group
        shuffled = _shuffle(rest - first * taps, size * taps, unit, law_ptr, False)
        first = _sub_mod(first, _turned(column, law_ptr), octets)
        column = _permute(column, law_ptr, ROUNDS, SWAP_ROUNDS)
        use = (column * octets + first) * taps + shuffled
    octet = _over(use + _law_word(law_ptr, _OFFSET), law_ptr, _LAPS)
    slots, x = _law_word(law_ptr, _SLOTS), (octet << 3) | place
    x -= _over(x, law_ptr, _SLOTS) * slots
    return _add_mod(_law_word(law_ptr, _BASE), x, slots)


@triton.jit
def _end(law_ptr):
    """Octets of the ring that the band reads, unwrapped, from that of its first use on."""
    last = _law_word(law_ptr, _USES) - 1 + _law_word(law_ptr, _OFFSET)
    return _over(last, law_ptr, _LAPS) + 1


@triton.jit
def most_uses(law_ptr):
    """How many positions of the band, padding counted, may read one slot, int64."""
    slots = _law_word(law_ptr, _SLOTS).to(tl.int64)
    return tl.cdiv(8 * _end(law_ptr).to(tl.int64), slots) * _law_word(law_ptr, _LAPS).to(tl.int64)


@triton.jit
def use(
    slot,
    number,
    law_ptr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
):
    """(p, whether there is one) of use ``number`` of slots; p may lie in the rows' padding.

    Args:
        slot: uint32.
        number: scalar int64, below most_uses.
    """
    laps, slots = _law_word(law_ptr, _LAPS), _law_word(law_ptr, _SLOTS)
    turn = number // laps.to(tl.int64)
    unwrapped = _sub_mod(slot, _law_word(law_ptr, _BASE), slots).to(tl.int64)
    unwrapped += turn * slots.to(tl.int64)
    live = unwrapped < 8 * _end(law_ptr).to(tl.int64)
    x = tl.where(live, unwrapped, 0).to(tl.uint32)
    lap = (number - turn * laps.to(tl.int64)).to(tl.uint32)
    q = (x >> 3) * laps + lap - _law_word(law_ptr, _OFFSET)
    live = live & (q < _law_word(law_ptr, _USES))  # below the offset q wraps around, and is large
    q = tl.where(live, q, tl.zeros_like(q))
    row = x & 7
    if LAW != _IN_ORDER:
        taps, octets = _law_word(law_ptr, _TAPS), _law_word(law_ptr, _OCTETS)
        column, rest = _column(q, law_ptr)
        column = _unpermute(column, law_ptr, ROUNDS, SWAP_ROUNDS)
        rest = _add_mod(rest, _turned(column, law_ptr) * taps, _law_word(law_ptr, _COLUMN))
        group, first, size = _group(_over(rest, law_ptr, _TAPS), law_ptr)
        unit = column * _law_word(law_ptr, _GROUPS) + group
        i = _shuffle(rest - first * taps, size * taps, unit, law_ptr, True)
        q = (column * octets + first) * taps + i
        word = _sign_word(q, law_ptr, _OCTET_WORD)
        row = ((row * ((word >> 3) | 1) + word) & 7) ^ (word >> 29)
    return (q << 3) | row, live
