"""Device functions that find and fetch virtual weights: what every kernel's tile is made of.

A position (n, b) is a row of the launch and a block of the row. Its *entry* is the slot that it
reads, an int32, made in one of three ways (``SOURCE``):

    "law"      computed here, about 60 to 100 lane-instructions per position
    "scratch"  read from entry_ptr [blocks of the launch, rows of the launch], written by slots.py
    "table"    read from entry_ptr [rows, blocks], an explicit table (bit 31 is the sign)

and its sign comes in one of four (``SIGN``):

    "none"     there is none
    "folded"   the bank is [v, -v]: a negative entry is slot + slots
    "entry"    bit 31 of the entry, applied to the tile
    "element"  one bit per element, from the words of the law

A tile is COARSE when its columns lie in one block: one entry per row of the tile, and loads of 16
bytes. Otherwise every element finds its own entry.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rpg_kernels.triton import law as device_law

_SIGN = tl.constexpr(0x80000000)
_PAIR = tl.constexpr(0x80008000)
_LOW = tl.constexpr(0x7FFFFFFF)
_slot_of = device_law.slot_of
_sign_word = device_law.sign_word
_sign_bit = device_law.sign_bit
_law_word = device_law.law_word
_SLOTS = device_law._SLOTS


@triton.jit
def position(n, b, row0, blocks):
    """q of row n and block b of the launch, uint32; row0 is the launch's first row in its band."""
    return ((row0 + n) * blocks + b).to(tl.uint32)


@triton.jit
def law_entry(q, law_ptr, SIGN: tl.constexpr, ROUNDS: tl.constexpr, SWAP_ROUNDS: tl.constexpr):
    """The entry of band positions q, uint32, from the law."""
    slot = _slot_of(q, law_ptr, ROUNDS, SWAP_ROUNDS)
    if SIGN == "folded":
        negative = _sign_word(q, law_ptr, 0) >> 31
        slot += negative * _law_word(law_ptr, _SLOTS)
    if SIGN == "entry":
        slot |= _sign_word(q, law_ptr, 0) & tl.full([], _SIGN, tl.uint32)
    return slot


@triton.jit
def entry(
    law_ptr,  # [128]
    entry_ptr,  # [count, entry_stride] in scratch, [rows, blocks] of a table
    entry_stride,
    n,
    b,
    row0,
    blocks,
    low,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
):
    """The entries of rows n and blocks b, uint32 of their common shape."""
    if SOURCE == "table":
        return tl.load(entry_ptr + n.to(tl.int64) * blocks + b).to(tl.uint32, bitcast=True)
    elif SOURCE == "scratch":
        at = entry_ptr + (b - low).to(tl.int64) * entry_stride + n
        return tl.load(at).to(tl.uint32, bitcast=True)
    else:
        return law_entry(position(n, b, row0, blocks), law_ptr, SIGN, ROUNDS, SWAP_ROUNDS)


@triton.jit
def slot_and_sign(word, SIGN: tl.constexpr):
    """(slot int64, sign in bit 31 of a uint32) of an entry."""
    slot = word
    if SIGN == "entry":
        slot = word & tl.full([], _LOW, tl.uint32)
    return slot.to(tl.int64), word & tl.full([], _SIGN, tl.uint32)


@triton.jit
def block_words(q, law_ptr, e0, index, BLOCK_K: tl.constexpr):
    """Sign words [BLOCK_N, len(index)] of elements e0 + index of block positions q [BLOCK_N].

    index runs over elements within a tile of BLOCK_K (at most 64, so one or two words).
    """
    if BLOCK_K > 32:
        # Each word once per row of the tile, not once per thread that needs it.
        both = _sign_word(q[:, None], law_ptr, (e0 // 32 + tl.arange(0, 2))[None, :])
        half: tl.constexpr = index.shape[0] // 2
        spread = tl.broadcast_to(both[:, :, None], (q.shape[0], 2, half))
        word = spread.reshape(q.shape[0], 2 * half)
    else:
        word = _sign_word(q, law_ptr, e0 // 32)[:, None]
    return word


@triton.jit
def locate(
    law_ptr,  # [128]
    entry_ptr,  # see entry
    entry_stride,
    n,
    b,
    e0,
    row0,
    blocks,
    low,
    G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
):
    """Where the elements of a tile lie on the ring, and their signs.

    Args:
        n: rows of the launch [BLOCK_N].
        b: COARSE: the block, a scalar; otherwise the block of every column [BLOCK_K].
        e0: COARSE: the first element, a scalar; otherwise the element of every column [BLOCK_K].

    Returns:
        (int64 offsets [BLOCK_N, BLOCK_K], uint32 signs in bit 31 that broadcast to it).
    """
    index = tl.arange(0, BLOCK_K)
    if G >= BLOCK_K:
        word = entry(
            law_ptr, entry_ptr, entry_stride, n, b, row0, blocks, low,
            SOURCE, SIGN, ROUNDS, SWAP_ROUNDS,
        )  # fmt: skip
        slot, sign = slot_and_sign(word, SIGN)
        # What makes the loads and the atomics of a row vectors of 16 bytes.
        base = tl.multiple_of(slot * G, G)
        offsets = base[:, None] + (e0 + index)[None, :]
        sign = sign[:, None]
        if SIGN == "element":
            words = block_words(position(n, b, row0, blocks), law_ptr, e0, index, BLOCK_K)
            sign = words << (31 - _sign_bit(e0 + index)).to(tl.uint32)[None, :]
    else:
        rows, columns = n[:, None], b[None, :]
        word = entry(
            law_ptr, entry_ptr, entry_stride, rows, columns, row0, blocks, low,
            SOURCE, SIGN, ROUNDS, SWAP_ROUNDS,
        )  # fmt: skip
        slot, sign = slot_and_sign(word, SIGN)
        offsets = slot * G + e0[None, :]
        if SIGN == "element":
            words = _sign_word(position(rows, columns, row0, blocks), law_ptr, 0)
            sign = words << (31 - _sign_bit(e0)).to(tl.uint32)[None, :]
    return offsets, sign


@triton.jit
def flip(w, sign):
    """w with bit 31 of ``sign`` exclusive-or'd into its own sign bit; fp32, fp16 or bf16."""
    mask = sign & tl.full([], _SIGN, tl.uint32)
    if w.dtype == tl.float32:
        return (w.to(tl.uint32, bitcast=True) ^ mask).to(tl.float32, bitcast=True)
    else:
        short = (mask >> 16).to(tl.uint16)
        return (w.to(tl.uint16, bitcast=True) ^ short).to(w.dtype, bitcast=True)


@triton.jit
def weight_tile(
    bank_ptr,  # [slots, G], [2 * slots, G] when signs are folded
    law_ptr,  # [128]
    entry_ptr,  # see entry
    entry_stride,
    n,
    step,
    row0,
    blocks,
    low,
    first,
    length,
    G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """G · w of rows n [BLOCK_N] and columns step * BLOCK_K + [0, BLOCK_K) from block ``low``.

    Columns outside [first, first + length) are zero and not read. With PAIRS two 16-bit elements
    are read, and signed, as one uint32.
    """
    index = tl.arange(0, BLOCK_K)
    k = step * BLOCK_K + index
    valid = ((k >= first) & (k < first + length))[None, :]
    if G >= BLOCK_K and PAIRS:
        b = low + step // (G // BLOCK_K)
        e0 = (step % (G // BLOCK_K)) * BLOCK_K
        word = entry(
            law_ptr, entry_ptr, entry_stride, n, b, row0, blocks, low,
            SOURCE, SIGN, ROUNDS, SWAP_ROUNDS,
        )  # fmt: skip
        slot, sign = slot_and_sign(word, SIGN)
        base = tl.multiple_of(slot * (G // 2), G // 2)
        pair = tl.arange(0, BLOCK_K // 2)
        at = bank_ptr.to(tl.pointer_type(tl.uint32)) + base[:, None] + (e0 // 2 + pair)[None, :]
        if EVEN_K:
            both = tl.load(at)
        else:
            one = step * BLOCK_K + 2 * pair
            some = ((one + 1 >= first) & (one < first + length))[None, :]
            both = tl.load(at, mask=some, other=0)
        if SIGN == "element":
            q = position(n, b, row0, blocks)
            words = block_words(q, law_ptr, e0, 2 * pair, BLOCK_K)
            shift = ((e0 // 2 + pair) % 16).to(tl.uint32)[None, :]
            both ^= (words << shift) & tl.full([], _PAIR, tl.uint32)
        else:
            both ^= tl.where(sign != 0, tl.full([], _PAIR, tl.uint32), 0)[:, None]
        even, odd = both.to(tl.uint16), (both >> 16).to(tl.uint16)
        w = tl.interleave(even, odd).to(DTYPE, bitcast=True)
        if not EVEN_K:
            w = tl.where(valid, w, tl.zeros([], DTYPE))
        return w
    else:
        if G >= BLOCK_K:
            b = low + step // (G // BLOCK_K)
            e0 = (step % (G // BLOCK_K)) * BLOCK_K
        else:
            b = low + tl.minimum(k, first + length - 1) // G  # no entry beyond the last block
            e0 = k % G
        offsets, sign = locate(
            law_ptr, entry_ptr, entry_stride, n, b, e0, row0, blocks, low,
            G, BLOCK_K, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS,
        )  # fmt: skip
        if EVEN_K:
            w = tl.load(bank_ptr + offsets)
        else:
            w = tl.load(bank_ptr + offsets, mask=valid, other=0.0)
        w = w.to(DTYPE)
        if SIGN == "entry" or SIGN == "element":
            w = flip(w, sign)
        return w
