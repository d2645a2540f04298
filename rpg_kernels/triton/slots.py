"""A layer's entries in scratch: 4 bytes per block instead of the law in every tile."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels.triton import weights

_position, _law_entry = weights.position, weights.law_entry


@triton.jit
def _slots_kernel(
    law_ptr,  # [128]
    out_ptr,  # [count, rows], int32
    rows,
    count,
    row0,
    blocks,
    low,
    SIGN: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[b, n] = entry of row row0 + n and block low + b.

    Tile: BLOCK entries, rows innermost, so that a kernel that walks one block column of many rows
    reads them coalesced. Grid: one program per tile. Shared memory: none. About 60 to 100
    lane-instructions per entry (8 per Feistel round, 9 per swap-or-not round, 11 for the sign).
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < tl.full([], 1, tl.int64) * count * rows
    b = offs // rows
    n = (offs - b * rows).to(tl.int32)
    q = _position(n, low + b.to(tl.int32), row0, blocks)
    word = _law_entry(q, law_ptr, SIGN, ROUNDS, SWAP_ROUNDS)
    tl.store(out_ptr + offs, word.to(tl.int32, bitcast=True), mask=mask)


def write(
    out: Tensor,
    words: Tensor,
    row0: int,
    blocks: int,
    low: int,
    sign: str,
    rounds: tuple[int, int],
) -> None:
    """Fill ``out`` int32 ``[count, rows]`` with the entries of blocks ``low``.. of rows ``row0``..

    Args:
        out: contiguous scratch.
        words: the law's vector (``law.law_words``) of the band that holds all of these rows.
        row0: first row, counted from the band's.
        blocks: per row of the layer.
        low: first block.
        sign: "none", "folded", "entry" or "element".
        rounds: Feistel and swap-or-not rounds of the band.
    """
    block = 1024
    grid = (triton.cdiv(out.numel(), block),)
    _slots_kernel[grid](
        words, out, out.shape[1], out.shape[0], row0, blocks, low, sign, *rounds, block
    )
