"""The window law in Triton: device functions on the order p of positions, and their words.

docs/window_law.md is its specification, rpg_kernels/law/window.py its definition. The words stand
in a vector like law 1's, so that kernels of both laws differ by the constant ``SCRAMBLE`` alone:

    0        law 1
    7, 8     the window law, and the rounds of a lap's scramble
    -1       the window law with its laps in order (permute False)

Addresses have 64 bits, but a band spans less than 2^31 + 2^28 of them: cells and laps are counted
from the cell of the band's first position, and what lies before is reduced on the host. So
everything here is uint32. Lane-instructions per position, as compiled for sm_90: order and slot
131, a vector sign 16 to 19, and 10 for each Feistel round of the units.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels.backends.triton import law as device_law
from rpg_kernels.backends.triton.law import LAW_WORDS
from rpg_kernels.law.ring import keys, most_square_factors
from rpg_kernels.law.window import WindowLaw

IN_ORDER = -1
_RING = 2**64 - 1  # the ring's keys are those of this layer
_IN_ORDER = tl.constexpr(IN_ORDER)
# Where each number stands, beside those that law 1 has too: _SIZE is of the units, 0 without any,
# and _BASE the slot of the first cell's window.
_ROWS = tl.constexpr(9)  # of the band
_LOG_WINDOW = tl.constexpr(10)
_LAPS = tl.constexpr(11)
_LAPS_MAGIC = tl.constexpr(12)
_LAPS_SHIFT = tl.constexpr(13)
_OFFSET = tl.constexpr(14)  # of the band's first position in its cell
_FIRST_LAP = tl.constexpr(15)  # of that cell, modulo 2^32
_OCTET_WORD = tl.constexpr(4)  # the ring's words follow the layer's four sign words
_FACTOR_WORD = tl.constexpr(5)
_SUMMAND_WORD = tl.constexpr(6)
_POSITIONS = tl.constexpr(30)  # of the band

_SIZE, _BASE = device_law._SIZE, device_law._BASE
_SLOTS, _SLOTS_MAGIC = device_law._SLOTS, device_law._SLOTS_MAGIC
_SLOTS_SHIFT = device_law._SLOTS_SHIFT
_law_word, _sign_word = device_law.law_word, device_law.sign_word
_divide, _add_mod, _sub_mod = device_law._divide, device_law._add_mod, device_law._sub_mod
_permute, _unpermute = device_law.permute, device_law.unpermute


@functools.lru_cache(maxsize=65536)
def rounds(law: WindowLaw, band: int = 0) -> tuple[int, int, int]:
    """(Feistel rounds, swap-or-not rounds, SCRAMBLE), the compile-time part of a band's law."""
    if not law.permute:
        return 0, 0, IN_ORDER
    scramble = law.scramble.rounds
    if law.units(band) < 2:
        return 0, 0, scramble
    p = law.permutation(band)
    return (p.rounds, 0, scramble) if p.rounds else (0, p.swap_rounds, scramble)


@functools.cache
def law_words(law: WindowLaw, band: int, device: torch.device) -> Tensor:
    """int32 ``[LAW_WORDS]`` on a device: what the device functions read as ``law_ptr``.

    Kept for good: a captured CUDA graph goes on reading them.

    Raises:
        RuntimeError: a stream is being captured, and these words are not on the device yet.
    """
    p = law.permutation(band)
    major, minor = most_square_factors(p.size)
    cell, offset = divmod(law.first(band), law.cell)
    rows = law.rows_in(band)
    words = [0] * LAW_WORDS
    words[:16] = [
        law.units(band),
        major,
        minor,
        *device_law.divider(minor),
        law.slots,
        *device_law.divider(law.slots),
        cell * law.window % law.slots,
        rows,
        law.window.bit_length() - 1,
        law.laps,
        *device_law.divider(law.laps),
        offset,
        cell * law.laps % (1 << 32),
    ]
    words[16:24] = keys(law.seed, law.layer, band, 128, 8)
    words[24:30] = keys(law.seed, _RING, 0, 128, 6)
    words[30] = rows * law.blocks
    drawn = device_law.round_words(p)
    words[32 : 32 + len(drawn)] = drawn
    return device_law.on_device(words, device)


@triton.jit
def _strip(n, law_ptr):
    """log2 of the rows of the strip that holds row n of the band: at most 4096 rows."""
    differ = tl.minimum(n ^ _law_word(law_ptr, _ROWS), tl.full([], 8191, tl.uint32))
    return (differ.to(tl.float32).to(tl.uint32, bitcast=True) >> 23) - 127


@triton.jit
def order(n, b, blocks, law_ptr):
    """p of row n of the band and block b, uint32 of their common shape."""
    n = n.to(tl.uint32)
    log = _strip(n, law_ptr)
    first = (n >> log) << log
    return (first * blocks + ((tl.zeros_like(log) + b).to(tl.uint32) << log) + (n - first)).to(
        tl.uint32
    )


@triton.jit
def row_and_block(p, blocks, law_ptr):
    """(n, b) of positions p of the band, int32: the inverse of ``order``.

    In a strip of H rows p // blocks is one of these rows, though another.
    """
    log = _strip((p.to(tl.int32) // blocks).to(tl.uint32), law_ptr)
    first = ((p.to(tl.int32) // blocks).to(tl.uint32) >> log) << log
    rest = (p - first * blocks).to(tl.uint32)
    b = rest >> log
    return (first + rest - (b << log)).to(tl.int32), b.to(tl.int32)


@triton.jit
def _residue_words(lap, o, law_ptr):
    """(t, m, k) of octets: the residue of row r is ((r ^ t) - k) * m mod 8."""
    h = _sign_word((lap << (_law_word(law_ptr, _LOG_WINDOW) - 3)) + o, law_ptr, _OCTET_WORD)
    return h >> 29, (h >> 3) | 1, h


@triton.jit
def _round_shape(law_ptr):
    """(shift, mask): a round ends with A ^= A >> shift & mask, in the low bits of A."""
    bits = _law_word(law_ptr, _LOG_WINDOW) - 3
    shift = tl.maximum(bits >> 1, tl.full([], 1, tl.uint32))
    return shift, (tl.full([], 1, tl.uint32) << (bits - shift)) - 1


@triton.jit
def _window_mask(law_ptr):
    return (tl.full([], 1, tl.uint32) << _law_word(law_ptr, _LOG_WINDOW)) - 1


@triton.jit
def _scramble(lap, j, law_ptr, SCRAMBLE: tl.constexpr):
    """Place in the window of position j of a lap. Bits of A above its own are left as they fall."""
    t, m, k = _residue_words(lap, j >> 3, law_ptr)
    c = (((j & 7) ^ t) - k) * m & 7
    factors = _sign_word(8 * lap + c, law_ptr, _FACTOR_WORD)
    summands = _sign_word(8 * lap + c, law_ptr, _SUMMAND_WORD)
    shift, mask = _round_shape(law_ptr)
    a = j >> 3
    for r in tl.static_range(SCRAMBLE):
        a = a * ((factors >> (4 * r)) | 1) + (summands >> (4 * r))
        a ^= (a >> shift) & mask
    return (8 * a + c) & _window_mask(law_ptr)


@triton.jit
def _unscramble(lap, place, law_ptr, SCRAMBLE: tl.constexpr):
    """Position of a lap that reads a place in the window."""
    c = place & 7
    factors = _sign_word(8 * lap + c, law_ptr, _FACTOR_WORD)
    summands = _sign_word(8 * lap + c, law_ptr, _SUMMAND_WORD)
    shift, mask = _round_shape(law_ptr)
    bits = _window_mask(law_ptr) >> 3
    a = place >> 3
    for r in tl.static_range(SCRAMBLE - 1, -1, -1):
        high = a ^ ((a >> shift) & mask)  # twice, since shift is a third of the bits or more
        high = a ^ ((high >> shift) & mask)
        factor = (factors >> (4 * r)) | 1
        inverse = factor  # right in 3 bits; each step of Newton's doubles them
        for _ in tl.static_range(3):
            inverse = inverse * (2 - factor * inverse)
        a = (high - (summands >> (4 * r))) * inverse & bits
    t, m, k = _residue_words(lap, a, law_ptr)
    return 8 * a + (((c * m + k) & 7) ^ t)


@triton.jit
def _unit(cell, law_ptr):
    """(unit, whether there is such a whole unit) of cells, counted from the band's first."""
    offset = _law_word(law_ptr, _OFFSET)
    unit = cell - (offset != 0).to(tl.uint32)
    return unit, unit < _law_word(law_ptr, _SIZE)


@triton.jit
def slot_of(p, law_ptr, ROUNDS: tl.constexpr, SWAP_ROUNDS: tl.constexpr, SCRAMBLE: tl.constexpr):
    """Slot of positions p: uint32 of p's shape."""
    address = p + _law_word(law_ptr, _OFFSET)
    log, laps = _law_word(law_ptr, _LOG_WINDOW), _law_word(law_ptr, _LAPS)
    lap = address >> log
    cell = _divide(lap, _law_word(law_ptr, _LAPS_MAGIC), _law_word(law_ptr, _LAPS_SHIFT))
    if ROUNDS + SWAP_ROUNDS > 0:
        unit, whole = _unit(cell, law_ptr)
        moved = _permute(unit, law_ptr, ROUNDS, SWAP_ROUNDS) - unit
        moved = tl.where(whole, moved, tl.zeros_like(moved))
        cell += moved
        lap += moved * laps
    place = address & _window_mask(law_ptr)
    if SCRAMBLE != _IN_ORDER:
        place = _scramble(lap + _law_word(law_ptr, _FIRST_LAP), place, law_ptr, SCRAMBLE)
    first, slots = cell << log, _law_word(law_ptr, _SLOTS)  # first <= 2^31
    turns = _divide(first, _law_word(law_ptr, _SLOTS_MAGIC), _law_word(law_ptr, _SLOTS_SHIFT))
    first = _add_mod(_law_word(law_ptr, _BASE), first - turns * slots, slots)
    return _add_mod(first, place, slots)


@triton.jit
def vector_word(p, law_ptr):
    """A word whose bit 31 is the sign of positions p: 32 of them share what is computed."""
    return _sign_word(p >> 5, law_ptr, 0) << (31 - (p & 31))


@triton.jit
def _end(law_ptr):
    """One past the last slot of the band's windows, unwrapped, counted from the first of them."""
    log = _law_word(law_ptr, _LOG_WINDOW)
    lap = (_law_word(law_ptr, _POSITIONS) + _law_word(law_ptr, _OFFSET) - 1) >> log
    cell = _divide(lap, _law_word(law_ptr, _LAPS_MAGIC), _law_word(law_ptr, _LAPS_SHIFT))
    return ((cell + 1) << log).to(tl.int64)


@triton.jit
def most_uses(law_ptr):
    """How many positions of the band may read one slot, int32."""
    slots = _law_word(law_ptr, _SLOTS).to(tl.int64)
    return (tl.cdiv(_end(law_ptr), slots) * _law_word(law_ptr, _LAPS).to(tl.int64)).to(tl.int32)


@triton.jit
def use(
    slot,
    number,
    law_ptr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    SCRAMBLE: tl.constexpr,
):
    """(p, whether there is one) of use ``number`` of slots, in the order of addresses.

    Args:
        slot: uint32.
        number: scalar int32, below most_uses.
    """
    log, laps = _law_word(law_ptr, _LOG_WINDOW), _law_word(law_ptr, _LAPS)
    slots, offset = _law_word(law_ptr, _SLOTS), _law_word(law_ptr, _OFFSET)
    turn = number // laps.to(tl.int32)
    unwrapped = _sub_mod(slot, _law_word(law_ptr, _BASE), slots).to(tl.int64)
    unwrapped += turn.to(tl.int64) * slots.to(tl.int64)
    live = unwrapped < _end(law_ptr)
    x = tl.where(live, unwrapped, 0).to(tl.uint32)
    cell = x >> log
    lap = cell * laps + (number - turn * laps.to(tl.int32)).to(tl.uint32)
    j = x & _window_mask(law_ptr)
    if SCRAMBLE != _IN_ORDER:
        j = _unscramble(lap + _law_word(law_ptr, _FIRST_LAP), j, law_ptr, SCRAMBLE)
    address = (lap << log) + j
    p = address - offset
    live = live & (address >= offset) & (p < _law_word(law_ptr, _POSITIONS))
    if ROUNDS + SWAP_ROUNDS > 0:
        unit, whole = _unit(cell, law_ptr)
        moved = (_unpermute(unit, law_ptr, ROUNDS, SWAP_ROUNDS) - unit) * (laps << log)
        p += tl.where(whole, moved, tl.zeros_like(moved))
    return tl.where(live, p, tl.zeros_like(p)), live
