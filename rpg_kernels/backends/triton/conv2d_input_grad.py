"""dx of y = conv2d(x, Ŵ), one launch per residue class of the input pixels modulo the stride."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels._tensors import empty_image
from rpg_kernels.backends.reference import conv2d as reference
from rpg_kernels.backends.triton import ahead, entries, pixels, plan, stored, weights
from rpg_kernels.backends.triton import law as device_law
from rpg_kernels.backends.triton import linear as pointwise
from rpg_kernels.backends.triton.config import Config, dot_precision
from rpg_kernels.law.placement import Placement, parse

_weight_tile, _slot_and_sign = weights.weight_tile, entries.slot_and_sign
_position, _flip = entries.position, entries.flip
_block_of, _read = stored.block_of, stored.read
_sign_word, _sign_bit = device_law.sign_word, device_law.sign_bit
_tile_of = pointwise._tile_of
_pixel, _inside, _tap_bits = pixels.pixel, pixels.inside, pixels.tap_bits
_walk, _distance, _wide = pixels.walk, pixels.distance, pixels.wide


@triton.jit
def _element_tile(
    bank_ptr,  # see weights.weight_tile
    scales_ptr,
    places_ptr,
    law_ptr,  # [192]
    entry_ptr,  # see entries.entry
    entry_stride,
    n,
    i,
    wanted,
    row0,
    blocks,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
    DTYPE: tl.constexpr,
    scale,
    live,
):
    """G · w of rows n [BLOCK_N] and elements i [BLOCK_K] of a run of all taps, each on its own."""
    block, e = i // G, i % G
    rows, columns = n[:, None], block[None, :]
    slot, sign = _slot_and_sign(
        law_ptr, entry_ptr, entry_stride, rows, columns, row0, blocks, 0,
        SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
    )  # fmt: skip
    mask = tl.broadcast_to(wanted[None, :], slot.shape)
    if live is not None:
        mask = mask & live[:, None]
    if scales_ptr is not None or places_ptr is not None:
        place = _block_of(slot, places_ptr, PARTS)
        at = place * G + e[None, :]
        w = _read(bank_ptr, scales_ptr, places_ptr, at, place, mask, 1, 16, PARTS)
    else:
        w = tl.load(bank_ptr + slot * G + e[None, :], mask=mask, other=0.0)
    if bank_ptr.dtype.element_ty != DTYPE:
        w = (w * scale).to(DTYPE)  # as in weights.weight_tile
    if SIGN == "element":
        q = _position(rows, columns, row0, blocks, law_ptr, LAW)
        words = _sign_word(q, law_ptr, (e // 32)[None, :])
        sign = words << (31 - _sign_bit(e)).to(tl.uint32)[None, :]
    if SIGN == "entry" or SIGN == "element":
        w = _flip(w, sign)
    return w


@triton.jit(do_not_specialize=pixels.PER_LAYER)
def _input_grad_kernel(
    dy_ptr,  # [B, N, out_h, out_w]
    bank_ptr,  # [slots, G] or [2 * slots, G]
    scales_ptr,  # of a bank that is kept in fewer bytes, see stored.py
    places_ptr,
    law_ptr,  # [192]
    entry_ptr,  # see entries.entry; in scratch [taps * count, entry_stride]
    dx_ptr,  # [B, C, rows of the class, columns of the class]
    # Sizes of the product and of the images; N rows of one launch.
    M,
    N,
    height,
    width,
    class_h,
    class_w,
    # Strides of the images.
    stride_dyb,
    stride_dyn,
    stride_dyh,
    stride_dyw,
    stride_dxb,
    stride_dxc,
    stride_dxh,
    stride_dxw,
    # Which pixels a row reads: see pixels.Reads.
    step_h,
    step_w,
    start_h,
    start_w,
    reach_h,
    reach_w,
    first_tap,
    tap_down,
    tap_across,
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
    turns,
    parts,
    parts_magic,
    taps_w,
    taps_w_magic,
    tiles_k,
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
    BY_TAP: tl.constexpr,
    BITS_H: tl.constexpr,
    BITS_W: tl.constexpr,
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
    """dx[m, c] = scale * sum over taps t and rows n of dy[m, t, n] Ŵ[n, c, t]; added where ADD.

    m is an input pixel of one residue class, and dy[m, t, n] what the class reads: only
    taps that reach the class are walked, and over them the strides are 1.
    Tile: BLOCK_M pixels x BLOCK_K channels of one group, the columns of one step of a run; BLOCK_N
    rows of the weight at a time, all rows of a tap in turn. Grid: one program per tile, grouped.
    Shared memory: a ring of (BLOCK_M + BLOCK_K) * BLOCK_N elements, 146 KiB at 128 x 64 x 256 with
    5 stages in 16 bits, of which 3 hold tiles. Budget at that size on sm_90: 2.6 lane-instructions
    per generated weight with entries in scratch and folded signs, 6.0 with element signs.
    Where not BY_TAP (fewer than 8 channels) every weight of the tile finds its own entry.
    """
    pid = tl.program_id(0)
    pid_m, pid_k = _tile_of(pid, tl.cdiv(M, BLOCK_M), tiles_k, GROUP)
    group = pid_k // steps
    step = pid_k - group * steps
    begin = group * per_group - offset
    n_low, n_high = tl.maximum(begin, 0), tl.minimum(begin + per_group, N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b, i, j = _pixel(tl.minimum(offs_m, M - 1), class_h, class_w)
    top, left = i * step_h + start_h, j * step_w + start_w
    dy_row = b.to(tl.int64) * stride_dyb + top.to(tl.int64) * stride_dyh
    dy_row += left.to(tl.int64) * stride_dyw
    offs_n = tl.arange(0, BLOCK_N)
    column = (n_low + offs_n).to(tl.int64) * stride_dyn
    dy_ptrs = dy_ptr + dy_row[:, None] + column[None, :]
    if BITS_H > 0:
        bits = _tap_bits(top, left, reach_h, reach_w, height, width, taps_w, BITS_H, BITS_W)
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    dy_down, dy_across = _wide(reach_h, stride_dyh), _wide(reach_w, stride_dyw)
    dy_along = _wide(BLOCK_N, stride_dyn)
    tl.assume(turns > 0)  # see linear.py
    for turn in range(0, turns):
        at, part, th, tw = _walk(turn, parts, parts_magic, taps_w, taps_w_magic)
        tap = first_tap + th * tap_down + tw * tap_across
        n = n_low + part * BLOCK_N + offs_n
        live = None if EVEN_N else n < n_high
        n = tl.minimum(n, n_high - 1)
        if BY_TAP:
            entry_at = entry_ptr
            if SOURCE == "scratch":
                entry_at += tl.full([], 1, tl.int64) * (tap * count) * entry_stride
            w = _weight_tile(
                bank_ptr, scales_ptr, places_ptr,
                law_ptr, entry_at, entry_stride, n, step, row0, blocks,
                low + tap * run_blocks, first, length,
                G, BLOCK_K, PARTS, SOURCE, SIGN, PAIRS, EVEN_K, ROUNDS, SWAP_ROUNDS, LAW,
                dy_ptr.dtype.element_ty, scale, live,
            )  # fmt: skip
        else:
            wanted = k < length
            w = _element_tile(
                bank_ptr, scales_ptr, places_ptr, law_ptr, entry_ptr, entry_stride, n,
                tap * channels + column0 + tl.where(wanted, k, 0), wanted, row0, blocks,
                G, PARTS, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW, dy_ptr.dtype.element_ty, scale,
                live,
            )  # fmt: skip
        if BITS_H > 0:
            valid = ((bits >> at) & 1 != 0)[:, None]
        else:
            valid = _inside(top + th * reach_h, height) & _inside(left + tw * reach_w, width)
            valid = valid[:, None]
        if live is not None:
            valid = valid & live[None, :]
        shift = _distance(th, tw, part, dy_down, dy_across, dy_along)
        dy = tl.load(dy_ptrs + shift, mask=valid, other=0.0)
        acc = tl.dot(dy, w, acc, input_precision=PRECISION)
    c = k - first
    dx_row = b.to(tl.int64) * stride_dxb + i.to(tl.int64) * stride_dxh
    dx_row += j.to(tl.int64) * stride_dxw
    place = ((group0 + group).to(tl.int64) * group_channels + c) * stride_dxc
    dx_ptrs = dx_ptr + dx_row[:, None] + place[None, :]
    mask = (offs_m < M)[:, None] & ((c >= 0) & (c < length))[None, :]
    dx = acc
    if bank_ptr.dtype.element_ty == dy_ptr.dtype.element_ty:  # otherwise the tiles hold it
        dx *= scale
    if ADD:
        dx += tl.load(dx_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class _Columns:
    """Blocks of every run that a launch holds, and which columns of dx they are.

    Args:
        low, count: blocks of a run.
        first: element of them that is the first column wanted.
        begin, length: of the columns, counted from the selection's.
    """

    low: int
    count: int
    first: int
    begin: int
    length: int


def conv2d_input_grad(
    dy: Tensor,
    bank: Tensor,
    table: Tensor | None,
    input_size: Sequence[int],
    placement: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    config: Config | None = None,
) -> Tensor:
    """dy ``[B, out, H', W']`` -> dx of ``input_size`` in dy's memory format.

    Entries in scratch are cut by columns, whose results are independent; rows add up only where
    the law itself has several bands, and then in fp32.
    """
    p = parse(placement)
    if pixels.is_pointwise(dy, p, stride, padding, groups):
        lines, matrix = dy.permute(0, 2, 3, 1), pixels.as_matrix(placement)
        dx = pointwise.linear_input_grad(lines, bank, table, matrix, config)
        return pixels.from_lines(dx, dy)
    dx = empty_image(dy, input_size)
    if dx.numel() == 0:
        return dx
    if pixels.too_large(p, dx, dy):
        return reference.conv2d_input_grad(
            dy, bank, table, input_size, placement, stride, padding, dilation, groups
        )
    classes = pixels.residue_classes(p, input_size[2:], stride, padding, dilation)
    dy = pixels.lines(dy, p.selected_shape[0] // groups)
    m = dx.shape[0] * max((one.height * one.width for one in classes), default=0)
    c = config or pixels.choose_tiles("conv2d_input_grad", m, p, groups, dy)
    if not p.matrix.by_tap:
        c = replace(c, block_k=16)
    with plan.on_device(dy):
        operand = plan.operand(bank, p, dy.dtype, m, c.block_m)
        launches = list(plan.launches(p, dy.device))
        out = pixels.lines_for(dx, p.selected_shape[1])
        out = out.float() if len(launches) > 1 else out
        if len(launches) > 1 or len(classes) < stride[0] * stride[1]:
            out.zero_()
        for launch in launches:
            room = operand.left if table is None else 0
            in_scratch, cuts = _cut(p, launch, room, c)
            for columns in cuts:
                if table is not None:
                    entries = plan.entries_of_table(table, p, launch)
                elif in_scratch:
                    blocks = (columns.low, columns.count)
                    entries = plan.entries_in_scratch(p, launch, *blocks, operand.sign)
                else:
                    entries = plan.entries_in_line(launch)
                for one in classes:
                    for image, number in pixels.images(dx.shape[0], one.height * one.width):
                        some = slice(image, image + number)
                        _launch(
                            dy[some, launch.row : launch.row + launch.rows], operand, entries,
                            out[some], p, launch, columns, one, stride, groups, c,
                            len(launches) > 1,
                        )  # fmt: skip
                del entries
        if out is not dx:
            dx.copy_(out)
    return dx


def _cut(
    p: Placement, launch: plan.LaunchRows, room: int, c: Config
) -> tuple[bool, list[_Columns]]:
    """Whether entries go to scratch, and the launches' columns so that they fit ``room`` bytes."""
    cols, matrix, g = p.block_columns, p.matrix, p.matrix.block
    if not matrix.by_tap:
        in_scratch = 4 * launch.rows * matrix.blocks <= room
        return in_scratch, [_Columns(0, matrix.blocks, 0, 0, p.selected_shape[1])]
    unit = max(1, c.block_k // g)  # blocks that a launch must hold whole
    fits = room // (4 * launch.rows * matrix.runs) // unit * unit
    in_scratch = fits >= min(unit, cols.count)
    width = min(fits, cols.count) if in_scratch else cols.count
    cuts = []
    for offset in range(0, cols.count, width):
        count = min(width, cols.count - offset)
        begin = max(0, offset * g - cols.first)
        end = min(cols.length, (offset + count) * g - cols.first)
        first = cols.first if offset == 0 else 0
        cuts.append(_Columns(cols.low + offset, count, first, begin, end - begin))
    return in_scratch, cuts


def _launch(
    dy: Tensor,
    bank: plan.Operand,
    entries: plan.Entries,
    dx: Tensor,
    p: Placement,
    launch: plan.LaunchRows,
    columns: _Columns,
    one: pixels.ResidueClass,
    stride: Sequence[int],
    groups: int,
    c: Config,
    add: bool,
) -> None:
    matrix, view = p.matrix, one.reads
    out = dx[:, columns.begin :, one.first[0] :: stride[0], one.first[1] :: stride[1]]
    m = out.shape[0] * one.height * one.width
    padded = columns.count * matrix.block if matrix.by_tap else columns.length
    steps = plan.cdiv(padded, c.block_k)
    g = pixels.groups_of(p, groups, launch.row, launch.rows)
    tiles_k, parts = g.count * steps, plan.cdiv(g.per_group, c.block_n)
    even_n = g.per_group % c.block_n == 0 and g.offset == 0 and launch.rows % g.per_group == 0
    ahead.launch(_input_grad_kernel, (plan.cdiv(m, c.block_m) * tiles_k,))(
        dy, *bank.ring.tensors, launch.words, entries.tensor, out,
        m, launch.rows, *dy.shape[2:], one.height, one.width, *dy.stride(), *out.stride(),
        *view.numbers, view.first_tap, *view.taps_apart,
        g.per_group, g.first, g.offset, p.selected_shape[1], matrix.channels, p.selection[1][0],
        entries.stride, launch.row0, matrix.blocks, matrix.run_blocks, columns.low, columns.count,
        columns.first, columns.length, steps, math.prod(view.taps) * parts,
        *pixels.divider(parts), *pixels.divider(view.taps[1]), tiles_k, bank.scale,
        G=matrix.block, PARTS=bank.ring.parts, SOURCE=entries.source, SIGN=bank.sign,
        PAIRS=bank.pairs, EVEN_N=even_n,
        EVEN_K=columns.first == 0 and columns.length == steps * c.block_k,
        BY_TAP=matrix.by_tap, BITS_H=view.bits[0], BITS_W=view.bits[1], ADD=add,
        PRECISION=dot_precision(dy.dtype, convolution=True),
        **entries.law_of(launch, bank.sign),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, GROUP=c.group,
        num_warps=c.warps, num_stages=pointwise._stages(bank, dy, entries, c),
    )  # fmt: skip
