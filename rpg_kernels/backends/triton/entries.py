"""Device functions that find virtual weights: the slot that each reads, and its sign.

A position (n, b) is a row of the launch and a block of the row. Its *entry* is the slot that it
reads, an int32, made in one of three ways (``SOURCE``):

    "law"      computed here, 60 to 110 lane-instructions in every thread that holds part of a row,
               and 600 in the unit law
    "scratch"  read from entry_ptr [blocks of the launch, rows of the launch], which entry_table.py
               writes; entry_stride is the number of rows
    "table"    read from entry_ptr [rows, blocks], an explicit table (bit 31 is the sign)

and its sign comes in one of four (``SIGN``):

    "none"     there is none
    "folded"   the bank is [v, -v]: a negative entry is slot + slots
    "entry"    bit 31 of the entry, applied to the tile
    "element"  one bit per element, from the words of the law

Which law it is, and whether it shuffles, is said by LAW, beside the rounds of a permutation:

    1        law 1, law.py
    3        law 3, unit_law.py; -3, with units in order

A tile of G >= 8 takes one entry per row and block. Below 8, every element finds its own entry.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rpg_kernels.backends.triton import law as device_law
from rpg_kernels.backends.triton import unit_law

_SIGN = tl.constexpr(0x80000000)
_LOW = tl.constexpr(0x7FFFFFFF)
_slot_of, _slot_of_unit = device_law.slot_of, unit_law.slot_of
_order_of_units, _vector_word = unit_law.order, unit_law.vector_word
_sign_word = device_law.sign_word
_sign_bit = device_law.sign_bit
_law_word = device_law.law_word
_SLOTS = device_law._SLOTS


@triton.jit
def position(n, b, row0, blocks, law_ptr, LAW: tl.constexpr):
    """q of row n and block b of the launch, uint32; row0 is the launch's first row in its band.

    In law 3 it is p, the place in the order in which units are cut.
    """
    if LAW == 1:
        return ((row0 + n) * blocks + b).to(tl.uint32)
    else:
        return _order_of_units(row0 + n, b, law_ptr)


@triton.jit
def vector_sign(q, law_ptr, LAW: tl.constexpr):
    """A word whose bit 31 is the sign of band positions q, where a block has one."""
    if LAW == 1:
        return _sign_word(q, law_ptr, 0)
    else:
        return _vector_word(q, law_ptr)


@triton.jit
def law_entry(
    q,
    law_ptr,  # [192]
    SIGN: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
):
    """The entry of band positions q, uint32, from the law."""
    if LAW == 1:
        slot = _slot_of(q, law_ptr, ROUNDS, SWAP_ROUNDS)
    else:
        slot = _slot_of_unit(q, law_ptr, ROUNDS, SWAP_ROUNDS, LAW)
    if SIGN == "folded":
        negative = vector_sign(q, law_ptr, LAW) >> 31
        slot += negative * _law_word(law_ptr, _SLOTS)
    if SIGN == "entry":
        slot |= vector_sign(q, law_ptr, LAW) & tl.full([], _SIGN, tl.uint32)
    return slot


@triton.jit
def entry(
    law_ptr,  # [192]
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
    LAW: tl.constexpr,
):
    """The entries of rows n and blocks b, uint32 of their common shape."""
    if SOURCE == "table":
        return tl.load(entry_ptr + n.to(tl.int64) * blocks + b).to(tl.uint32, bitcast=True)
    elif SOURCE == "scratch":
        at = entry_ptr + (b - low).to(tl.int64) * entry_stride + n
        return tl.load(at).to(tl.uint32, bitcast=True)
    else:
        q = position(n, b, row0, blocks, law_ptr, LAW)
        return law_entry(q, law_ptr, SIGN, ROUNDS, SWAP_ROUNDS, LAW)


@triton.jit
def slot_and_sign(
    law_ptr,  # [192]
    entry_ptr,  # see entry
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
    LAW: tl.constexpr,
):
    """(slot int64, sign in bit 31 of a uint32) of rows n and blocks b, of their common shape."""
    word = entry(
        law_ptr, entry_ptr, entry_stride, n, b, row0, blocks, low,
        SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
    )  # fmt: skip
    slot = word
    if SIGN == "entry":
        slot = word & tl.full([], _LOW, tl.uint32)
    return slot.to(tl.int64), word & tl.full([], _SIGN, tl.uint32)


@triton.jit
def grid(n, b, G: tl.constexpr, BLOCK_K: tl.constexpr):
    """(n, b) of a tile's entries: [rows] of one block, or two shapes that broadcast."""
    rows, columns = n, b
    if G < BLOCK_K:
        rows, columns = n[:, None], b[None, :]
    return rows, columns


@triton.jit
def span(step, low, last, G: tl.constexpr, BLOCK_K: tl.constexpr):
    """(blocks b, elements e) of the padded columns step * BLOCK_K + [0, BLOCK_K).

    A tile is PART of one block, or several whole BLOCKS, or for G < 8 a list of elements:

        PART    G >= BLOCK_K   b and e scalars, e the tile's first element
        BLOCKS  8 <= G         b [BLOCK_K / G], e 0
        else                   b and e [BLOCK_K]

    Args:
        low: the block that padded columns count from.
        last: of the wanted blocks, counted from ``low``; those beyond repeat it.
    """
    if G >= BLOCK_K:
        per_block: tl.constexpr = G // BLOCK_K
        b = low + step // per_block
        e = (step % per_block) * BLOCK_K
    elif G >= 8:
        many: tl.constexpr = BLOCK_K // G
        b = low + tl.minimum(step * many + tl.arange(0, many), last)
        e = 0
    else:
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        b = low + tl.minimum(k // G, last)
        e = k % G
    return b, e


@triton.jit
def spread(per_block, WIDTH: tl.constexpr):
    """[rows, blocks] -> [rows, blocks * WIDTH], each column WIDTH times."""
    wide = tl.broadcast_to(per_block[:, :, None], (per_block.shape[0], per_block.shape[1], WIDTH))
    return wide.reshape(per_block.shape[0], per_block.shape[1] * WIDTH)


@triton.jit
def sign_words(q, law_ptr, e, G: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sign words [rows, COLUMNS] of a tile of BLOCK_K elements, PART or BLOCKS.

    Each word is made once per row and block of the tile, not once per thread that needs it.

    Args:
        q: positions [rows] or [rows, blocks].
        e: the tile's first element, PART.
        COLUMNS: BLOCK_K, or BLOCK_K / 2 for words of pairs of elements.
    """
    part: tl.constexpr = G if G < BLOCK_K else BLOCK_K  # elements of one block in the tile
    words: tl.constexpr = part // 32 if part > 32 else 1
    width: tl.constexpr = COLUMNS * part // BLOCK_K // words
    w = e // 32 + tl.arange(0, words)
    if len(q.shape) == 1:
        return spread(_sign_word(q[:, None], law_ptr, w[None, :]), width)
    else:
        three = _sign_word(q[:, :, None], law_ptr, w[None, None, :])
        return spread(three.reshape(q.shape[0], q.shape[1] * words), width)


@triton.jit
def signs(
    sign,
    rows,
    columns,
    e,
    law_ptr,  # [192]
    row0,
    blocks,
    G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIGN: tl.constexpr,
    LAW: tl.constexpr,
):
    """Signs of a tile's elements in bit 31 of a uint32, of a shape that broadcasts to the tile's.

    Args:
        sign: of the entries (slot_and_sign).
        rows, columns: see grid.
        e: see span.
    """
    if SIGN == "element":
        q = position(rows, columns, row0, blocks, law_ptr, LAW)
        element = e
        if G >= 8 or G >= BLOCK_K:
            words = sign_words(q, law_ptr, e, G, BLOCK_K, BLOCK_K)
            element = (e + tl.arange(0, BLOCK_K)) % G
        else:
            words = _sign_word(q, law_ptr, 0)
        sign = words << (31 - _sign_bit(element)).to(tl.uint32)[None, :]
    elif G >= BLOCK_K:
        sign = sign[:, None]
    elif G >= 8:
        sign = spread(sign, G)
    return sign


@triton.jit
def flip(w, sign):
    """w with bit 31 of ``sign`` exclusive-or'd into its own sign bit; fp32, fp16 or bf16."""
    mask = sign & tl.full([], _SIGN, tl.uint32)
    if w.dtype == tl.float32:
        return (w.to(tl.uint32, bitcast=True) ^ mask).to(tl.float32, bitcast=True)
    else:
        short = (mask >> 16).to(tl.uint16)
        return (w.to(tl.uint16, bitcast=True) ^ short).to(w.dtype, bitcast=True)
