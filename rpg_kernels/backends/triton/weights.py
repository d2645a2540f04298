"""Device functions that fetch virtual weights and scatter their gradients, tile by tile.

The columns of a row are walked *padded*: whole blocks from block ``low`` on, of whose elements
those from ``first`` to ``first + length`` are wanted. Step s of a tile is BLOCK_K of them:

    block   low        low + 1                       low + count - 1
            [..first|==========|========== ... ======|.......]
                    length elements that are wanted

Nothing outside of them is read. Tiles of G >= 8 are read in lines of 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rpg_kernels.backends.triton import entries, stored

_PAIR = tl.constexpr(0x80008000)
_position, _slot_and_sign = entries.position, entries.slot_and_sign
_grid, _span, _spread = entries.grid, entries.span, entries.spread
_sign_words, _signs, _flip = entries.sign_words, entries.signs, entries.flip
_block_of, _read = stored.block_of, stored.read


@triton.jit
def line(base, e, WIDTH: tl.constexpr):
    """base [rows] or [rows, blocks] + e + [0, WIDTH): addresses of whole lines, two-dimensional."""
    index = tl.arange(0, WIDTH)
    if len(base.shape) == 1:
        at = base[:, None] + (e + index)[None, :]
    else:
        at = (base[:, :, None] + (e + index)[None, None, :]).reshape(
            base.shape[0], base.shape[1] * WIDTH
        )
        # Said again: the reshape hides from the compiler that these are whole, aligned lines.
        at = tl.max_contiguous(tl.multiple_of(at, [1, WIDTH]), [1, WIDTH])
    return at


@triton.jit
def places(slot, e, G: tl.constexpr, BLOCK_K: tl.constexpr):
    """Addresses [BLOCK_N, BLOCK_K] of a tile whose entries name ``slot``, with e from span.

    The multiples are what makes the loads and the atomics of a row vectors of 16 bytes.
    """
    if G >= BLOCK_K:
        at = line(tl.multiple_of(slot * G, G), e, BLOCK_K)
    elif G >= 8:
        at = line(tl.multiple_of(slot * G, [G, G]), e, G)
    else:
        at = slot * G + e[None, :]
    return at


@triton.jit
def locate(
    law_ptr,  # [192]
    entry_ptr,  # see entry
    entry_stride,
    n,
    b,
    e,
    row0,
    blocks,
    low,
    G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
):
    """Where the elements of a tile lie on the ring, and their signs.

    Args:
        n: rows of the launch [BLOCK_N].
        b, e: see span.

    Returns:
        (int64 offsets [BLOCK_N, BLOCK_K], uint32 signs in bit 31 that broadcast to it).
    """
    rows, columns = _grid(n, b, G, BLOCK_K)
    slot, sign = _slot_and_sign(
        law_ptr, entry_ptr, entry_stride, rows, columns, row0, blocks, low,
        SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
    )  # fmt: skip
    offsets = places(slot, e, G, BLOCK_K)
    sign = _signs(sign, rows, columns, e, law_ptr, row0, blocks, G, BLOCK_K, SIGN, LAW)
    return offsets, sign


@triton.jit
def stored_tile(
    bank_ptr,  # [rows * PARTS, G]
    scales_ptr,  # see stored.read
    places_ptr,
    law_ptr,  # [192]
    entry_ptr,  # see entry
    entry_stride,
    n,
    b,
    e,
    wanted,
    row0,
    blocks,
    low,
    G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
):
    """(values without signs, their signs) of a tile of a bank that is kept in fewer bytes.

    Args:
        n, b, e: as in locate.
        wanted: see stored.read.

    Returns:
        (see stored.read; uint32 signs in bit 31 that broadcast to it).
    """
    rows, columns = _grid(n, b, G, BLOCK_K)
    slot, sign = _slot_and_sign(
        law_ptr, entry_ptr, entry_stride, rows, columns, row0, blocks, low,
        SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
    )  # fmt: skip
    block = _block_of(slot, places_ptr, PARTS)
    at = places(block, e, G, BLOCK_K)
    value = _read(bank_ptr, scales_ptr, places_ptr, at, block, wanted, G, BLOCK_K, PARTS)
    sign = _signs(sign, rows, columns, e, law_ptr, row0, blocks, G, BLOCK_K, SIGN, LAW)
    return value, sign


@triton.jit
def masked_load(at, columns, live, EVEN_K: tl.constexpr):
    """What lies at ``at`` [rows, columns], zero outside of columns [1, columns] and rows [rows]."""
    if live is not None:
        mask = live[:, None]
        if not EVEN_K:
            mask = mask & columns
        value = tl.load(at, mask=mask, other=0)
    elif EVEN_K:
        value = tl.load(at)
    else:
        value = tl.load(at, mask=columns, other=0)
    return value


@triton.jit
def _scatter_columns(
    grad_ptr,  # [slots, G], fp32
    value,  # [BLOCK_N, BLOCK_K], fp32
    law_ptr,  # [192]
    entry_ptr,  # see entry
    entry_stride,
    n,
    mask_n,
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
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
):
    """See scatter."""
    last = (first + length - 1) // G
    b, e = _span(step, low, last, G, BLOCK_K)
    if G >= BLOCK_K:  # the right half of the last tile may lie beyond the last block
        b = tl.minimum(b, low + last)
    offsets, sign = locate(
        law_ptr, entry_ptr, entry_stride, n, b, e, row0, blocks, low,
        G, BLOCK_K, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
    )  # fmt: skip
    if SIGN != "none":
        value = _flip(value, sign)
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = mask_n[:, None] & ((k >= first) & (k < first + length))[None, :]
    tl.atomic_add(grad_ptr + offsets, value, mask=mask, sem="relaxed")


@triton.jit
def scatter(
    grad_ptr,  # [slots, G], fp32
    value,  # [BLOCK_N, BLOCK_K], fp32
    law_ptr,  # [192]
    entry_ptr,  # see entry
    entry_stride,
    n,
    mask_n,
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
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
):
    """grad[slot, e] += sign * value, one atomic for 4 elements where the device has such.

    Columns as in weight_tile; rows [BLOCK_N] are left out where ``mask_n`` is false. The halves of
    a large tile follow each other: beside its sums, registers hold the addresses and signs of one.
    """
    if value.shape[0] * BLOCK_K >= 256 * 128:
        halves = value.reshape(value.shape[0], 2, BLOCK_K // 2).permute(0, 2, 1)
        left, right = tl.split(halves)
        _scatter_columns(
            grad_ptr, left, law_ptr, entry_ptr, entry_stride, n, mask_n, 2 * step, row0, blocks,
            low, first, length, G, BLOCK_K // 2, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
        )  # fmt: skip
        _scatter_columns(
            grad_ptr, right, law_ptr, entry_ptr, entry_stride, n, mask_n, 2 * step + 1, row0,
            blocks, low, first, length, G, BLOCK_K // 2, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS,
            LAW,
        )  # fmt: skip
    else:
        _scatter_columns(
            grad_ptr, value, law_ptr, entry_ptr, entry_stride, n, mask_n, step, row0, blocks,
            low, first, length, G, BLOCK_K, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
        )  # fmt: skip


@triton.jit
def weight_tile(
    bank_ptr,  # [slots, G], [2 * slots, G] when signs are folded
    scales_ptr,  # of a bank that is kept in fewer bytes, see stored.read
    places_ptr,
    law_ptr,  # [192]
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
    PARTS: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
    DTYPE: tl.constexpr,
    scale,
    live=None,
):
    """G · w of rows n [BLOCK_N] and columns step * BLOCK_K + [0, BLOCK_K) from block ``low``.

    Columns outside [first, first + length) are zero and not read; so are rows where ``live``, if
    given, is false. With PAIRS two 16-bit elements are read, and signed, as one uint32. A bank of
    another dtype than DTYPE is multiplied by ``scale`` before it is rounded, as the reference
    does; otherwise the scale is the caller's to apply.

    Args:
        entry_stride: rows of the table of entries, in which a block's lie side by side.
        n: numbers of rows within the launch, [BLOCK_N] int32.
        row0: the launch's first row, counted in its band of the law.
        blocks: that a row of the whole layer has.
        low: the block from which padded columns are counted.
        live: [BLOCK_N] booleans, or None where all rows are wanted.
    """
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = ((k >= first) & (k < first + length))[None, :]
    b, e = _span(step, low, (first + length - 1) // G, G, BLOCK_K)
    if PAIRS and G >= 16:
        width: tl.constexpr = (G if G < BLOCK_K else BLOCK_K) // 2
        pair = tl.arange(0, BLOCK_K // 2)
        rows, columns = _grid(n, b, G, BLOCK_K)
        slot, sign = _slot_and_sign(
            law_ptr, entry_ptr, entry_stride, rows, columns, row0, blocks, low,
            SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
        )  # fmt: skip
        at = bank_ptr.to(tl.pointer_type(tl.uint32)) + places(slot, e // 2, G // 2, BLOCK_K // 2)
        half, end = step * (BLOCK_K // 2) + pair, first + length
        some = ((half >= first // 2) & (half < end - end // 2))[None, :]  # pairs with one wanted
        both = masked_load(at, some, live, EVEN_K)
        if SIGN == "element":
            q = _position(rows, columns, row0, blocks, law_ptr, LAW)
            words = _sign_words(q, law_ptr, e, G, BLOCK_K // 2, BLOCK_K)
            shift = ((e // 2 + pair) % (G // 2) % 16).to(tl.uint32)[None, :]
            both ^= (words << shift) & tl.full([], _PAIR, tl.uint32)
        else:
            mask = tl.where(sign != 0, tl.full([], _PAIR, tl.uint32), 0)
            if G >= BLOCK_K:
                both ^= mask[:, None]
            else:
                both ^= _spread(mask, width)
        even, odd = both.to(tl.uint16), (both >> 16).to(tl.uint16)
        w = tl.interleave(even, odd).to(DTYPE, bitcast=True)
        if not EVEN_K:
            w = tl.where(valid, w, tl.zeros([], DTYPE))
    elif scales_ptr is not None or places_ptr is not None:
        wanted = None
        if live is not None:
            wanted = live[:, None]
            if not EVEN_K:
                wanted = wanted & valid
        elif not EVEN_K:
            wanted = valid
        w, sign = stored_tile(
            bank_ptr, scales_ptr, places_ptr, law_ptr, entry_ptr, entry_stride, n, b, e, wanted,
            row0, blocks, low, G, BLOCK_K, PARTS, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
        )  # fmt: skip
        if bank_ptr.dtype.element_ty != DTYPE:
            w = (w * scale).to(DTYPE)
        if SIGN == "entry" or SIGN == "element":
            w = _flip(w, sign)
    else:
        offsets, sign = locate(
            law_ptr, entry_ptr, entry_stride, n, b, e, row0, blocks, low,
            G, BLOCK_K, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
        )  # fmt: skip
        w = masked_load(bank_ptr + offsets, valid, live, EVEN_K)
        if bank_ptr.dtype.element_ty != DTYPE:
            w = (w * scale).to(DTYPE)
        if SIGN == "entry" or SIGN == "element":
            w = _flip(w, sign)
    return w
