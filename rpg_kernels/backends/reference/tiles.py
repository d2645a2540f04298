"""Tiles of a virtual weight within the scratch limit, and how one is unpacked and packed.

A tile is a Placement narrowed to some rows and columns. Scratch of one tile::

    positions * position_bytes     law evaluation, positions at a time
    weights   * bytes_per_weight   the unpacked tile (forward) or its gradient (backward)

Both are given at most their part of the limit before anything is allocated. Callers keep no name
for a tile: the one before must be gone when the next is unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg_kernels import _checks, native, settings
from rpg_kernels._stored import StoredValues
from rpg_kernels.law.placement import Placement, split
from rpg_kernels.law.ring import WORD_BITS, sign_bits
from rpg_kernels.law.selection import Range

_LAW_BYTES = 96  # per position: twelve int64 tensors alive at once in the law
_LAPS_BYTES = 200  # 25 of them in laws 2 and 3, which have laps
_SIGN_BYTES = 20  # per element of a position under "element": its word, its bit, its mask
_MAX_POSITIONS = 1 << 16
_FIXED_BYTES = 4096  # small tensors that do not grow with the tile
_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class Tile:
    """A part of a virtual weight: offsets within the selection, and its placement."""

    row: int
    column: int
    placement: Placement

    @property
    def rows(self) -> slice:
        """Where the tile lies among the selected rows."""
        return slice(self.row, self.row + self.placement.selected_shape[0])

    @property
    def columns(self) -> slice:
        """Where the tile lies among the selected columns (in-channels)."""
        return slice(self.column, self.column + self.placement.selected_shape[1])


def tiles(
    p: Placement, device: torch.device, bytes_per_weight: int, groups: int = 1
) -> Iterator[Tile]:
    """Cut a virtual weight into tiles that fit the scratch limit, row by row if need be.

    Args:
        p: the weight.
        device: whose limit counts.
        bytes_per_weight: of scratch that the caller needs for each weight of a tile.
        groups: of a convolution. A tile holds whole groups, or lies within one.

    Raises:
        RuntimeError: not even the smallest tile fits.
    """
    rows, columns = tile_size(p, device, bytes_per_weight)
    for row, height in row_spans(p.selected_shape[0], rows, groups):
        part = p.narrow(0, row, height)
        for column, width in column_spans(p, columns):
            yield Tile(row, column, part.narrow(1, column, width))


def row_spans(total: int, most: int, groups: int) -> list[Range]:
    """(first row, rows) of parts of at most ``most`` rows: whole groups, or within one.

    Args:
        total: rows of the weight.
        most: at least 1.
        groups: of a convolution.

    Example:
        >>> row_spans(12, 8, 3), row_spans(12, 3, 2)
        ([(0, 8), (8, 4)], [(0, 3), (3, 3), (6, 3), (9, 3)])
    """
    per_group = total // groups
    if most >= per_group:
        return list(split(total, most - most % per_group))
    return [
        (group * per_group + first, rows)
        for group in range(groups)
        for first, rows in split(per_group, most)
    ]


def column_spans(p: Placement, most: int) -> list[Range]:
    """(first column, columns) of parts that lie within at most ``most`` neighbouring columns of the
    whole weight, counted in selected ones.

    Example:
        >>> from rpg_kernels import Generator
        >>> p = Placement(Generator(100, 8, "vector"), 0, 0, (6, 20), 1.0)
        >>> column_spans(p, 8), column_spans(p.select(1, [0, 7, 8, 19]), 8)
        ([(0, 8), (8, 8), (16, 4)], [(0, 2), (2, 1), (3, 1)])
    """
    chosen = p.columns_chosen
    if chosen is None:
        return list(split(p.selected_shape[1], most))
    spans, first = [], 0
    for number, column in enumerate((*chosen, chosen[-1] + most + 1)):
        if column - chosen[first] >= most:
            spans.append((first, number - first))
            first = number
    return spans


def tile_size(p: Placement, device: torch.device, bytes_per_weight: int) -> tuple[int, int]:
    """(rows, columns) of a tile; columns only fall below all of them when a row does not fit. Of
    chosen columns: those from the first to the last, chosen or not, as ``column_spans`` takes it.

    Raises:
        RuntimeError: not even one block of each run fits, with the limit that would do.
    """
    size = fitting_size(p, device, bytes_per_weight)
    if size is not None:
        return size
    _, smallest, _ = _row(p)
    need = max(4 * _position_bytes(p), -(-smallest * bytes_per_weight * 4 // 3) + 4)
    limit = settings.scratch_bytes(device.type)
    raise RuntimeError(
        f"scratch_limit: got {limit} bytes, wanted at least {need + _FIXED_BYTES} for the "
        f"reference back end of a virtual weight {list(p.selected_shape)}"
    )


def fitting_size(
    p: Placement, device: torch.device, bytes_per_weight: int
) -> tuple[int, int] | None:
    """tile_size, or None when nothing fits."""
    law_bytes, tile_bytes = _shares(device)
    budget = tile_bytes // bytes_per_weight
    row, smallest, straddle = _row(p)
    if law_bytes < _position_bytes(p) or smallest > budget:
        return None
    if row <= budget:
        return min(p.selected_shape[0], budget // row), p.hull(1)[1]
    block_of_runs = p.matrix.runs * p.matrix.block
    return 1, (budget // block_of_runs - straddle) * p.matrix.block


def _row(p: Placement) -> tuple[int, int, int]:
    """Weights, padding counted, of a row and of the least that a tile can hold; and 1 where the
    selection, or a part of chosen columns, begins inside a block, so that a tile of whole widths
    touches one block more."""
    matrix = p.matrix
    if not matrix.by_tap:
        row = matrix.run_blocks * matrix.block
        return row, row, 0
    offset, length = p.hull(1)
    straddle = int(offset % matrix.block != 0 or p.columns_chosen is not None)
    run_blocks = min(matrix.run_blocks, -(-length // matrix.block) + straddle)
    block_of_runs = matrix.runs * matrix.block  # one more block in every run
    least = block_of_runs * min(run_blocks, 1 + straddle)
    return block_of_runs * run_blocks, least, straddle


def _position_bytes(p: Placement) -> int:
    per_element = getattr(p.generator, "reflect", "") == "element"
    laps = getattr(p.generator, "laps", None) is not None
    law = _LAPS_BYTES if laps else _LAW_BYTES
    return law + (_SIGN_BYTES * p.matrix.block if per_element else 0)


def _shares(device: torch.device) -> tuple[int, int]:
    """(bytes for the law, bytes for the tile): a quarter of the scratch limit, and the rest."""
    limit = max(0, settings.scratch_bytes(device.type) - _FIXED_BYTES)
    return limit // 4, limit - limit // 4


def unpack_tile(
    bank: Tensor, table: Tensor | None, p: Placement, lookup: Tensor | None = None
) -> Tensor:
    """scale · G · w of one tile, or of some of its rows.

    Args:
        bank: ``[slots, granularity]``, contiguous, or stored in fewer bytes.
        table: int32 ``[entries]`` or None.
        p: the tile.
        lookup: int64 ``[count]``, row numbers within the tile; None for all in order.

    Returns:
        The tile in torch's layout ``[rows, columns, *kernel]`` and the bank's dtype; a view of
        memory in virtual-matrix order.
    """
    block = p.matrix.block
    stored = bank if isinstance(bank, StoredValues) else None
    ring = bank if stored is not None else bank.view(-1, block)
    rows = p.selected_shape[0] if lookup is None else lookup.numel()
    out = bank.new_empty((rows * p.matrix.runs * p.block_columns.count, block))
    lookup = _chosen_rows(p, bank.device, lookup)
    if stored is None and table is None and native.handles(ring, out):
        native.unpack(p.law, ring, out, p.scale, _region(p, rows), lookup)
    else:
        for offset, n, b in _position_groups(p, bank.device, lookup):
            part = out[offset : offset + n.numel()]
            slot, negative = _read(p, table, n, b)
            if stored is None:
                torch.index_select(ring, 0, slot, out=part)
            else:
                stored.read_blocks(slot, part)
            _reflect_(part, negative, p.scale)
    taps = _neighbours(out.view(rows, p.matrix.runs, -1), p)
    if p.columns_chosen is not None:
        taps = taps.index_select(2, _chosen_columns(p, bank.device))
    return _torch_layout(taps, p)


def pack_tile(
    grad: Tensor,
    dense: Tensor,
    table: Tensor | None,
    p: Placement,
    lookup: Tensor | None = None,
) -> None:
    """grad += scale · Gᵀ · dense, for one tile, or for some of its rows.

    Args:
        grad: the accumulator ``[slots, granularity]``, contiguous, float32 or float64.
        dense: the tile's gradient in torch's layout; overwritten where that saves a copy.
        table: int32 ``[entries]`` or None.
        p: the tile.
        lookup: int64 ``[count]``, the row that each row of ``dense`` belongs to; None for all.
    """
    block = p.matrix.block
    ring = grad.view(-1, block)
    runs = dense.view(dense.shape[0], dense.shape[1], -1).transpose(1, 2)  # [rows, taps, columns]
    width = p.block_columns.count * block
    if not (p.matrix.by_tap and runs.shape[2] == width and runs.is_contiguous()):
        padded = runs.new_zeros((runs.shape[0], p.matrix.runs, width))
        if p.columns_chosen is None:
            _neighbours(padded, p).copy_(runs)
        else:
            _neighbours(padded, p).index_copy_(2, _chosen_columns(p, grad.device), runs)
        runs = padded
    del dense  # the last reference, when the caller keeps none
    source = runs.view(-1, block)
    lookup = _chosen_rows(p, grad.device, lookup)
    if table is None and native.handles(source, grad):
        law_bytes, _ = _shares(grad.device)
        region = _region(p, runs.shape[0])
        native.pack(p.law, source, ring, p.scale, region, lookup, law_bytes)
        return
    for offset, n, b in _position_groups(p, grad.device, lookup):
        part = source[offset : offset + n.numel()]
        slot, negative = _read(p, table, n, b)
        _reflect_(part, negative, 1.0)
        part = part.to(grad.dtype)
        if p.scale != 1.0:  # not by alpha: whether that rounds in between depends on the machine
            part.mul_(p.scale)
        if block == 1:  # torch adds scalars several times faster than rows of one
            ring.view(-1).index_add_(0, slot, part.view(-1))
        else:
            ring.index_add_(0, slot, part)


def _chosen_rows(p: Placement, device: torch.device, lookup: Tensor | None) -> Tensor | None:
    """Where rows are chosen: int64 row numbers of the whole weight, in place of a lookup."""
    if p.rows_chosen is None:
        return lookup
    rows = torch.tensor(p.rows_chosen, device=device)
    return rows if lookup is None else rows[lookup]


def _chosen_columns(p: Placement, device: torch.device) -> Tensor:
    """int64 numbers of the chosen columns among their neighbours."""
    return torch.tensor(p.columns_chosen, device=device).sub_(p.hull(1)[0])


def _neighbours(runs: Tensor, p: Placement) -> Tensor:
    """``[rows, runs, padded elements]`` -> ``[rows, taps, columns]`` from the first of the selected
    columns to the last, a view."""
    first = p.block_columns.first
    elements = runs[:, :, first : first + p.block_columns.length]
    if p.matrix.by_tap:
        return elements
    offset, columns = p.hull(1)
    by_tap: Tensor = elements.squeeze(1).unflatten(1, (p.matrix.taps, p.matrix.channels))
    return by_tap[:, :, offset : offset + columns]


def _torch_layout(taps: Tensor, p: Placement) -> Tensor:
    """``[rows, taps, columns]`` -> ``[rows, columns]`` or ``[rows, columns, *kernel]``, a view."""
    if len(p.shape) == 2:
        return taps.squeeze(1)
    kernel: Tensor = taps.transpose(1, 2).unflatten(2, p.shape[2:])
    return kernel


def _region(p: Placement, rows: int) -> tuple[int, int, int, int, int, int]:
    """The positions of a tile as native.unpack and native.pack take them."""
    matrix, columns = p.matrix, p.block_columns
    return _first_row(p), rows, matrix.runs, matrix.run_blocks, columns.low, columns.count


def _first_row(p: Placement) -> int:
    """That lookups count from: the first of a range; chosen rows are those of the whole weight."""
    return p.hull(0)[0] if p.rows_chosen is None else 0


def _position_groups(
    p: Placement, device: torch.device, lookup: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(offset, rows n, blocks b) over the positions of a tile, some at a time."""
    first_row = _first_row(p)
    matrix, columns = p.matrix, p.block_columns
    per_row = matrix.runs * columns.count
    rows = p.selected_shape[0] if lookup is None else lookup.numel()
    law_bytes, _ = _shares(device)
    step = max(1, min(_MAX_POSITIONS, law_bytes // _position_bytes(p)))
    for offset, count in split(rows * per_row, step):
        position = torch.arange(offset, offset + count, device=device)
        row = position.div(per_row, rounding_mode="floor")
        b = position.sub_(row * per_row)
        if matrix.runs > 1:
            run = b.div(columns.count, rounding_mode="floor")
            b.add_(run.mul_(matrix.run_blocks - columns.count))
        b.add_(columns.low)
        if lookup is not None:
            row = lookup[row]
        yield offset, row + first_row, b


def _read(p: Placement, table: Tensor | None, n: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None]:
    """(slots, signs) of positions: None, bool ``[positions]`` or int32 words ``[positions, W]``."""
    if table is not None:
        entry = table[n.mul(p.matrix.blocks).add_(b).add_(p.start)]
        return entry.bitwise_and(_checks.INT32_MAX), entry < 0
    law = p.law
    slot = law.slot(n, b)
    if law.reflect == "none":
        return slot, None
    words = law.sign_words(n, b)
    if law.reflect == "vector":
        return slot, words.squeeze(-1) >= 1 << 31
    return slot, words.to(torch.int32)


def _reflect_(part: Tensor, negative: Tensor | None, scale: float) -> None:
    """In place: scale times the blocks ``[positions, block]``, with their signs."""
    if negative is not None:
        if negative.dim() == 1:
            bit = negative.unsqueeze(1)
        else:
            e = torch.arange(part.shape[1], device=part.device)
            bit = negative[:, e // WORD_BITS].bitwise_right_shift_(sign_bits(e)).bitwise_and_(1)
        size = part.element_size()
        mask = bit.to(_INTEGER[size]).bitwise_left_shift_(8 * size - 1)
        part.view(mask.dtype).bitwise_xor_(mask)
    if scale != 1.0:
        part.mul_(scale)  # a Python number, so that every dtype rounds once
