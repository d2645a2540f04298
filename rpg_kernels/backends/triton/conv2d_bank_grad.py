"""dw = scale·Gᵀ·dŴ of y = conv2d(x, Ŵ): scattered from tiles, or summed in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels import settings
from rpg_kernels.backends.reference import conv2d as reference
from rpg_kernels.backends.reference.accumulate import bank_accumulator
from rpg_kernels.backends.triton import ahead, linear_bank_grad, pixels, plan, sum_uses, weights
from rpg_kernels.backends.triton import law as device_law
from rpg_kernels.backends.triton.config import Config, dot_precision
from rpg_kernels.law.placement import Placement, parse, split

_scatter = weights.scatter
_inside, _rows_of, _divide = pixels.inside, pixels.rows_of, device_law._divide


@triton.jit
def _pixel_by_magic(m, height, width, line_magic, line_shift, image_magic, image_shift):
    """pixels.pixel, with multiplications for the divisions."""
    u = m.to(tl.uint32)
    line = _divide(u, line_magic, line_shift).to(tl.int32)
    b = _divide(line.to(tl.uint32), image_magic, image_shift).to(tl.int32)
    return b, line - b * height, m - line * width


@triton.jit(do_not_specialize=pixels.PER_LAYER)
def _bank_grad_kernel(
    dy_ptr,  # [B, N, out_h, out_w]
    x_ptr,  # [B, C, H, W]
    law_ptr,  # [192]
    magic_ptr,  # [4]: magic and shift of out_w, and of out_h
    entry_ptr,  # see entries.entry; in scratch [taps * count, entry_stride]
    out_ptr,  # SCATTER: [slots, G]; otherwise [N, taps, C of a group]; fp32
    # Sizes of the product and of the images; N rows of one launch.
    M,
    N,
    height,
    width,
    out_h,
    out_w,
    # Strides of the images.
    stride_dyb,
    stride_dyn,
    stride_dyh,
    stride_dyw,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    # Which pixels a row reads: see pixels.Reads.
    step_h,
    step_w,
    start_h,
    start_w,
    reach_h,
    reach_w,
    # Groups: see pixels.Groups; channels of one, and of a run of all taps.
    per_group,
    group0,
    offset,
    group_channels,
    channels,
    column0,
    # Which weights: see weights.weight_tile.
    entry_stride,
    row0,
    blocks,
    run_blocks,
    low,
    count,
    first,
    length,
    # The walk: steps of a run, taps, tiles, and pixels of a program.
    parts,
    taps,
    taps_w,
    tiles_n,
    tiles,
    span,
    scale,
    # How a weight is found and signed: see entries.py.
    G: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    # What the operands allow.
    LINES: tl.constexpr,
    BY_TAP: tl.constexpr,
    SCATTER: tl.constexpr,
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
    """dŴ[n, c, t] = sum over pixels m of dy[m, n] x[m, t, c], added to slots, or stored bare.

    What is added is scale * sign * dŴ. Tile: BLOCK_N rows of one group x BLOCK_K columns, one step
    of one tap (of the run of all taps where not BY_TAP), over ``span`` output pixels: all of them,
    unless tiles are too few to fill the device. Grid: one program per tile (of which there are
    ``tiles``) and span, row tiles innermost. Shared memory: a ring of BLOCK_M * (BLOCK_N + BLOCK_K)
    elements, 144 KiB at 64 x 256 x 128 with 3 stages in 16 bits. Budget at that size on sm_90: 5.2
    lane-instructions per element of dy in the loop, a dense product's and the places and masks of
    the rows of x; at the end an entry per row and block, and one atomic per 4 elements where the
    device has vector atomics, 4 bytes per virtual weight and span.
    LINES: dy's pixels lie at one stride, and need no coordinates.
    """
    pid = tl.program_id(0)
    split = pid // tiles
    pid -= split * tiles
    begin = split * span
    number = pid // tiles_n
    group, offs_n, n_low, n_high = _rows_of(pid - number * tiles_n, N, per_group, offset, BLOCK_N)
    mask_n = (offs_n >= n_low) & (offs_n < n_high)
    n = tl.minimum(tl.maximum(offs_n, n_low), n_high - 1)
    tap = number // parts
    step = number - tap * parts
    padded = step * BLOCK_K + tl.arange(0, BLOCK_K)
    if BY_TAP:
        c = padded - first
        mask_k = (c >= 0) & (c < length)
        tap_of = tap + tl.zeros_like(c)
    else:
        tap_of = padded // channels
        c = padded - tap_of * channels - column0
        mask_k = (padded < length) & (c >= 0) & (c < group_channels)
    th = tap_of // taps_w
    down, across = th * reach_h + start_h, (tap_of - th * taps_w) * reach_w + start_w
    x_column = c.to(tl.int64) * stride_xc + down.to(tl.int64) * stride_xh
    x_column += across.to(tl.int64) * stride_xw
    if BY_TAP:
        tap_h = tap // taps_w
        top, left = tap_h * reach_h + start_h, (tap - tap_h * taps_w) * reach_w + start_w
    else:
        top, left = down[None, :], across[None, :]
    x_ptr += (group0 + group).to(tl.int64) * group_channels * stride_xc
    x_columns = x_ptr + x_column
    dy_columns = (offs_n.to(tl.int64) * stride_dyn)[None, :]
    line_magic = tl.load(magic_ptr).to(tl.uint32, bitcast=True)
    line_shift = tl.load(magic_ptr + 1).to(tl.uint32)
    image_magic = tl.load(magic_ptr + 2).to(tl.uint32, bitcast=True)
    image_shift = tl.load(magic_ptr + 3).to(tl.uint32)
    next_i = tl.full([], 1, tl.int64) * step_h * stride_xh  # the address of the next i, and j
    next_j = tl.full([], 1, tl.int64) * step_w * stride_xw
    offs_m = tl.arange(0, BLOCK_M)
    dy_ptrs = dy_ptr + dy_columns + ((begin + offs_m).to(tl.int64) * stride_dyw)[:, None]
    dy_step = tl.full([], BLOCK_M, tl.int64) * stride_dyw
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    end = tl.minimum(begin + span, M)
    tl.assume(begin < end)
    for m0 in range(begin, end, BLOCK_M):
        m = m0 + offs_m
        mask_m = (m < M)[:, None]
        b, i, j = _pixel_by_magic(m, out_h, out_w, line_magic, line_shift, image_magic, image_shift)
        b64, i64, j64 = b.to(tl.int64), i.to(tl.int64), j.to(tl.int64)
        if not LINES:
            dy_row = b64 * stride_dyb + i64 * stride_dyh + j64 * stride_dyw
            dy_ptrs = dy_ptr + dy_columns + dy_row[:, None]
        dy = tl.load(dy_ptrs, mask=mask_m & mask_n[None, :], other=0.0)
        if LINES:
            dy_ptrs += dy_step
        i, j = i * step_h, j * step_w
        x_row = b64 * stride_xb + i64 * next_i + j64 * next_j
        valid = _inside(i[:, None] + top, height) & _inside(j[:, None] + left, width)
        x = tl.load(
            x_columns[None, :] + x_row[:, None],
            mask=valid & mask_m & mask_k[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
    if SCATTER:
        base, entry_at = low, entry_ptr
        if BY_TAP:
            base = low + tap * run_blocks
            if SOURCE == "scratch":
                entry_at += tap.to(tl.int64) * count * entry_stride
        value = acc * scale
        if not BY_TAP:  # columns of the run that are not selected
            value = tl.where(mask_k[None, :], value, tl.zeros_like(value))
        _scatter(
            out_ptr, value, law_ptr, entry_at, entry_stride, n, mask_n, step, row0, blocks,
            base, first, length, G, BLOCK_K, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
        )  # fmt: skip
    else:
        row = offs_n.to(tl.int64) * (taps * group_channels)
        place = tap_of.to(tl.int64) * group_channels + c
        mask = mask_n[:, None] & mask_k[None, :]
        tl.store(out_ptr + row[:, None] + place[None, :], acc, mask=mask)


def conv2d_bank_grad(
    dy: Tensor,
    x: Tensor,
    table: Tensor | None,
    placement: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """dy ``[B, out, H', W']``, x ``[B, C, H, W]`` -> dw ``[slots, granularity]`` of ``dtype``.

    Under ``torch.use_deterministic_algorithms`` dŴ goes to scratch, some rows at a time, as in
    ``linear_bank_grad``; with a table, or without room for a row, the reference sums.

    Raises:
        RuntimeError: deterministic, and the scratch limit is too small for the reference too.
    """
    p = parse(placement)
    if pixels.is_pointwise(x, p, stride, padding, groups):
        lines = dy.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
        matrix = pixels.as_matrix(placement)
        return linear_bank_grad.linear_bank_grad(*lines, table, matrix, dtype, config)
    columns, taps = p.selected_shape[1], p.matrix.taps
    deterministic = torch.are_deterministic_algorithms_enabled()
    height = settings.scratch_bytes(dy.device.type) // (4 * columns * taps)
    if (deterministic and (table is not None or height == 0)) or pixels.too_large(p, dy, x):
        how = (stride, padding, dilation, groups, dtype)
        return reference.conv2d_bank_grad(dy, x, table, placement, *how)
    grad = bank_accumulator(p, dy.device, dtype)
    m = dy.shape[0] * dy.shape[2] * dy.shape[3]
    if m == 0:
        return grad.to(dtype)
    dy, x = pixels.lines(dy, p.selected_shape[0] // groups), pixels.lines(x, columns)
    cols, rows = p.block_columns, p.selected_shape[0]
    limit = settings.scratch_bytes(dy.device.type)
    count = p.matrix.runs * cols.count
    in_line = table is None and not deterministic and limit < 4 * count * linear_bank_grad.MOST_ROWS
    crowded = in_line or p.matrix.block < 8
    c = config or pixels.choose_tiles("conv2d_bank_grad", m, p, groups, x, crowded)
    view = pixels.forward_reads(p, stride, padding, dilation)
    ring = grad.view(-1, p.matrix.block)
    at_most = plan.rows_that_fit(limit, rows, count, c.block_n)
    in_scratch = table is None and not deterministic and at_most > 0
    with plan.on_device(dy):
        for launch in plan.launches(p, dy.device, at_most if in_scratch else plan.INT32_MAX):
            entries = plan.entries_in_line(launch)
            if table is not None:
                entries = plan.entries_of_table(table, p, launch)
            elif in_scratch:
                sign = plan.sign_kind(p)
                entries = plan.entries_in_scratch(p, launch, cols.low, cols.count, sign)
            for image, number in pixels.images(dy.shape[0], dy.shape[2] * dy.shape[3]):
                some = slice(image, image + number)
                if not deterministic:
                    _launch(dy[some], x[some], entries, ring, p, launch, view, groups, c)
                    continue
                for offset, count in split(launch.rows, height):
                    row, row0 = launch.row + offset, launch.row0 + offset
                    part = plan.LaunchRows(
                        row, count, row0, launch.words, launch.rounds, launch.band
                    )
                    dense = plan.scratch((count, taps, columns), torch.float32, dy.device)
                    _launch(dy[some], x[some], entries, dense, p, part, view, groups, c, False)
                    sum_uses.add(ring, dense.transpose(1, 2), p, part)
                    del dense
            del entries  # before the next launch's are made
    return grad.to(dtype)


@cache
def _magic(height: int, width: int, device: torch.device) -> Tensor:
    """What divides pixel numbers by W' and by H'; kept, as captured graphs go on reading it."""
    words = (*device_law.divider(width), *device_law.divider(height))
    return device_law.on_device(words, device)


def _launch(
    dy: Tensor,
    x: Tensor,
    entries: plan.Entries,
    out: Tensor,
    p: Placement,
    launch: plan.LaunchRows,
    view: pixels.Reads,
    groups: int,
    c: Config,
    scatter: bool = True,
) -> None:
    cols, matrix = p.block_columns, p.matrix
    dy = dy[:, launch.row : launch.row + launch.rows]
    batch, _, out_h, out_w = dy.shape
    stride_b, _, stride_h, stride_w = dy.stride()
    lines = stride_h == out_w * stride_w and stride_b == out_h * stride_h
    parts = plan.cdiv(cols.count * matrix.block, c.block_k)
    g = pixels.groups_of(p, groups, launch.row, launch.rows)
    tiles_n = g.count * plan.cdiv(g.per_group, c.block_n)
    m, tiles = batch * out_h * out_w, tiles_n * parts * matrix.runs
    splits, span = linear_bank_grad.spans(m, c, scatter)
    ahead.launch(_bank_grad_kernel, (tiles * splits,))(
        dy, x, launch.words, _magic(out_h, out_w, dy.device), entries.tensor, out,
        m, launch.rows, *x.shape[2:], out_h, out_w, *dy.stride(), *x.stride(),
        *view.numbers, g.per_group, g.first, g.offset,
        p.selected_shape[1], matrix.channels, p.selection[1][0],
        entries.stride, launch.row0, matrix.blocks, matrix.run_blocks,
        cols.low, cols.count, cols.first, cols.length, parts, matrix.taps, view.taps[1],
        tiles_n, tiles, span, p.scale,
        G=matrix.block, SOURCE=entries.source, SIGN=plan.sign_kind(p), LINES=lines,
        BY_TAP=matrix.by_tap, SCATTER=scatter,
        PRECISION=dot_precision(dy.dtype, convolution=True),
        **entries.law_of(launch, plan.sign_kind(p)),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
