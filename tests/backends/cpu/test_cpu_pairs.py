"""Products of pairs of bfloat16, on any processor: without its instruction by shifts and masks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pair_brute
import processes
import pytest
import test_cpu_units
import torch
import unit_images
import unit_layers
from torch import Tensor
from unit_images import Convolution, close, where_numbers_end
from unit_layers import NAMES, Layer

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.backends.cpu import lanes, lanes_linear, unit_conv2d, units
from rpg_kernels.backends.cpu.units import UNITS

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")

BF16, INFINITY, NAN = torch.bfloat16, float("inf"), float("nan")
LOW = {"dtype": BF16, "bank_dtype": BF16}
MIXED = {"dtype": BF16, "bank_dtype": torch.float32}  # as autocast has it


@pytest.fixture(autouse=True)
def workspaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Pairs wherever they can be, in workspaces of which nothing else is written."""
    monkeypatch.setattr(native, "multiplies_pairs", lambda: True)
    monkeypatch.setattr(units, "ROUNDED_READS", 0)
    monkeypatch.setattr(unit_layers, "DTYPES", [(BF16, BF16)])
    monkeypatch.setattr(unit_images, "DTYPES", (BF16,))
    guarded = unit_layers.guard(monkeypatch)
    unit_images_guarded = unit_images.guard(monkeypatch)
    next(unit_images_guarded)
    yield from guarded
    next(unit_images_guarded, None)


def without_pairs(layer: Layer) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "multiplies_pairs", lambda: False)
        return layer.results()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("columns", "block"), [(64, 32), (109, 32), (47, 16), (255, 128)])
def test_linear_is_what_pairs_define(threads: int, columns: int, block: int) -> None:
    """Bit for bit, of whole numbers: forward exactly, gradients from sums in bfloat16."""
    torch.set_num_threads(threads)
    for rows, laps, batch in ((100, 4, 20), (331, 16, 37), (64, 3, 70), (7, 5, 5)):
        layer = Layer(
            (rows, columns), batch, slots=5000, granularity=block, laps=laps, dtype=BF16, bias=False
        )
        pair_brute.whole_numbers(layer)
        exact, rounded = layer.defined(torch.float64), pair_brute.linear_grads(layer)
        for name, got, wanted in zip(
            NAMES, layer.results(), (exact[0], *rounded, *rounded), strict=True
        ):
            assert got.equal(wanted.to(BF16)), f"{name}: {layer}"
        assert rows < 8 or not exact[1].equal(rounded[0])  # there is something to round


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [31, 32, 61, 64])
def test_conv2d_is_what_pairs_define(stride: int, channels: int) -> None:
    for kernel, laps, threads, lanes_, rows in (
        ((3, 3), 9, 1, 1, 2),
        ((3, 3), 4, 2, 8, 3),
        ((1, 1), 4, 3, 1, 1),
        ((2, 3), 16, 2, 16, 4),
    ):
        layer = Convolution(
            (44, channels, *kernel), 3, (5, 7), stride=(stride, stride), padding=(1, 1),
            slots=5000, granularity=32, laps=laps, taps=1 if stride > 1 else None, bias=False,
            **LOW,
        )  # fmt: skip
        pair_brute.whole_numbers(layer)
        layer.pairs = True
        y = layer.forward(threads, lanes_, min(rows, layer.dy.shape[2]))
        assert y.equal(layer.exact()[0].to(BF16)), layer
        dx, dw = layer.grads(threads, lanes_, 5 if stride > 1 else rows)
        wanted_dx, wanted_dw = pair_brute.conv2d_grads(layer)
        assert dx.equal(wanted_dx.to(BF16)), layer
        assert dw.equal(wanted_dw.float()), layer


@pytest.mark.parametrize("bank_dtype", [BF16, torch.float32])
@pytest.mark.parametrize("channels", [31, 61, 64])
def test_channels_last_is_what_pairs_define(channels: int, bank_dtype: torch.dtype) -> None:
    """Bit for bit, of images alone and of a part of larger ones, with NaN around it."""
    for cut in (False, True):
        for lanes_, threads in ((1, 1), (8, 2), (24, 3)):
            layer = Convolution(
                (41, channels, 3, 3), 3, (5, 7), padding=(1, 1), slots=5000, granularity=32,
                bias=False, dtype=BF16, bank_dtype=bank_dtype,
            )  # fmt: skip
            pair_brute.whole_numbers(layer)
            for name in ("x", "dy"):
                images = getattr(layer, name)
                n, c, *size = images.shape
                more = images.new_full((n, c + 3 * cut, *size), NAN)
                more = more.contiguous(memory_format=torch.channels_last)
                more[:, :c] = images
                setattr(layer, name, more[:, :c])
            layer.pairs = True
            assert layer.forward(threads, lanes_, 2).equal(layer.exact()[0].to(BF16)), layer
            dx, dw = layer.grads(threads, lanes_, 2)
            wanted_dx, wanted_dw = pair_brute.conv2d_grads(layer)
            assert dx.equal(wanted_dx.to(BF16)), layer
            assert dw.equal(wanted_dw.float()), layer


@pytest.mark.parametrize("stride", [1, 2])
def test_numbers_that_bfloat16_lacks(stride: int) -> None:
    """One of them rounds to infinity, and meets no pixel that its taps do not reach."""
    layer = Convolution(
        (12, 32, 3, 3), 1, (5, 6), granularity=32, laps=9, padding=(1, 1), bias=False, scale=1.0,
        stride=(stride, stride), taps=1 if stride > 1 else None, **MIXED,
    )  # fmt: skip
    layer.dy.zero_()
    layer.dy[0, 0, 1, 1] = 2.0**-20
    layer.bank.view(-1)[layer.index[0]] = 3.4e38
    for pairs in (False, True):
        layer.pairs = pairs
        assert layer.grads(1, 1, 5)[0].isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_linear_against_the_written_out_weight(seed: int) -> None:
    """As exact as torch in bfloat16; and within what rounding sums can add to fp32 arithmetic."""
    for layer in unit_layers.layers(8, 200 + seed):
        results = layer.check()
        for got, again in zip(results, layer.results(), strict=True):
            assert got.equal(again), layer
        exact = layer.defined(torch.float64)
        signless = Layer.__new__(Layer)
        signless.__dict__ = {
            **layer.__dict__,
            "x": layer.x.abs(), "dy": layer.dy.abs(), "bank": layer.bank.abs(),
            "bias": None, "sign": layer.sign.abs(),
        }  # fmt: skip
        sizes = [size.abs() for size in signless.defined(torch.float64)]
        plain = without_pairs(layer)
        for name, got, other, size, number in zip(NAMES, results, plain, sizes, exact, strict=True):
            # Half a unit of bfloat16 for the sums, one for each result, and fp32's own rounding.
            rounding = 2**-9 * (name != "y") + 2**-14
            far = (got.double() - other.double()).abs()
            assert (far <= rounding * size + 2**-7 * number.abs() + 1e-6).all(), f"{name}: {layer}"
        if layer.dy.shape[0] > 16 and layer.p.shape[0] > 300:
            assert any(not got.equal(other) for got, other in zip(results, plain, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_conv2d_against_the_written_out_weight(seed: int) -> None:
    rng = random.Random(seed)
    for layer in unit_images.convolutions(8, 300 + seed):
        layer.pairs, exact = True, layer.exact()
        height, strided = layer.x.shape[2], max(layer.how[0]) > 1
        threads, lanes_, rows = rng.choice([1, 2, 3]), rng.choice([1, 8]), rng.choice([1, 3, 1000])
        y = layer.forward(threads, lanes_, min(rows, layer.dy.shape[2]))
        close(y, exact[0], f"y: {layer}")
        assert y.equal(layer.forward(threads % 3 + 1, lanes_, min(rows, layer.dy.shape[2])))
        of_x = height if strided else min(rows, height)
        dx, dw = layer.grads(threads, lanes_, of_x)
        # A rounded sum may be half a unit of bfloat16 away; its products add up like numbers.
        for got, wanted in ((dx, exact[1]), (dw, exact[2])):
            far = (got.double() - wanted).square().mean().sqrt()
            assert far <= 2**-8 * wanted.square().mean().sqrt() + 1e-6, str(layer)
        (alone,) = layer.grads(threads, lanes_, of_x, dw=False)
        assert alone.equal(dx), layer
        (alone,) = layer.grads(threads, lanes_, of_x, dx=False)
        assert alone.equal(dw), layer


@pytest.mark.parametrize("laps", [4, 8, 16])
@pytest.mark.parametrize("bank_dtype", [BF16, torch.float32])
def test_errors_are_those_of_a_dense_layer(laps: int, bank_dtype: torch.dtype) -> None:
    """In the root of mean squares against float64: of a rounded weight, and of rounded products.

    A bank in bfloat16 is rounded no more, so y is better. One in fp32 is, as the dense weight is:
    y is as good, and dx has one rounding more than the dense layer's two.
    """
    layer = Layer(
        (128 * laps, 128), 64, slots=4096, laps=laps, dtype=BF16, bank_dtype=bank_dtype,
        scale=0.037, bias=False,
    )  # fmt: skip
    exact, bank = layer.defined(torch.float64), layer.bank.double().flatten()
    weight = (bank[layer.index] * layer.sign.flatten() * layer.p.scale).view(layer.p.shape)
    rounded, x, dy = weight.to(BF16).double(), layer.x.double(), layer.dy.double()
    products = (dy.T @ x).to(BF16).double() * layer.sign * layer.p.scale
    dw = torch.zeros_like(bank).index_add_(0, layer.index, products.flatten())
    dense = [x @ rounded.T, dy @ rounded, dw.view(layer.bank.shape)]
    for name, got, wanted, torchs in zip(NAMES, layer.results(), exact, dense, strict=False):
        ours, theirs = (
            float((t.to(BF16).double() - wanted).square().mean().sqrt()) for t in (got, torchs)
        )
        of_sums = 1.02 if laps < 8 else 1.01
        most = {"y": 0.75, "dx": of_sums, "dw": of_sums}
        if bank_dtype != BF16:
            most |= {"y": 1.01, "dx": 1.25}
        assert ours <= most[name] * theirs, name


@pytest.mark.parametrize("threads", [1, 3])
def test_a_bank_in_float32_is_rounded(threads: int) -> None:
    """The bits of the same bank in bfloat16, and dw as it is before that is rounded."""
    torch.set_num_threads(threads)
    for columns, slots, laps in ((64, 700, 4), (109, 130, 9), (90, 41, 4)):
        layer = Layer((331, columns), 37, granularity=32, slots=slots, laps=laps, **MIXED)
        mixed, layer.bank = layer.results(), layer.bank.to(BF16)
        for name, got, low in zip(NAMES, mixed, layer.results(), strict=True):
            assert got.dtype == (torch.float32 if "dw" in name else BF16)
            assert got.to(BF16).equal(low), f"{name}: {layer}"
    for stride, channels in ((1, 61), (2, 64)):
        image = Convolution(
            (44, channels, 3, 3), 3, (5, 7), stride=(stride, stride), padding=(1, 1), slots=130,
            granularity=32, laps=9, taps=1 if stride > 1 else None, **MIXED,
        )  # fmt: skip
        image.pairs = True
        mixed = [image.forward(threads, 1, 2), *image.grads(threads, 8, 5)]
        image.bank = image.bank.to(BF16)
        low = [image.forward(threads, 1, 2), *image.grads(threads, 8, 5)]
        for got, wanted in zip(mixed, low, strict=True):
            assert got.equal(wanted), image


def test_rings_that_end_inside_a_window() -> None:
    for slots in (1, 7, 8, 9, 24, 41):
        for threads, laps in ((1, 4), (3, 9)):
            torch.set_num_threads(threads)
            for columns in (90, 91):
                Layer(
                    (200, columns), 20, granularity=32, slots=slots, laps=laps, start=10**9,
                    dtype=BF16,
                ).check()  # fmt: skip


def test_a_bank_that_is_not_aligned() -> None:
    layer = Layer((100, 110), 20, dtype=BF16)
    wanted, bank = layer.results(), layer.bank
    layer.bank = bank.new_full((bank.numel() + 1,), NAN)[1:].view(bank.shape).copy_(bank)
    assert layer.bank.data_ptr() % 4 == 2
    for got, exact in zip(layer.results(), wanted, strict=True):
        assert got.equal(exact)


@pytest.mark.parametrize("bank_dtype", [BF16, torch.float32])
@pytest.mark.parametrize("kind", test_cpu_units.KINDS, ids=str)
def test_infinities_stay_where_they_are_in_linear(
    kind: dict[str, int], bank_dtype: torch.dtype
) -> None:
    for rows, columns, threads, values in (
        (13, 110, 1, (INFINITY, NAN, -INFINITY)),
        (101, 109, 2, (-INFINITY, INFINITY, NAN)),
    ):
        torch.set_num_threads(threads)
        dtypes: dict[str, Any] = {"dtype": BF16, "bank_dtype": bank_dtype}
        layer = Layer((rows, columns), 21, bias=False, **dtypes, **kind)
        unused = test_cpu_units.unread(layer)
        for value in (INFINITY, NAN):  # beside an odd last element, and where no row reads
            layer.bank.view(-1)[unused] = value
            results = layer.check()
            for dw in (results[2], results[4]):
                assert not dw.flatten()[unused].any(), layer
        for tensor, value in zip((layer.x, layer.dy, layer.bank), values, strict=True):
            kept, flat = tensor.clone(), tensor.view(-1)
            flat[layer.index[columns // 2] if tensor is layer.bank else len(flat) // 2] = value
            test_cpu_units.check_infinities(layer)
            tensor.copy_(kept)


@pytest.mark.parametrize("dtypes", [LOW, MIXED], ids=["bf16", "fp32"])
@pytest.mark.parametrize("channels", [30, 31])
@pytest.mark.parametrize("stride", [1, 2])
def test_infinities_stay_where_they_are_in_conv2d(
    channels: int, stride: int, dtypes: dict[str, torch.dtype]
) -> None:
    read = {"y": ("x", "bank"), "dx": ("dy", "bank"), "dw": ("x", "dy")}
    for laps, size in ((4, (5, 7)), (9, (4, 16))):
        for name, tensors in read.items():
            for tensor in tensors:
                layer = Convolution(
                    (12, channels, 3, 3), 2, size, stride=(stride, 1), padding=(1, 1), laps=laps,
                    granularity=32, taps=1 if stride > 1 else None, bias=False, **dtypes,
                )  # fmt: skip
                layer.pairs = True
                unused = torch.ones(layer.bank.numel(), dtype=torch.bool)
                unused[layer.index] = False
                layer.bank.view(-1)[unused] = NAN
                where_numbers_end(layer, name)
                flat = getattr(layer, tensor).view(-1)
                flat[layer.index[0] if tensor == "bank" else 0] = INFINITY
                where_numbers_end(layer, name)


def test_what_multiplies_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls whose activations are bfloat16; backward those whose sums are of three rows or more."""
    monkeypatch.undo()
    low, full = (Layer((999, 64), 20, laps=laps).spec for laps in (2, 4))
    assert units.reads(low) < units.ROUNDED_READS < units.reads(full)
    monkeypatch.setattr(native, "multiplies_pairs", lambda: True)
    for op in lanes.PRODUCTS:
        for spec in (low, full):
            wanted = op == "linear" or spec is full
            for bank_dtype in (BF16, torch.float32):
                assert UNITS.pairs(op, BF16, bank_dtype, 20, spec) == wanted
            for dtypes in (
                (BF16, torch.float16),
                (torch.float16,) * 2,
                (torch.float32,) * 2,
                (torch.float32, BF16),
            ):
                assert not UNITS.pairs(op, *dtypes, 20, spec)
    assert not UNITS.pairs("linear", BF16, BF16, units.FEW, full)
    assert UNITS.pairs("linear_grads", BF16, BF16, units.FEW, full)
    monkeypatch.setattr(native, "multiplies_pairs", lambda: False)
    assert not UNITS.pairs("linear", BF16, BF16, 20, full)


def test_other_dtypes_are_refused() -> None:
    for dtype, bank_dtype in ((torch.float16,) * 2, (torch.float32,) * 2, (BF16, torch.float16)):
        layer = Convolution((24, 32, 3, 3), 2, (5, 6), dtype=dtype, bank_dtype=bank_dtype)
        layer.pairs = True
        with pytest.raises(ValueError, match="pairs"):
            layer.forward(1, 1, 5 - 2)
        with pytest.raises(ValueError, match="pairs"):
            layer.grads(1, 1, 5)
    law = native.layer_law(Layer((24, 32), 2).p.law)
    with pytest.raises(ValueError, match="pairs"):
        law.unit_linear_workspace(2, 32, 1, 2, pairs=True)
    law = native.layer_law(Layer((24, 32), 2, law=1, laps=None).p.law)
    for name in ("tile_linear_workspace", "tile_linear_grads_workspace"):
        size = (20, 32, 1, 32) if name == "tile_linear_workspace" else (20, 32, 1, 32, True, True)
        with pytest.raises(ValueError, match="pairs"):
            getattr(law, name)(*size, pairs=True)


@pytest.mark.parametrize("name", lanes.PRODUCTS)
def test_scratch_limits(name: str, workspaces: list[int]) -> None:
    """What has no room with pairs is made without them."""
    torch.set_num_threads(2)
    layer = Layer((300, 110), 70, dtype=BF16)
    x, dy, bank, spec = layer.x, layer.dy, layer.bank, layer.spec
    arguments = {
        "linear": (x, bank, None, spec),
        "linear_input_grad": (dy, bank, spec),
        "linear_bank_grad": (dy, x, spec, BF16),
        "linear_grads": (dy, bank, x, spec, BF16),
    }[name]
    steps = lanes._choices(UNITS, name, spec, 70, 2, True)
    assert {step.pairs for step in steps} == {True, False}
    assert tuple(s for s in steps if not s.pairs) == lanes._choices(UNITS, name, spec, 70, 2)
    for step in steps:
        workspaces.clear()
        with rpg.scratch_limit(step.scratch):
            taken = UNITS.check(name, spec, 70, True)
            getattr(lanes_linear, name)(UNITS, *arguments)
        assert steps.index(taken) <= steps.index(step)
        assert workspaces == [taken.workspace]


@pytest.mark.parametrize("number", range(3))
def test_operators_of_convolutions(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Convolution((44, 61, 3, 3), 2, (9, 20), padding=(1, 1), laps=9, **LOW)
    choices = unit_conv2d._choices(
        unit_conv2d.OPERATORS[number], layer.spec, tuple(layer.x.shape), layer.how, 1, True
    )
    assert {choice.pairs for choice in choices} == {True, False}
    assert choices[0].pairs
    with_pairs, exact = layer.called(number, "cpu"), layer.exact()[number]
    monkeypatch.setattr(native, "multiplies_pairs", lambda: False)
    plain = layer.called(number, "cpu")
    for got in (with_pairs, plain):
        far = (got.double() - exact).square().mean().sqrt()
        assert far <= 2**-8 * exact.square().mean().sqrt()
    assert with_pairs.equal(plain) == (number == 0 and bool((with_pairs == plain).all()))
    assert number == 0 or not with_pairs.equal(plain)


def check_all() -> None:
    """The program of the process below, in which another instruction set is chosen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "multiplies_pairs", lambda: True)
        patch.setattr(units, "ROUNDED_READS", 0)
        for columns, block in ((64, 32), (109, 32), (255, 128)):
            test_linear_is_what_pairs_define(2, columns, block)
        for channels in (31, 64):
            for stride in (1, 2):
                test_conv2d_is_what_pairs_define(stride, channels)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_a_processor_with_less(isa: str) -> None:
    if isa not in native.build_info()["isas"]:
        pytest.skip(f"{isa} is not compiled in")
    program = "import test_cpu_pairs as t; t.check_all(); print(t.native.build_info()['isa'])"
    done = processes.python(program, RPG_KERNELS_ISA=isa)
    if f"RPG_KERNELS_ISA: got {isa}" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert (done.returncode, done.stdout) == (0, f"{isa}\n"), done.stderr
