"""A layer's entries in scratch: 4 bytes per block instead of the law in every tile."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels.backends.triton import entries

_position, _law_entry = entries.position, entries.law_entry


@triton.jit(do_not_specialize=["row0", "blocks", "run_blocks", "low", "count"])
def _slots_kernel(
    law_ptr,  # [192]
    out_ptr,  # [runs * count, rows], int32
    rows,
    count,
    row0,
    blocks,
    run_blocks,
    low,
    SIGN: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t * count + j, n] = entry of row row0 + n and block t * run_blocks + low + j.

    Tile: BLOCK rows of one block column, so that a kernel that walks many rows of it reads them
    coalesced. Grid: one program per tile. Shared memory: none. About 60 to 100 lane-instructions
    per entry (8 per Feistel round, 9 per swap-or-not round, 11 for the sign); in law 3 600.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK)
    at = pid // tiles
    n = (pid - at * tiles) * BLOCK + tl.arange(0, BLOCK)
    run = at // count
    b = run * run_blocks + low + at - run * count
    q = _position(n, b, row0, blocks, law_ptr, LAW)
    word = _law_entry(q, law_ptr, SIGN, ROUNDS, SWAP_ROUNDS, LAW)
    out = out_ptr + tl.full([], 1, tl.int64) * at * rows + n
    tl.store(out, word.to(tl.int32, bitcast=True), mask=n < rows)


def write(
    out: Tensor,
    words: Tensor,
    row0: int,
    blocks: int,
    low: int,
    sign: str,
    rounds: tuple[int, int, int],
    runs: int = 1,
    run_blocks: int = 0,
) -> None:
    """Fill ``out`` int32 ``[runs * count, rows]`` with entries of rows ``row0``..

    They are those of ``count`` blocks of every run, from the run's block ``low``.

    Args:
        out: contiguous scratch.
        words: the law's vector (``law.law_words``) of the band that holds all of these rows.
        row0: first row, counted from the band's.
        blocks: per row of the layer.
        low: first block of a run.
        sign: "none", "folded", "entry" or "element".
        rounds: Feistel and swap-or-not rounds of the band, and LAW (entries.py).
        runs, run_blocks: runs per row, and blocks from one to the next.
    """
    number, rows = out.shape
    block = min(1024, max(32, triton.next_power_of_2(rows)))
    _slots_kernel[(number * -(-rows // block),)](
        words, out, rows, number // runs, row0, blocks, run_blocks, low, sign, *rounds, block
    )
