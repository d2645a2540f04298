"""A layer's entries in scratch: 4 bytes per block instead of the law in every tile."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels.backends.triton import ahead, entries
from rpg_kernels.backends.triton import law as device_law

_position, _law_entry, _vector_sign = entries.position, entries.law_entry, entries.vector_sign
_law_word, _SLOTS = device_law.law_word, device_law._SLOTS
_READ, _BIT_31 = tl.constexpr(device_law.READ), entries._SIGN
# What a negative sign adds to a slot, by its number in the list.
_SIGNS = ("none", "folded", "entry")
_FOLDED, _ENTRY = tl.constexpr(_SIGNS.index("folded")), tl.constexpr(_SIGNS.index("entry"))


@triton.jit(do_not_specialize=["count", "row0", "blocks", "run_blocks", "low", "sign"])
def _slots_kernel(
    law_ptr,  # [192]
    out_ptr,  # [runs * count, rows], int32
    rows,
    count,
    row0,
    blocks,
    run_blocks,
    low,
    sign,
    LAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t * count + j, n] = entry of row row0 + n and block t * run_blocks + low + j.

    One kernel for all layers of a law: rounds are read from its words, and a negative sign adds
    nothing, the number of slots or bit 31, by ``sign``, a number of _SIGNS.
    Tile: BLOCK rows of one block column, so that a kernel that walks many rows of it reads them
    coalesced. Grid: one program per tile. Shared memory: none. About 75 to 110 lane-instructions
    per entry (8 per Feistel round, 9 per swap-or-not round, 11 for the sign); in law 3 600.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK)
    at = pid // tiles
    n = (pid - at * tiles) * BLOCK + tl.arange(0, BLOCK)
    run = at // count
    b = run * run_blocks + low + at - run * count
    q = _position(n, b, row0, blocks, law_ptr, LAW)
    word = _law_entry(q, law_ptr, "none", _READ, _READ, LAW)
    added = tl.where(sign == _FOLDED, _law_word(law_ptr, _SLOTS), tl.full([], 0, tl.uint32))
    added = tl.where(sign == _ENTRY, tl.full([], _BIT_31, tl.uint32), added)
    word += (_vector_sign(q, law_ptr, LAW) >> 31) * added
    out = out_ptr + tl.full([], 1, tl.int64) * at * rows + n
    tl.store(out, word.to(tl.int32, bitcast=True), mask=n < rows)


def write(
    out: Tensor,
    words: Tensor,
    row0: int,
    blocks: int,
    low: int,
    sign: str,
    law: int,
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
        law: LAW, see entries.py.
        runs, run_blocks: runs per row, and blocks from one to the next.
    """
    number, rows = out.shape
    block = 1024 if rows >= 1024 else 128  # one entry a thread at least, and two kernels at most
    ahead.launch(_slots_kernel, (number * -(-rows // block),))(
        words, out, rows, number // runs, row0, blocks, run_blocks, low,
        _SIGNS.index(sign) if sign in _SIGNS else 0, law, block,
    )  # fmt: skip
