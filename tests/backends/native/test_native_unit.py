"""The compiled unit law: slots and signs, unpack and pack, against PyTorch; what it refuses."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from test_native import DTYPES, assert_same_bits, in_pytorch, threads
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.geometry import VirtualMatrix
from rpg_kernels.law.placement import Placement, place
from rpg_kernels.law.unit import UnitLaw, alignment, span_of

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "built")

REFLECT = ("none", "vector", "element")
LONGEST = 2**14  # columns of blocks that the kernels keep in memory


def generator_of(rng: random.Random, slots: int, granularity: int, **given: Any) -> Generator:
    drawn = {
        "reflect": rng.choice(REFLECT),
        "permute": rng.random() < 0.8,
        "window": rng.choice([None, None, 8, 24, 64, 128]),
        "laps": rng.choice([1, 2, 3, 4, 9, 16, 64]),
        "seed": rng.randrange(2**63),
    }
    return Generator(slots, granularity, **{**drawn, **given})


def draw(rng: random.Random) -> Placement:
    """A layer of any shape behind others: a linear one, or a convolution by taps or not."""
    granularity = 2 ** rng.randrange(8)
    generator = generator_of(rng, rng.choice([1, 7, 8, 100, 5000]), granularity)
    rows = rng.choice([1, 5, 8, rng.randint(1, 200), rng.randint(1, 700)])
    kernel = rng.choice([(), (), (3, 3), (2, 2), (5,)])
    shape = (rows, rng.randint(1, 3 * granularity + 20), *kernel)
    return place(generator, rng.randrange(2**31), rng.randrange(2**40), shape)[0]


def positions_of(law: UnitLaw) -> tuple[Tensor, Tensor]:
    return torch.arange(law.rows)[:, None], torch.arange(law.blocks)[None]


def law_of(p: Placement) -> UnitLaw:
    assert type(p.law) is UnitLaw
    return p.law


def assert_as_in_pytorch(law: UnitLaw, n: Tensor, b: Tensor) -> None:
    assert torch.equal(native.slots(law, n, b), law.slot(n, b)), law
    assert torch.equal(native.sign_words(law, n, b), law.sign_words(n, b)), law


def test_random_layers() -> None:
    rng = random.Random(3)
    for _ in range(50):
        law = law_of(draw(rng))
        with threads(rng.randint(1, 3)):
            assert_as_in_pytorch(law, *positions_of(law))


@pytest.mark.parametrize("laps", [1, 9])
@pytest.mark.parametrize("blocks", [1, 3, 2**10 + 1, 12345, 2**20, 2**28])
def test_far_rows_in_bands(blocks: int, laps: int) -> None:
    rng = random.Random(blocks + laps)
    for rows in (2**28 // blocks * 8, 2**28 // blocks * 8 + 1, 2**31 // blocks + 100, 2**33 + 5):
        matrix = VirtualMatrix((rows, blocks), 1)
        step = alignment(1, laps)
        start = rng.choice([0, (2**62 - step) // step * step, rng.randrange(2**50) * step])
        if start + span_of(matrix) >= 2**63:
            start = 0
        slots = rng.choice([1000, 12345677, 2**31 - 1])
        generator = generator_of(rng, slots, 1, laps=laps)
        law = law_of(Placement(generator, 3, start, (rows, blocks), 1.0))
        band = law.rows_per_band
        rows_at = {0, 7, band - 1, band, 2 * band, rows // band * band, rows - 2, rows - 1}
        rows_at |= {rng.randrange(rows) for _ in range(4)}
        n = torch.tensor([n for n in sorted(rows_at) if 0 <= n < rows])
        b = torch.tensor([0, blocks - 1, *(rng.randrange(blocks) for _ in range(8))])
        assert_as_in_pytorch(law, n[:, None], b)


def test_addresses_that_end_below_two_to_the_63() -> None:
    law = UnitLaw(1, 2, 2**31 - 8, 1, 1, 2**31 - 1, 2**60 - 2**28, "vector", True, 1, None, 1, 1)
    n = torch.tensor([0, 1, 2**30, 2**31 - 9])
    assert_as_in_pytorch(law, n, torch.tensor(0))


def test_the_permutation_is_that_of_columns() -> None:
    rng = random.Random(11)
    for _ in range(20):
        law = law_of(draw(rng))
        column = torch.arange(law.columns)
        image = native.permutation(law, 0, column, inverse=False)
        assert torch.equal(image, law.permutation(0).forward(column.clone()))
        assert torch.equal(native.permutation(law, 0, image, inverse=True), column)
        with pytest.raises(ValueError, match="q: outside the band"):
            native.permutation(law, 0, torch.tensor([law.columns]), inverse=False)


def weights(bank: rpg.ParameterBank) -> list[VirtualWeight]:
    """Whole layers and parts of them, whose rows begin and end within octets, and columns within
    blocks."""
    linear = bank.place((70, 150), scale=0.37)
    conv = bank.place((21, 40, 3, 3), scale=-1.0)
    tall = bank.place((300, 33), scale=1.0)
    return [
        linear,
        linear.narrow(0, 13, 30).narrow(1, 37, 70),
        conv,
        conv.narrow(0, 3, 11).narrow(1, 7, 20),
        tall,
        tall.narrow(0, 115, 180),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", [1, 8, 64])
def test_unpack_and_pack_bit_for_bit(
    dtype: torch.dtype, granularity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(granularity)
    for reflect in REFLECT:
        generator = generator_of(rng, 70, granularity, reflect=reflect, laps=rng.choice([3, 4, 9]))
        bank = rpg.ParameterBank.from_generator(generator, dtype=dtype)
        for weight in weights(bank):
            law_of(weight.placement)
            with torch.no_grad():
                dense = torch.randn(weight.shape).to(dtype)
                unpacked = in_pytorch(monkeypatch, weight.unpack)
                packed = in_pytorch(monkeypatch, lambda w=weight, d=dense: w.pack(d))
                with threads(rng.randint(1, 3)):
                    assert_same_bits(weight.unpack(), unpacked)
                    assert_same_bits(weight.pack(dense), packed)


@pytest.mark.parametrize("reflect", ["element", "vector"])
def test_pack_does_not_depend_on_threads(reflect: str) -> None:
    generator = Generator(80, 16, reflect, laps=4)
    weight = rpg.ParameterBank.from_generator(generator).place((300, 640), scale=0.3)
    dense = torch.randn(weight.shape)
    results = []
    for count in (1, 2, 3, 5):
        with threads(count), torch.no_grad():
            results.append((weight.pack(dense), weight.unpack()))
    for packed, unpacked in results[1:]:
        assert_same_bits(packed, results[0][0])
        assert_same_bits(unpacked, results[0][1])


@pytest.mark.parametrize("shape", [(9, LONGEST), (9, LONGEST + 1), (4, 3 * LONGEST - 5)])
def test_rows_longer_than_the_memory(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = rpg.ParameterBank.from_generator(Generator(3000, 1, "element", laps=4))
    weight = bank.place(shape, scale=0.3)
    dense = torch.randn(shape)
    with torch.no_grad():
        unpacked = in_pytorch(monkeypatch, weight.unpack)
        packed = in_pytorch(monkeypatch, lambda: weight.pack(dense))
        for count in (1, 3):
            with threads(count):
                assert_same_bits(weight.unpack(), unpacked)
                assert_same_bits(weight.pack(dense), packed)


def test_rows_of_many_bands() -> None:
    """Of a layer of 2^35 blocks, rows that are looked up, in and out of order."""
    generator = Generator(1000, 2, "element", laps=3)
    p = Placement(generator, 4, 0, (2**23 + 3, 2**13), 0.5).narrow(0, 5, 2**23 - 9)
    band = law_of(p).rows_per_band
    rows = p.selected_shape[0]
    lookup = torch.tensor([rows - 1, *range(band - 9, band + 9), 0, 2 * band, band, rows - 1, 0])
    ring = torch.randn(1000, 2)
    region = (5, len(lookup), 1, 2**12, 70, 300)
    size = (300 - 1) * 2 + 1  # a part of the last block is cut off
    out = torch.empty(len(lookup), size)
    for count in (1, 2, 3):
        out.fill_(torch.nan)
        with threads(count):
            native.unpack(p.law, ring, out, 0.5, region, lookup, (1, size))
        n, b = (lookup + 5)[:, None], torch.arange(70, 370)[None]
        wanted = ring[p.law.slot(n, b)] * 0.5
        word = p.law.sign_words(n, b)[..., 0]
        sign = torch.stack((word >> 15 & 1, word >> 31), -1)
        wanted = torch.where(sign == 1, -wanted, wanted).flatten(1)
        assert_same_bits(out, wanted[:, 1:])


def test_a_lookup_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(80, 16, "element", laps=2)
    weight = rpg.ParameterBank.from_generator(generator).place((5000, 70), scale=0.5)
    index = torch.randint(5000, (9, 13))

    def run() -> Tensor:
        out = rpg.functional.embedding(index, weight)
        (grad,) = torch.autograd.grad(out.square().sum(), weight.bank.weight)
        return torch.cat((out.flatten(), grad.flatten()))

    assert_same_bits(run(), in_pytorch(monkeypatch, run))


GOOD: dict[str, Any] = {
    "seed": 0, "layer": 0, "rows": 60, "blocks": 12, "granularity": 32, "slots": 100, "reflect": 1,
    "permute": True, "laps": 4, "address": 0, "taps": 3, "run_blocks": 2, "groups": 3,
    "last_groups": 3,
}  # fmt: skip
# Two bands of 2^10 and of 60 rows, which are 2^7 and 8 octets.
BANDS = {**GOOD, "rows": 2**10 + 60, "blocks": 2**21, "taps": 1, "run_blocks": 1, "groups": 8}


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 0}, {"rows": 2**62}, {"blocks": 0}, {"blocks": 2**28 + 6}, {"granularity": 48},
        {"slots": 0}, {"slots": 2**31 + 1}, {"reflect": 3}, {"laps": 0}, {"laps": 65}, {"laps": -1},
        {"address": -1}, {"address": 2**63 - 96}, {"taps": 0}, {"taps": -1}, {"taps": 2**15 + 1},
        {"taps": 4}, {"run_blocks": 0}, {"run_blocks": -1}, {"run_blocks": 3}, {"run_blocks": 8},
        {"run_blocks": 2**62}, {"groups": 0}, {"groups": 9}, {"groups": -1}, {"groups": 2**32 + 3},
        {"last_groups": 0}, {"last_groups": 9}, {"last_groups": 2**32 + 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_law_out_of_range_is_refused(changes: dict[str, int]) -> None:
    from rpg_kernels.native import _native

    _native.LayerLaw(**GOOD)
    _native.LayerLaw(**{**GOOD, "address": 2**63 - 97})
    (name,) = changes
    wanted = "run_blocks" if changes == {"taps": 4} else name
    with pytest.raises(ValueError, match=f"^{wanted}: wanted"):
        _native.LayerLaw(**{**GOOD, **changes})


def test_groups_are_checked_in_every_band() -> None:
    from rpg_kernels.native import _native

    for name, most in (("groups", 2**7), ("last_groups", 8)):
        _native.LayerLaw(**{**BANDS, name: most})
        with pytest.raises(ValueError, match=f"^{name}: wanted"):
            _native.LayerLaw(**{**BANDS, name: most + 1})


def test_units_larger_than_the_law_knows_are_refused() -> None:
    from rpg_kernels.native import _native

    tall = {**GOOD, "rows": 8 * 10 * 2**15, "taps": 1, "groups": 10, "last_groups": 10}
    _native.LayerLaw(**tall)
    for changes in ({"groups": 9}, {"last_groups": 9}, {"taps": 2}, {"rows": 8 * 10 * 2**15 + 1}):
        with pytest.raises(ValueError, match="groups: wanted"):
            _native.LayerLaw(**{**tall, **changes})


def test_products_and_devices_refuse_what_they_do_not_read() -> None:
    """Those of law 1, and on devices convolutions."""
    from rpg_kernels.native import _native

    law = _native.LayerLaw(**{**GOOD, "rows": 64, "granularity": 64})
    with pytest.raises(ValueError, match="law: wanted 1, not the unit law"):
        law.linear_workspace(columns=12 * 64, threads=1, batch_tile=1, tiles=1)
    with pytest.raises(ValueError, match="law: wanted 1, not the unit law"):
        law.conv2d_workspace(threads=1, batch_tile=1, tiles=1)
    # A matrix whose units have one tap, but whose blocks are dealt to two taps of the layer.
    taps = _native.LayerLaw(**{**GOOD, "rows": 64, "granularity": 64, "taps": 1, "run_blocks": 6})
    devices = [_native.cuda, *([_native.simt] if hasattr(_native, "simt") else [])]
    for device, refused in itertools.product(devices, (law, taps)):
        for name in ("plan_linear", "plan_linear_input_grad", "plan_linear_bank_grad"):
            with pytest.raises(ValueError, match="wanted a matrix, not a convolution"):
                getattr(device, name)(refused, 1, 1, 12 * 64, 100, 10**5)
        with pytest.raises(ValueError, match="wanted a matrix, not a convolution"):
            device.unpack(refused, 1, 0, 0, 12 * 64, 1.0, 0)
        with pytest.raises(ValueError, match="wanted a matrix, not a convolution"):
            device.pack(refused, 1, 0, 0, 12 * 64, 1.0, 0)
