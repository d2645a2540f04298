"""The compiled CPU kernels on banks in fewer bytes, against their values written out in float64.

Where x stays as it is, results are as exact as those of a bank of floats.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import stored_banks
import torch
import unit_images
import unit_layers
from stored_banks import FORMS, INT8
from torch import Tensor
from unit_images import Convolution
from unit_layers import Layer

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.cpu import factored, lanes_linear, rules, units
from rpg_kernels.backends.cpu.lanes import Family
from rpg_kernels.backends.cpu.tiles import TILES
from rpg_kernels.backends.cpu.units import UNITS

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")
op = torch.ops.rpg_kernels
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def workspaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Workspaces hold NaN and are not left; nothing is written out."""
    monkeypatch.setattr(StoredValues, "dense", None)
    yield from unit_layers.guard(monkeypatch)


def as_before(values: StoredValues) -> Tensor:
    """Values of their dtype, as one who reads them as floats has them."""
    out = torch.empty(values.shape, dtype=values.dtype)
    values.read_blocks(torch.arange(len(values)), out)
    return out


def check(layer: Layer, form: str, family: Family, seed: int) -> None:
    """y and dx are at most twice as far from the exact ones as torch's of a written-out weight, or
    the same kernels' of a plain bank; and results are rounded."""
    values = stored_banks.stored(*layer.bank.shape, form, layer.bank.dtype, seed)

    def run(bank: Tensor) -> list[Tensor]:
        y = lanes_linear.linear(family, layer.x, bank, layer.bias, layer.spec)
        return [y, lanes_linear.linear_input_grad(family, layer.dy, bank, layer.spec)]

    results = run(values)
    layer.bank = stored_banks.exact(values)
    exacts = layer.defined(torch.float64)
    layer.bank = as_before(values)
    others = zip(run(layer.bank), layer.defined(layer.dtype), strict=False)
    eps = torch.finfo(layer.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    for got, exact, other in zip(results, exacts, others, strict=False):
        what = f"{form}: {layer}"
        assert got.dtype == layer.dtype, what
        assert got.isfinite().all(), what
        allowed = 2 * max(float((o.double() - exact).abs().max()) for o in other)
        allowed += eps * max(1.0, float(exact.abs().max()))
        assert float((got.double() - exact).abs().max()) <= allowed, what


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [1, 2])
def test_units(form: str, seed: int) -> None:
    for i, layer in enumerate(unit_layers.layers(10, seed)):
        check(layer, form, UNITS, i)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("granularity", [32, 64, 128])
def test_few_rows(form: str, granularity: int) -> None:
    """A ring that ends within an octet, a last block that is not whole, blocks of half a slot."""
    for dtype in (torch.float32, BF16, torch.float16):
        for batch, threads in ((1, 1), (1, 2), (2, 1), (3, 2), (4, 1)):
            torch.set_num_threads(threads)
            for columns in (3 * granularity, 2 * granularity - 5, granularity // 2):
                how = {"slots": 77, "granularity": granularity, "dtype": dtype}
                layer = Layer((130, columns), batch, start=10**6, **how)
                if layer.p.matrix.block >= 16:
                    check(layer, form, UNITS, batch)


@pytest.mark.parametrize("form", FORMS)
def test_tiles(form: str) -> None:
    rng = random.Random(form)
    for law, laps in ((1, None), (3, 1), (3, 4)):
        for granularity in (16, 64, 128):
            for dtype in (torch.float32, BF16):
                torch.set_num_threads(rng.choice([1, 2]))
                shape = rng.choice([1, 37, 150, 300]), rng.choice([64, 100, 257])
                how = {"law": law, "laps": laps, "slots": rng.choice([7, 91, 400])}
                layer = Layer(
                    shape, rng.choice([1, 5, 40]), granularity=granularity, dtype=dtype, **how
                )
                if layer.p.matrix.block >= 16:
                    check(layer, form, TILES, rng.randrange(100))


@pytest.mark.parametrize("form", FORMS)
def test_convolutions(form: str) -> None:
    for i, layer in enumerate(unit_images.convolutions(12, len(form))):
        torch.set_num_threads(1 + i % 2)
        layer.pairs = layer.x.dtype == BF16 and layer.bank.dtype != torch.float16
        values = stored_banks.stored(*layer.bank.shape, form, layer.bank.dtype, i)
        layer.bank = values
        size, rows = layer.x.shape[2], min(3, layer.dy.shape[2])
        in_rows = size if max(layer.how[0]) > 1 else min(2, size)
        results = [[layer.forward(2, 8, rows), *layer.grads(2, 8, in_rows, dw=False)]]
        if layer.x.dtype == values.dtype:
            results.append([layer.called(n, "cpu") for n in (0, 1)])
        layer.bank = stored_banks.exact(values)
        exacts = layer.exact()
        # Pairs round values and the sums of dy that meet them.
        eps = 0.01 if layer.pairs else 1e-3 if values.dtype != torch.float32 else 0.0
        for got in results:
            for name, result, exact in zip(unit_images.NAMES, got, exacts, strict=False):
                unit_images.close(result, exact, f"{form}, {name}: {layer}", eps)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [1, 2])
def test_what_is_infinite_meets_only_what_is_there(form: str, step: int) -> None:
    """Of dy, at the border of an image: lanes that no tap reaches stay as they are."""
    layer = Convolution((24, 40, 3, 3), 2, (5, 6), stride=(step,) * 2, padding=(1, 1), taps=1,
                        slots=91, granularity=32, bias=False)  # fmt: skip
    layer.dy[0, 3, 0, 0] = float("inf")
    values = stored_banks.stored(91, 32, form, torch.float32, 3)
    layer.bank = values
    got = layer.called(1, "cpu")
    layer.bank = stored_banks.exact(values)
    exact = layer.defined()[1]
    present = exact.isfinite()
    assert torch.equal(got.isfinite() | ~present, torch.ones_like(present))
    far = (torch.where(present, got.double(), 0.0) - torch.where(present, exact, 0.0)).abs().max()
    assert far <= 1e-4 * torch.where(present, exact, 0.0).abs().max()


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_slots_that_are_not_there_are_not_multiplied(batch: int) -> None:
    """Not even with an infinity."""
    layer = Layer((100, 150), batch)
    layer.x.fill_(float("inf"))
    values = stored_banks.stored(*layer.bank.shape, "nothing", torch.float32, 0)
    y = lanes_linear.linear(UNITS, layer.x, values, layer.bias, layer.spec)
    assert layer.bias is not None
    assert torch.equal(y, layer.bias.expand_as(y))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 3, 9, 20])
def test_factors(form: str, batch: int) -> None:
    """Of law 1, linear and convolution, with rings of fewer and of more slots than rows."""
    for slots, dtype in ((40, torch.float32), (700, torch.float32), (40, BF16)):
        bank = rpg.ParameterBank(64 * slots)
        values = stored_banks.stored(slots, 64, form, dtype, batch)
        matrix, kernel = bank.place((300, 100)), bank.place((70, 64, 3, 2))
        exact = stored_banks.exact(values)
        if not factored.unsupported("linear", matrix.spec):
            x = torch.randn(batch, 100).to(dtype)
            got = op.linear(x, values, None, None, matrix.spec, "cpu")
            wanted = op.linear(x.double(), exact, None, None, matrix.spec, "reference")
            compare(got, wanted, dtype)
        images = torch.randn(1, 64, 6, batch + 1).to(dtype)
        how = ((1, 1), (1, 0), (1, 1), 1)
        got = op.conv2d(images, values, None, None, kernel.spec, *how, "cpu")
        wanted = op.conv2d(images.double(), exact, None, None, kernel.spec, *how, "reference")
        compare(got, wanted, dtype)


def compare(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    bound = 1e-5 if dtype == torch.float32 else 0.02
    assert (got.double() - exact).abs().max() <= bound * exact.abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_of_the_reference_bit_by_bit(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unpacked weights and rows that are looked up: a value is rounded once, then scaled."""
    rng = random.Random(form)
    for granularity in (1, 4, 32, 128):
        torch.set_num_threads(rng.choice([1, 2]))
        laps, reflect = rng.choice([None, 3]), rng.choice(["vector", "none"])
        if laps is None:
            reflect = rng.choice(["element", reflect])
        bank = rpg.ParameterBank(granularity * 90, granularity, reflect, laps=laps)
        values = stored_banks.stored(90, granularity, form, dtype, rng.randrange(99))
        weight = bank.place((50, rng.choice([3, 40, 129])), scale=rng.choice([1.0, 0.3]))
        part = weight.narrow(0, 3, 20)
        indices = torch.randint(0, 50, (3, 41))
        got = [
            op.unpack(values, None, weight.spec, ""),
            op.unpack(values, None, part.spec, ""),
            op.embedding(values, None, indices, weight.spec, "cpu"),
        ]
        with monkeypatch.context() as without:
            without.setattr(native, "_enabled", False)
            wanted = [
                op.unpack(values, None, weight.spec, "reference"),
                op.unpack(values, None, part.spec, "reference"),
                op.embedding(values, None, indices, weight.spec, "reference"),
            ]
        for one, other in zip(got, wanted, strict=True):
            assert one.dtype == dtype
            assert torch.equal(one, other), f"{form} {granularity} {weight.spec}"


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_multiplications(keep: float) -> None:
    """Against the slots that are there of the octets that each unit reads."""
    slots = 1 << 12
    present = torch.rand(slots, generator=torch.Generator().manual_seed(1)) < keep
    places = torch.where(present, present.cumsum(0) - 1, -1).int()
    values = StoredValues(torch.zeros(int(present.sum()), 64), None, places)
    for layer in (
        Layer((300, 150), 1, slots=slots, start=10**5),
        Layer((64, 24), 1, slots=slots),  # whose blocks are half a slot
        Convolution((100, 70, 3, 3), 1, (9, 9), slots=slots, laps=4),
    ):
        p, law = layer.p, layer.p.law
        n, b = torch.arange(law.rows)[:, None], torch.arange(law.blocks)
        octets = law.slot(n, b) // 8
        column, group, _, _ = law.number(*torch.broadcast_tensors(n, b), 0)
        block = (b % p.matrix.run_blocks).expand_as(octets)
        read = torch.stack((block, column, group, octets), -1).flatten(0, 1).unique(dim=0)
        elements = (p.matrix.run - p.matrix.block * read[:, 0]).clamp(max=p.matrix.block)
        of_octet = present.repeat_interleave(law.slots // slots).view(-1, 8).sum(1)
        counted = int((of_octet[read[:, 3]] * elements).sum())
        if isinstance(layer, Convolution):
            assert units.multiplications(layer.spec, values) == counted
        else:
            assert UNITS.multiplications("linear", layer.spec, values) == counted


def test_dispatch() -> None:
    bank = rpg.ParameterBank(64 * 700, laps=4)
    spec, x = bank.place((1000, 256)).spec, torch.randn(40, 256)
    values = stored_banks.stored(700, 64, "int8, compacted", torch.float32, 2)
    call = Call("linear", x, spec, values)
    assert rules.Cpu().takes(call)
    assert "the bank is read as int8" in rules.Cpu().explain(call)
    assert rules.Cpu().multiplications(call) == 40 * UNITS.multiplications("linear", spec, values)
    plain = Call("linear", x, spec, torch.randn(700, 64))
    assert rules.Cpu().multiplications(call) < rules.Cpu().multiplications(plain)  # type: ignore[operator]
    float8 = StoredValues(torch.zeros(700, 64).to(torch.float8_e4m3fn), torch.ones(700))
    assert "float8_e4m3fn" in rules.Cpu().unsupported(Call("linear", x, spec, float8))
    with pytest.raises(RuntimeError, match="float8_e4m3fn"):
        op.linear(x, float8, None, None, spec, "cpu")
    y = op.linear(x, float8, None, None, spec, "")
    assert torch.equal(y, torch.zeros_like(y))


def test_the_module_refuses_another_bank() -> None:
    """Addresses are all that it gets; sizes must at least fit the law."""
    layer = Layer((24, 64), 1, slots=20, granularity=32)
    law, x, y = native.layer_law(layer.p.law), layer.x, torch.zeros(1, 24)
    values = stored_banks.stored(20, 32, "int8, compacted", torch.float32, 2)
    assert 0 < len(values.codes) < 20
    good = native.given_bank(values)
    memory = torch.zeros(1 << 16, dtype=torch.uint8)

    def call(given: tuple[int, ...]) -> None:
        law.unit_linear(given, x.data_ptr(), 1, 0, y.data_ptr(), 1, 64, 1.0, 1, 1,
                        -(-memory.data_ptr() // 64) * 64)  # fmt: skip

    call(good)
    for at, value in ((1, 5), (1, -1), (1, 0), (1, 1), (2, 0), (3, 0), (4, -1), (4, 2**32), (5, 19),
                      (5, 2**40), (6, 16), (6, 48), (6, 256)):  # fmt: skip
        with pytest.raises(ValueError, match="bank: wanted"):
            call((*good[:at], value, *good[at + 1 :]))
    grad = (good, layer.dy.data_ptr(), x.data_ptr(), 1, 0, y.data_ptr(), 1, 64, 1.0, 1, 16, 64)
    with pytest.raises(ValueError, match="bank: wanted plain values for dw"):
        law.unit_linear_grads(*grad)


@pytest.mark.parametrize("place", [20, 2**31 - 1, -(2**31)])
def test_places_that_are_no_row_are_zeros(place: int) -> None:
    """Nothing outside of the codes is read, whatever places say."""
    for form in (INT8[0], "compacted"):
        layer = Layer((40, 100), 3, slots=20)
        values = stored_banks.stored(20, 64, form, torch.float32, 0)
        absent = torch.arange(20, dtype=torch.int32)
        absent[3:9] = -1
        wrong = torch.where(absent < 0, place, absent)
        codes = torch.randn(20, 64) if values.scales is None else values.codes
        results = [
            lanes_linear.linear(
                UNITS, layer.x, StoredValues(codes, values.scales, places), None, layer.spec
            )
            for places in (absent, wrong.int())
        ]
        assert torch.equal(*results)
