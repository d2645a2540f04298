"""Fused y = conv2d(x, Ŵ) + bias, an implicit product; the gradients are in files of their own.

Ŵ exists only as tiles in shared memory, and x is never unfolded. Signatures are those of the
reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels._tensors import empty_image
from rpg_kernels.backends.reference import conv2d as reference
from rpg_kernels.backends.triton import ahead, pixels, plan, weights
from rpg_kernels.backends.triton import linear as pointwise
from rpg_kernels.backends.triton.config import Config, dot_precision
from rpg_kernels.backends.triton.conv2d_bank_grad import conv2d_bank_grad
from rpg_kernels.backends.triton.conv2d_input_grad import conv2d_input_grad
from rpg_kernels.law.placement import Placement, parse

__all__ = ["conv2d", "conv2d_bank_grad", "conv2d_input_grad"]

_MOST_STEPS = tl.constexpr(pixels.MOST_STEPS)
_weight_tile = weights.weight_tile
_tile_of = pointwise._tile_of
_pixel, _inside, _tap_bits = pixels.pixel, pixels.inside, pixels.tap_bits
_walk, _divide = pixels.walk, pixels.divide
_distance, _wide, _rows_of = pixels.distance, pixels.wide, pixels.rows_of


@triton.jit(do_not_specialize=pixels.PER_LAYER)
def _forward_kernel(
    x_ptr,  # [B, C, H, W]
    bank_ptr,  # [slots, G] or [2 * slots, G]
    scales_ptr,  # of a bank that is kept in fewer bytes, see stored.py
    places_ptr,
    law_ptr,  # [192]
    entry_ptr,  # see entries.entry; in scratch [taps * count, entry_stride]
    bias_ptr,  # [N] or unused
    y_ptr,  # [B, N, out_h, out_w]
    # Sizes of the product and of the images; N rows of one launch.
    M,
    N,
    height,
    width,
    out_h,
    out_w,
    # Strides of the images.
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yb,
    stride_yn,
    stride_yh,
    stride_yw,
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
    # The walk: see pixels.walk.
    steps,
    parts,
    parts_magic,
    taps_w,
    taps_w_magic,
    tiles_n,
    scale,
    # How a weight is found and signed: see entries.py.
    G: tl.constexpr,
    PARTS: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    PAIRS: tl.constexpr,
    # What the operands allow.
    EVEN_K: tl.constexpr,
    WHOLE: tl.constexpr,
    BY_TAP: tl.constexpr,
    BITS_H: tl.constexpr,
    BITS_W: tl.constexpr,
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
    """y[m, n] = scale * sum over taps t and channels c of x[m, t, c] Ŵ[n, c, t] + bias[n].

    m is an output pixel (b, i, j), and x[m, t, c] what it reads at tap t, zero outside of the
    image. The rows n are those of one launch, ``per_group`` of them for each group of channels.
    Tile: BLOCK_M pixels x BLOCK_N rows of one group; a step is BLOCK_K padded columns of one tap
    (of the run of all taps where not BY_TAP), ``parts`` steps per tap in one loop. Grid: one
    program per tile, grouped for the L2 cache. Shared memory: a ring of (BLOCK_M + BLOCK_N) *
    BLOCK_K elements, 146 KiB at 128 x 256 x 64 with 5 stages in 16 bits, of which 3 hold tiles.
    Budget at that size on sm_90: 2.4 lane-instructions per generated weight with entries in
    scratch and folded signs, 5.3 with element signs, 0.4 of them for the place in the image and
    the masks of rows.
    WHOLE: steps cover the blocks of a row without a gap, and the weight is walked as a matrix's.
    BITS_H, BITS_W: a row's valid taps, at most so many, are bits of one word. Where they are 0,
    coordinates are compared at every step.
    """
    pid = tl.program_id(0)
    pid_m, pid_n = _tile_of(pid, tl.cdiv(M, BLOCK_M), tiles_n, GROUP)
    group, offs_n, n_low, n_high = _rows_of(pid_n, N, per_group, offset, BLOCK_N)
    n = tl.minimum(tl.maximum(offs_n, n_low), n_high - 1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b, i, j = _pixel(tl.minimum(offs_m, M - 1), out_h, out_w)
    top, left = i * step_h + start_h, j * step_w + start_w
    x_row = b.to(tl.int64) * stride_xb + top.to(tl.int64) * stride_xh
    x_row += left.to(tl.int64) * stride_xw
    index = tl.arange(0, BLOCK_K)
    x_ptr += (group0 + group).to(tl.int64) * group_channels * stride_xc
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(steps > 0)  # see linear.py
    tl.assume(steps < _MOST_STEPS)  # so that numbers of steps are not widened to int64
    if BY_TAP:
        column = index.to(tl.int64) * stride_xc
        if not EVEN_K:
            column -= tl.full([], 1, tl.int64) * first * stride_xc
        x_ptrs = x_ptr + x_row[:, None] + column[None, :]
        if BITS_H > 0:
            bits = _tap_bits(top, left, reach_h, reach_w, height, width, taps_w, BITS_H, BITS_W)
        x_down, x_across = _wide(reach_h, stride_xh), _wide(reach_w, stride_xw)
        x_along = _wide(BLOCK_K, stride_xc)
        for step in range(0, steps):
            tap, part, th, tw = _walk(step, parts, parts_magic, taps_w, taps_w_magic)
            if WHOLE:
                w = _weight_tile(
                    bank_ptr, scales_ptr, places_ptr,
                    law_ptr, entry_ptr, entry_stride, n, step, row0, blocks, 0, 0,
                    steps * BLOCK_K,
                    G, BLOCK_K, PARTS, SOURCE, SIGN, PAIRS, EVEN_K, ROUNDS, SWAP_ROUNDS, LAW,
                    x_ptr.dtype.element_ty, scale,
                )  # fmt: skip
            else:
                entry_at = entry_ptr
                if SOURCE == "scratch":
                    entry_at += tl.full([], 1, tl.int64) * (tap * count) * entry_stride
                w = _weight_tile(
                    bank_ptr, scales_ptr, places_ptr,
                    law_ptr, entry_at, entry_stride, n, part, row0, blocks,
                    low + tap * run_blocks, first, length,
                    G, BLOCK_K, PARTS, SOURCE, SIGN, PAIRS, EVEN_K, ROUNDS, SWAP_ROUNDS, LAW,
                    x_ptr.dtype.element_ty, scale,
                )  # fmt: skip
            if BITS_H > 0:
                valid = ((bits >> tap) & 1 != 0)[:, None]
            else:
                valid = _inside(top + th * reach_h, height) & _inside(left + tw * reach_w, width)
                valid = valid[:, None]
            if not EVEN_K:
                k = part * BLOCK_K + index
                valid = valid & ((k >= first) & (k < first + length))[None, :]
            shift = _distance(th, tw, part, x_down, x_across, x_along)
            x = tl.load(x_ptrs + shift, mask=valid, other=0.0)
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    else:
        for step in range(0, steps):
            w = _weight_tile(
                bank_ptr, scales_ptr, places_ptr,
                law_ptr, entry_ptr, entry_stride, n, step, row0, blocks, low, first,
                length, G, BLOCK_K, PARTS, SOURCE, SIGN, PAIRS, EVEN_K, ROUNDS, SWAP_ROUNDS, LAW,
                x_ptr.dtype.element_ty, scale,
            )  # fmt: skip
            k = step * BLOCK_K + index
            tap = k // channels
            c = k - tap * channels - column0
            th = _divide(tap, taps_w_magic)
            down = th * reach_h
            across = (tap - th * taps_w) * reach_w
            wanted = ((k < length) & (c >= 0) & (c < group_channels))[None, :]
            valid = _inside(top[:, None] + down[None, :], height) & wanted
            valid = valid & _inside(left[:, None] + across[None, :], width)
            column = c.to(tl.int64) * stride_xc + down.to(tl.int64) * stride_xh
            column += across.to(tl.int64) * stride_xw
            x = tl.load(x_ptr + x_row[:, None] + column[None, :], mask=valid, other=0.0)
            w = tl.where(wanted, w, tl.zeros_like(w))
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    y = acc
    if bank_ptr.dtype.element_ty == x_ptr.dtype.element_ty:  # otherwise the tiles hold it
        y *= scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    y_row = b.to(tl.int64) * stride_yb + i.to(tl.int64) * stride_yh + j.to(tl.int64) * stride_yw
    y_ptrs = y_ptr + y_row[:, None] + (offs_n.to(tl.int64) * stride_yn)[None, :]
    mask = (offs_m < M)[:, None] & ((offs_n >= n_low) & (offs_n < n_high))[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


def conv2d(
    x: Tensor,
    bank: Tensor,
    table: Tensor | None,
    bias: Tensor | None,
    placement: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    config: Config | None = None,
) -> Tensor:
    """x ``[B, C, H, W]`` -> ``[B, out, H', W']`` in x's memory format.

    The kernel reads and writes channels-last: other images are copied (pixels.lines).
    """
    p = parse(placement)
    bias = None if bias is None else bias.contiguous()
    if pixels.is_pointwise(x, p, stride, padding, groups):
        lines, matrix = x.permute(0, 2, 3, 1), pixels.as_matrix(placement)
        return pixels.from_lines(pointwise.linear(lines, bank, table, bias, matrix, config), x)
    rows = p.selected_shape[0]
    view = pixels.forward_reads(p, stride, padding, dilation)
    out_h, out_w = (
        (x.shape[2 + d] - 2 * view.start[d] - view.reach[d] * (view.taps[d] - 1) - 1)
        // view.step[d] + 1
        for d in (0, 1)
    )  # fmt: skip
    y = empty_image(x, (x.shape[0], rows, out_h, out_w))
    if y.numel() == 0:
        return y
    if pixels.too_large(p, x, y):
        return reference.conv2d(x, bank, table, bias, placement, stride, padding, dilation, groups)
    x = pixels.lines(x, p.selected_shape[1])
    out = pixels.lines_for(y, rows // groups)
    m = x.shape[0] * out_h * out_w
    c = config or pixels.choose_tiles("conv2d", m, p, groups, x)
    with plan.on_device(x):
        bank_operand = plan.operand(bank, p, x.dtype, m, c.block_m)
        count = p.matrix.runs * p.block_columns.count
        at_most = plan.rows_that_fit(bank_operand.left, rows, count, c.block_n)
        in_scratch = table is None and at_most > 0
        for launch in plan.launches(p, x.device, at_most if in_scratch else plan.INT32_MAX):
            entries = _entries(p, launch, table, bank_operand, in_scratch)
            part = slice(launch.row, launch.row + launch.rows)
            added = None if bias is None else bias[part]
            for image, number in pixels.images(x.shape[0], out_h * out_w):
                some = slice(image, image + number)
                _launch(
                    x[some], bank_operand, entries, added, out[some, part], p, launch, view, groups,
                    c,
                )  # fmt: skip
            del entries  # before the next launch's are made
    return y if out is y else y.copy_(out)


def _entries(
    p: Placement,
    launch: plan.LaunchRows,
    table: Tensor | None,
    bank: plan.Operand,
    in_scratch: bool,
) -> plan.Entries:
    if table is not None:
        return plan.entries_of_table(table, p, launch)
    if in_scratch:
        cols = p.block_columns
        return plan.entries_in_scratch(p, launch, cols.low, cols.count, bank.sign)
    return plan.entries_in_line(launch)


def _launch(
    x: Tensor,
    bank: plan.Operand,
    entries: plan.Entries,
    bias: Tensor | None,
    y: Tensor,
    p: Placement,
    launch: plan.LaunchRows,
    view: pixels.Reads,
    groups: int,
    c: Config,
) -> None:
    cols, matrix, columns = p.block_columns, p.matrix, p.selected_shape[1]
    parts = -(-cols.count * matrix.block // c.block_k)
    even = cols.first == 0 and cols.length == parts * c.block_k
    g = pixels.groups_of(p, groups, launch.row, launch.rows)
    m = y.shape[0] * y.shape[2] * y.shape[3]
    tiles_n = g.count * plan.cdiv(g.per_group, c.block_n)
    ahead.launch(_forward_kernel, (plan.cdiv(m, c.block_m) * tiles_n,))(
        x, *bank.ring.tensors, launch.words, entries.tensor, y if bias is None else bias, y,
        m, launch.rows, *x.shape[2:], *y.shape[2:], *x.stride(), *y.stride(), *view.numbers,
        g.per_group, g.first, g.offset, columns, matrix.channels, p.selection[1][0],
        entries.stride, launch.row0, matrix.blocks, matrix.run_blocks,
        cols.low, cols.count, cols.first, cols.length,
        parts * matrix.runs, *pixels.divider(parts), *pixels.divider(view.taps[1]), tiles_n,
        bank.scale,
        G=matrix.block, PARTS=bank.ring.parts, SOURCE=entries.source, SIGN=bank.sign,
        PAIRS=bank.pairs, EVEN_K=even,
        WHOLE=even and cols.count == matrix.run_blocks, BY_TAP=matrix.by_tap,
        BITS_H=view.bits[0], BITS_W=view.bits[1],
        HAS_BIAS=bias is not None, PRECISION=dot_precision(x.dtype, convolution=True),
        **entries.law_of(launch, bank.sign),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, GROUP=c.group,
        num_warps=c.warps, num_stages=pointwise._stages(bank, x, entries, c),
    )  # fmt: skip
