"""What a placement selects along one dimension: a range, or chosen indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rpg_kernels import _checks
from rpg_kernels.law.geometry import MAX_ROWS

Range = tuple[int, int]  # (offset, length)
MOST = 1 << 24  # chosen indices: a text of a few bytes must not ask for more memory than there is


@dataclass(frozen=True)
class Chosen:
    """Indices along one dimension of a weight, such as the channels that pruning has left.

    Args:
        indices: strictly ascending, at least one and at most 2^24, none negative.

    Raises:
        TypeError, ValueError: they are not.

    Example:
        >>> Chosen((0, 1, 4, 5, 6)).ranges
        (0, 2, 4, 3)
    """

    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", tuple(self.indices))
        if not 0 < len(self.indices) <= MOST:
            raise _checks.fail("indices", f"{len(self.indices)} of them", f"from 1 to {MOST}")
        for index in self.indices:
            _checks.integer("indices", index, 0, MAX_ROWS)
        if any(b <= a for a, b in zip(self.indices, self.indices[1:], strict=False)):
            raise _checks.fail("indices", self.indices, "strictly ascending ones")

    @property
    def ranges(self) -> tuple[int, ...]:
        """Offset and length of each run of neighbours, one after the other: short as text."""
        found: list[int] = []
        for index in self.indices:
            if found and found[-2] + found[-1] == index:
                found[-1] += 1
            else:
                found += [index, 1]
        return tuple(found)


Selection = Range | Chosen


def checked(name: str, selection: object, size: int) -> Selection:
    """A selection within ``size`` indices; neighbours become a range, None becomes all of them.

    Raises:
        TypeError, ValueError: not a selection, or it reaches beyond the size.

    Example:
        >>> checked("rows", None, 6), checked("rows", Chosen((2, 3)), 6)
        ((0, 6), (2, 2))
    """
    if isinstance(selection, Chosen):
        _checks.integer(f"{name} index", selection.indices[-1], 0, size - 1)
        return _short(selection)
    selection = (0, size) if selection is None else selection
    if not isinstance(selection, tuple) or len(selection) != 2:
        raise _checks.fail(name, repr(selection), "a pair (offset, length), or Chosen")
    offset, length = selection
    _checks.integer(f"{name} offset", offset, 0, size - 1)
    _checks.integer(f"{name} length", length, 1, size - offset)
    return offset, length


def _short(chosen: Chosen) -> Selection:
    """Neighbours as a range."""
    first, last = chosen.indices[0], chosen.indices[-1]
    size = last - first + 1
    return (first, size) if size == len(chosen.indices) else chosen


def indices_of(selection: Selection) -> Sequence[int]:
    """The selected indices, ascending."""
    if isinstance(selection, Chosen):
        return selection.indices
    return range(selection[0], selection[0] + selection[1])


def count(selection: Selection) -> int:
    """How many indices are selected."""
    return len(indices_of(selection))


def hull(selection: Selection) -> Range:
    """The smallest range that holds the selection.

    >>> hull(Chosen((3, 5, 9)))
    (3, 7)
    """
    if isinstance(selection, Chosen):
        first, last = selection.indices[0], selection.indices[-1]
        return first, last - first + 1
    return selection


def narrowed(selection: Selection, start: int, length: int) -> Selection:
    """``length`` of the selected indices from the one of number ``start``.

    Raises:
        TypeError, ValueError: it is empty or reaches beyond the selection.
    """
    size = count(selection)
    _checks.integer("start", start, 0, size - 1)
    _checks.integer("length", length, 1, size - start)
    if isinstance(selection, Chosen):
        return _short(Chosen(selection.indices[start : start + length]))
    return selection[0] + start, length


def composed(selection: Selection, indices: Iterable[int]) -> Selection:
    """Those of the selected indices whose numbers within the selection are given.

    Raises:
        TypeError, ValueError: they are not ascending, none, or reach beyond the selection.

    Example:
        >>> composed(Chosen((3, 5, 9)), (0, 2)), composed((4, 4), (0, 3))
        (Chosen(indices=(3, 9)), Chosen(indices=(4, 7)))
    """
    of = indices_of(selection)
    wanted = Chosen(tuple(indices)).indices
    _checks.integer("indices", wanted[-1], 0, len(of) - 1)
    return _short(Chosen(tuple(of[index] for index in wanted)))


def record(selection: Selection) -> list[int] | dict[str, list[int]]:
    """What JSON and state dicts keep: ``[offset, length]``, or the ranges of chosen indices.

    >>> record(Chosen((0, 1, 4))), record((2, 7))
    ({'chosen': [0, 2, 4, 1]}, [2, 7])
    """
    if isinstance(selection, Chosen):
        return {"chosen": list(selection.ranges)}
    return list(selection)


def text(selection: Selection) -> str:
    """The same as JSON; written out, since torch.compile cannot trace the json module."""
    if isinstance(selection, Chosen):
        return f'{{"chosen":{list(selection.ranges)}}}'
    return str(list(selection))


def from_record(name: str, given: object) -> Selection:
    """The inverse of ``record``.

    Raises:
        TypeError, ValueError: not a record of a selection.
    """
    wanted = "a list of ints, or ranges of chosen indices"
    if isinstance(given, list):
        return tuple(given)  # its length is checked where the size is known
    ranges = given.get("chosen") if isinstance(given, dict) and len(given) == 1 else None
    if not isinstance(ranges, list) or not ranges or len(ranges) % 2:
        raise _checks.fail(name, repr(given), wanted)
    for number in ranges:
        _checks.integer(name, number, 0, MAX_ROWS)
    _checks.integer(f"{name} chosen", sum(ranges[1::2]), 1, MOST)
    indices: list[int] = []
    for offset, length in zip(ranges[::2], ranges[1::2], strict=True):
        if length == 0 or (indices and offset <= indices[-1]):
            raise _checks.fail(name, repr(given), "ascending ranges, none of them empty")
        indices += range(offset, offset + length)
    return _short(Chosen(tuple(indices)))
