"""Parts of weights of the unit law in the compiled CPU kernels, against written-out weights."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import guard_pages
import processes
import pytest
import torch
import unit_images
import unit_layers
from unit_images import Convolution
from unit_layers import Layer

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.cpu import rules, units
from rpg_kernels.backends.cpu.selection import selection
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import Placement

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")

INFINITY, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Indices = Sequence[int] | None


@pytest.fixture(autouse=True)
def workspaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workspaces hold NaN, and nothing around them changes."""
    for _ in unit_layers.guard(monkeypatch):
        for _ in unit_images.guard(monkeypatch):
            yield


def drawn(rng: random.Random, size: int) -> Indices:
    """All indices, a range, one, all but one, some, or some of a few octets and blocks."""
    kind = rng.randrange(7)
    if kind == 0:
        return None
    if kind == 1:
        low = rng.randrange(size)
        return range(low, rng.randint(low + 1, size))
    if kind == 2:
        return [rng.randrange(size)]
    if kind == 3 and size > 1:
        without = rng.randrange(size)
        return [i for i in range(size) if i != without]
    if kind == 4:
        part = rng.choice([8, 16, 64])
        kept = {rng.randrange(-(-size // part)) for _ in range(2)}
        return [i for i in range(size) if (i // part in kept and i % 3 != 1) or i == size - 1]
    return sorted(rng.sample(range(size), rng.randint(1, size)))


def both(rng: random.Random, shape: Sequence[int]) -> tuple[Indices, Indices]:
    """Rows and columns, not both of them all."""
    rows, columns = drawn(rng, shape[0]), drawn(rng, shape[1])
    if rows is None and columns is None:
        rows = range(0, shape[0], 2)
    return rows, columns


@pytest.mark.parametrize("seed", range(8))
def test_linear_layers(seed: int) -> None:
    rng = random.Random(seed)
    for layer in unit_layers.layers(8, 1000 + seed):
        layer.choose(*both(rng, layer.p.shape))
        for one, again in zip(layer.check(), layer.results(), strict=True):
            assert one.equal(again), layer


@pytest.mark.parametrize("seed", range(8))
def test_convolutions(seed: int) -> None:
    """Whatever the tiles are; the same bits again, and one by one."""
    rng = random.Random(seed)
    for layer in unit_images.convolutions(10, 2000 + seed):
        layer.choose(*both(rng, layer.p.shape))
        layer.x = unit_images.laid_out(rng.randrange(6), layer.x)
        layer.dy = unit_images.laid_out(rng.randrange(6), layer.dy)
        may_pair = layer.x.dtype == torch.bfloat16 and layer.bank.dtype != torch.float16
        layer.pairs = may_pair and rng.random() < 0.5
        exact = layer.exact()
        threads, lanes, height = rng.choice([1, 2, 3]), rng.choice([1, 8, 16]), layer.x.shape[2]
        of_y = rng.randint(1, layer.dy.shape[2])
        of_x = height if max(layer.how[0]) > 1 else rng.randint(1, height)
        what = f"{threads} {lanes} {of_y} {of_x} {layer.pairs} {layer}"
        y = layer.forward(threads, lanes, of_y)
        assert y.equal(layer.forward(threads % 2 + 1, lanes, of_y)), what
        dx, dw = layer.grads(threads, lanes, of_x)
        eps = torch.finfo(torch.bfloat16).eps if layer.pairs else 0
        for got, wanted in zip((y, dx, dw), exact, strict=True):
            unit_images.close(got, wanted, what, eps)
        assert layer.grads(threads, lanes, of_x, dw=False)[0].equal(dx), what
        assert layer.grads(threads, lanes, of_x, dx=False)[0].equal(dw), what


@pytest.mark.parametrize("seed", range(3))
def test_operators_of_convolutions(seed: int) -> None:
    rng = random.Random(seed)
    for layer in unit_images.convolutions(6, 3000 + seed):
        torch.set_num_threads(1 + seed % 2)
        layer.bank = layer.bank.to(layer.x.dtype)
        layer.choose(*both(rng, layer.p.shape))
        exact = layer.exact()
        for results in (layer.results(), layer.results("")):
            for got, wanted in zip(results, exact, strict=True):
                unit_images.close(got, wanted, str(layer), torch.finfo(layer.x.dtype).eps)


@pytest.mark.parametrize("granularity", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_count_of_a_block(granularity: int, dtype: torch.dtype) -> None:
    """From one element to all, of a whole block beside one that ends before its vectors do."""
    rng = random.Random(granularity)
    size = 2 * granularity - 5
    for count in (1, 2, 7, 8, 9, 15, 16, 17, granularity - 1, granularity, size - 1):
        for batch in (2, 20):
            layer = Layer((40, size), batch, granularity=granularity, dtype=dtype, slots=90)
            layer.choose(sorted(rng.sample(range(40), 21)), sorted(rng.sample(range(size), count)))
            layer.check()


@pytest.mark.parametrize("batch", [3, 20])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_octets_groups_and_blocks_without_any(batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for rows, columns in (
        (range(1000, 1030), range(70, 80)),
        ([5, 2029], [0, 249]),
        ([*range(16, 64), *range(1500, 1600, 7)], [*range(64, 128), 200]),
        (range(2030), [130]),
        ([2029], range(250)),
    ):
        layer = Layer((2030, 250), batch, laps=2, window=64)
        layer.choose(rows, columns)
        layer.check()


@pytest.mark.parametrize("batch", [1, 3, 20, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_chosen_is_not_met(batch: int, dtype: torch.dtype) -> None:
    """Infinities of the bank that only other rows or columns read."""
    for columns in ([*range(1, 110, 2)], None, [3], [*range(64, 110)]):
        for rows in (range(0, 77, 2), None, [*range(8), 70]):
            layer = Layer((77, 110), batch, dtype=dtype, laps=3, slots=400)
            layer.choose(rows, columns)
            unread = torch.ones(layer.bank.numel(), dtype=torch.bool)
            unread[layer.index] = False
            assert unread.any()
            for value in (INFINITY, NAN):
                layer.bank.view(-1)[unread] = value
                results = layer.check()
                for dw in (results[2], results[4]):
                    assert not dw.flatten()[unread].any(), layer


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_infinities_of_convolutions_stay_where_they_are(stride: tuple[int, int]) -> None:
    for rows, columns in ((range(0, 30, 2), range(1, 70, 3)), ([7], None), (None, [1, 69])):
        layer = Convolution(
            (30, 70, 3, 3), 2, (7, 9), stride=stride, padding=(1, 1), bias=False,
            taps=1 if stride[0] > 1 else None, slots=400,
        )  # fmt: skip
        layer.choose(rows, columns)
        unread = torch.ones(layer.bank.numel(), dtype=torch.bool)
        unread[layer.index] = False
        for value in (1.0, INFINITY, NAN):
            layer.bank.view(-1)[unread] = value
            for name in unit_images.NAMES:
                unit_images.where_numbers_end(layer, name)
        layer.bank.view(-1)[unread] = 1.0
        for tensor in (layer.x, layer.dy, layer.bank):
            kept, flat = tensor.clone(), tensor.view(-1)
            place = layer.index.flatten()[0] if tensor is layer.bank else len(flat) // 2
            flat[place] = INFINITY
            for name in unit_images.NAMES:
                unit_images.where_numbers_end(layer, name)
            tensor.copy_(kept)


def test_a_selection_of_all_is_none() -> None:
    p = Placement(Generator(100, 32, "vector", laps=2), 0, 0, (6, 64), 1.0)
    assert selection(p.select(0, range(6)).to_json()) is None
    assert selection(p.narrow(1, 0, 63).to_json()) is not None


def test_products_shrink_with_columns_and_groups() -> None:
    g = Generator(1 << 14, 64, "vector", laps=4)
    whole = Placement(g, 0, 0, (4096, 256), 1.0)

    def count(p: Placement) -> int:
        return units.multiplications(p.to_json())

    assert count(whole) == 4096 * 256 // 4
    assert count(whole.select(1, range(0, 256, 2))) == count(whole) // 2
    assert count(whole.select(0, range(0, 4096, 2))) == count(whole)
    assert count(whole.narrow(0, 0, 2048)) == count(whole) // 2
    assert units.reads(whole.select(0, range(0, 4096, 2)).to_json()) == 2


def test_such_calls_run_here_and_explain_says_so() -> None:
    bank = rpg.ParameterBank(256_000, granularity=64, laps=4)
    layer = bank.place((512, 256))
    weight = layer.select(0, range(0, 512, 2)).select(1, range(1, 256, 2))
    x = torch.randn(64, 128)
    for op, of in (("linear", x), ("linear_input_grad", torch.randn(64, 256))):
        call = Call(op, of, weight.placement.to_json(), bank=bank.weight)
        assert rules.Cpu().takes(call)
        assert "shared by the rows that read it, 2 on average" in rules.Cpu().explain(call)


def test_weights_of_other_laws_and_tiles_are_left() -> None:
    p = Placement(Generator(100, 32, "vector"), 0, 0, (6, 64), 1.0).narrow(0, 0, 3)
    for op in ("linear", "conv2d"):
        assert rules.unsupported_weight(op, p.to_json())


def bad_selections() -> list[tuple[Any, ...]]:
    return [
        ([], None), (None, []), ([0, 0], None), ([1, 0], None), ([-1, 3], None),
        ([0, 40], None), (None, [0, 64]), (None, [5, 4]), (None, [1 << 30]),
    ]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns"), bad_selections())
def test_bad_lists_are_refused(rows: list[int] | None, columns: list[int] | None) -> None:
    with pytest.raises(ValueError, match="ascending"):
        native.selection(rows, columns, (40, 64))


def test_selections_of_other_weights_are_refused() -> None:
    p = Placement(Generator(100, 32, "vector", laps=2), 0, 0, (40, 64), 1.0)
    law = native.layer_law(p.law)
    for shape in ((40, 65), (48, 64)):
        part = native.selection([1], [2], shape)
        with pytest.raises(ValueError, match="selection: that of another weight"):
            law.unit_linear_workspace(20, 64, 1, 16, selection=part)
        with pytest.raises(ValueError, match="selection: that of another weight"):
            law.unit_linear_grads_workspace(20, 64, 1, 16, True, True, selection=part)
    part = native.selection([1], [2], (40, 64))
    with pytest.raises(ValueError, match="of units alone"):
        law.tile_linear_workspace(20, 64, 1, 16, selection=part)
    how: tuple[Any, ...] = ((1, 1), True, (1, 1), (0, 0), (1, 1), 1, 1, 1)
    for channels in (64, 2):
        with pytest.raises(ValueError, match="size: wanted the selection's channels"):
            law.unit_conv2d_workspace((1, channels, 4, 4), *how, selection=part)
        with pytest.raises(ValueError, match="size: wanted the selection's channels"):
            law.unit_conv2d_grads_workspace((1, channels, 4, 4), *how, True, True, selection=part)


def check_pages() -> None:
    """The program of the processes below: nothing is read or written beyond any tensor."""
    rng = random.Random(5)
    for layer in unit_images.convolutions(16, 4000):
        layer.choose(*both(rng, layer.p.shape))
        for name in ("x", "dy", "bank"):
            setattr(layer, name, guard_pages.moved(getattr(layer, name).contiguous()))
        may_pair = layer.x.dtype == torch.bfloat16 and layer.bank.dtype != torch.float16
        layer.pairs = may_pair and rng.random() < 0.7
        height, lanes = layer.x.shape[2], rng.choice([1, 8, 16])
        layer.forward(rng.choice([1, 3]), lanes, rng.randint(1, layer.dy.shape[2]))
        strided = max(layer.how[0]) > 1
        layer.grads(rng.choice([1, 3]), lanes, height if strided else rng.randint(1, height))
    for linear in unit_layers.layers(16, 5000):
        linear.choose(*both(rng, linear.p.shape))
        for name in ("x", "dy", "bank"):
            setattr(linear, name, guard_pages.moved(getattr(linear, name).contiguous()))
        linear.results()


def check_all() -> None:
    """The program of the processes below, in which another instruction set is chosen."""
    tests: list[Callable[[int], None]] = [test_linear_layers, test_convolutions]
    with pytest.MonkeyPatch.context() as monkeypatch:
        for _ in unit_layers.guard(monkeypatch):
            for test in tests:
                test(20)
    check_pages()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected as Linux does it")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_with_every_instruction_set(isa: str) -> None:
    if isa not in native.build_info()["isas"]:
        pytest.skip(f"{isa} is not compiled in")
    program = "import test_cpu_selections as t; t.check_all()"
    done = processes.python(program, RPG_KERNELS_ISA=isa)
    if f"RPG_KERNELS_ISA: got {isa}" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
