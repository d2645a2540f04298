"""Fused y = x·Ŵᵀ + bias and dx = dy·Ŵ; dw = scale·Gᵀ·(dyᵀ·x) is in linear_bank_grad.py.

Ŵ exists only as tiles in shared memory. Signatures are those of the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels.backends.triton import ahead, plan, weights
from rpg_kernels.backends.triton.config import (
    Config,
    choose,
    dot_precision,
    gpu,
    whole_weight,
)
from rpg_kernels.backends.triton.linear_bank_grad import linear_bank_grad
from rpg_kernels.law.placement import Placement, parse, split

__all__ = ["linear", "linear_bank_grad", "linear_input_grad"]

_weight_tile = weights.weight_tile
# Integers of which no multiple makes a load wider: a kernel compiled anew for them gains nothing.
_PER_LAYER = ["M", "row0", "blocks", "low", "steps"]


@triton.jit
def _tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(m, n) of program ``pid``, numbers of tiles. GROUP row tiles of the batch take one tile of
    the weight before any takes the next, so that it is read from the L2 cache."""
    group = pid // (GROUP * tiles_n)
    first = group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = pid - group * GROUP * tiles_n
    return first + inside % height, inside // height


@triton.jit(do_not_specialize=_PER_LAYER)
def _forward_kernel(
    x_ptr,  # [M, K]
    bank_ptr,  # [slots, G] or [2 * slots, G]
    scales_ptr,  # of a bank that is kept in fewer bytes, see stored.py
    places_ptr,
    law_ptr,  # [192]
    entry_ptr,  # see entries.entry
    bias_ptr,  # [N] or unused
    y_ptr,  # [M, N], N contiguous
    # Sizes of the product; N rows of one launch.
    M,
    N,
    K,
    # Strides of its operands and of the result.
    stride_xm,
    stride_xk,
    stride_ym,
    # Which weights: see weights.weight_tile.
    entry_stride,
    row0,
    blocks,
    low,
    first,
    # The walk.
    steps,
    scale,
    # How a weight is found and signed: see entries.py.
    G: tl.constexpr,
    PARTS: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    PAIRS: tl.constexpr,
    # What the operands allow.
    EVEN_K: tl.constexpr,
    UNIT_N: tl.constexpr,
    UNIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    # The law, where it is evaluated in line, or for signs of elements.
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
    # Tiles.
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y[m, n] = scale * sum_k x[m, k] Ŵ[n, k] + bias[n], for the rows n of one launch.

    Tile: BLOCK_M x BLOCK_N, BLOCK_K columns a step; padded columns count from block ``low``,
    and column 0 of x is padded column ``first``. Grid: one program per tile, grouped for the L2
    cache. Shared memory: a ring of (BLOCK_M + BLOCK_N) * BLOCK_K elements, 146 KiB at 128 x 256 x
    64 with 3 stages of tiles and 2 more of entries, in 16 bits. Budget at that size on sm_90: 1.8
    lane-instructions per generated weight with entries in scratch and folded signs, 4.8 with
    element signs; 11 with the law in line.
    K, first and stride_xm come in units of UNIT_K elements, N and stride_ym of UNIT_N: 16 bytes
    where all are multiples; the multiplications show the compiler that rows begin at such ones.
    Rows beyond M and N repeat the last one and are not stored.
    """
    K, first, stride_xm = K * UNIT_K, first * UNIT_K, tl.full([], UNIT_K, tl.int64) * stride_xm
    N, stride_ym = N * UNIT_N, tl.full([], UNIT_N, tl.int64) * stride_ym
    pid = tl.program_id(0)
    pid_m, pid_n = _tile_of(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.arange(0, BLOCK_K)
    n = tl.minimum(offs_n, N - 1)
    x_row = tl.minimum(offs_m, M - 1).to(tl.int64) * stride_xm
    column = index.to(tl.int64) * stride_xk
    if not EVEN_K:
        column -= tl.full([], 1, tl.int64) * first * stride_xk
    x_ptrs = x_ptr + x_row[:, None] + column[None, :]
    step_x = tl.full([], BLOCK_K, tl.int64) * stride_xk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # A loop that may not run at all makes ptxas wait for each product before it starts the next.
    tl.assume(steps > 0)
    tl.assume(steps <= 1 << 27)  # 2^31 columns
    for step in range(0, steps):
        w = _weight_tile(
            bank_ptr, scales_ptr, places_ptr,
            law_ptr, entry_ptr, entry_stride, n, step, row0, blocks, low, first, K,
            G, BLOCK_K, PARTS, SOURCE, SIGN, PAIRS, EVEN_K, ROUNDS, SWAP_ROUNDS, LAW,
            x_ptr.dtype.element_ty, scale,
        )  # fmt: skip
        if EVEN_K:
            x = tl.load(x_ptrs)
        else:
            k = step * BLOCK_K + index
            x = tl.load(x_ptrs, mask=((k >= first) & (k < first + K))[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        x_ptrs += step_x
    y = acc
    if bank_ptr.dtype.element_ty == x_ptr.dtype.element_ty:  # otherwise the tiles hold it
        y *= scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_PER_LAYER)
def _input_grad_kernel(
    dy_ptr,  # [M, N]
    bank_ptr,  # [slots, G] or [2 * slots, G]
    scales_ptr,  # of a bank that is kept in fewer bytes, see stored.py
    places_ptr,
    law_ptr,  # [192]
    entry_ptr,  # see entries.entry
    dx_ptr,  # [M, K], K contiguous
    # Sizes of the product; N rows of one launch.
    M,
    N,
    K,
    # Strides of its operands and of the result.
    stride_dym,
    stride_dyn,
    stride_dxm,
    # Which weights: see weights.weight_tile.
    entry_stride,
    row0,
    blocks,
    low,
    first,
    # The walk.
    steps,
    scale,
    # How a weight is found and signed: see entries.py.
    G: tl.constexpr,
    PARTS: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    PAIRS: tl.constexpr,
    # What the operands allow.
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    UNIT_N: tl.constexpr,
    UNIT_K: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    # The law, where it is evaluated in line, or for signs of elements.
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
    # Tiles.
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dx[m, k] = scale * sum_n dy[m, n] Ŵ[n, k]; added to what dx holds where ADD.

    Tile: BLOCK_M x BLOCK_K, the columns of one ``step``, BLOCK_N rows of the weight at a time.
    Grid: one program per tile, grouped. Shared memory: a ring of (BLOCK_M + BLOCK_K) * BLOCK_N
    elements, 146 KiB at 128 x 64 x 256 with 3 stages of tiles and 2 more of entries, in 16 bits.
    Budget at that size: as the forward's. K, first and stride_dxm come in units of UNIT_K elements,
    N and stride_dym of UNIT_N.
    """
    K, first, stride_dxm = K * UNIT_K, first * UNIT_K, tl.full([], UNIT_K, tl.int64) * stride_dxm
    N, stride_dym = N * UNIT_N, tl.full([], UNIT_N, tl.int64) * stride_dym
    pid = tl.program_id(0)
    pid_m, step = _tile_of(pid, tl.cdiv(M, BLOCK_M), steps, GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    dy_row = tl.minimum(offs_m, M - 1).to(tl.int64) * stride_dym
    dy_ptrs = dy_ptr + dy_row[:, None] + (offs_n.to(tl.int64) * stride_dyn)[None, :]
    step_dy = tl.full([], BLOCK_N, tl.int64) * stride_dyn
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    tl.assume(N > 0)
    for n0 in range(0, N, BLOCK_N):
        n = tl.minimum(n0 + offs_n, N - 1)
        live = None if EVEN_N else n0 + offs_n < N
        w = _weight_tile(
            bank_ptr, scales_ptr, places_ptr,
            law_ptr, entry_ptr, entry_stride, n, step, row0, blocks, low, first, K,
            G, BLOCK_K, PARTS, SOURCE, SIGN, PAIRS, EVEN_K, ROUNDS, SWAP_ROUNDS, LAW,
            dy_ptr.dtype.element_ty, scale, live,
        )  # fmt: skip
        if EVEN_N:
            dy = tl.load(dy_ptrs)
        else:
            dy = tl.load(dy_ptrs, mask=(n0 + offs_n < N)[None, :], other=0.0)
        acc = tl.dot(dy, w, acc, input_precision=PRECISION)
        dy_ptrs += step_dy
    k = step * BLOCK_K + tl.arange(0, BLOCK_K) - first
    dx_ptrs = dx_ptr + offs_m.to(tl.int64)[:, None] * stride_dxm + k.to(tl.int64)[None, :]
    mask = (offs_m < M)[:, None] & ((k >= 0) & (k < K))[None, :]
    dx = acc
    if bank_ptr.dtype.element_ty == dy_ptr.dtype.element_ty:
        dx *= scale
    if ADD:
        dx += tl.load(dx_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _steps(p: Placement, config: Config, count: int) -> int:
    """Tiles of block_k columns that cover ``count`` blocks."""
    return -(-count * p.matrix.block // config.block_k)


def _stages(bank: plan.Operand, a: Tensor, entries: plan.Entries, c: Config) -> int:
    """Stages of the pipeline, of which each takes a tile of shared memory.

    More than three only pay where entries are loaded before weights. Two where the bank has another
    dtype than the product, as tiles of fp32 are twice as large.
    """
    if bank.ring.codes.dtype != a.dtype:
        return min(2, c.stages)
    return c.stages if entries.source == "scratch" else min(3, c.stages)


def _rows(x: Tensor) -> Tensor:
    """``[..., K]`` as ``[M, K]``, a view where strides allow it."""
    return x.reshape(-1, x.shape[-1])


def linear(
    x: Tensor,
    bank: Tensor,
    table: Tensor | None,
    bias: Tensor | None,
    placement: str,
    config: Config | None = None,
) -> Tensor:
    """x ``[..., K]`` -> ``[..., N]`` in x's dtype."""
    p = parse(placement)
    rows, columns = p.selected_shape
    y = x.new_empty((*x.shape[:-1], rows))
    a, out = _rows(x), y.view(-1, rows)
    m = a.shape[0]
    if m == 0:
        return y
    c = config or choose(
        "linear", m, rows, columns, p.matrix.block, x.dtype, gpu(x.device),
        crowded=not plan.vectors(p, None, a),
    )  # fmt: skip
    cols = p.block_columns
    added = None if bias is None else bias.contiguous()
    with plan.on_device(x):
        bank_operand = plan.operand(bank, p, x.dtype, m, c.block_m)
        at_most = plan.rows_that_fit(bank_operand.left, rows, cols.count, c.block_n)
        in_scratch = table is None and at_most > 0
        for launch in plan.launches(p, x.device, at_most if in_scratch else plan.INT32_MAX):
            if table is not None:
                entries = plan.entries_of_table(table, p, launch)
            elif in_scratch:
                entries = plan.entries_in_scratch(
                    p, launch, cols.low, cols.count, bank_operand.sign
                )
            else:
                entries = plan.entries_in_line(launch)
            part = slice(launch.row, launch.row + launch.rows)
            for top, height in split(m, plan.MAX_ROWS):
                batch = slice(top, top + height)
                _launch_forward(
                    a[batch], bank_operand, entries, added, out[batch], part, p, launch, c
                )
            del entries  # before the next launch's are made
    return y


def _launch_forward(
    a: Tensor,
    bank: plan.Operand,
    entries: plan.Entries,
    bias: Tensor | None,
    out: Tensor,
    part: slice,
    p: Placement,
    launch: plan.LaunchRows,
    c: Config,
) -> None:
    m, columns = a.shape
    cols, g = p.block_columns, p.matrix.block
    steps = _steps(p, c, cols.count)
    grid = (plan.cdiv(m, c.block_m) * plan.cdiv(launch.rows, c.block_n),)
    of_n, of_k = (
        plan.unit(out.dtype, launch.rows, out.stride(0)),
        plan.unit(a.dtype, columns, a.stride(0)),
    )
    of_k = of_k if cols.first % of_k == 0 else 1
    ahead.launch(_forward_kernel, grid)(
        a, *bank.ring.tensors, launch.words, entries.tensor, out if bias is None else bias[part],
        out[:, part], m, launch.rows // of_n, columns // of_k,
        a.stride(0) // of_k, a.stride(1), out.stride(0) // of_n,
        entries.stride, launch.row0, p.matrix.blocks, cols.low, cols.first // of_k, steps,
        bank.scale,
        G=g, PARTS=bank.ring.parts, SOURCE=entries.source, SIGN=bank.sign,
        PAIRS=bank.pairs,
        EVEN_K=cols.first == 0 and columns == steps * c.block_k, HAS_BIAS=bias is not None,
        UNIT_N=of_n, UNIT_K=of_k, PRECISION=dot_precision(a.dtype),
        **entries.law_of(launch, bank.sign),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, GROUP=c.group,
        num_warps=c.warps, num_stages=_stages(bank, a, entries, c),
    )  # fmt: skip


def linear_input_grad(
    dy: Tensor,
    bank: Tensor,
    table: Tensor | None,
    placement: str,
    config: Config | None = None,
) -> Tensor:
    """dy ``[..., N]`` -> dx ``[..., K]`` in dy's dtype.

    Entries in scratch are cut by columns, whose results are independent; rows add up only where
    the law itself has several bands, and then in fp32.
    """
    p = parse(placement)
    rows, columns = p.selected_shape
    dx = dy.new_empty((*dy.shape[:-1], columns))
    a = _rows(dy)
    m = a.shape[0]
    if m == 0:
        return dx
    block = p.matrix.block
    c = config or choose(
        "linear_input_grad", m, rows, columns, block, dy.dtype, gpu(dy.device),
        crowded=not plan.vectors(p, a, None),
    )  # fmt: skip
    cols, g = p.block_columns, p.matrix.block
    unit = max(1, c.block_k // g)  # blocks that a launch must hold whole
    with plan.on_device(dy):
        bank_operand = plan.operand(bank, p, dy.dtype, m, c.block_m)
        launches = list(plan.launches(p, dy.device))
        several = len(launches) > 1
        out = dx.view(-1, columns)
        if several:
            out = torch.empty_like(out, dtype=torch.float32)
        for launch in launches:
            fits = bank_operand.left // (4 * whole_weight(launch.rows)) // unit * unit
            in_scratch = table is None and fits >= min(unit, cols.count)
            width = min(fits, cols.count) if in_scratch else cols.count
            for offset in range(0, cols.count, width):
                low, count = cols.low + offset, min(width, cols.count - offset)
                if table is not None:
                    entries = plan.entries_of_table(table, p, launch)
                elif in_scratch:
                    entries = plan.entries_in_scratch(p, launch, low, count, bank_operand.sign)
                else:
                    entries = plan.entries_in_line(launch)
                # Columns of dx that these blocks hold, and where they begin in the first block.
                begin = max(0, offset * g - cols.first)
                end = min(columns, (offset + count) * g - cols.first)
                first = cols.first if offset == 0 else 0
                part = a[:, launch.row : launch.row + launch.rows]
                for top, height in split(m, plan.MAX_ROWS):
                    batch = slice(top, top + height)
                    _launch_input_grad(
                        part[batch], bank_operand, entries, out[batch, begin:end],
                        p, launch, c, low, count, first, launch.row > 0,
                    )  # fmt: skip
                del entries
        if several:
            dx.view(-1, columns).copy_(out)
    return dx


def _launch_input_grad(
    a: Tensor,
    bank: plan.Operand,
    entries: plan.Entries,
    out: Tensor,
    p: Placement,
    launch: plan.LaunchRows,
    c: Config,
    low: int,
    count: int,
    first: int,
    add: bool,
) -> None:
    m, columns = out.shape
    steps = _steps(p, c, count)
    of_n, of_k = (
        plan.unit(a.dtype, launch.rows, a.stride(0)),
        plan.unit(out.dtype, columns, out.stride(0)),
    )
    of_k = of_k if first % of_k == 0 else 1
    ahead.launch(_input_grad_kernel, (plan.cdiv(m, c.block_m) * steps,))(
        a, *bank.ring.tensors, launch.words, entries.tensor, out,
        m, launch.rows // of_n, columns // of_k,
        a.stride(0) // of_n, a.stride(1), out.stride(0) // of_k, entries.stride, launch.row0,
        p.matrix.blocks, low, first // of_k, steps, bank.scale,
        G=p.matrix.block, PARTS=bank.ring.parts, SOURCE=entries.source, SIGN=bank.sign,
        PAIRS=bank.pairs,
        EVEN_K=first == 0 and columns == steps * c.block_k, EVEN_N=launch.rows % c.block_n == 0,
        UNIT_N=of_n, UNIT_K=of_k, ADD=add,
        PRECISION=dot_precision(a.dtype),
        **entries.law_of(launch, bank.sign),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, GROUP=c.group,
        num_warps=c.warps, num_stages=_stages(bank, a, entries, c),
    )  # fmt: skip
