"""Generator, TableGenerator and RPGConfig: frozen, printable, to JSON and back, checked."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

import rpg_kernels as rpg
from rpg_kernels.generator import parse_generator

LAW = {"slots": 31, "granularity": 16, "reflect": "element", "permute": False, "seed": 2**63 - 1}
TABLE = {"slots": 50, "entries": 99, "sha256": "0123456789abcdef" * 4}


def test_is_frozen_hashable_and_printable() -> None:
    for generator in (rpg.Generator(**LAW), rpg.TableGenerator(**TABLE)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            generator.slots = 3  # type: ignore[misc]
        assert generator == dataclasses.replace(generator)
        assert hash(generator) == hash(dataclasses.replace(generator))
        assert generator != dataclasses.replace(generator, slots=7)
        for field in (f for f in dataclasses.fields(generator) if f.init):
            assert f"{field.name}={getattr(generator, field.name)!r}" in repr(generator)


def test_dof_is_slots_times_granularity() -> None:
    assert rpg.Generator(**LAW).dof == 31 * 16
    table = rpg.TableGenerator(**TABLE)
    assert (table.dof, table.granularity) == (50, 1)


def test_json_holds_every_field_and_the_law() -> None:
    record = json.loads(rpg.Generator(**LAW).to_json())
    assert record == {**LAW, "window": None, "law": 1}
    record = json.loads(rpg.TableGenerator(**TABLE).to_json())
    assert record == {**TABLE, "law": "table"}


@pytest.mark.parametrize("reflect", ["element", "vector", "none"])
@pytest.mark.parametrize("granularity", [1, 2, 4, 8, 16, 32, 64, 128])
def test_json_and_back(granularity: int, reflect: str) -> None:
    generator = rpg.Generator(slots=2**31 - 1, granularity=granularity, reflect=reflect, seed=9)
    text = generator.to_json()
    assert "\n" not in text
    assert rpg.Generator.from_json(text) == generator
    assert parse_generator(text) == generator


def test_table_json_and_back() -> None:
    table = rpg.TableGenerator(**TABLE)
    assert rpg.TableGenerator.from_json(table.to_json()) == table
    assert parse_generator(table.to_json()) == table


BAD_LAW: list[tuple[str, Any, type[Exception]]] = [
    ("slots", 0, ValueError),
    ("slots", -3, ValueError),
    ("slots", 2**31, ValueError),
    ("slots", True, TypeError),
    ("slots", 4.0, TypeError),
    ("slots", None, TypeError),
    ("granularity", 0, ValueError),
    ("granularity", 3, ValueError),
    ("granularity", 256, ValueError),
    ("granularity", -64, ValueError),
    ("granularity", True, TypeError),
    ("granularity", 64.0, TypeError),
    ("granularity", "64", TypeError),
    ("reflect", "vectors", ValueError),
    ("reflect", "Vector", ValueError),
    ("reflect", None, ValueError),
    ("reflect", True, ValueError),
    ("permute", 1, TypeError),
    ("permute", None, TypeError),
    ("window", 128, ValueError),
    ("window", 0, ValueError),
    ("seed", -1, ValueError),
    ("seed", 2**63, ValueError),
    ("seed", 1.0, TypeError),
    ("seed", False, TypeError),
    ("seed", None, TypeError),
    ("law", 2, ValueError),
    ("law", 0, ValueError),
    ("law", True, ValueError),
    ("law", "table", ValueError),
]
BAD_TABLE: list[tuple[str, Any, type[Exception]]] = [
    ("slots", 0, ValueError),
    ("slots", 2**31, ValueError),
    ("slots", 1.5, TypeError),
    ("entries", 0, ValueError),
    ("entries", True, TypeError),
    ("sha256", "0" * 63, ValueError),
    ("sha256", "G" * 64, ValueError),
    ("sha256", None, ValueError),
    ("law", 1, ValueError),
]


@pytest.mark.parametrize(("field", "value", "error"), BAD_LAW)
def test_law_field_that_is_refused(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{field}: got .*, wanted "):
        rpg.Generator(**{**LAW, field: value})
    record = json.dumps({**LAW, "law": 1, field: value})
    with pytest.raises(error, match=rf"^{field}: got .*, wanted "):
        rpg.Generator.from_json(record)


@pytest.mark.parametrize(("field", "value", "error"), BAD_TABLE)
def test_table_field_that_is_refused(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{field}: got .*, wanted "):
        rpg.TableGenerator(**{**TABLE, field: value})


NOT_A_GENERATOR = [
    "",
    "{",
    "[]",
    "null",
    "3",
    '"slots"',
    "{}",
    '{"slots":4}',
    '{"slots":4,"granularity":8,"reflect":"none"}',  # no law
    '{"granularity":8,"reflect":"none","law":1}',  # no slots
    '{"slots":4,"granularity":8,"reflect":"none","law":1,"extra":0}',
    '{"slots":4,"entries":8,"law":"table"}',  # no digest
    '{"slots":4,"granularity":8,"reflect":"none","law":[1]}',
]


@pytest.mark.parametrize("text", NOT_A_GENERATOR)
def test_json_that_is_not_a_generator(text: str) -> None:
    for read in (rpg.Generator.from_json, rpg.TableGenerator.from_json, parse_generator):
        with pytest.raises(ValueError, match=r": got .*, wanted "):
            read(text)


@pytest.mark.parametrize("text", [None, 3, {"slots": 4}, b"\xff"])
def test_something_that_is_not_text(text: Any) -> None:
    for read in (rpg.Generator.from_json, rpg.TableGenerator.from_json, parse_generator):
        with pytest.raises((TypeError, ValueError), match=r": got .*, wanted "):
            read(text)


def test_another_law_is_named() -> None:
    text = '{"slots":4,"granularity":8,"reflect":"none","law":7}'
    for read in (rpg.Generator.from_json, parse_generator):
        with pytest.raises(ValueError, match="law: got 7, wanted 1, the only law known here"):
            read(text)


CONFIG: list[tuple[str, Any, type[Exception]]] = [
    *(("dof", value, ValueError) for value in (0, -1, 2**62 + 1)),
    *(("dof", value, TypeError) for value in (True, 1.5, "9", None)),
    *(("granularity", value, ValueError) for value in (0, 3, 129, 256)),
    *(("granularity", value, TypeError) for value in (False, 8.0, None)),
    *(("reflect", value, ValueError) for value in ("elements", None, 0)),
    *(("permute", value, TypeError) for value in (0, "yes", None)),
    *(("window", value, ValueError) for value in (0, 64, "all")),
    *(("seed", value, ValueError) for value in (-1, 2**63)),
    *(("seed", value, TypeError) for value in (True, 0.5, None)),
    *(("init_std", value, ValueError) for value in (0, -1.0, float("inf"), float("nan"))),
    *(("init_std", value, TypeError) for value in (True, "1", None)),
    *(("scale", value, ValueError) for value in ("fan", None, 1.0)),
]


@pytest.mark.parametrize(("field", "value", "error"), CONFIG)
def test_configuration_that_is_refused(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{field}: got .*, wanted "):
        rpg.RPGConfig(**{"dof": 640, field: value})
