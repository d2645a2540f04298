"""Ŵ = scale · G · w in torch's layout, and its adjoint by the inverse law."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels.placement import parse
from rpg_kernels.reference import unpack as reference
from rpg_kernels.reference.accumulate import bank_accumulator
from rpg_kernels.triton import gather, plan, weights
from rpg_kernels.triton.config import Config, choose

_locate, _flip = weights.locate, weights.flip


@triton.jit
def _unpack_kernel(
    bank_ptr,  # [slots, G]
    law_ptr,  # [128]
    entry_ptr,  # see weights.entry
    out_ptr,  # [rows, columns, taps]
    stride_n,
    stride_c,
    rows,
    columns,
    column0,
    channels,
    run,
    run_blocks,
    row0,
    blocks,
    low,
    count,
    steps,
    scale,
    G: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    BY_TAP: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n, c, t] = scale * sign * bank[slot(n, b), e] for the selected columns c.

    Tile: BLOCK_N rows x BLOCK_K elements of ``count`` blocks from block ``low`` of every run.
    Grid: one program per tile, row tiles innermost. Shared memory: none. Budget: the law once per
    position (60 to 100 lane-instructions per G weights), about 12 per weight for its place.
    The product with scale is rounded once, from fp32.
    """
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(rows, BLOCK_N)
    step = pid // tiles_n
    offs_n = (pid - step * tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.minimum(offs_n, rows - 1)
    index = tl.arange(0, BLOCK_K)
    if G >= BLOCK_K:
        per_block: tl.constexpr = G // BLOCK_K
        number = step // per_block
        e0 = (step % per_block) * BLOCK_K
        element = e0 + index
        wanted = index >= 0
    else:
        padded = step * BLOCK_K + index
        last = steps * BLOCK_K // G  # at least the number of blocks
        number = tl.minimum(padded // G, last - 1)
        e0 = padded % G
        element = e0
        wanted = number < blocks
    tap = number // count
    inside = number - tap * count + low
    wanted = wanted & (inside < run_blocks) & (tap * run_blocks + inside < blocks)
    b = tl.minimum(tap * run_blocks + inside, blocks - 1)
    i = inside * G + element
    wanted = wanted & (i < run)
    if BY_TAP:
        channel = i
        tap = tap + tl.zeros_like(i)
    else:
        tap = i // channels
        channel = i - tap * channels
    column = channel - column0
    wanted = wanted & (column >= 0) & (column < columns)
    offsets, sign = _locate(
        law_ptr, entry_ptr, 0, n, b, e0, row0, blocks, low,
        G, BLOCK_K, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS,
    )  # fmt: skip
    mask = (offs_n < rows)[:, None] & wanted[None, :]
    w = tl.load(bank_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if SIGN != "none":
        w = _flip(w, sign)
    place = column.to(tl.int64) * stride_c + tap.to(tl.int64)
    at = out_ptr + (offs_n.to(tl.int64) * stride_n)[:, None] + place[None, :]
    tl.store(at, (w * scale).to(out_ptr.dtype.element_ty), mask=mask)


def unpack(
    bank: Tensor, table: Tensor | None, placement: str, config: Config | None = None
) -> Tensor:
    """bank ``[slots, granularity]`` -> ``[rows, columns, *kernel]``, contiguous, no scratch."""
    p = parse(placement)
    matrix, cols = p.matrix, p.block_columns
    rows, columns = p.selected_shape[:2]
    out = bank.new_empty(p.selected_shape)
    dense = out.view(rows, columns, -1)
    ring = bank.contiguous().view(-1, matrix.block)
    c = config or choose("unpack", 1, rows, columns, matrix.block, bank.dtype)
    steps = -(-matrix.runs * cols.count * matrix.block // c.block_k)
    with plan.on_device(bank):
        for band in plan.bands(p, bank.device):
            in_line = plan.entries_in_line(band)
            entries = in_line if table is None else plan.entries_of_table(table, p, band)
            part = dense[band.row : band.row + band.rows]
            _unpack_kernel[(triton.cdiv(band.rows, c.block_n) * steps,)](
                ring, band.words, entries.tensor, part, *part.stride()[:2],
                band.rows, columns, p.selection[1][0], matrix.channels, matrix.run,
                matrix.run_blocks, band.row0, matrix.blocks, cols.low, cols.count, steps, p.scale,
                G=matrix.block, SOURCE=entries.source, SIGN=plan.sign_kind(p),
                BY_TAP=matrix.by_tap, ROUNDS=band.rounds[0], SWAP_ROUNDS=band.rounds[1],
                BLOCK_N=c.block_n, BLOCK_K=c.block_k, num_warps=c.warps,
            )  # fmt: skip
    return out


def pack(dense: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype) -> Tensor:
    """dense ``[rows, columns, *kernel]`` -> ``[slots, granularity]`` of ``dtype``, fp32 sums.

    Deterministic. A table has no inverse: the reference sums there.
    """
    if table is not None:
        return reference.pack(dense, table, placement, dtype)
    p = parse(placement)
    grad = bank_accumulator(p, dense.device, dtype)
    taps = dense.reshape(*dense.shape[:2], -1)
    with plan.on_device(dense):
        for band in plan.bands(p, dense.device):
            part = taps[band.row : band.row + band.rows]
            gather.add(grad.view(-1, p.matrix.block), part, p, band)
    return grad.to(dtype)
