"""Chosen rows and columns of placements: composed, to JSON and back, checked."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from rpg_kernels import Generator, TableGenerator
from rpg_kernels.law.placement import Placement, parse
from rpg_kernels.law.selection import Chosen, indices_of

SHAPES = [(9, 30), (16, 12, 3, 3), (7, 10, 5)]


def placement(shape: tuple[int, ...]) -> Placement:
    return Placement(Generator(100, 8, "vector"), 2, 16, shape, 0.5)


@pytest.mark.parametrize("seed", range(30))
def test_parts_of_chosen_parts_are_those_of_plain_lists(seed: int) -> None:
    rng = random.Random(seed)
    shape = rng.choice(SHAPES)
    p = placement(shape)
    wanted = [list(range(size)) for size in shape[:2]]
    for _ in range(4):
        dim = rng.randrange(2)
        size = len(wanted[dim])
        if rng.random() < 0.5:
            start = rng.randrange(size)
            length = rng.randint(1, size - start)
            p = p.narrow(dim, start, length)
            wanted[dim] = wanted[dim][start : start + length]
        else:
            indices = sorted(rng.sample(range(size), rng.randint(1, size)))
            p = p.select(dim, indices)
            wanted[dim] = [wanted[dim][index] for index in indices]
        assert [list(indices_of(p.selected(dim))) for dim in (0, 1)] == wanted
        assert p.selected_shape == (len(wanted[0]), len(wanted[1]), *shape[2:])
        assert p.hull(dim) == (wanted[dim][0], wanted[dim][-1] - wanted[dim][0] + 1)
        for chosen, one, given in zip(
            (p.rows_chosen, p.columns_chosen), (p.rows, p.columns), wanted, strict=True
        ):
            if given == list(range(given[0], given[-1] + 1)):  # neighbours are a range
                assert (chosen, one) == (None, (given[0], len(given)))
            else:
                assert chosen == tuple(given)
        assert parse(p.to_json()) == p
        assert hash(parse(p.to_json())) == hash(p)


def test_long_lists_are_short_as_text() -> None:
    p = placement((4096, 64)).select(0, [*range(2000), *range(2001, 4096)])
    record = json.loads(p.to_json())
    assert record["rows"] == {"chosen": [0, 2000, 2001, 2095]}
    assert record["columns"] == [0, 64]
    assert p.of_images() is p


def test_ranges_are_asked_for_where_there_are_none() -> None:
    p = placement((9, 30))
    assert p.narrow(0, 2, 3).selection == ((2, 3), (0, 30))
    with pytest.raises(ValueError, match="rows_chosen"):
        _ = p.select(0, [1, 3]).selection


def test_of_a_table() -> None:
    p = Placement(TableGenerator(50, 99, "0" * 64), 0, 5, (6, 10), 1.0).select(1, [0, 9])
    assert (p.numel, parse(p.to_json())) == (12, p)


@pytest.mark.parametrize(
    ("indices", "error"),
    [
        ([], ValueError),
        ([3, 1], ValueError),
        ([1, 1], ValueError),
        ([-1, 2], ValueError),
        ([0, 9], ValueError),
        ([0.0, 2.0], TypeError),
        ([True, 2], TypeError),
    ],
)
def test_wrong_indices(indices: list[Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="indices"):
        placement((9, 30)).select(0, indices)


@pytest.mark.parametrize("dim", [2, -1])
def test_wrong_dimension(dim: int) -> None:
    with pytest.raises(IndexError, match="dim"):
        placement((9, 30)).select(dim, [0])


def test_beyond_the_shape() -> None:
    with pytest.raises(ValueError, match="columns"):
        Placement(Generator(100, 8, "vector"), 0, 0, (9, 30), 1.0, None, Chosen((3, 30)))


@pytest.mark.parametrize(
    "rows",
    [
        {"chosen": []},
        {"chosen": [1]},
        {"chosen": [0, 2, 1, 1]},
        {"chosen": [0, 2, 4, 0]},
        {"chosen": [0, 2**40, 2**41, 1]},
        {"chosen": ["a", 1]},
        {"chosen": [0, 2], "more": 1},
        {"other": [0, 2]},
        {"chosen": None},
        "all",
        [0, 2, 4],
        [0, 99],
    ],
)
def test_wrong_json(rows: Any) -> None:
    record = json.loads(placement((9, 30)).to_json()) | {"rows": rows}
    with pytest.raises((TypeError, ValueError), match="rows"):
        parse(json.dumps(record))
