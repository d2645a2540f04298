"""Generator, TableGenerator and RPGConfig: frozen, printable, to JSON and back, checked."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

import rpg_kernels as rpg
from rpg_kernels.law.generator import parse_generator

LAW = {"slots": 31, "granularity": 16, "reflect": "element", "permute": False, "seed": 2**63 - 1}
UNITS = {
    "slots": 704, "granularity": 16, "reflect": "none", "permute": True, "window": None, "laps": 3,
    "seed": 5, "law": 3,
}  # fmt: skip
TABLE = {"slots": 50, "entries": 99, "sha256": "0123456789abcdef" * 4}


def test_is_frozen_hashable_and_printable() -> None:
    made = (
        rpg.Generator(**LAW), rpg.Generator(**UNITS), rpg.TableGenerator(**TABLE),
    )  # fmt: skip
    for generator in made:
        with pytest.raises(dataclasses.FrozenInstanceError):
            generator.slots = 3  # type: ignore[misc]
        assert generator == dataclasses.replace(generator)
        assert hash(generator) == hash(dataclasses.replace(generator))
        assert generator != dataclasses.replace(generator, slots=799)
        for field in (f for f in dataclasses.fields(generator) if f.init):
            assert f"{field.name}={getattr(generator, field.name)!r}" in repr(generator)


def test_dof_is_slots_times_granularity() -> None:
    assert rpg.Generator(**LAW).dof == 31 * 16
    table = rpg.TableGenerator(**TABLE)
    assert (table.dof, table.granularity) == (50, 1)


def test_json_holds_every_field_and_the_law() -> None:
    text = rpg.Generator(**LAW).to_json()
    assert json.loads(text) == {**LAW, "window": None, "law": 1}
    assert list(json.loads(text)) == [*[*LAW][:4], "window", "seed", "law"]
    for fields in (UNITS, {**UNITS, "window": 96}):
        assert json.loads(rpg.Generator(**fields).to_json()) == fields
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


@pytest.mark.parametrize("window", [None, 8, 104, 128])
@pytest.mark.parametrize("laps", [1, 3, 64])
def test_laps_to_json_and_back(window: int | None, laps: int) -> None:
    """Laps alone make law 3, whatever the size of the ring."""
    generator = rpg.Generator(5, 8, "vector", window=window, laps=laps)
    assert generator.law == 3
    text = generator.to_json()
    assert rpg.Generator.from_json(text) == generator == parse_generator(text)
    assert rpg.Generator(5, 8, "vector", window=window, laps=laps, law=3) == generator
    assert generator != rpg.Generator(5, 8, "vector", window=window, laps=laps % 64 + 1)


def test_the_text_of_law_1_is_what_it_was() -> None:
    """Placements and checkpoints of before windows: byte for byte, without a word on laps."""
    text = (
        '{"slots":31,"granularity":16,"reflect":"element","permute":false,"window":null,'
        '"seed":9223372036854775807,"law":1}'
    )
    assert rpg.Generator(**LAW).to_json() == text
    assert rpg.Generator(**LAW, law=1) == rpg.Generator(**LAW) == parse_generator(text)
    with pytest.raises(ValueError, match=r"Generator: got .*'laps'.*, wanted a JSON object with"):
        parse_generator(text.replace('"window":null', '"window":null,"laps":null'))


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
    ("law", 4, ValueError),
    ("law", 0, ValueError),
    ("law", True, ValueError),
    ("law", "table", ValueError),
]
BAD_UNITS: list[tuple[str, Any, type[Exception], str]] = [
    *(("window", value, ValueError, f"got {value}, wanted a multiple of 8 from 8 to 4096")
      for value in (0, -8, 4, 12, 100, 4104)),
    ("window", 4096, ValueError, "got 4096, wanted at most 128 slots with 64 laps"),
    ("window", True, TypeError, "got True (bool), wanted an int"),
    ("window", 64.0, TypeError, "got 64.0 (float), wanted an int"),
    *(("laps", value, ValueError, f"got {value}, wanted an int from 1 to 64")
      for value in (0, -1, 65)),
    ("laps", 2.0, TypeError, "got 2.0 (float), wanted an int"),
    ("laps", None, ValueError, "got None, wanted an int from 1 to 64 with law 3"),
    ("slots", 0, ValueError, "got 0, wanted an int from 1 to 2147483647"),
    ("law", 4, ValueError, "got 4, wanted one of 1, 3, the laws known here"),
    ("law", 2, ValueError, "got 2, wanted one of 1, 3, the laws known here; law 2 was never "
                           "released, law 3 takes its place"),
]  # fmt: skip
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


@pytest.mark.parametrize(("field", "value", "error", "message"), BAD_UNITS)
def test_field_of_units_that_is_refused(
    field: str, value: Any, error: type[Exception], message: str
) -> None:
    fields = {**UNITS, "laps": 64 if value == 4096 else 3, field: value}
    for make in (lambda: rpg.Generator(**fields), lambda: parse_generator(json.dumps(fields))):
        with pytest.raises(error, match=f"^{field}: {re.escape(message)}"):
            make()


def test_law_laps_and_window_must_agree() -> None:
    for change, message in (
        ({"law": 1}, "laps: got 3, wanted None with law 1"),
        ({"law": 1, "laps": None}, "window: got 256, wanted None without laps"),
        ({"law": None, "laps": None}, "window: got 256, wanted None without laps"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            rpg.Generator(**{**UNITS, "window": 256, **change})
    with pytest.raises(ValueError, match="law: got None, wanted one of 1, 3"):
        rpg.Generator.from_json(json.dumps({**UNITS, "law": None}))
    for name in ("window", "laps"):
        record = {key: value for key, value in UNITS.items() if key != name}
        with pytest.raises(ValueError, match=f"Generator of law 3: .*wanted at least .*{name}"):
            rpg.Generator.from_json(json.dumps(record))


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
    for text in (
        '{"slots":4,"granularity":8,"reflect":"none","law":7}',
        '{"slots":4,"granularity":8,"reflect":"none","tilt":1,"law":7}',  # fields of its own
        '{"law":7}',
    ):
        for read in (rpg.Generator.from_json, parse_generator):
            with pytest.raises(ValueError, match="law: got 7, wanted one of 1, 3, the laws"):
                read(text)


CONFIG: list[tuple[str, Any, type[Exception]]] = [
    *(("dof", value, ValueError) for value in (0, -1, 2**62 + 1)),
    *(("dof", value, TypeError) for value in (True, 1.5, "9", None)),
    *(("granularity", value, ValueError) for value in (0, 3, 129, 256)),
    *(("granularity", value, TypeError) for value in (False, 8.0, None)),
    *(("reflect", value, ValueError) for value in ("elements", None, 0)),
    *(("permute", value, TypeError) for value in (0, "yes", None)),
    *(("window", value, ValueError) for value in (0, 64, "all")),  # without laps
    *(("laps", value, ValueError) for value in (0, 65)),
    *(("laps", value, TypeError) for value in ("4", 4.0, True)),
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


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"window": 64}, ValueError, "window: got 64, wanted None without laps"),
        ({"window": 12, "laps": 2}, ValueError, "window: got 12, wanted a multiple of 8 from 8"),
        ({"window": 64, "laps": 0}, ValueError, "laps: got 0, wanted an int from 1 to 64"),
        ({"laps": 65}, ValueError, "laps: got 65, wanted an int from 1 to 64"),
        ({"laps": 4.0}, TypeError, "laps: got 4.0"),
        ({"laps": 4, "window": 64.0}, TypeError, "window: got 64.0"),
        ({"laps": 64, "window": 4096}, ValueError, "window: got 4096, wanted at most 128 slots"),
    ],
)
def test_laps_and_windows_that_are_refused(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    for make in (rpg.RPGConfig, rpg.ParameterBank):
        with pytest.raises(error, match=f"^{message}"):
            make(**{"dof": 6400, "granularity": 64, **fields})
