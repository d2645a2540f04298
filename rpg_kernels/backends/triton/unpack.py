"""Ŵ = scale · G · w in torch's layout, and its adjoint by the inverse law."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels import _checks
from rpg_kernels._checks import INT32_MAX as _INT32_MAX
from rpg_kernels.backends.reference import tiles
from rpg_kernels.backends.reference import unpack as reference
from rpg_kernels.backends.reference.accumulate import bank_accumulator
from rpg_kernels.backends.triton import ahead, entries, plan, stored, sum_uses, weights
from rpg_kernels.backends.triton.config import Config, choose
from rpg_kernels.law.placement import Placement, parse

_locate, _stored_tile, _flip = weights.locate, weights.stored_tile, entries.flip


@triton.jit(do_not_specialize=["rows", "low", "row0", "steps"])
def _unpack_kernel(
    bank_ptr,  # [slots, G]
    scales_ptr,  # of a bank that is kept in fewer bytes, see stored.py
    places_ptr,
    law_ptr,  # [192]
    entry_ptr,  # see entries.entry
    out_ptr,  # [rows, columns, taps]
    stride_n,
    stride_c,
    stride_t,
    rows,
    columns,
    channels,
    run,
    run_blocks,
    runs,
    row0,
    blocks,
    low,
    count,
    first,
    steps,
    scale,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    BY_TAP: tl.constexpr,
    ONE_TAP: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n, c, t] = scale * sign * bank[slot(n, b), e] for the selected columns c.

    A row of the virtual matrix is ``runs`` runs of ``run_blocks`` blocks. Of each run, ``count``
    blocks from block ``low`` are walked, one block after the other; i counts the elements of one
    run from there. BY_TAP a run is a tap, and i = ``first`` is the first wanted column. Otherwise
    one run holds all taps, ``channels`` elements for each, of which column ``first`` is the first.
    Tile: BLOCK_N rows x BLOCK_K elements. Grid: one program per tile, row tiles innermost. Shared
    memory: none where lines are aligned, otherwise 4 KiB. Budget: 20 to 25 lane-instructions per
    weight of a matrix at G = 64, most of them the law, which each of the 8 threads of a row
    evaluates; about 85 in law 3.
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
        e = (step % per_block) * BLOCK_K
        t = number // count
        b = t * run_blocks + low + number - t * count
        i = (number - t * count) * G + e + index
        wanted = i >= 0
    else:
        padded = step * BLOCK_K + index
        number = tl.minimum(padded // G, runs * count - 1)
        wanted = padded < runs * count * G
        t = number // count
        e = padded % G
        i = (number - t * count) * G + e
        b = t * run_blocks + low + number - t * count
        if G >= 8:  # one entry per block, not per element
            many: tl.constexpr = BLOCK_K // G
            number = tl.minimum(step * many + tl.arange(0, many), runs * count - 1)
            run_of = number // count
            b = run_of * run_blocks + low + number - run_of * count
            e = 0
    if BY_TAP:
        column = i - first
    else:
        t = i // channels
        column = i - t * channels - first
        wanted = wanted & (i < run)
    wanted = wanted & (column >= 0) & (column < columns)
    if scales_ptr is not None or places_ptr is not None:
        mask = (offs_n < rows)[:, None] & wanted[None, :]
        w, sign = _stored_tile(
            bank_ptr, scales_ptr, places_ptr, law_ptr, entry_ptr, 0, n, b, e, mask, row0, blocks,
            low, G, BLOCK_K, PARTS, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
        )  # fmt: skip
    else:
        offsets, sign = _locate(
            law_ptr, entry_ptr, 0, n, b, e, row0, blocks, low,
            G, BLOCK_K, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
        )  # fmt: skip
        mask = (offs_n < rows)[:, None] & wanted[None, :]
        w = tl.load(bank_ptr + offsets, mask=mask, other=0.0)
    if SIGN != "none":
        w = _flip(w, sign)
    w = w.to(tl.float32) * scale
    at = out_ptr + (offs_n.to(tl.int64) * stride_n)[:, None]
    at += (column.to(tl.int64) * stride_c)[None, :]
    if not ONE_TAP:  # even a tap of 0 would hide that addresses are aligned
        at += (t + tl.zeros_like(i)).to(tl.int64)[None, :] * stride_t
    tl.store(at, w.to(out_ptr.dtype.element_ty), mask=mask)


def unpack_tile(
    bank: Tensor,
    table: Tensor | None,
    p: Placement,
    dtype: torch.dtype,
    channels_last: bool = False,
    config: Config | None = None,
) -> Tensor:
    """scale · G · w as ``[rows, columns, *kernel]`` in ``dtype``, rounded once; no scratch.

    Args:
        bank: ``[slots, granularity]``, or StoredValues.
        table: int32 ``[entries]`` or None.
        p: the weight, or a part of it.
        dtype: of the result.
        channels_last: columns innermost in memory, as convolutions in channels-last want them.
    """
    matrix, cols = p.matrix, p.block_columns
    rows, columns, *kernel = p.selected_shape
    if channels_last:
        dense = bank.new_empty((rows, matrix.taps, columns), dtype=dtype).transpose(1, 2)
    else:
        dense = bank.new_empty((rows, columns, matrix.taps), dtype=dtype)
    ring = stored.ring_of(bank, matrix.block)
    c = config or choose("unpack", 1, rows, columns, matrix.block, bank.dtype)
    padded = matrix.runs * cols.count * matrix.block
    if padded > _INT32_MAX:
        raise _checks.fail("weight", f"rows of {padded} elements", f"at most {_INT32_MAX}")
    steps = -(-padded // c.block_k)
    first = cols.first if matrix.by_tap else p.selection[1][0]
    with plan.on_device(bank):
        for launch in plan.launches(p, bank.device):
            in_line = plan.entries_in_line(launch)
            entries = in_line if table is None else plan.entries_of_table(table, p, launch)
            part = dense[launch.row : launch.row + launch.rows]
            ahead.launch(_unpack_kernel, (plan.cdiv(launch.rows, c.block_n) * steps,))(
                *ring.tensors, launch.words, entries.tensor, part, *part.stride(),
                launch.rows, columns, matrix.channels, matrix.run, matrix.run_blocks, matrix.runs,
                launch.row0, matrix.blocks, cols.low, cols.count, first, steps, p.scale,
                G=matrix.block, PARTS=ring.parts, SOURCE=entries.source, SIGN=plan.sign_kind(p),
                BY_TAP=matrix.by_tap, ONE_TAP=matrix.taps == 1,
                **entries.law_of(launch, plan.sign_kind(p)),
                BLOCK_N=c.block_n, BLOCK_K=c.block_k, num_warps=c.warps,
            )  # fmt: skip
    return dense.unflatten(2, kernel) if kernel else dense.squeeze(2)


def add(grad: Tensor, dense: Tensor, p: Placement) -> None:
    """grad += scale · Gᵀ · dense, by the inverse law: the same bits in every run.

    Args:
        grad: fp32 ``[slots, granularity]``, contiguous.
        dense: ``[rows, columns, *kernel]`` of p, any strides.
        p: the weight, or a part of it; not one with a table, which has no inverse.
    """
    taps = dense.unsqueeze(2) if dense.dim() == 2 else dense.flatten(2)
    with plan.on_device(dense):
        for launch in plan.launches(p, dense.device):
            part = taps[launch.row : launch.row + launch.rows]
            sum_uses.add(grad.view(-1, p.matrix.block), part, p, launch)


def pack_tile(grad: Tensor, dense: Tensor, table: Tensor | None, p: Placement) -> None:
    """As ``add``; a table has no inverse, so the reference adds there."""
    if table is None:
        add(grad, dense, p)
    else:
        tiles.pack_tile(grad, dense.contiguous(), table, p)


def unpack(
    bank: Tensor, table: Tensor | None, placement: str, config: Config | None = None
) -> Tensor:
    """bank ``[slots, granularity]`` -> ``[rows, columns, *kernel]``, contiguous, no scratch."""
    return unpack_tile(bank, table, parse(placement), bank.dtype, config=config)


def pack(dense: Tensor, table: Tensor | None, placement: str, dtype: torch.dtype) -> Tensor:
    """dense ``[rows, columns, *kernel]`` -> ``[slots, granularity]`` of ``dtype``, fp32 sums.

    Deterministic. A table has no inverse: the reference sums there.
    """
    if table is not None:
        return reference.pack(dense, table, placement, dtype)
    p = parse(placement)
    grad = bank_accumulator(p, dense.device, dtype)
    add(grad, dense, p)
    return grad.to(dtype)
