"""dw = scale·Gᵀ·(dyᵀ·x): scattered from accumulator tiles, or summed in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels import settings
from rpg_kernels.backends.reference import linear as reference
from rpg_kernels.backends.reference.accumulate import bank_accumulator
from rpg_kernels.backends.triton import ahead, plan, sum_uses, weights
from rpg_kernels.backends.triton.config import Config, choose, dot_precision, gpu
from rpg_kernels.law.placement import Placement, parse, split

_scatter = weights.scatter
MOST_ROWS = 256  # of a tile; entries of fewer than that may not fit scratch, and are made in line


@triton.jit(do_not_specialize=["M", "row0", "blocks", "low", "steps", "span"])
def _bank_grad_kernel(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, K]
    law_ptr,  # [192]
    entry_ptr,  # see entries.entry
    out_ptr,  # SCATTER: [slots, G]; otherwise [N, K]; fp32
    # Sizes of the product; N rows of one launch.
    M,
    N,
    K,
    # Strides of its operands and of the result.
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xk,
    # Which weights: see weights.weight_tile.
    entry_stride,
    row0,
    blocks,
    low,
    first,
    # The walk.
    steps,
    span,
    scale,
    # How a weight is found and signed: see entries.py.
    G: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    # What the operands allow.
    SCATTER: tl.constexpr,
    ADD: tl.constexpr,
    UNIT_N: tl.constexpr,
    UNIT_K: tl.constexpr,
    PRECISION: tl.constexpr,
    # The law, where it is evaluated in line, or for signs of elements.
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
    # Tiles.
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dŴ[n, k] = sum_m dy[m, n] x[m, k], added as scale * sign * dŴ to slot(n, k), or stored bare
    (where ADD, added to what is there).

    Tile: BLOCK_N x BLOCK_K, the columns of one step, over ``span`` rows of the batch: all of them,
    unless tiles are too few to fill the device. Grid: one program per tile and span, row tiles
    innermost. Shared memory: a ring of BLOCK_M * (BLOCK_N + BLOCK_K) elements, 144 KiB at
    64 x 256 x 128 with 3 stages in 16 bits. Budget: that of a dense product in the loop, 2.4
    lane-instructions per element of dy at that size; at the end an entry per row and block, and one
    atomic per 4 elements where the device has vector atomics, 4 bytes per virtual weight and span.
    K, first and stride_xm come in units of UNIT_K elements, N and stride_dym of UNIT_N.
    """
    K, first, stride_xm = K * UNIT_K, first * UNIT_K, tl.full([], UNIT_K, tl.int64) * stride_xm
    N, stride_dym = N * UNIT_N, tl.full([], UNIT_N, tl.int64) * stride_dym
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    split = pid // (tiles_n * steps)
    pid -= split * tiles_n * steps
    begin = split * span
    step = pid // tiles_n
    offs_n = (pid - step * tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    n = tl.minimum(offs_n, N - 1)
    padded = step * BLOCK_K + tl.arange(0, BLOCK_K)
    k = padded - first
    mask_k = (k >= 0) & (k < K)
    offs_m = tl.arange(0, BLOCK_M)
    dy_ptrs = dy_ptr + ((begin + offs_m).to(tl.int64) * stride_dym)[:, None]
    dy_ptrs += (offs_n.to(tl.int64) * stride_dyn)[None, :]
    x_ptrs = x_ptr + ((begin + offs_m).to(tl.int64) * stride_xm)[:, None]
    x_ptrs += (k.to(tl.int64) * stride_xk)[None, :]
    step_dy = tl.full([], BLOCK_M, tl.int64) * stride_dym
    step_x = tl.full([], BLOCK_M, tl.int64) * stride_xm
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    end = tl.minimum(begin + span, M)
    tl.assume(begin < end)  # see linear.py
    for m0 in range(begin, end, BLOCK_M):
        mask_m = (m0 + offs_m < M)[:, None]
        dy = tl.load(dy_ptrs, mask=mask_m & mask_n[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
        dy_ptrs += step_dy
        x_ptrs += step_x
    if SCATTER:
        _scatter(
            out_ptr, acc * scale, law_ptr, entry_ptr, entry_stride, n, mask_n, step, row0, blocks,
            low, first, K, G, BLOCK_K, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
        )  # fmt: skip
    else:
        at = offs_n.to(tl.int64)[:, None] * K + k.to(tl.int64)[None, :]
        mask = mask_n[:, None] & mask_k[None, :]
        if ADD:
            acc += tl.load(out_ptr + at, mask=mask, other=0.0)
        tl.store(out_ptr + at, acc, mask=mask)


def linear_bank_grad(
    dy: Tensor,
    x: Tensor,
    table: Tensor | None,
    placement: str,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """dy ``[..., N]``, x ``[..., K]`` -> dw ``[slots, granularity]`` of ``dtype``.

    Under ``torch.use_deterministic_algorithms`` dŴ goes to scratch, some rows at a time, and every
    slot sums its uses in the order of the law, without atomics. A table has no inverse, and a
    scratch limit below one row of dŴ leaves no room: then the reference sums.

    Raises:
        RuntimeError: deterministic, and the scratch limit is too small for the reference too.
    """
    p = parse(placement)
    rows, columns = p.selected_shape
    deterministic = torch.are_deterministic_algorithms_enabled()
    height = settings.scratch_bytes(dy.device.type) // (4 * columns)
    if deterministic and (table is not None or height == 0):
        return reference.linear_bank_grad(dy, x, table, placement, dtype)
    grad = bank_accumulator(p, dy.device, dtype)
    a, b = dy.reshape(-1, rows), x.reshape(-1, columns)
    m = a.shape[0]
    if m == 0:
        return grad.to(dtype)
    block, cols = p.matrix.block, p.block_columns
    limit = settings.scratch_bytes(dy.device.type)
    in_line = table is None and not deterministic and limit < 4 * cols.count * MOST_ROWS
    c = config or choose(
        "linear_bank_grad", m, rows, columns, block, dy.dtype, gpu(dy.device),
        crowded=block < 8 or in_line or not plan.vectors(p, a, b),
    )  # fmt: skip
    ring = grad.view(-1, p.matrix.block)
    at_most = plan.rows_that_fit(limit, rows, cols.count, c.block_n)
    in_scratch = table is None and not deterministic and at_most > 0
    with plan.on_device(dy):
        for launch in plan.launches(p, dy.device, at_most if in_scratch else plan.INT32_MAX):
            if deterministic:
                _add_in_order(a, b, ring, p, launch, c, height)
                continue
            if table is not None:
                entries = plan.entries_of_table(table, p, launch)
            elif in_scratch:
                sign = plan.sign_kind(p)
                entries = plan.entries_in_scratch(p, launch, cols.low, cols.count, sign)
            else:
                entries = plan.entries_in_line(launch)
            part = a[:, launch.row : launch.row + launch.rows]
            for top, count in split(m, plan.MAX_ROWS):
                batch = slice(top, top + count)
                _launch(part[batch], b[batch], entries, ring, p, launch, c)
            del entries  # before the next launch's are made
    return grad.to(dtype)


def _add_in_order(
    a: Tensor,
    b: Tensor,
    ring: Tensor,
    p: Placement,
    launch: plan.LaunchRows,
    c: Config,
    height: int,
) -> None:
    """ring += scale · Gᵀ · (aᵀ·b), at most ``height`` rows of the weight at a time."""
    columns = b.shape[1]
    for offset, count in split(launch.rows, height):
        row = launch.row + offset
        dense = plan.scratch((count, columns), torch.float32, a.device)
        part = plan.LaunchRows(
            row, count, launch.row0 + offset, launch.words, launch.rounds, launch.band
        )
        rows = a[:, row : row + count]
        for top, many in split(a.shape[0], plan.MAX_ROWS):
            batch = slice(top, top + many)
            entries = plan.entries_in_line(launch)
            _launch(rows[batch], b[batch], entries, dense, p, part, c, scatter=False, add=top > 0)
        sum_uses.add(ring, dense.view(count, columns, 1), p, part)
        del dense


def spans(m: int, c: Config, scatter: bool) -> tuple[int, int]:
    """(parts of the batch, rows of each) of a launch; one part where results are stored."""
    rows = plan.cdiv(m, c.splits if scatter else 1)
    span = plan.cdiv(rows, c.block_m) * c.block_m
    return plan.cdiv(m, span), span


def _launch(
    a: Tensor,
    b: Tensor,
    entries: plan.Entries,
    out: Tensor,
    p: Placement,
    launch: plan.LaunchRows,
    c: Config,
    scatter: bool = True,
    add: bool = False,
) -> None:
    (m, columns), cols, g = b.shape, p.block_columns, p.matrix.block
    steps = -(-cols.count * g // c.block_k)
    splits, span = spans(m, c, scatter)
    of_n, of_k = (
        plan.unit(a.dtype, launch.rows, a.stride(0)),
        plan.unit(b.dtype, columns, b.stride(0)),
    )
    of_k = of_k if cols.first % of_k == 0 else 1
    ahead.launch(_bank_grad_kernel, (plan.cdiv(launch.rows, c.block_n) * steps * splits,))(
        a, b, launch.words, entries.tensor, out, m, launch.rows // of_n, columns // of_k,
        a.stride(0) // of_n, a.stride(1), b.stride(0) // of_k, b.stride(1), entries.stride,
        launch.row0, p.matrix.blocks, cols.low, cols.first // of_k, steps, span, p.scale,
        G=g, SOURCE=entries.source, SIGN=plan.sign_kind(p), SCATTER=scatter, ADD=add,
        UNIT_N=of_n, UNIT_K=of_k,
        PRECISION=dot_precision(a.dtype),
        **entries.law_of(launch, plan.sign_kind(p)),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
