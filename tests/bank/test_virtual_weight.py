"""VirtualWeight: parts of weights, JSON, and what it says of itself."""

from __future__ import annotations

import copy
import json
import pickle
import random
from typing import Any

import brute_force as brute
import pytest
import torch

import rpg_kernels as rpg
from rpg_kernels.functional import conv2d, linear

F64 = torch.float64


def random_part(rng: random.Random, size: int) -> tuple[int, int]:
    start = rng.randrange(size)
    return start, rng.randrange(1, size - start + 1)


@pytest.mark.parametrize("shape", [*brute.MATRICES, *brute.KERNELS], ids=str)
@pytest.mark.parametrize("granularity", [1, 8, 64])
def test_narrow_is_that_part_of_the_whole(shape: tuple[int, ...], granularity: int) -> None:
    rng = random.Random(f"{shape} {granularity}")
    bank = brute.bank_of(777, granularity=granularity, reflect="element")
    bank.place((1, 5))
    weight = bank.place(shape, scale=-1.5)
    whole = brute.unpack(weight, brute.ring(bank).detach())
    for _ in range(4):
        part, wanted = weight, whole
        for dim in rng.choices((0, 1), k=rng.randrange(1, 4)):  # parts of parts
            start, length = random_part(rng, part.shape[dim])
            part, wanted = part.narrow(dim, start, length), wanted.narrow(dim, start, length)
        assert part.shape == wanted.shape
        assert part.numel() == wanted.numel()
        assert torch.equal(part.unpack(), wanted)
        dense = torch.randn(part.shape, dtype=F64)
        padded = torch.zeros(shape, dtype=F64)
        (row, rows), (column, columns) = part.placement.selection
        padded[row : row + rows, column : column + columns] = dense
        brute.assert_exact(part.pack(dense), brute.pack(weight, padded))


@pytest.mark.parametrize("offset", [1, 8, 15, 16, 17, 31])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
def test_columns_at_every_alignment(offset: int, length: int) -> None:
    weight = brute.bank_of(500, granularity=16).place((5, 64)).narrow(1, offset, length)
    kernel = brute.bank_of(500, granularity=16).place((3, 64, 2, 2)).narrow(1, offset, length)
    for part in (weight, kernel):
        ring = brute.ring(part.bank).detach()
        assert torch.equal(part.unpack(), brute.unpack(part, ring))
        dense = torch.randn(part.shape, dtype=F64)
        brute.assert_exact(part.pack(dense), brute.pack(part, dense))


def test_rows_and_columns_of_a_linear_add_up_to_the_whole() -> None:
    weight = brute.bank_of(600, granularity=32).place((21, 75), scale=0.4)
    x = torch.randn(4, 75, dtype=F64)
    whole = linear(x, weight)
    rows = [linear(x, weight.narrow(0, start, 7)) for start in (0, 7, 14)]
    brute.assert_exact(torch.cat(rows, -1), whole)
    columns = [linear(x[:, i : i + 25], weight.narrow(1, i, 25)) for i in (0, 25, 50)]
    brute.assert_exact(sum(columns, torch.zeros((), dtype=F64)), whole)
    kernel = brute.bank_of(600, granularity=32).place((4, 10, 3, 3))
    image = torch.randn(2, 10, 5, 5, dtype=F64)
    halves = [conv2d(image[:, i : i + 5], kernel.narrow(1, i, 5)) for i in (0, 5)]
    brute.assert_exact(halves[0] + halves[1], conv2d(image, kernel))


@pytest.mark.parametrize(
    ("dim", "start", "length", "error", "argument"),
    [
        (2, 0, 1, IndexError, "dim"),
        (-1, 0, 1, IndexError, "dim"),
        (None, 0, 1, IndexError, "dim"),
        (0, -1, 1, ValueError, "start"),
        (0, 4, 1, ValueError, "start"),
        (0, 1, 0, ValueError, "length"),
        (0, 1, 4, ValueError, "length"),
        (1, 3, 5, ValueError, "length"),
        (1, 0, -2, ValueError, "length"),
        (1, True, 2, TypeError, "start"),
        (1, 1.0, 2, TypeError, "start"),
        (0, 0, 2.0, TypeError, "length"),
        (0, 0, None, TypeError, "length"),
    ],
)
def test_parts_that_are_refused(
    dim: Any, start: Any, length: Any, error: type[Exception], argument: str
) -> None:
    whole = rpg.ParameterBank(640, granularity=16).place((9, 12))
    part = whole.narrow(0, 3, 4).narrow(1, 2, 7)
    with pytest.raises(error, match=rf"^{argument}: got .*, wanted "):
        part.narrow(dim, start, length)


def test_does_not_change_and_says_what_it_is() -> None:
    bank = rpg.ParameterBank(640, granularity=16)
    weight = bank.place((9, 12), scale=0.25)
    with pytest.raises(AttributeError, match="bank: a virtual weight's does not change"):
        weight.bank = bank
    assert weight.scale == 0.25
    assert weight.dtype == torch.float32
    assert weight.device.type == "cpu"
    assert weight.shape == torch.Size((9, 12))
    for word in ("(9, 12)", "layer=0", "scale=0.25", "dof=640"):
        assert word in repr(weight)
    assert "(2, 12) of (9, 12)" in repr(weight.narrow(0, 1, 2))
    assert not isinstance(weight, torch.nn.Module)


@pytest.mark.parametrize("shape", [(9, 20), (4, 3, 3, 3)])
def test_json_and_back(shape: tuple[int, ...]) -> None:
    table = brute.table_bank(50, torch.Size(shape).numel())
    for bank in (brute.bank_of(640, granularity=16, reflect="element", seed=2**60), table):
        weight = bank.place(shape, scale=0.1)
        for original in (weight, weight.narrow(0, 1, 2).narrow(1, 1, 2)):
            again = rpg.VirtualWeight.from_json(bank, original.to_json())
            assert again.placement == original.placement
            assert again.scale == original.scale
            assert torch.equal(again.unpack(), original.unpack())


def test_json_names_the_law_and_the_place() -> None:
    weight = rpg.ParameterBank(640, granularity=16, seed=5).place((9, 20), scale=0.1)
    record = json.loads(weight.narrow(0, 2, 3).to_json())
    assert record["generator"]["law"] == 1
    assert record["generator"]["seed"] == 5
    assert (record["layer"], record["start"], record["shape"]) == (0, 0, [9, 20])
    assert (record["rows"], record["columns"], record["scale"]) == ([2, 3], [0, 20], 0.1)


def changed(weight: rpg.VirtualWeight, **fields: Any) -> str:
    return json.dumps({**json.loads(weight.to_json()), **fields})


BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("generator", 3, "generator"),
    ("generator", None, "generator"),
    ("generator", {"slots": 4}, "generator"),
    (
        "generator",
        {"slots": 40, "granularity": 16, "reflect": "vector", "law": 2},
        "law",
    ),
    (
        "generator",
        {"slots": 40, "granularity": 16, "reflect": "vector", "law": 3},
        "law",
    ),
    ("layer", -1, "layer"),
    ("layer", 1.0, "layer"),
    ("layer", True, "layer"),
    ("start", -16, "start"),
    ("start", 3, "start"),
    ("start", 640, "start"),
    ("start", "0", "start"),
    ("shape", [9], "shape"),
    ("shape", [9, 0], "shape"),
    ("shape", 9, "shape"),
    ("shape", None, "shape"),
    ("shape", [9, 20.0], "shape"),
    ("scale", 0, "scale"),
    ("scale", "1", "scale"),
    ("scale", None, "scale"),
    ("scale", float("nan"), "scale"),
    ("rows", [0, 10], "rows"),
    ("rows", [9, 1], "rows"),
    ("rows", [0], "rows"),
    ("rows", 3, "rows"),
    ("columns", [0, 0], "columns"),
    ("columns", [-1, 2], "columns"),
    ("columns", [0, 1, 2], "columns"),
    ("columns", [0.0, 2], "columns"),
]


@pytest.mark.parametrize(("field", "value", "argument"), BAD_FIELDS)
def test_json_with_a_field_that_is_refused(field: str, value: Any, argument: str) -> None:
    weight = rpg.ParameterBank(640, granularity=16).place((9, 20))
    with pytest.raises((TypeError, ValueError), match=rf"{argument}.*: got .*, wanted "):
        rpg.VirtualWeight.from_json(weight.bank, changed(weight, **{field: value}))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "{}", '{"layer":0}', None, 3])
def test_json_that_is_not_a_placement(text: Any) -> None:
    bank = rpg.ParameterBank(640, granularity=16)
    with pytest.raises((TypeError, ValueError), match=r": got .*, wanted "):
        rpg.VirtualWeight.from_json(bank, text)


def test_placement_of_another_generator_is_refused() -> None:
    weight = rpg.ParameterBank(640, granularity=16).place((9, 20))
    for other in (
        rpg.ParameterBank(656, granularity=16),
        rpg.ParameterBank(640, granularity=16, seed=1),
        rpg.ParameterBank(640, granularity=16, reflect="none"),
        brute.table_bank(50, 180),
    ):
        with pytest.raises(ValueError, match=r"placement: got .*, wanted"):
            rpg.VirtualWeight(other, weight.placement)
        with pytest.raises(ValueError, match=r"placement: got .*, wanted"):
            rpg.VirtualWeight.from_json(other, weight.to_json())


def test_constructor_with_arguments_of_the_wrong_type() -> None:
    weight = rpg.ParameterBank(640, granularity=16).place((9, 20))
    with pytest.raises(TypeError, match=r"bank: got .*, wanted"):
        rpg.VirtualWeight(weight.bank.weight, weight.placement)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"placement: got .*, wanted"):
        rpg.VirtualWeight(weight.bank, weight.to_json())  # type: ignore[arg-type]


def test_deepcopy_and_pickle_keep_bank_and_weight_together() -> None:
    bank = rpg.ParameterBank(640, granularity=16)
    weight = bank.place((9, 20))
    for twin_bank, twin in (
        copy.deepcopy((bank, weight)),
        pickle.loads(pickle.dumps((bank, weight))),
    ):
        assert twin.bank is twin_bank
        assert torch.equal(twin.unpack(), weight.unpack())
        with torch.no_grad():
            twin_bank.weight.zero_()
        assert twin.unpack().eq(0).all()
    assert weight.unpack().abs().sum() > 0


def test_held_by_a_module_it_registers_nothing() -> None:
    module = torch.nn.Module()
    module.weight = rpg.ParameterBank(640, granularity=16).place((9, 20))
    assert not list(module.parameters())
    assert not module.state_dict()
