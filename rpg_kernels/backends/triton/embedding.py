"""Row lookup y = Ŵ[indices] and its bank gradient, each weight made where it is used.

Signatures are those of the reference. An index that the operators' check has let through in error
(on CUDA it asserts on the device) reads and writes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_kernels.backends.reference import embedding as reference
from rpg_kernels.backends.reference.accumulate import bank_accumulator
from rpg_kernels.backends.triton import ahead, entries, plan, stored, weights
from rpg_kernels.backends.triton.config import Config, choose
from rpg_kernels.law.placement import Placement, parse

_locate, _stored_tile, _flip = weights.locate, weights.stored_tile, entries.flip
# What changes from call to call, and would be compiled anew where a multiple of 16 comes or goes.
_VARYING = ("M", "row", "rows", "row0", "low", "steps")


@triton.jit
def _rows_of(
    index_ptr,  # [M], int32 or int64
    tile,
    M,
    row,
    rows,
    BLOCK_M: tl.constexpr,
):
    """(lookups i int64, rows n of the launch, whether it has that row) of a tile of indices.

    The launch has ``rows`` rows of the selection, from ``row``; others count as its first.
    """
    i = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.load(index_ptr + i, mask=i < M, other=-1).to(tl.int64) - row
    found = (n >= 0) & (n < rows)
    return i, tl.where(found, n, 0).to(tl.int32), found


@triton.jit
def _columns_of(step, low, first, columns, G: tl.constexpr, BLOCK_K: tl.constexpr):
    """(columns k of the selection, whether it has them, block b, element e) of a step.

    b and e as weights.locate wants them: of the first column where the tile is a part of one
    block, otherwise of every column.
    """
    padded = step * BLOCK_K + tl.arange(0, BLOCK_K)
    k = padded - first
    if G >= BLOCK_K:
        per_block: tl.constexpr = G // BLOCK_K
        b = low + step // per_block
        e = (step % per_block) * BLOCK_K
    else:
        b = low + tl.minimum(padded, first + columns - 1) // G
        e = padded % G
    return k, (k >= 0) & (k < columns), b, e


@triton.jit(do_not_specialize=_VARYING)
def _embedding_kernel(
    bank_ptr,  # [slots, G]
    scales_ptr,  # of a bank that is kept in fewer bytes, see stored.py
    places_ptr,
    law_ptr,  # [192]
    entry_ptr,  # see entries.entry
    index_ptr,  # [M], int32 or int64
    y_ptr,  # [M, columns], contiguous
    M,
    columns,
    row,
    rows,
    row0,
    blocks,
    low,
    first,
    steps,
    scale,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[i, k] = scale * Ŵ[index[i], k] for the indices that name a row of the launch.

    Tile: BLOCK_M indices x BLOCK_K columns. Grid: one program per tile, columns innermost, so that
    neighbours write one row. Shared memory: none but for changes of layout. Budget: the law once
    per index and block (60 to 100 lane-instructions per BLOCK_K weights, 600 in law 3), 16 bytes a
    load from 16 elements per block on; the product with scale is rounded once, from fp32.
    Whole blocks are read, since a slot has all of its elements; only wanted columns are stored.
    """
    pid = tl.program_id(0)
    tile = pid // steps
    i, n, found = _rows_of(index_ptr, tile, M, row, rows, BLOCK_M)
    k, wanted, b, e = _columns_of(pid - tile * steps, low, first, columns, G, BLOCK_K)
    if scales_ptr is not None or places_ptr is not None:
        w, sign = _stored_tile(
            bank_ptr, scales_ptr, places_ptr, law_ptr, entry_ptr, 0, n, b, e, None, row0, blocks,
            low, G, BLOCK_K, PARTS, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
        )  # fmt: skip
        w = w.to(tl.float32)
    else:
        offsets, sign = _locate(
            law_ptr, entry_ptr, 0, n, b, e, row0, blocks, low,
            G, BLOCK_K, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
        )  # fmt: skip
        w = tl.load(bank_ptr + offsets).to(tl.float32)
    if SIGN != "none":
        w = _flip(w, sign)
    at = y_ptr + (i * columns)[:, None] + k[None, :]
    mask = found[:, None] & wanted[None, :]
    tl.store(at, (w * scale).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def _embedding_grad_kernel(
    dy_ptr,  # [M, columns]
    law_ptr,  # [192]
    entry_ptr,  # see entries.entry
    index_ptr,  # [M], int32 or int64
    grad_ptr,  # [slots, G], fp32
    M,
    columns,
    stride_dym,
    stride_dyk,
    row,
    rows,
    row0,
    blocks,
    low,
    first,
    steps,
    scale,
    G: tl.constexpr,
    SOURCE: tl.constexpr,
    SIGN: tl.constexpr,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad[slot(index[i], k)] += scale * sign * dy[i, k] for the indices of the launch's rows.

    Tile: BLOCK_M indices x BLOCK_K columns. Grid: one program per tile, columns innermost. Shared
    memory: none but for changes of layout. Budget: the law as in the forward, and one atomic per
    4 elements where the device has vector atomics and blocks have 8 elements or more.
    """
    pid = tl.program_id(0)
    tile = pid // steps
    i, n, found = _rows_of(index_ptr, tile, M, row, rows, BLOCK_M)
    k, wanted, b, e = _columns_of(pid - tile * steps, low, first, columns, G, BLOCK_K)
    mask = found[:, None] & wanted[None, :]
    at = dy_ptr + (i * stride_dym)[:, None] + (k.to(tl.int64) * stride_dyk)[None, :]
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32) * scale
    offsets, sign = _locate(
        law_ptr, entry_ptr, 0, n, b, e, row0, blocks, low,
        G, BLOCK_K, SOURCE, SIGN, ROUNDS, SWAP_ROUNDS, LAW,
    )  # fmt: skip
    if SIGN != "none":
        value = _flip(value, sign)
    tl.atomic_add(grad_ptr + offsets, value, mask=mask, sem="relaxed")


def embedding(
    bank: Tensor,
    table: Tensor | None,
    indices: Tensor,
    placement: str,
    config: Config | None = None,
) -> Tensor:
    """indices int32 or int64, any shape -> ``[*indices.shape, dim]`` in the bank's dtype.

    The bits of ``unpack(...)[indices]``. No scratch.
    """
    p = parse(placement)
    y = bank.new_empty((*indices.shape, p.selected_shape[1]))
    if y.numel():
        ring = stored.ring_of(bank, p.matrix.block)
        c = config or _config("embedding", indices, p, bank.dtype)
        _launch(_embedding_kernel, ring.tensors, (y,), (), table, indices, p, c, PARTS=ring.parts)
    return y


def embedding_bank_grad(
    dy: Tensor,
    indices: Tensor,
    table: Tensor | None,
    placement: str,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """dy ``[*indices.shape, dim]`` -> dw ``[slots, granularity]`` of ``dtype``, fp32 sums.

    The order of the sums changes from run to run. Under ``torch.use_deterministic_algorithms`` the
    reference sums, in a fixed order.

    Raises:
        RuntimeError: deterministic, and the scratch limit is too small for the reference.
    """
    if torch.are_deterministic_algorithms_enabled():
        return reference.embedding_bank_grad(dy, indices, table, placement, dtype)
    p = parse(placement)
    grad = bank_accumulator(p, dy.device, dtype)
    if dy.numel():
        a, ring = dy.reshape(-1, dy.shape[-1]), grad.view(-1, p.matrix.block)
        c = config or _config("embedding_bank_grad", indices, p, dy.dtype)
        _launch(_embedding_grad_kernel, (a,), (ring,), a.stride(), table, indices, p, c)
    return grad.to(dtype)


def _config(op: str, indices: Tensor, p: Placement, dtype: torch.dtype) -> Config:
    rows, columns = p.selected_shape
    return choose(op, indices.numel(), rows, columns, p.matrix.block, dtype)


def _launch(
    kernel: triton.JITFunction,
    source: tuple[Tensor | None, ...],
    result: tuple[Tensor],
    strides: tuple[int, ...],
    table: Tensor | None,
    indices: Tensor,
    p: Placement,
    c: Config,
    **constants: int,
) -> None:
    """One launch for every band of the law, each over all indices."""
    flat = indices.reshape(-1).contiguous()
    m, matrix, cols = flat.numel(), p.matrix, p.block_columns
    width = min(c.block_k, matrix.block) if matrix.block >= 8 else c.block_k
    steps = -(-cols.count * matrix.block // width)
    with plan.on_device(indices):
        for launch in plan.launches(p, indices.device):
            in_line = plan.entries_in_line(launch)
            entries = in_line if table is None else plan.entries_of_table(table, p, launch)
            ahead.launch(kernel, (plan.cdiv(m, c.block_m) * steps,))(
                *source, launch.words, entries.tensor, flat, *result, m, p.selected_shape[1],
                *strides, launch.row, launch.rows, launch.row0, matrix.blocks, cols.low, cols.first,
                steps, p.scale,
                G=matrix.block, SOURCE=entries.source, SIGN=plan.sign_kind(p),
                **entries.law_of(launch, plan.sign_kind(p)),
                **constants, BLOCK_M=c.block_m, BLOCK_K=width, num_warps=c.warps,
            )  # fmt: skip
