"""The packing law, version 1, in Triton: device functions, and the words that they read.

docs/law.md is its specification, rpg_kernels/law/ring.py its definition. Everything on positions is
uint32 arithmetic; keys and the layer's numbers come from one int32 vector of LAW_WORDS words,
because integer arguments of a kernel would be specialised, and so compiled anew, layer by layer.
About 8 instructions per Feistel round, 9 per swap-or-not round, 11 per sign word.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels.law.ring import (
    LAW_VERSION,
    LayerLaw,
    Permutation,
    keys,
    most_square_factors,
)

LAW_WORDS = 192  # law 1 leaves the last 64 unused
# Where each number stands in the vector.
_SIZE = tl.constexpr(0)  # Q, positions of the band
_MAJOR = tl.constexpr(1)
_MINOR = tl.constexpr(2)
_MINOR_MAGIC = tl.constexpr(3)
_MINOR_SHIFT = tl.constexpr(4)
_SLOTS = tl.constexpr(5)
_SLOTS_MAGIC = tl.constexpr(6)
_SLOTS_SHIFT = tl.constexpr(7)
_BASE = tl.constexpr(8)  # (start + first position of the band) mod slots
_ROUNDS = tl.constexpr(9)  # of Feistel, and of swap-or-not
_SWAP_ROUNDS = tl.constexpr(10)
_SIGN_KEYS = tl.constexpr(16)  # two for each of four sign words
_ROUND_KEYS = tl.constexpr(32)  # swap-or-not: pivots (already times Q) and keys in turn

_M1 = tl.constexpr(0x7FEB352D)
_M2 = tl.constexpr(0x846CA68B)
_S1 = tl.constexpr(0xED5AD4BB)
_S2 = tl.constexpr(0xAC4C1B51)
_S3 = tl.constexpr(0x31848BAB)

READ = -1  # instead of the rounds of a permutation: as many as the words say
_READ = tl.constexpr(READ)


def divider(divisor: int) -> tuple[int, int]:
    """(magic, shift) with n // divisor == umulhi(n, magic) >> shift for n <= 2^31.

    Granlund and Montgomery (1994). For divisor 1 the pair (0, 0) stands for n itself.

    Example:
        >>> magic, shift = divider(7)
        >>> all((n * magic >> 32) >> shift == n // 7 for n in (0, 6, 7, 8, 2**31))
        True
    """
    if divisor == 1:
        return 0, 0
    log = (divisor - 1).bit_length()
    return -(-(1 << (31 + log)) // divisor), log - 1


@functools.lru_cache(maxsize=65536)
def rounds(law: LayerLaw, band: int = 0) -> tuple[int, int, int]:
    """(Feistel rounds, swap-or-not rounds, LAW), the compile-time part of a band's law.

    The last number is what tells law 3 from this one, see entries.py.
    """
    if not law.permute:
        return 0, 0, LAW_VERSION
    p = law.permutation(band)
    return (p.rounds, 0, LAW_VERSION) if p.rounds else (0, p.swap_rounds, LAW_VERSION)


def round_words(p: Permutation) -> list[int]:
    """What the device functions read in a permutation's rounds."""
    if p.rounds:
        return list(keys(p.seed, p.layer, p.band, 0, p.rounds))
    drawn = list(keys(p.seed, p.layer, p.band, 0, 2 * p.swap_rounds))
    drawn[::2] = [key * p.size >> 32 for key in drawn[::2]]
    return drawn


@functools.cache
def law_words(law: LayerLaw, band: int, device: torch.device) -> Tensor:
    """int32 ``[LAW_WORDS]`` on a device: what the device functions read as ``law_ptr``.

    Kept for good: a captured CUDA graph goes on reading them.

    Raises:
        TypeError: another law than version 1, whose numbers these words would not be.
        RuntimeError: a stream is being captured, and these words are not on the device yet.
    """
    if type(law) is not LayerLaw:
        raise TypeError(f"law: got a {type(law).__name__}, wanted a LayerLaw of version 1")
    p = law.permutation(band)
    major, minor = most_square_factors(p.size)
    first = band * law.rows_per_band * law.blocks
    words = [0] * LAW_WORDS
    words[:9] = [
        p.size,
        major,
        minor,
        *divider(minor),
        law.slots,
        *divider(law.slots),
        (law.start + first) % law.slots,
    ]
    words[9:11] = rounds(law, band)[:2]
    words[16:24] = keys(law.seed, law.layer, band, 128, 8)
    drawn = round_words(p)
    words[32 : 32 + len(drawn)] = drawn
    return on_device(words, device)


def on_device(words: Sequence[int], device: torch.device) -> Tensor:
    """uint32 words as an int32 tensor on a device.

    Raises:
        RuntimeError: a stream is being captured, which allows no copy from the host.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "stream: got a capture before the first call of this layer, wanted a warm-up call, "
            "since a few words about the layer are copied to the device once"
        )
    signed = [word - (1 << 32) if word >= 1 << 31 else word for word in words]
    if device.type != "cuda":
        return torch.tensor(signed, dtype=torch.int32, device=device)
    # In another thread, which allocates outside of a CUDA graph's private pool: what lies there
    # and is no output would be taken for a leak (torch.compile, mode="reduce-overhead").
    with ThreadPoolExecutor(1) as thread:
        made: Tensor = thread.submit(
            torch.tensor, signed, dtype=torch.int32, device=device
        ).result()
    return made


@triton.jit
def law_word(law_ptr, i):
    """Word i of the law's vector as uint32."""
    return tl.load(law_ptr + i).to(tl.uint32, bitcast=True)


@triton.jit
def _divide(n, magic, shift):
    return tl.where(magic == 0, n, tl.umulhi(n, magic) >> shift)


@triton.jit
def _round_value(x, key, size):
    h = (x ^ key) * tl.full([], _M1, tl.uint32)
    h = (h ^ (h >> 15)) * tl.full([], _M2, tl.uint32)
    return tl.umulhi(h, tl.zeros_like(h) + size)


@triton.jit
def _add_mod(a, b, m):
    s = a + b
    return tl.minimum(s, s - m)


@triton.jit
def _sub_mod(a, b, m):
    d = a - b
    return tl.minimum(d, d + m)


@triton.jit
def _swap_or_not(q, law_ptr, size, r):
    partner = _sub_mod(law_word(law_ptr, _ROUND_KEYS + 2 * r), q, size)
    key = law_word(law_ptr, _ROUND_KEYS + 2 * r + 1)
    swap = _round_value(tl.maximum(q, partner), key, tl.full([], 2, tl.uint32))
    return tl.where(swap != 0, partner, q)


@triton.jit
def _two_rounds(i, j, major, minor, law_ptr, r):
    """Feistel rounds r and r + 1."""
    j = _add_mod(j, _round_value(i, law_word(law_ptr, _ROUND_KEYS + r), minor), minor)
    i = _add_mod(i, _round_value(j, law_word(law_ptr, _ROUND_KEYS + r + 1), major), major)
    return i, j


@triton.jit
def permute(q, law_ptr, ROUNDS: tl.constexpr, SWAP_ROUNDS: tl.constexpr):
    """q -> P(q), uint32 of any shape. With ROUNDS = READ one kernel serves every permutation."""
    if ROUNDS == _READ:
        size = law_word(law_ptr, _SIZE)
        for r in range(law_word(law_ptr, _SWAP_ROUNDS).to(tl.int32)):
            q = _swap_or_not(q, law_ptr, size, r)
        major, minor = law_word(law_ptr, _MAJOR), law_word(law_ptr, _MINOR)
        i = _divide(q, law_word(law_ptr, _MINOR_MAGIC), law_word(law_ptr, _MINOR_SHIFT))
        j = q - i * minor
        for r in range(0, law_word(law_ptr, _ROUNDS).to(tl.int32), 2):
            i, j = _two_rounds(i, j, major, minor, law_ptr, r)
        q = i * minor + j
    if SWAP_ROUNDS > 0:
        size = law_word(law_ptr, _SIZE)
        for r in range(SWAP_ROUNDS):
            q = _swap_or_not(q, law_ptr, size, r)
    if ROUNDS > 0:
        major, minor = law_word(law_ptr, _MAJOR), law_word(law_ptr, _MINOR)
        i = _divide(q, law_word(law_ptr, _MINOR_MAGIC), law_word(law_ptr, _MINOR_SHIFT))
        j = q - i * minor
        for r in tl.static_range(0, ROUNDS, 2):
            i, j = _two_rounds(i, j, major, minor, law_ptr, r)
        q = i * minor + j
    return q


@triton.jit
def unpermute(q, law_ptr, ROUNDS: tl.constexpr, SWAP_ROUNDS: tl.constexpr):
    """P(q) -> q, uint32 of any shape."""
    if SWAP_ROUNDS > 0:
        size = law_word(law_ptr, _SIZE)
        for r in range(SWAP_ROUNDS):
            q = _swap_or_not(q, law_ptr, size, SWAP_ROUNDS - 1 - r)
    if ROUNDS > 0:
        major, minor = law_word(law_ptr, _MAJOR), law_word(law_ptr, _MINOR)
        i = _divide(q, law_word(law_ptr, _MINOR_MAGIC), law_word(law_ptr, _MINOR_SHIFT))
        j = q - i * minor
        for r in tl.static_range(ROUNDS - 2, -1, -2):
            key = law_word(law_ptr, _ROUND_KEYS + r + 1)
            i = _sub_mod(i, _round_value(j, key, major), major)
            key = law_word(law_ptr, _ROUND_KEYS + r)
            j = _sub_mod(j, _round_value(i, key, minor), minor)
        q = i * minor + j
    return q


@triton.jit
def slot_of(q, law_ptr, ROUNDS: tl.constexpr, SWAP_ROUNDS: tl.constexpr):
    """Slot of band positions q: uint32 of q's shape."""
    q = permute(q, law_ptr, ROUNDS, SWAP_ROUNDS)
    slots = law_word(law_ptr, _SLOTS)
    laps = _divide(q, law_word(law_ptr, _SLOTS_MAGIC), law_word(law_ptr, _SLOTS_SHIFT))
    return _add_mod(law_word(law_ptr, _BASE), q - laps * slots, slots)


@triton.jit
def sign_word(q, law_ptr, w):
    """Sign word w (elements 32 w to 32 w + 31) of band positions q."""
    k0 = law_word(law_ptr, _SIGN_KEYS + 2 * w)
    k1 = law_word(law_ptr, _SIGN_KEYS + 2 * w + 1)
    h = q ^ k0
    h = (h ^ (h >> 17)) * tl.full([], _S1, tl.uint32)
    h = (h ^ (h >> 11) ^ k1) * tl.full([], _S2, tl.uint32)
    h = (h ^ (h >> 15)) * tl.full([], _S3, tl.uint32)
    return h ^ (h >> 14)


@triton.jit
def sign_bit(e):
    """The bit of its sign word that belongs to element e: 15 - p and 31 - p for pair p."""
    return 15 - (e % 32) // 2 + 16 * (e % 2)
