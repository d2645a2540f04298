"""Banks that are read window by window (law 2): placing, unpacking, operators, states."""

from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import brute_force as brute
import pytest
import torch
import torch.nn.functional as F
import window_brute

import rpg_kernels as rpg
from rpg_kernels import functional, native
from rpg_kernels.law import window as window_law
from rpg_kernels.law.placement import Placement, parse
from rpg_kernels.law.window import WindowLaw

REFLECT = ("element", "vector", "none")


@pytest.fixture(params=["C++", "PyTorch"], autouse=True)
def half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the native module, if there is one, and without."""
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "_enabled", False)
    elif not native.available():
        pytest.skip(native.why_not())


def bank_of(slots: int = 200, granularity: int = 8, **options: Any) -> rpg.ParameterBank:
    options = {"window": 64, "laps": 2, "seed": 3, **options}
    return brute.bank_of(slots * granularity, granularity=granularity, **options)


def numbered(bank: rpg.ParameterBank) -> rpg.ParameterBank:
    """The same bank holding 1, 2, 3 ..., so that a weight tells what it reads."""
    with torch.no_grad():
        bank.weight.copy_(torch.arange(1.0, bank.dof + 1).view(bank.weight.shape))
    return bank


def test_laps_of_a_bank_made_by_hand() -> None:
    for laps, wanted in ((None, 4), (1, 1), (7, 7)):
        g = rpg.ParameterBank(6400, window=64, laps=laps).generator
        assert isinstance(g, rpg.Generator)
        assert (g.window, g.laps, g.law) == (64, wanted, 2)
        assert f"window=64, laps={wanted}" in repr(rpg.ParameterBank(6400, window=64, laps=laps))
    g = rpg.ParameterBank(6400).generator
    assert isinstance(g, rpg.Generator)
    assert (g.window, g.laps, g.law) == (None, None, 1)


def test_layers_follow_each_other_and_never_wrap() -> None:
    bank = bank_of(slots=70, granularity=64)
    end = 0
    for number, shape in enumerate([*brute.MATRICES, *brute.KERNELS, (5000, 70), (64, 64)]):
        p = bank.place(shape).placement
        block, blocks, _ = brute.row_layout(shape, 64)
        step = 1
        while step < 64 and 2 * step <= shape[0]:
            step *= 2
        while end % (step * block):
            end += 1
        assert (p.layer, p.start) == (number, end)
        end += shape[0] * blocks * block
    assert end > 20 * bank.dof
    assert bank.map.placements[-1].start + 64 * 64 == end


@pytest.mark.parametrize("granularity", [1, 8, 64, 128])
@pytest.mark.parametrize("reflect", REFLECT)
def test_the_law_of_a_placement(granularity: int, reflect: str) -> None:
    """Its numbers, in blocks of the layer, against the second implementation."""
    bank = bank_of(granularity=granularity, reflect=reflect, laps=3)
    rng = random.Random(granularity)
    for shape in [*brute.MATRICES, *brute.KERNELS]:
        weight = bank.place(shape)
        law, _ = brute.layer_law(weight.placement)
        assert weight.placement.law == law
        assert type(weight.placement.law) is WindowLaw
        index, sign = numbered_map(weight)
        block, _, layout = brute.row_layout(shape, granularity)
        flat, flat_sign = (each.reshape(*shape[:2], -1) for each in (index, sign))
        for channel, tap in rng.sample(sorted(layout), min(8, len(layout))):
            b, e = layout[channel, tap]
            n = rng.randrange(shape[0])
            assert int(flat[n, channel, tap]) == window_brute.reads(law, n, b) * block + e
            assert bool(flat_sign[n, channel, tap] < 0) is window_brute.negative(law, n, b, e)


def numbered_map(weight: rpg.VirtualWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """(bank element, sign) of each virtual weight, read off an unpacked weight."""
    bank = weight.bank
    kept = bank.weight.detach().clone()
    values = numbered(bank).weight
    assert values.dtype == torch.float64
    read = (weight.unpack() / weight.scale).round().long()
    with torch.no_grad():
        bank.weight.copy_(kept)
    return read.abs() - 1, read.sign()


@pytest.mark.parametrize("seed", range(24))
def test_unpack_and_pack_of_selections(seed: int) -> None:
    rng = random.Random(seed)
    bank = bank_of(
        slots=rng.choice([64, 65, 200]),
        granularity=1 << seed % 8,
        reflect=REFLECT[seed % 3],
        permute=seed % 5 != 0,
        laps=rng.choice([1, 2, 3, 16]),
        seed=seed,
    )
    for shape in (rng.choice(brute.MATRICES), rng.choice(brute.KERNELS), (210, 37), (4100, 2)):
        bank.place((3, rng.randrange(1, 300)))
        weight = bank.place(shape, scale=rng.uniform(0.2, 2))
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
            again = parse(part.spec)
            assert again == part.placement
            assert again.law == part.placement.law


@pytest.mark.parametrize("dtype", brute.ALL)
@pytest.mark.parametrize("reflect", REFLECT)
def test_operators_and_their_gradients(reflect: str, dtype: torch.dtype) -> None:
    """Within little scratch, so that tiles are parts of rows, against a dense weight."""
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
    bank = bank_of(slots=64, granularity=2, laps=1)
    weight = bank.place((9, 20))
    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    values = bank.weight
    assert torch.autograd.gradcheck(lambda x, _: functional.linear(x, weight), (x, values))


@pytest.mark.parametrize("laps", [1, 4])
def test_elements_are_used_evenly(laps: int) -> None:
    """All that a window gives, ``laps`` times each, and where layers end one use more or less."""
    bank = bank_of(slots=128, granularity=16, laps=laps)
    uses: Counter[int] = Counter()
    for shape in [(64, 48), (128, 32), (64, 16, 3, 3), (4096, 16), (192, 16)]:
        index, _ = numbered_map(bank.place(shape))
        uses.update(index.flatten().tolist())
    counts = [uses[i] for i in range(bank.dof)]
    assert max(counts) - min(counts) <= laps
    assert sum(counts) == bank.map.placements[-1].start + 192 * 16


def test_far_rows_of_bands() -> None:
    bank = numbered(bank_of(granularity=4, laps=7))
    weight = bank.place((2**33, 12), scale=1.0)
    law = weight.placement.law
    assert law.rows_per_band == 2**29
    for first in (0, 2**29 - 2, 2**32 + 2**29 - 1, 2**33 - 3):
        for column, width in ((0, 12), (5, 6)):
            got = weight.narrow(0, first, 3).narrow(1, column, width).unpack()
            for row in range(3):
                for k in range(width):
                    b, e = divmod(column + k, 4)
                    wanted = window_brute.reads(law, first + row, b) * 4 + e + 1
                    negative = window_brute.negative(law, first + row, b, e)
                    assert float(got[row, k]) == (-wanted if negative else wanted)


def test_a_layer_far_along_the_line() -> None:
    generator = rpg.Generator(200, 4, "vector", window=64, laps=3)
    bank = numbered(bank_of(granularity=4, laps=3, seed=0))
    for start in (0, 2**61, 2**62 - 256, 2**62):
        placement = Placement(generator, 5, start, (100, 8), 1.0)
        weight = rpg.VirtualWeight.from_json(bank, placement.to_json())
        index, sign = numbered_map(weight)
        brute_index, brute_sign = brute.index_and_sign(weight)
        assert torch.equal(index, brute_index)
        assert torch.equal(sign, brute_sign.long())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": -256}, "start: got -256, wanted an int from 0 to 4611686018427387904"),
        ({"start": 2**62 + 256}, "start: got 4611686018427388160, wanted an int from 0"),
        ({"start": 64}, "start: got 64, wanted a multiple of 256 elements"),
        ({"start": 2**62, "shape": (2**62, 4)}, r"shape: got .* from address 4611.*below 2\^63"),
    ],
)
def test_starts_that_are_refused(change: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"start": 0, "shape": (100, 8)} | change
    generator = rpg.Generator(200, 4, "vector", window=64, laps=3)
    with pytest.raises(ValueError, match=f"^{message}"):
        Placement(generator, 0, scale=1.0, **fields)


@pytest.mark.parametrize("shape", [(5,), (5, 0), "55", (2**62, 2**10)])
def test_a_place_that_is_refused_changes_nothing(shape: Any) -> None:
    bank = bank_of(granularity=4)
    bank.place((3, 8))
    with pytest.raises((TypeError, ValueError), match=r"^shape: got .*, wanted "):
        bank.place(shape)
    assert bank.layers == 1
    following = bank.place((2, 4)).placement
    assert (following.layer, following.start) == (1, 24)


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
    twin = copy.deepcopy(bank)
    assert twin.place((3, 8)).placement == bank.place((3, 8)).placement
    other = bank_of()
    for p in bank.map.placements:
        other.place(p.shape, scale=2.0)
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
        ({"window": 128}, "window: got 128, wanted 64"),
        ({"window": None, "laps": None}, "law: got 1, wanted 2"),
    ],
)
def test_a_state_of_other_windows_is_refused(change: dict[str, Any], message: str) -> None:
    bank, other = bank_of(), bank_of(**change)
    for each in (bank, other):
        each.place((64, 16))
    with pytest.raises(RuntimeError, match=message):
        bank.load_state_dict(other.state_dict())
    if change["window" if "window" in change else "laps"] is None:
        with pytest.raises(RuntimeError, match="law: got 2, wanted 1"):
            other.load_state_dict(bank.state_dict())


def test_law_1_is_what_it_was() -> None:
    """Addresses of law 1 still wrap, and its laws are not windows."""
    bank = brute.bank_of(640, granularity=64)
    starts = [bank.place((7, 64)).placement.start for _ in range(3)]
    assert starts == [0, 448, 256]
    assert type(bank.map.placements[0].law) is not WindowLaw
    assert "laps" not in bank.place((2, 2)).spec


def test_checks_are_those_of_the_law() -> None:
    for slots, window in ((63, 64), (64, 64), (704, 1024)):
        try:
            window_law.check_window(window, 1, slots)
        except ValueError as error:
            with pytest.raises(ValueError, match=str(error)):
                rpg.ParameterBank(slots * 8, granularity=8, window=window)
        else:
            rpg.ParameterBank(slots * 8, granularity=8, window=window)
