"""Placements: all that an operator must know about a virtual weight, as a record and as text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from rpg_kernels import _checks
from rpg_kernels.law import selection as selections
from rpg_kernels.law import unit as unit_law
from rpg_kernels.law.generator import Generator, TableGenerator, parse_generator
from rpg_kernels.law.geometry import VirtualMatrix
from rpg_kernels.law.ring import LAW_VERSION, MAX_BAND, LayerLaw
from rpg_kernels.law.selection import Chosen, Range, Selection
from rpg_kernels.law.unit import UNIT_LAW, UnitLaw

_KEYS = ("generator", "layer", "start", "shape", "scale", "rows", "columns")


@dataclass(frozen=True)
class BlockColumns:
    """What selected columns need of each run of a row: ``count`` blocks from block ``low``, and
    ``length`` of their elements from element ``first``. Of chosen columns: what the smallest
    range needs that holds them."""

    low: int
    count: int
    first: int
    length: int


@dataclass(frozen=True)
class Placement:
    """A generator, a layer number, a segment of the ring, a shape, a scale and a selection.

    Args:
        generator: what G is.
        layer: number of the layer, part of its keys.
        start: where the layer's segment begins: a ring address in elements, a multiple of the
            layer's block; with laps an address up to 2^62 that is not wrapped, a multiple of
            ``alignment`` of the law; with a table the first entry.
        shape: torch's shape of the full weight, ``[N, K]`` or ``[out, in/groups, *kernel]``.
        scale: the layer's multiplier; finite and not zero.
        rows, columns: the selection along dimensions 0 and 1 of the shape: (offset, length) or
            ``Chosen`` indices, which become a range where they are neighbours; None for all of it.
        taps: of a unit (law 3): a divisor of the kernel's, at most the laps; None for the largest,
            or where there are no units.

    Raises:
        TypeError, ValueError: a field is out of range.

    Example:
        >>> p = Placement(Generator(100, 8, "vector"), layer=0, start=0, shape=(6, 20), scale=2.0)
        >>> p.narrow(0, 2, 3).selected_shape, parse(p.to_json()) == p
        ((3, 20), True)
        >>> p.select(0, [1, 4, 5]).narrow(0, 1, 2).rows, p.select(1, [1, 3]).columns_chosen
        ((4, 2), (1, 3))
    """

    generator: Generator | TableGenerator
    layer: int
    start: int
    shape: tuple[int, ...]
    scale: float
    rows: Selection | None = None
    columns: Selection | None = None
    taps: int | None = None
    matrix: VirtualMatrix = field(init=False, repr=False, compare=False)  # the full weight
    selected_shape: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _checks.integer("layer", self.layer, 0, _checks.INT32_MAX)
        if _checks.finite("scale", self.scale) == 0:
            raise _checks.fail("scale", self.scale, "a number other than 0")
        object.__setattr__(self, "shape", tuple(self.shape))
        matrix = VirtualMatrix(self.shape, self.generator.granularity)
        object.__setattr__(self, "matrix", matrix)
        for name, size in (("rows", self.matrix.rows), ("columns", self.matrix.channels)):
            object.__setattr__(self, name, selections.checked(name, getattr(self, name), size))
        selected = (selections.count(self.selected(dim)) for dim in (0, 1))
        object.__setattr__(self, "selected_shape", (*selected, *self.shape[2:]))
        g = self.generator
        laps = g.laps if isinstance(g, Generator) and g.law == UNIT_LAW else None
        if laps is not None and self.taps is None:
            object.__setattr__(self, "taps", unit_law.taps_of_unit(self.matrix.runs, laps))
        elif laps is None and self.taps is not None:
            raise _checks.fail("taps", self.taps, "None where there are no units")
        self._check_start()

    def _check_start(self) -> None:
        generator, matrix = self.generator, self.matrix
        if isinstance(generator, TableGenerator):
            _checks.integer("start", self.start, 0, generator.entries - matrix.numel)
        elif generator.dof // matrix.block > MAX_BAND:
            got = f"a bank of {generator.dof} elements read in blocks of {matrix.block}"
            raise _checks.fail("generator", got, f"at most {MAX_BAND} blocks")
        elif generator.law == UNIT_LAW:
            assert generator.laps is not None
            assert self.taps is not None
            unit_law.check_layer(self.start, matrix, self.taps, generator.laps)
        else:
            _checks.integer("start", self.start, 0, generator.dof - 1)
            if self.start % matrix.block:
                raise _checks.fail("start", self.start, f"a multiple of {matrix.block}")

    @cached_property
    def law(self) -> LayerLaw:
        """The packing law of this layer; a table has none."""
        g = self.generator
        if isinstance(g, TableGenerator):
            raise TypeError("generator: got a TableGenerator, wanted a Generator with a law")
        matrix = self.matrix
        if g.law == UNIT_LAW:
            assert g.laps is not None
            assert self.taps is not None
            return UnitLaw(
                seed=g.seed,
                layer=self.layer,
                rows=matrix.rows,
                blocks=matrix.blocks,
                granularity=matrix.block,
                slots=g.dof // matrix.block,
                start=self.start // (unit_law.OCTET * matrix.block),
                reflect=g.reflect,
                permute=g.permute,
                laps=g.laps,
                window=g.window,
                runs=matrix.runs,
                taps=self.taps,
            )
        return LayerLaw(
            seed=g.seed,
            layer=self.layer,
            rows=matrix.rows,
            blocks=matrix.blocks,
            granularity=matrix.block,
            slots=g.dof // matrix.block,
            start=self.start // matrix.block,
            reflect=g.reflect,
            permute=g.permute,
        )

    @property
    def span(self) -> int:
        """Addresses in elements that the whole weight takes, padding counted."""
        if self.generator.law == UNIT_LAW:
            return unit_law.span_of(self.matrix)
        return self.matrix.span

    def selected(self, dim: int) -> Selection:
        """The rows (dim 0) or columns (dim 1), never None."""
        selection = self.columns if dim else self.rows
        assert selection is not None
        return selection

    @property
    def rows_chosen(self) -> tuple[int, ...] | None:
        """The chosen rows; None where the rows are a range."""
        return self.rows.indices if isinstance(self.rows, Chosen) else None

    @property
    def columns_chosen(self) -> tuple[int, ...] | None:
        """The chosen columns; None where the columns are a range."""
        return self.columns.indices if isinstance(self.columns, Chosen) else None

    @property
    def selection(self) -> tuple[Range, Range]:
        """Rows and columns as (offset, length), for code that reads ranges only.

        Raises:
            ValueError: rows or columns are chosen.
        """
        rows, columns = self.selected(0), self.selected(1)
        if isinstance(rows, Chosen) or isinstance(columns, Chosen):
            got = "chosen rows or columns"
            raise _checks.fail("selection", got, "ranges; see rows_chosen and columns_chosen")
        return rows, columns

    def hull(self, dim: int) -> Range:
        """The smallest range that holds the selected rows (dim 0) or columns (dim 1)."""
        return selections.hull(self.selected(dim))

    @property
    def numel(self) -> int:
        """Virtual weights of the selected part."""
        return math.prod(self.selected_shape)

    def narrow(self, dim: int, start: int, length: int) -> Placement:
        """A part of this placement, as torch.narrow: dim 0 selects rows, dim 1 columns.

        Raises:
            IndexError: dim is neither 0 nor 1.
            ValueError: the part is empty or reaches beyond the selection.
        """
        return self._with(dim, selections.narrowed(self._along(dim), start, length))

    def select(self, dim: int, indices: Sequence[int]) -> Placement:
        """Chosen rows (dim 0) or columns (dim 1) of this placement.

        Args:
            dim: 0 or 1.
            indices: strictly ascending numbers within the selection.

        Raises:
            IndexError: dim is neither 0 nor 1.
            TypeError, ValueError: the indices are none, not ascending, or reach beyond the
                selection.
        """
        return self._with(dim, selections.composed(self._along(dim), indices))

    def _along(self, dim: int) -> Selection:
        if dim not in (0, 1):
            raise IndexError(f"dim: got {dim}, wanted 0 (rows) or 1 (columns)")
        return self.selected(dim)

    def _with(self, dim: int, selection: Selection) -> Placement:
        return replace(self, columns=selection) if dim else replace(self, rows=selection)

    def selection_record(self) -> list[list[int] | dict[str, list[int]]]:
        """Rows and columns as JSON and state dicts keep them."""
        return [selections.record(self.selected(dim)) for dim in (0, 1)]

    def of_images(self) -> Placement:
        """Of a sequence's convolution the same weight, for images of height one; else itself.

        Example:
            >>> p = Placement(Generator(100, 8, "vector"), 0, 0, (6, 20, 5), 1.0)
            >>> p.of_images().shape, p.of_images().law == p.law
            ((6, 20, 1, 5), True)
        """
        if len(self.shape) != 3:
            return self
        rows, columns, length = self.shape
        return replace(self, shape=(rows, columns, 1, length))

    @cached_property
    def block_columns(self) -> BlockColumns:
        """The blocks of a row that the selected columns touch.

        Rows whose run holds all taps are taken whole; the caller selects their columns.
        """
        matrix = self.matrix
        offset, length = self.hull(1) if matrix.by_tap else (0, matrix.run)
        low, high = offset // matrix.block, -(-(offset + length) // matrix.block)
        return BlockColumns(low, high - low, offset - low * matrix.block, length)

    def to_json(self) -> str:
        """One line of JSON: the operators' argument, and what a checkpoint keeps."""
        rows, columns = (selections.text(self.selected(dim)) for dim in (0, 1))
        shape = list(self.shape)
        taps = "" if self.taps is None else f',"taps":{self.taps}'
        # Written out, since torch.compile cannot trace the json module.
        return (
            f'{{"generator":{self.generator.to_json()},"layer":{self.layer},"start":{self.start},'
            f'"shape":{shape},"scale":{float(self.scale)!r},"rows":{rows},'
            f'"columns":{columns}{taps}}}'
        )


def place(
    generator: Generator | TableGenerator,
    layer: int,
    cursor: int,
    shape: Sequence[int],
    scale: float = 1.0,
    taps: int | None = None,
) -> tuple[Placement, int]:
    """A layer that follows others, and where the next one may begin.

    Args:
        generator, layer, shape, scale, taps: of the placement.
        cursor: where the layer before ended; 0 for the first.

    Returns:
        (placement, cursor).

    Raises:
        TypeError, ValueError: as Placement; a table with too few entries.

    Example:
        >>> ring = Generator(slots=4, granularity=8, reflect="none")
        >>> [place(ring, 0, 0, (3, 8))[1], place(ring, 1, 24, (3, 8))[1]]
        [24, 16]
    """
    shape = tuple(shape)
    if isinstance(generator, TableGenerator):
        placement = Placement(generator, layer, cursor, shape, scale, taps=taps)
        return placement, cursor + placement.matrix.numel
    first = Placement(generator, layer, 0, shape, scale, taps=taps)  # checks all but the start
    if generator.law == LAW_VERSION:
        block = first.matrix.block
        start = -(-cursor // block) * block % generator.dof
        end = (start + first.matrix.span) % generator.dof
    else:
        assert generator.laps is not None
        start, end = unit_law.place(shape, generator.granularity, generator.laps, cursor)
    return replace(first, start=start), end


def check_laps(laps: int, dof: int, span: int) -> None:
    """Refuse more laps than a finished model compresses: some slots would never be read.

    Args:
        laps: of the generator.
        dof: elements of the bank.
        span: addresses that the model's layers take, in elements: where the last one ends.

    Raises:
        ValueError: laps is above span / dof.

    Example:
        >>> check_laps(4, dof=1000, span=4500)
        >>> check_laps(5, dof=1000, span=4500)
        Traceback (most recent call last):
        ValueError: laps: got 5, wanted at most 4, as 4500 weights are read from 1000 elements
    """
    most = max(1, span // dof)
    if laps > most:
        why = f"as {span} weights are read from {dof} elements"
        raise _checks.fail("laps", laps, f"at most {most}, {why}")


@lru_cache(maxsize=65536)
def parse(text: str) -> Placement:
    """The placement that a JSON text describes; the inverse of to_json, cached.

    Raises:
        TypeError, ValueError: not a placement's JSON, or a field out of range.
    """
    _checks.text("placement", text)
    try:
        record = json.loads(text)
        given = {name: record[name] for name in _KEYS}
        given["taps"] = record.get("taps")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise _checks.fail("placement", repr(text[:80]), "the JSON of a Placement") from error
    generator = parse_generator(json.dumps(given.pop("generator")))
    if not isinstance(given["shape"], list):
        raise _checks.fail("shape", repr(given["shape"]), "a list of ints")
    given["shape"] = tuple(given["shape"])
    for name in ("rows", "columns"):
        given[name] = selections.from_record(name, given[name])
    return Placement(generator, **given)


def split(length: int, at_most: int) -> Iterator[Range]:
    """(offset, length) of parts that cover [0, length) in order, none longer than ``at_most``.

    Example:
        >>> list(split(7, 3))
        [(0, 3), (3, 3), (6, 1)]
    """
    for offset in range(0, length, at_most):
        yield offset, min(at_most, length - offset)
