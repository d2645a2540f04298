"""Gᵀ by the inverse law: every slot sums its own uses, in a fixed order, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels.backends.triton import ahead, entries, plan, unit_law
from rpg_kernels.backends.triton import law as device_law
from rpg_kernels.law.placement import Placement

_unpermute = device_law.unpermute
_use_of_unit, _most_uses_of_units = unit_law.use, unit_law.most_uses
_row_and_block_of_unit, _vector_sign = unit_law.row_and_block, entries.vector_sign
_sign_word, _sign_bit = device_law.sign_word, device_law.sign_bit
_law_word, _sub_mod = device_law.law_word, device_law._sub_mod
_SIZE, _SLOTS, _BASE = device_law._SIZE, device_law._SLOTS, device_law._BASE
_flip = entries.flip


@triton.jit(do_not_specialize=["rows", "row0", "blocks", "run_blocks"])
def _gather_kernel(
    dense_ptr,  # [rows, columns, taps]
    law_ptr,  # [192]
    grad_ptr,  # [slots, G], fp32
    stride_n,
    stride_c,
    stride_t,
    rows,
    columns,
    column0,
    channels,
    run,
    run_blocks,
    row0,
    blocks,
    scale,
    G: tl.constexpr,
    SIGN: tl.constexpr,
    BY_TAP: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """grad[s, e] += scale * sum over the band's uses (n, b) of slot s of sign * dense[n, b, e].

    A row of the virtual matrix is runs of ``run_blocks`` blocks; a run is a tap of ``run``
    channels where BY_TAP, otherwise it holds all taps, ``channels`` elements for each. The
    selected columns begin at channel ``column0``.
    The uses of s are P^-1(t) for t = (s - base) mod slots, + slots, + 2 slots ... below the band's
    positions, in this order; in law 3 those of ``unit_law.use``. Uses outside the rows and columns
    of ``dense``, such as the padding of rows to octets, are passed over, but each costs its
    inverse: a part of a layer takes as long as the whole band.
    Tile: BLOCK_S slots x G elements. Grid: one program per tile. Shared memory: 4 KiB, to exchange
    what rows share. Budget at G = 64: about 55 lane-instructions per weight and lap, a fifth of
    them the inverse law, which every thread of a slot evaluates; 125 in law 3.
    """
    s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    slots, size = _law_word(law_ptr, _SLOTS), _law_word(law_ptr, _SIZE)
    mask_s = s < slots.to(tl.int64)
    e = tl.arange(0, G)
    inside = tl.where(mask_s, s, 0).to(tl.uint32)
    if LAW == 1:
        t = _sub_mod(inside, _law_word(law_ptr, _BASE), slots).to(tl.int64)
        uses = tl.cdiv(size.to(tl.int64), slots.to(tl.int64))
    else:
        uses = _most_uses_of_units(law_ptr)
    acc = tl.zeros((BLOCK_S, G), tl.float32)
    for number in range(0, uses):
        if LAW == 1:
            use = mask_s & (t < size.to(tl.int64))
            q = _unpermute(tl.where(use, t, 0).to(tl.uint32), law_ptr, ROUNDS, SWAP_ROUNDS)
            row = q.to(tl.int32) // blocks  # q < 2^31
            b = q.to(tl.int32) - row * blocks
            t += slots.to(tl.int64)
        else:
            q, live = _use_of_unit(inside, number, law_ptr, ROUNDS, SWAP_ROUNDS, LAW)
            use = mask_s & live
            row, b = _row_and_block_of_unit(q, law_ptr)
        n = (row - row0).to(tl.int64)
        use = use & (n >= 0) & (n < rows)
        tap = b // run_blocks
        i = ((b - tap * run_blocks).to(tl.int64) * G)[:, None] + e[None, :]
        valid = use[:, None] & (i < run)
        if BY_TAP:
            channel, tap = i, tap[:, None]
        else:
            tap = i // channels
            channel = i - tap * channels
        column = channel - column0
        valid = valid & (column >= 0) & (column < columns)
        at = dense_ptr + (n * stride_n)[:, None] + column * stride_c + tap * stride_t
        value = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        if SIGN == "entry":
            value = _flip(value, _vector_sign(q, law_ptr, LAW)[:, None])
        if SIGN == "element":
            word = _sign_word(q[:, None], law_ptr, (e // 32)[None, :])
            value = _flip(value, word << (31 - _sign_bit(e)).to(tl.uint32)[None, :])
        acc += value
    out = grad_ptr + (s * G)[:, None] + e[None, :]
    mask = tl.broadcast_to(mask_s[:, None], (BLOCK_S, G))
    tl.store(out, tl.load(out, mask=mask, other=0.0) + acc * scale, mask=mask)


def add(ring: Tensor, dense: Tensor, p: Placement, launch: plan.LaunchRows) -> None:
    """ring += scale · Gᵀ · dense for the rows of one launch.

    Args:
        ring: fp32 ``[slots, block]``, contiguous.
        dense: ``[rows, columns, taps]`` of the selection, any strides.
        p: the weight; not one with a table, which has no inverse.
        launch: the rows.
    """
    matrix = p.matrix
    block_s = max(1, 1024 // matrix.block)
    rows, columns, _ = dense.shape
    ahead.launch(_gather_kernel, (plan.cdiv(ring.shape[0], block_s),))(
        dense, launch.words, ring, *dense.stride(), rows, columns, p.selection[1][0],
        matrix.channels, matrix.run, matrix.run_blocks, launch.row0, matrix.blocks, p.scale,
        G=matrix.block, SIGN=plan.sign_kind(p), BY_TAP=matrix.by_tap,
        ROUNDS=launch.rounds[0], SWAP_ROUNDS=launch.rounds[1], LAW=launch.rounds[2],
        BLOCK_S=block_s,
    )  # fmt: skip
