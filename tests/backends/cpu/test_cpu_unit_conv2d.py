"""The compiled CPU kernels of convolutions of the unit law, against written-out weights."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import guard_pages
import processes
import pytest
import torch
import unit_images
from torch.utils.flop_counter import FlopCounterMode
from unit_images import NAMES, Convolution, close, products, where_numbers_end

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels._tensors import empty_image
from rpg_kernels.backends import dispatch
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.cpu import rules, unit_conv2d, units

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")

INFINITY, NAN = float("inf"), float("nan")
SAME = {"padding": (1, 1)}


@pytest.fixture(autouse=True)
def workspaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes in bytes of what the operators were given to work in, around which nothing changes."""
    yield from unit_images.guard(monkeypatch)


def tiles(rng: random.Random, layer: Convolution) -> tuple[int, int, int, int]:
    """Threads, lanes, and rows of y and of x."""
    height, out_height = layer.x.shape[2], layer.dy.shape[2]
    rows = rng.choice([1, 2, 3, 1000])
    strided = max(layer.how[0]) > 1
    of_x = height if strided else min(rows, height)
    return rng.choice([1, 2, 3, 5]), rng.choice([1, 8, 16]), min(rows, out_height), of_x


@pytest.mark.parametrize("seed", range(10))
def test_native_methods(seed: int) -> None:
    """Whatever the tiles are; and the same bits again, for other threads, and one by one."""
    rng = random.Random(seed)
    for layer in unit_images.convolutions(12, seed):
        exact = layer.exact()
        threads, lanes, rows, of_x = tiles(rng, layer)
        what = f"{threads} {lanes} {rows} {of_x} {layer}"
        y = layer.forward(threads, lanes, rows)
        assert y.stride() == empty_image(layer.x, y.shape).stride(), what
        assert y.equal(layer.forward(threads % 3 + 1, lanes, rows)), what
        dx, dw = layer.grads(threads, lanes, of_x)
        assert dx.stride() == empty_image(layer.dy, dx.shape).stride(), what
        for got, wanted, name in zip((y, dx, dw), exact, NAMES, strict=True):
            close(got, wanted, f"{name}: {what}")
        (alone,) = layer.grads(threads, lanes, of_x, dw=False)
        assert alone.equal(dx), what
        (alone,) = layer.grads(threads, lanes, of_x, dx=False)
        assert alone.equal(dw), what


@pytest.mark.parametrize("seed", range(4))
def test_operators(seed: int, workspaces: list[int]) -> None:
    """On the back end, the same bits again; and wherever dispatch runs them."""
    for layer in unit_images.convolutions(8, 100 + seed):
        torch.set_num_threads(1 + seed)
        if layer.bank.dtype != torch.float32:  # a bank has the dtype of images, or float32
            layer.bank = layer.bank.to(layer.x.dtype)
        results, exact = layer.results(), layer.exact()
        assert len(workspaces) == 3, layer
        tensors = zip(results, layer.results(), layer.results(""), exact, NAMES, strict=True)
        for got, again, usual, wanted, name in tensors:
            eps = torch.finfo(layer.x.dtype).eps  # in which the reference multiplies, and pairs are
            rounds = units.pairs("conv2d", layer.x.dtype, layer.bank.dtype, layer.spec)
            close(got, wanted, f"{name}: {layer}", eps if rounds else 0)
            close(usual, wanted, f"{name}, by dispatch: {layer}", eps)
            assert got.equal(again), f"{name}: {layer}"
        workspaces.clear()


def check_pages() -> None:
    """The program of the processes below: nothing is read or written beyond any tensor."""
    rng = random.Random(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit_images, "empty_image", lambda *how: guard_pages.moved(empty_image(*how)))
        layers = [*unit_images.convolutions(24, 7)]
        for channels in (31, 48, 61):
            for dtype in unit_images.DTYPES:
                for kind in (0, 1):
                    layer = Convolution(
                        (33, channels, 3, 3), 9, (4, 6), granularity=32, padding=(1, 1),
                        dtype=dtype, bank_dtype=rng.choice([dtype, torch.float32]),
                    )  # fmt: skip
                    layer.x = unit_images.laid_out(kind, layer.x)
                    layer.dy = unit_images.laid_out(kind, layer.dy)
                    layers.append(layer)
        for layer in layers:
            for name in ("x", "dy", "bank"):
                setattr(layer, name, guard_pages.moved(getattr(layer, name)))
            may_pair = layer.x.dtype == torch.bfloat16 and layer.bank.dtype != torch.float16
            layer.pairs = may_pair and rng.random() < 0.7
            height, lanes = layer.x.shape[2], rng.choice([1, 8, 16])
            layer.forward(rng.choice([1, 3]), lanes, rng.randint(1, layer.dy.shape[2]))
            strided = max(layer.how[0]) > 1
            layer.grads(rng.choice([1, 3]), lanes, height if strided else rng.randint(1, height))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected as Linux does it")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_nothing_beyond_a_tensor_is_touched(isa: str) -> None:
    if isa not in native.build_info()["isas"]:
        pytest.skip(f"{isa} is not compiled in")
    program = "import test_cpu_unit_conv2d as t; t.check_pages()"
    done = processes.python(program, RPG_KERNELS_ISA=isa)
    if f"RPG_KERNELS_ISA: got {isa}" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr


def test_taps_that_share_blocks_are_left_to_the_reference() -> None:
    layer = Convolution((24, 3, 7, 7), 2, (9, 11), padding=(3, 3), granularity=64)
    assert not layer.p.matrix.by_tap
    with pytest.raises(ValueError, match="by_tap"):
        layer.forward(1, 1, 1)
    with pytest.raises(ValueError, match="by_tap"):
        layer.grads(1, 1, 1)


def test_numbers_of_threads_change_the_rounding_of_gradients_alone() -> None:
    layer, results = Convolution((100, 70, 3, 3), 3, (7, 9), slots=130, **SAME), []
    for threads in (1, 2, 3, 5, 40):
        torch.set_num_threads(threads)
        results.append(layer.results())
        for got, wanted, name in zip(results[-1], layer.exact(), NAMES, strict=True):
            close(got, wanted, f"{name}: {threads} threads")
    for y, _, _ in results[1:]:
        assert y.equal(results[0][0])
    assert any(not dx.equal(results[0][1]) for _, dx, _ in results[1:])


@pytest.mark.parametrize("slots", [1, 7, 8, 9, 24, 41])
def test_rings_smaller_than_a_window(slots: int) -> None:
    for threads, laps in ((1, 4), (3, 9), (5, 1)):
        layer = Convolution((100, 32, 3, 3), 2, (5, 6), slots=slots, laps=laps, start=10**9)
        exact = layer.exact()
        close(layer.forward(threads, 1, 2), exact[0], str(layer))
        for got, wanted in zip(layer.grads(threads, 8, 2), exact[1:], strict=True):
            close(got, wanted, str(layer))


# Of images whose borders see padding, and of ones whose outer pixels are seen by few taps.
BORDERS: dict[str, dict[str, Any]] = {
    "same": {"padding": (1, 1)},
    "valid": {"padding": (0, 0)},
    "full": {"padding": (3, 2), "taps": 1},
    "strided": {"padding": (1, 1), "stride": (2, 2), "taps": 1},
    "strided, valid": {"padding": (0, 0), "stride": (2, 1), "taps": 1},
}
READ = {"y": ("x", "bank"), "dx": ("dy", "bank"), "dw": ("x", "dy")}
CASES = [(tensor, name, border) for border in BORDERS for name in NAMES for tensor in READ[name]]


def bordered(border: str, laps: int, size: tuple[int, int], out: int = 12) -> Convolution:
    how = dict(BORDERS[border])
    shape = how.pop("shape", (out, 30, 3, 3))
    return Convolution(shape, 2, size, laps=laps, granularity=32, bias=False, **how)


@pytest.mark.parametrize(("tensor", "name", "border"), CASES)
def test_infinities_stay_where_they_are(tensor: str, name: str, border: str) -> None:
    for laps in (1, 4, 9):
        for value, place, size in (
            (INFINITY, 0, (5, 6)),
            (NAN, -1, (4, 16)),
            (-INFINITY, 100, (5, 6)),
        ):
            layer = bordered(border, laps, size)
            flat = getattr(layer, tensor).view(-1)
            flat[layer.index[place] if tensor == "bank" else place] = value
            where_numbers_end(layer, name)


@pytest.mark.parametrize("border", list(BORDERS))
@pytest.mark.parametrize("out", [1, 12, 100])
def test_elements_that_no_weight_reads(border: str, out: int) -> None:
    """Those behind the in-channels, and slots of rows behind the last, may hold anything."""
    for size, laps in (((5, 6), 1), ((4, 16), 4)):
        layer = bordered(border, laps, size, out)
        unused = torch.ones(layer.bank.numel(), dtype=torch.bool)
        unused[layer.index] = False
        assert unused.any()
        for value in (INFINITY, NAN):
            layer.bank.view(-1)[unused] = value
            for name in NAMES:
                where_numbers_end(layer, name)
            assert not layer.grads(2, 8, size[0])[1].flatten()[unused].any(), layer


def test_empty_batches_and_images() -> None:
    for backend in ("cpu", ""):
        layer = Convolution((24, 32, 1, 1), 2, (3, 5), **SAME)
        layer.x, layer.dy = layer.x[:0], layer.dy[:0]
        y, dx, dw = layer.results(backend)
        assert (y.shape, dx.shape) == (layer.dy.shape, layer.x.shape)
        assert not dw.any()
        layer = Convolution((24, 32, 3, 3), 2, (3, 3))
        layer.x = layer.x[:, :, :2]
        with pytest.raises(ValueError, match="x: got"):
            layer.results(backend)
    layer = Convolution((24, 32, 1, 1), 2, (0, 5), **SAME)  # torch and the reference refuse it
    y, dx, dw = layer.results()
    assert layer.bias is not None
    assert y.equal(layer.bias[:, None, None].expand(2, 24, 2, 7))
    assert dx.shape == (2, 32, 0, 5)
    assert not dw.any()


@pytest.mark.parametrize("number", range(3))
def test_scratch_limits(number: int, workspaces: list[int]) -> None:
    torch.set_num_threads(3)
    name = unit_conv2d.OPERATORS[number]
    layer = Convolution((100, 70, 3, 3), 3, (7, 9), **SAME)
    choices = unit_conv2d._choices(name, layer.spec, tuple(layer.x.shape), layer.how, 3)
    assert {choice.threads for choice in choices} == {1, 2, 3}
    wanted = layer.exact()[number]
    for choice in choices:
        workspaces.clear()
        with rpg.scratch_limit(choice.scratch):
            taken = unit_conv2d.check(name, layer.spec, layer.x.shape, layer.how)
            assert taken.scratch <= choice.scratch
            assert choices.index(taken) <= choices.index(choice)
            close(layer.called(number, "cpu"), wanted, str(choice))
        assert workspaces == [taken.workspace]
    workspaces.clear()
    with rpg.scratch_limit(min(choice.scratch for choice in choices) - 1):
        with pytest.raises(RuntimeError, match="scratch_limit"):
            layer.called(number, "cpu")
        close(layer.called(number, ""), wanted, name)
    assert not workspaces


@pytest.mark.parametrize(
    ("shape", "how", "reason", "names"),
    [
        ((24, 32, 3, 3), {"stride": (1, 2)}, "units of one tap", (0, 1, 2)),
        ((24, 32, 3, 3), {"reflect": "element"}, "one sign", (0, 1, 2)),
        ((24, 32, 3, 3), {"granularity": 8}, "16 to 128", (0, 1, 2)),
        ((24, 3, 7, 7), {"padding": (3, 3)}, "share a block", (0, 1, 2)),
    ],
    ids=lambda value: str(value),
)
def test_what_is_left_to_the_reference(
    shape: tuple[int, ...], how: dict[str, Any], reason: str, names: tuple[int, ...]
) -> None:
    layer = Convolution(shape, 2, (7, 9), **how)
    exact = layer.exact()
    for number, name in enumerate(unit_conv2d.OPERATORS):
        x = layer.x if number == 0 else layer.dy
        call = Call(name, x, layer.spec, layer.bank, (*layer.how, 1))
        close(layer.called(number, ""), exact[number], str(layer))
        if number not in names:
            assert not rules.Cpu().unsupported(call)
            continue
        assert reason in rules.Cpu().unsupported(call)
        assert dispatch.choose(call).name == "reference"
        with pytest.raises(RuntimeError, match=reason):
            layer.called(number, "cpu")


def test_groups_are_left_to_the_reference() -> None:
    layer = Convolution((24, 32, 3, 3), 2, (5, 6), bias=False, **SAME)
    layer.x = torch.randn(2, 64, 5, 6, generator=torch.Generator().manual_seed(3))
    x, bank = (t.double().requires_grad_() for t in (layer.x, layer.bank))
    y = torch.nn.functional.conv2d(x, layer.weight(bank), None, *layer.how, 2)
    exact = [y.detach(), *torch.autograd.grad(y, (x, bank), layer.dy.double())]
    for number, name in enumerate(unit_conv2d.OPERATORS):
        call = Call(name, layer.x, layer.spec, layer.bank, (*layer.how, 2))
        assert "2 groups" in rules.Cpu().unsupported(call)
        close(layer.called(number, "", groups=2), exact[number], name)
        with pytest.raises(RuntimeError, match="2 groups"):
            layer.called(number, "cpu", groups=2)


@pytest.mark.parametrize("shape", [(100, 70, 3, 3), (130, 128, 1, 1), (24, 3, 7, 7), (8, 60, 2, 2)])
@pytest.mark.parametrize(("laps", "taps"), [(1, None), (4, None), (4, 1), (9, None), (16, 1)])
def test_multiplications(shape: tuple[int, ...], laps: int, taps: int | None) -> None:
    layer = Convolution(shape, 1, (9, 9), slots=1 << 15, laps=laps, taps=taps)
    assert units.multiplications(layer.spec) == products(layer)


def test_the_counter_says_so() -> None:
    bank = rpg.ParameterBank(dof=64 << 15, granularity=64, laps=4)
    layer = rpg.nn.Conv2d(64, 256, 3, padding=1, bank=bank)
    x = torch.randn(2, 64, 5, 7, requires_grad=True)
    assert rpg.explain(layer, x).backend == "cpu"
    with FlopCounterMode(display=False, custom_mapping=rpg.flops.shared_products()) as counter:
        layer(x).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    got = {str(op).rpartition(".")[2]: count for op, count in counts.items()}
    weight = Convolution(layer.weight.shape, 1, (3, 3), slots=1 << 15, laps=4)
    once = 2 * 2 * 5 * 7 * products(weight)
    assert got == {"conv2d": once, unit_conv2d.BOTH: 2 * once}


def test_refusals() -> None:
    layer = Convolution((24, 32, 3, 3), 2, (7, 9), taps=3)
    for how, match in (
        ((0, 1, 1), "threads"),
        ((1, 4, 1), "lanes"),
        ((1, 72, 1), "lanes"),
        ((1, 1, 0), "rows"),
        ((1, 1, 8), "rows"),
    ):
        with pytest.raises(ValueError, match=match):
            layer.forward(*how)
        with pytest.raises(ValueError, match=match):
            layer.grads(*how)
    layer.how = ((2, 2), *layer.how[1:])
    with pytest.raises(ValueError, match="law"):
        layer.forward(1, 1, 1)


def test_narrower_images_fit_where_wider_ones_do() -> None:
    """Dispatch knows of a gradient only how large x may have been."""
    spec = Convolution((64, 64, 3, 3), 1, (3, 3), laps=2, taps=1).spec
    for op in unit_conv2d.OPERATORS[1:]:
        last = 0
        for width in range(1, 40):
            how = ((2, 2), (1, 1), (1, 1))
            choices = unit_conv2d._choices(op, spec, (8, 64, 50, width), how, 2)
            least = min(choice.scratch for choice in choices)
            assert least >= last
            last = least


@pytest.mark.parametrize(
    ("law", "size", "kernel", "match"),
    [
        ((0, 0, 8, 81, 16, 64, 1, True, 1, 0, 81, 1, 1, 1), (1, 16, 9, 9), (9, 9), "law"),
        ((0, 0, 8, 64, 16, 64, 1, True, 1, 0, 1, 1, 1, 1), (1, 1024, 1, 1), (1, 1), "law"),
        ((0, 0, 8, 1, 16, 64, 1, True, 1, 0, 1, 1, 1, 1), (1, 16, 1, 0), (1, 1), "size"),
        ((0, 0, 8, 1, 16, 64, 1, True, 1, 0, 1, 1, 1, 1), (1, 16, 2**62, 1), (1, 1), "size"),
    ],
    ids=["more taps than laps", "blocks of channels for taps", "no pixels", "beyond int64"],
)
def test_the_native_module_refuses_what_would_be_read_out_of_bounds(
    law: tuple[Any, ...], size: tuple[int, ...], kernel: tuple[int, int], match: str
) -> None:
    made = native.module().LayerLaw(*law)
    how = (size, kernel, True, (1, 1), (0, 0), (1, 1), 1, 1, 1)
    with pytest.raises(ValueError, match=match):
        made.unit_conv2d_workspace(*how)
    with pytest.raises(ValueError, match=match):
        made.unit_conv2d_grads_workspace(*how, True, True)
