"""ParameterBank: sizes, segments of the ring, even sampling, tables, and life as a module."""

from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import brute_force as brute
import pytest
import torch

import rpg_kernels as rpg
from rpg_kernels.bank.config import PAPER_INIT_STD

CONFIGURATIONS = [(1, "element"), (8, "vector"), (64, "vector"), (128, "none")]


def reads(bank: rpg.ParameterBank, shapes: list[tuple[int, ...]]) -> tuple[list[int], int]:
    """(how often each element of the bank is read, padding counted; alignment skips)."""
    uses: Counter[int] = Counter()
    skips = end = 0
    for shape in shapes:
        placement = bank.place(shape).placement
        law, _ = brute.layer_law(placement)
        skips += placement.start != end % bank.dof
        end = placement.start + law.rows * law.blocks * law.granularity
        slots = law.slot(torch.arange(law.rows)[:, None], torch.arange(law.blocks))
        for slot in slots.flatten().tolist():
            first = slot * law.granularity
            uses.update(range(first, first + law.granularity))
    return [uses[i] for i in range(bank.dof)], skips


def random_shapes(rng: random.Random, count: int) -> list[tuple[int, ...]]:
    return [rng.choice(brute.MATRICES + brute.KERNELS) for _ in range(count)]


@pytest.mark.parametrize(("granularity", "reflect"), CONFIGURATIONS)
@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_even_sampling_with_mixed_granularities(
    seed: int, permute: bool, granularity: int, reflect: str
) -> None:
    rng = random.Random(seed)
    dof = rng.choice([granularity, 257, 640, 1009, 3000])
    bank = brute.bank_of(
        max(dof, granularity),
        granularity=granularity,
        reflect=reflect,
        permute=permute,
        seed=seed,
    )
    uses, skips = reads(bank, random_shapes(rng, 8))
    assert max(uses) - min(uses) <= 1 + skips
    if granularity == 1:
        assert skips == 0


@pytest.mark.parametrize("granularity", [1, 4, 16, 64, 128])
@pytest.mark.parametrize("seed", range(3))
def test_slots_are_used_evenly_when_all_layers_have_one_granularity(
    seed: int, granularity: int
) -> None:
    rng = random.Random(seed)
    bank = brute.bank_of(granularity * rng.randrange(1, 60), granularity=granularity, seed=seed)
    shapes: list[tuple[int, ...]] = [
        (rng.randrange(1, 30), granularity * rng.randrange(1, 4)) for _ in range(6)
    ]
    shapes.append((3, granularity, 3, 3))
    uses, skips = reads(bank, shapes)
    assert skips == 0
    assert max(uses) - min(uses) <= 1


@pytest.mark.parametrize(("granularity", "reflect"), CONFIGURATIONS)
def test_bank_larger_than_the_model_uses_each_element_at_most_once(
    granularity: int, reflect: str
) -> None:
    bank = brute.bank_of(20_000, granularity=granularity, reflect=reflect)
    uses, _ = reads(bank, [(20, 128), (4, 8, 3, 3), (64, 48), (5, 1, 3, 3), (7, 128)])
    assert max(uses) == 1


def test_segments_follow_each_other_and_wrap_around() -> None:
    bank = rpg.ParameterBank(640, granularity=64)
    ring = end = 0
    for number, shape in enumerate([(3, 64), (5, 2), (7, 64), (2, 9), (40, 64), (3, 3, 3, 3)]):
        p = bank.place(shape).placement
        block, blocks, _ = brute.row_layout(shape, 64)
        end = -(-end // block) * block  # in elements, rounded up to the layer's own block
        assert (p.layer, p.start) == (number, end % 640)
        end += shape[0] * blocks * block
        ring += end >= 640
        end %= 640
    assert ring
    assert bank.layers == 6


@pytest.mark.parametrize(
    ("dof", "granularity", "slots", "used"),
    [(1000, 64, 15, 64), (64, 64, 1, 64), (63, 64, 1, 32), (5, 128, 1, 4), (1, 64, 1, 1)],
)
def test_dof_is_rounded_down_to_whole_slots_and_said(
    dof: int, granularity: int, slots: int, used: int
) -> None:
    bank = rpg.ParameterBank(dof, granularity=granularity)
    assert (bank.slots, bank.granularity, bank.dof) == (slots, used, slots * used)
    assert bank.weight.shape == (slots, used)
    assert f"dof={bank.dof}" in repr(bank)
    assert ("asked for" in repr(bank)) == (dof != bank.dof)
    bank.place((3, 50)).unpack()


def test_initial_values() -> None:
    torch.manual_seed(0)
    bank = rpg.ParameterBank(100_000)
    assert abs(float(bank.weight.std()) / PAPER_INIT_STD - 1) < 0.02
    assert abs(float(bank.weight.mean())) < PAPER_INIT_STD / 50
    before = bank.weight.detach().clone()
    bank.reset_parameters()
    assert not torch.equal(bank.weight, before)
    torch.manual_seed(0)
    assert torch.equal(rpg.ParameterBank(100_000, seed=5).weight, before)  # seed is of G only
    wide = rpg.ParameterBank(100_000, init_std=3.0)
    assert abs(float(wide.weight.std()) / 3 - 1) < 0.02


def test_seed_changes_the_map() -> None:
    maps = []
    for seed in (0, 1, 2**63 - 1):
        weight = rpg.ParameterBank(640, granularity=16, seed=seed).place((20, 32))
        maps.append(brute.index_and_sign(weight)[0])
    assert not torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])


def test_layers_of_one_shape_have_maps_of_their_own() -> None:
    bank = rpg.ParameterBank(640, granularity=16)
    first, second = bank.place((20, 32)), bank.place((20, 32))  # 640 each: the same segment
    assert first.placement.start == second.placement.start
    assert not torch.equal(first.unpack(), second.unpack())


def test_dtype_device_and_default_dtype() -> None:
    for dtype in brute.ALL:
        assert rpg.ParameterBank(64, dtype=dtype).weight.dtype == dtype
    torch.set_default_dtype(torch.float64)
    try:
        assert rpg.ParameterBank(64).weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    meta = rpg.ParameterBank(2**31, device="meta")
    assert meta.weight.is_meta
    with torch.device("meta"):
        assert rpg.ParameterBank(64).weight.is_meta
    weight = meta.place((100_000, 4096))
    assert weight.unpack().shape == (100_000, 4096)


def test_moves_and_casts_reach_placed_weights() -> None:
    bank = rpg.ParameterBank(640, granularity=16)
    weight = bank.place((20, 32))
    values = weight.unpack().detach()
    bank.double()
    assert weight.dtype == torch.float64
    assert torch.equal(weight.unpack(), values.double())
    bank.to("meta")
    assert weight.device.type == "meta"
    assert weight.unpack().is_meta


def test_state_dict_has_values_and_map() -> None:
    bank = rpg.ParameterBank(640, granularity=16)
    assert list(bank.state_dict()) == ["weight", "map_digits"]
    other = rpg.ParameterBank(640, granularity=16)
    other.load_state_dict(bank.state_dict())
    a, b = bank.place((9, 32)), other.place((9, 32))
    assert torch.equal(a.unpack(), b.unpack())
    table = brute.table_bank(10, 20)
    assert set(table.state_dict()) == {"weight", "table", "map_digits"}


def test_deepcopy_has_values_of_its_own_and_goes_on_placing() -> None:
    bank = rpg.ParameterBank(640, granularity=16)
    bank.place((9, 32))
    twin = copy.deepcopy(bank)
    assert twin.place((3, 32)).placement == bank.place((3, 32)).placement
    with torch.no_grad():
        twin.weight.zero_()
    assert bank.weight.abs().sum() > 0


def test_is_the_identity_among_the_modules_of_a_sequential() -> None:
    bank = rpg.ParameterBank(64)
    x = torch.randn(3)
    assert torch.nn.Sequential(bank)(x) is x


def test_table_bank() -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    table = torch.tensor([2, 0, 1 - 2**31, 2 - 2**31, 1, 1], dtype=torch.int32)
    bank = rpg.ParameterBank.from_table(values, table)
    assert (bank.dof, bank.granularity, bank.slots) == (3, 1, 3)
    assert bank.weight.shape == (3, 1)
    assert bank.place((2, 2), scale=10.0).unpack().tolist() == [[30.0, 10.0], [-20.0, -30.0]]
    assert bank.place((1, 2)).unpack().tolist() == [[2.0, 2.0]]
    with pytest.raises(ValueError, match="start: got 6"):
        bank.place((1, 1))
    values.zero_()
    assert bank.weight.flatten().tolist() == [1.0, 2.0, 3.0]  # copied


def test_table_digest_tells_tables_apart() -> None:
    values = torch.randn(4)
    tables = [torch.tensor(t, dtype=torch.int32) for t in ([0, 1, 2], [0, 1, 3], [0, 1, 2])]
    digests = [rpg.ParameterBank.from_table(values, t).generator.sha256 for t in tables]  # type: ignore[union-attr]
    assert digests[0] != digests[1]
    assert digests[0] == digests[2]


BAD: list[tuple[str, Any, type[Exception]]] = [
    ("dof", 0, ValueError),
    ("dof", -5, ValueError),
    ("dof", 2**62 + 1, ValueError),
    ("dof", True, TypeError),
    ("dof", 100.0, TypeError),
    ("dof", "100", TypeError),
    ("dof", None, TypeError),
    ("granularity", 0, ValueError),
    ("granularity", 48, ValueError),
    ("granularity", 256, ValueError),
    ("granularity", 1.0, TypeError),
    ("granularity", True, TypeError),
    ("reflect", "vectr", ValueError),
    ("reflect", None, ValueError),
    ("permute", 0, TypeError),
    ("window", 256, ValueError),
    ("seed", -1, ValueError),
    ("seed", 2**63, ValueError),
    ("seed", 0.0, TypeError),
    ("init_std", 0.0, ValueError),
    ("init_std", -1.0, ValueError),
    ("init_std", float("nan"), ValueError),
    ("init_std", float("inf"), ValueError),
    ("init_std", "1", TypeError),
    ("init_std", True, TypeError),
    ("dtype", torch.int32, ValueError),
    ("dtype", torch.complex64, ValueError),
    ("dtype", torch.float8_e4m3fn, ValueError),
    ("dtype", "float32", ValueError),
]


@pytest.mark.parametrize(("argument", "value", "error"), BAD)
def test_argument_that_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{argument}: got .*, wanted "):
        rpg.ParameterBank(**{"dof": 640, argument: value})


def test_more_slots_than_the_law_can_number() -> None:
    with pytest.raises(ValueError, match="slots: got 2147483648, wanted an int from 1"):
        rpg.ParameterBank(2**31, granularity=1, device="meta")


BAD_PLACES: list[tuple[Any, Any, str, type[Exception]]] = [
    ((), 1.0, "shape", ValueError),
    ((5,), 1.0, "shape", ValueError),
    ((5, 0), 1.0, "shape", ValueError),
    ((5, -1), 1.0, "shape", ValueError),
    ((5, True), 1.0, "shape", TypeError),
    ((5, 2.0), 1.0, "shape", TypeError),
    (5, 1.0, "shape", TypeError),
    (None, 1.0, "shape", TypeError),
    ("55", 1.0, "shape", TypeError),
    ((5, 5), 0.0, "scale", ValueError),
    ((5, 5), float("nan"), "scale", ValueError),
    ((5, 5), float("inf"), "scale", ValueError),
    ((5, 5), 10**400, "scale", ValueError),
    ((5, 5), True, "scale", TypeError),
    ((5, 5), "1", "scale", TypeError),
    ((5, 5), None, "scale", TypeError),
]


@pytest.mark.parametrize(("shape", "scale", "argument", "error"), BAD_PLACES)
def test_place_that_is_refused_changes_nothing(
    shape: Any, scale: Any, argument: str, error: type[Exception]
) -> None:
    for bank in (rpg.ParameterBank(640), brute.table_bank(50, 100)):
        bank.place((3, 7))
        with pytest.raises(error, match=rf"^{argument}: got .*, wanted "):
            bank.place(shape, scale=scale)
        assert bank.layers == 1
        following = bank.place((2, 3)).placement
        assert (following.layer, following.start) == (1, 24 if bank.table is None else 21)


def bad_tables() -> list[tuple[str, Any, Any]]:
    values, table = torch.randn(4), torch.zeros(6, dtype=torch.int32)
    return [
        ("weight", values.view(2, 2), table),
        ("weight", values[:0], table),
        ("weight", values.int(), table),
        ("weight", values.to(torch.float8_e4m3fn), table),
        ("table", values, table.view(2, 3)),
        ("table", values, table[:0]),
        ("table", values, table.long()),
        ("table", values, table.float()),
        ("table", values, table.to("meta")),
        ("table", values, table + 4),
        ("table", values, table + 4 - 2**31),
    ]


@pytest.mark.parametrize(("argument", "weight", "table"), bad_tables())
def test_table_that_is_refused(argument: str, weight: Any, table: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: got .*, wanted "):
        rpg.ParameterBank.from_table(weight, table)


def test_table_of_the_wrong_type() -> None:
    with pytest.raises((TypeError, ValueError), match=r"^weight: got .*, wanted "):
        rpg.ParameterBank.from_table([1.0], torch.zeros(1, dtype=torch.int32))  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match=r"^table: got .*, wanted "):
        rpg.ParameterBank.from_table(torch.ones(1), [0])  # type: ignore[arg-type]
