"""Banks whose slots are read several times close together (law 3), and banks of any generator."""

from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import brute_force as brute
import pytest
import torch
import torch.nn.functional as F

import rpg_kernels as rpg
from rpg_kernels import functional, native
from rpg_kernels.bank.bank_map import BankMap
from rpg_kernels.law.explicit import explicit_map
from rpg_kernels.law.placement import Placement, parse
from rpg_kernels.law.ring import LayerLaw
from rpg_kernels.law.unit import UnitLaw

REFLECT = ("element", "vector", "none")


@pytest.fixture(params=["C++", "PyTorch"], autouse=True)
def half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the native module, if there is one, and without."""
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "_enabled", False)
    elif not native.available():
        pytest.skip(native.why_not())


def bank_of(slots: int = 200, granularity: int = 8, **options: Any) -> rpg.ParameterBank:
    options = {"laps": 2, "seed": 3, **options}
    return brute.bank_of(slots * granularity, granularity=granularity, **options)


def numbered_map(weight: rpg.VirtualWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """(bank element, sign) of each virtual weight, read off an unpacked weight."""
    bank = weight.bank
    kept = bank.weight.detach().clone()
    assert bank.weight.dtype == torch.float64
    with torch.no_grad():
        # 1, 2, 3 ..., so that a weight tells what it reads.
        bank.weight.copy_(torch.arange(1.0, bank.dof + 1).view(bank.weight.shape))
        read = (weight.unpack() / weight.scale).round().long()
        bank.weight.copy_(kept)
    return read.abs() - 1, read.sign()


def test_laps_make_law_3_and_nothing_else_does() -> None:
    for options, wanted in (
        ({"laps": 7}, (None, 7, 3)),
        ({"laps": 4, "window": 64}, (64, 4, 3)),
        ({}, (None, None, 1)),
    ):
        g = rpg.ParameterBank(6400, **options).generator
        assert isinstance(g, rpg.Generator)
        assert (g.window, g.laps, g.law) == wanted
        assert rpg.RPGConfig(6400, **options).generator == g


def test_layers_follow_each_other_and_never_wrap() -> None:
    laps = 3
    bank = bank_of(slots=70, granularity=64, laps=laps)
    end = 0
    for number, shape in enumerate([*brute.MATRICES, *brute.KERNELS, (5000, 70), (64, 64)]):
        p = bank.place(shape).placement
        block, blocks, _ = brute.row_layout(shape, 64)
        while end % (8 * block * laps):  # an octet of slots is read first
            end += 1
        assert (p.layer, p.start) == (number, end)
        rows = shape[0]
        while rows % 8:
            rows += 1
        assert p.span == rows * blocks * block
        end += p.span
    assert end > 20 * bank.dof


@pytest.mark.parametrize("granularity", [1, 8, 64, 128])
@pytest.mark.parametrize("reflect", REFLECT)
def test_the_law_of_a_placement(granularity: int, reflect: str) -> None:
    """Its numbers, in blocks of the layer, and what is read by it."""
    bank = bank_of(granularity=granularity, reflect=reflect, laps=3)
    for shape in [*brute.MATRICES, *brute.KERNELS]:
        weight = bank.place(shape)
        law, _ = brute.layer_law(weight.placement)
        assert type(law) is UnitLaw
        assert weight.placement.law == law
        index, sign = numbered_map(weight)
        wanted = brute.index_and_sign(weight)
        assert torch.equal(index, wanted[0])
        assert torch.equal(sign, wanted[1].long())
        explicit = explicit_map(weight.placement)
        assert torch.equal(index, explicit[0])
        assert torch.equal(sign, explicit[1].long())


@pytest.mark.parametrize("seed", range(12))
def test_unpack_and_pack_of_selections(seed: int) -> None:
    rng = random.Random(seed)
    slots, granularity, laps = rng.choice([64, 65, 200]), 1 << seed % 8, rng.choice([1, 2, 3, 16])
    bank = rpg.ParameterBank(
        slots * granularity, granularity, REFLECT[seed % 3], seed % 5 != 0, laps=laps, seed=seed,
        window=rng.choice([None, 8, 64]), init_std=1.0, dtype=torch.float64,
    )  # fmt: skip
    for shape in (rng.choice(brute.MATRICES), rng.choice(brute.KERNELS), (210, 37), (4100, 2)):
        bank.place((3, rng.randrange(1, 300)))
        weight = bank.place(shape, scale=rng.uniform(0.2, 2))
        assert type(weight.placement.law) is UnitLaw
        parts = [weight]
        if min(shape[:2]) > 2:
            low = rng.randrange(shape[0] - 1)
            parts.append(weight.narrow(0, low, rng.randrange(1, shape[0] - low)))
            parts.append(parts[-1].narrow(1, 1, shape[1] - 2))
        for part in parts:
            elements = brute.ring(bank)
            brute.assert_exact(part.unpack(), brute.unpack(part, elements), f"unpack {shape}")
            dense = torch.randn(part.shape, dtype=torch.float64)
            brute.assert_exact(part.pack(dense), brute.pack(part, dense), f"pack {shape}")
            assert parse(part.spec) == part.placement


@pytest.mark.parametrize("dtype", brute.ALL)
@pytest.mark.parametrize("reflect", REFLECT)
def test_operators_and_their_gradients(reflect: str, dtype: torch.dtype) -> None:
    """Within little scratch, so that tiles are parts of rows, against a dense weight."""
    torch.manual_seed(0)
    bank = bank_of(granularity=16, reflect=reflect, dtype=dtype)
    bank.place((7, 30))
    matrix, kernel = bank.place((70, 150), scale=0.5), bank.place((12, 8, 3, 3), scale=0.7)
    index = torch.tensor([0, 69, 5, 5])
    cases = [
        (matrix, (5, 150), lambda x, w: functional.linear(x, w), F.linear),
        (kernel, (2, 8, 5, 4), lambda x, w: functional.conv2d(x, w), F.conv2d),
        (matrix, None, lambda x, w: functional.embedding(index, w), lambda x, w: w[index]),
    ]
    with rpg.scratch_limit(1 << 15):
        for weight, shape, ours, torchs in cases:
            ring = brute.ring(bank)
            x = torch.randn(shape or (1,)).to(dtype).requires_grad_(shape is not None)
            exact = torchs(x.double(), brute.unpack(weight, ring))
            dense = brute.unpack(weight, ring).detach().to(dtype).requires_grad_()
            same = torchs(x, dense)
            got = ours(x, weight)
            dy = torch.randn(got.shape).to(dtype)
            brute.assert_accurate(got, exact.detach(), same.detach(), "forward")
            (wanted,) = torch.autograd.grad(exact, ring, dy.double())
            (same,) = torch.autograd.grad(same, dense, dy)
            flat = brute.pack(weight, same.double()).view(-1)
            (found,) = torch.autograd.grad(got, bank.weight, dy)
            brute.assert_accurate(found.view(-1), wanted, flat.to(dtype), "bank gradient")


def test_the_gradient_in_float64() -> None:
    torch.manual_seed(0)
    bank = bank_of(slots=64, granularity=2, laps=3)
    weight = bank.place((9, 20))
    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    values = bank.weight
    assert torch.autograd.gradcheck(lambda x, _: functional.linear(x, weight), (x, values))


@pytest.mark.parametrize("laps", [1, 3, 4])
def test_elements_are_used_evenly(laps: int) -> None:
    """Every octet of slots is read as often as there are laps, then the next."""
    bank = bank_of(slots=128, granularity=16, laps=laps)
    uses: Counter[int] = Counter()
    shapes = [(64, 48), (128, 48), (64, 48, 3, 3), (4096, 48), (192, 48)]
    for shape in shapes:
        index, _ = numbered_map(bank.place(shape))
        uses.update(index.flatten().tolist())
    counts = [uses[i] for i in range(bank.dof)]
    assert max(counts) - min(counts) <= laps
    last = bank.map.placements[-1]
    assert sum(counts) == last.start + last.span  # nothing was skipped or padded


def test_taps_are_chosen_and_asked_for() -> None:
    bank = bank_of(granularity=16, laps=4)
    chosen = {(16, 16, 3, 3): 3, (16, 16, 2, 2): 4, (16, 16, 5, 5): 1, (16, 16, 1, 1): 1}
    for shape, taps in chosen.items():
        assert bank.place(shape).placement.taps == taps
    assert bank.place((16, 16)).placement.taps == 1
    weight = bank.place((16, 16, 3, 3), taps=1)
    assert weight.placement.taps == 1
    assert parse(weight.spec) == weight.placement
    assert bank.placed(weight.placement) is weight
    brute.assert_exact(weight.unpack(), brute.unpack(weight, brute.ring(bank)))


@pytest.mark.parametrize(
    ("shape", "taps", "message"),
    [
        ((8, 16, 3, 3), 2, "taps: got 2, wanted a divisor of the layer's 9"),
        ((8, 16, 3, 3), 9, "taps: got 9, wanted an int from 1 to 4"),
        ((8, 16, 3, 3), 0, "taps: got 0, wanted an int from 1 to 4"),
        ((8, 16), 3, "taps: got 3, wanted an int from 1 to 1"),
        ((4, 3, 3, 3), 3, "taps: got 3, wanted an int from 1 to 1"),  # taps packed into one run
    ],
)
def test_taps_that_are_refused(shape: tuple[int, ...], taps: int, message: str) -> None:
    bank = bank_of(granularity=16, laps=4)
    bank.place((3, 8))
    with pytest.raises(ValueError, match=f"^{message}"):
        bank.place(shape, taps=taps)
    following = bank.place((3, 8)).placement
    step = 8 * 8 * 4  # an octet of blocks of 8 elements, with all its uses
    assert (following.layer, following.start) == (1, step)


def test_taps_of_a_bank_without_units_are_refused() -> None:
    for bank in (
        brute.bank_of(640),
        brute.table_bank(100, 999),
    ):
        with pytest.raises(ValueError, match=r"^taps: got 1, wanted None where there are no units"):
            bank.place((8, 4, 3, 3), taps=1)
        assert bank.place((8, 4, 3, 3)).placement.taps is None


def test_far_rows_of_bands() -> None:
    bank = bank_of(granularity=4, laps=7)
    weight = bank.place((2**33, 12), scale=1.0)
    law = weight.placement.law
    assert law.rows_per_band < 2**33
    band = law.rows_per_band
    values = bank.weight.detach()
    for first in (0, band - 2, 8 * band - 1, 2**33 - 3):
        n, b = torch.arange(first, first + 3)[:, None], torch.arange(3)
        wanted = values[law.slot(n, b)] * (1 - 2 * law.negative(n, b).double())
        got = weight.narrow(0, first, 3).unpack()
        assert torch.equal(got, wanted.reshape(3, 12))
        assert torch.equal(weight.narrow(0, first, 3).narrow(1, 5, 6).unpack(), got[:, 5:11])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": -96}, "start: got -96, wanted an int from 0 to 4611686018427387904"),
        ({"start": 2**62 + 96}, "start: got 4611686018427388000, wanted an int from 0"),
        ({"start": 64}, "start: got 64, wanted a multiple of 96 elements"),
        ({"start": 96 * 2**55, "shape": (2**61, 4)}, r"shape: got .* from address .*below 2\^63"),
    ],
)
def test_starts_that_are_refused(change: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"start": 0, "shape": (100, 8)} | change
    generator = rpg.Generator(200, 4, "vector", laps=3)
    with pytest.raises(ValueError, match=f"^{message}"):
        Placement(generator, 0, scale=1.0, **fields)


def test_a_bank_that_is_full() -> None:
    bank = bank_of(granularity=4)
    bank.place((2**60, 4))
    with pytest.raises(ValueError, match=r"^shape: got .* from address 4611686018427387904"):
        bank.place((2**60, 4))
    bank.place((2**58, 4))
    with pytest.raises(ValueError, match=r"^start: got 5764607523034234880, wanted an int from 0"):
        bank.place((1, 4))


def test_copies_states_and_devices() -> None:
    bank = bank_of()
    weight = bank.place((100, 37), scale=0.5)
    bank.place((8, 16, 3, 3), taps=1)
    twin = copy.deepcopy(bank)
    assert twin.place((3, 8)).placement == bank.place((3, 8)).placement
    other = bank_of()
    for p in bank.map.placements:
        other.place(p.shape, scale=2.0, taps=p.taps)
    other.load_state_dict(bank.state_dict())
    mine = other.placed(weight.placement)
    assert mine is not None
    assert mine.scale == 0.5
    assert torch.equal(mine.unpack(), weight.unpack())
    assert rpg.VirtualWeight.from_json(other, weight.to_json()).narrow(0, 3, 5).shape == (5, 37)
    bank.to("meta")
    assert weight.unpack().is_meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"laps": 3}, "laps: got 3, wanted 2"),
        ({"window": 128}, "window: got 128, wanted None"),
        ({"laps": None}, "law: got 1, wanted 3"),
    ],
)
def test_a_state_of_other_laps_is_refused(change: dict[str, Any], message: str) -> None:
    bank, other = bank_of(), bank_of(**change)
    for each in (bank, other):
        each.place((64, 16))
    with pytest.raises(RuntimeError, match=message):
        bank.load_state_dict(other.state_dict())
    if change == {"laps": None}:
        with pytest.raises(RuntimeError, match="law: got 3, wanted 1"):
            other.load_state_dict(bank.state_dict())


def test_a_state_of_other_taps_is_refused() -> None:
    alone, shared = bank_of(laps=3), bank_of(laps=3)
    alone.place((8, 16, 3, 3), taps=1)
    shared.place((8, 16, 3, 3))
    with pytest.raises(RuntimeError, match="taps of layer 0: got 1, wanted 3"):
        shared.load_state_dict(alone.state_dict())


def test_a_record_of_a_bank() -> None:
    """What a checkpoint holds is enough to make the bank again, taps included."""
    bank = bank_of(laps=3, window=16)
    bank.place((8, 16, 3, 3), taps=1, scale=0.25)
    bank.place((8, 16, 3, 3))
    record = bank.map.record()
    assert [p["taps"] for p in record["placements"]] == [1, 3]
    read = BankMap.from_record(record)
    assert read == bank.map == BankMap.from_tensor(bank.map.to_tensor())
    assert isinstance(read.generator, rpg.Generator)
    again = rpg.ParameterBank.from_generator(read.generator, dtype=torch.float64)
    for p in read.placements:
        again.place(p.shape, scale=p.scale, taps=p.taps)
    assert again.map == bank.map
    again.load_state_dict(bank.state_dict())
    for mine, theirs in zip(again.map.placements, bank.map.placements, strict=True):
        made = [rpg.VirtualWeight(b, p).unpack() for b, p in ((again, mine), (bank, theirs))]
        assert torch.equal(*made)


@pytest.mark.parametrize("taps", [None, 0, 2, 4, 65, 1.0, True, "1", [1]])
def test_a_record_with_bad_taps_is_refused(taps: Any) -> None:
    bank = bank_of(laps=3)
    bank.place((8, 16, 3, 3))
    record = bank.map.record()
    record["placements"][0]["taps"] = taps
    with pytest.raises(ValueError, match=r"^a map that cannot be read \(taps: got "):
        BankMap.from_record(record)
    del record["placements"][0]["taps"]
    with pytest.raises(ValueError, match="wanted a record of start, shape, scale, taps"):
        BankMap.from_record(record)


@pytest.mark.parametrize(
    "generator",
    [
        rpg.Generator(100, 8, "none", permute=False, seed=9),
        rpg.Generator(100, 8, "element", window=64, laps=5, seed=2),
    ],
    ids=lambda g: f"law {g.law}",
)
def test_a_bank_of_a_generator(generator: rpg.Generator) -> None:
    made = rpg.ParameterBank.from_generator(
        generator, init_std=0.5, dtype=torch.bfloat16, device="meta"
    )
    assert made.generator is generator
    assert (made.dof, made.slots, made.granularity, made.init_std) == (800, 100, 8, 0.5)
    assert (made.weight.device.type, made.weight.dtype) == ("meta", torch.bfloat16)
    kinds = {1: LayerLaw, 3: UnitLaw}
    assert type(made.place((64, 16)).placement.law) is kinds[generator.law or 0]
    torch.manual_seed(1)
    bank = rpg.ParameterBank.from_generator(generator)
    torch.manual_seed(1)
    fields = {name: getattr(generator, name) for name in ("reflect", "permute", "seed")}
    same = rpg.ParameterBank(800, 8, window=generator.window, laps=generator.laps, **fields)
    assert same.generator == generator
    assert torch.equal(same.weight, bank.weight)
    assert repr(same) == repr(bank)
    assert float(bank.weight.detach().std()) == pytest.approx(bank.init_std, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"generator": 3}, TypeError, "generator: got a int, wanted a Generator"),
        (
            {"generator": rpg.TableGenerator(4, 4, "0" * 64)},
            TypeError,
            "generator: got a TableGenerator, wanted a Generator",
        ),
        ({"init_std": 0.0}, ValueError, "init_std: got 0.0, wanted a number above 0"),
        ({"dtype": torch.int8}, ValueError, "dtype: got torch.int8, wanted "),
    ],
)
def test_a_generator_that_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"generator": rpg.Generator(100, 8, "none"), **arguments}
    with pytest.raises(error, match=f"^{message}"):
        rpg.ParameterBank.from_generator(arguments.pop("generator"), **arguments)


def test_law_1_is_what_it_was() -> None:
    """Addresses of law 1 still wrap, and its laws are not units."""
    bank = brute.bank_of(640, granularity=64)
    starts = [bank.place((7, 64)).placement.start for _ in range(3)]
    assert starts == [0, 448, 256]
    assert type(bank.map.placements[0].law) is LayerLaw
    spec = bank.place((2, 2)).spec
    assert "laps" not in spec
    assert "taps" not in spec
