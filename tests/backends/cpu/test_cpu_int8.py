"""Products of int8 of the unit law against written-out weights and rows, in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator

import brute_force as brute
import processes
import pytest
import torch
import unit_layers
from torch import Tensor
from unit_layers import Layer

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.cpu import lanes_linear
from rpg_kernels.backends.cpu.int8 import INT8, Int8Units
from rpg_kernels.backends.reference.linear import SMALLEST, rounded_rows
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import Placement

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")

INFINITY, NAN = float("inf"), float("nan")
FAMILIES = [Int8Units(way) for way in range(native.int8_products() + 1)]
op = torch.ops.rpg_kernels


@pytest.fixture(autouse=True)
def workspaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes in bytes of what the kernels were given to work in."""
    yield from unit_layers.guard(monkeypatch)


def stored(slots: int, granularity: int, seed: int, present: float = 1.0) -> StoredValues:
    """Random codes with scales; of ``present`` < 1 so many slots, at places in any order."""
    made = torch.Generator().manual_seed(seed)
    here, places = torch.rand(slots, generator=made) < present, None
    rows = int(here.sum())
    if present < 1:
        places = torch.full((slots,), -1, dtype=torch.int32)
        places[here] = torch.randperm(rows, generator=made).int()
    codes = torch.randint(-127, 128, (rows, granularity), generator=made).to(torch.int8)
    return StoredValues(codes, torch.rand(rows, generator=made) / 64, places, activations="int8")


def weight(layer: Layer, values: StoredValues, dtype: torch.dtype = torch.float64) -> Tensor:
    """The virtual weight [N, K] that codes and scales stand for, written out."""
    rows = values.codes.to(dtype) * values.scales.to(dtype)[:, None]
    if values.places is not None:
        rows = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))[values.places.long()]
    read = rows.flatten()[layer.index] * layer.sign.flatten()
    return (read * layer.p.scale).view(layer.p.shape).to(dtype)


def rows_of(x: Tensor) -> Tensor:
    """Rows of x in float32, rounded to int8 and back, one after the other."""
    out = []
    for row in x.float().flatten(0, -2):
        most = row.abs().max()
        if not bool(most.isfinite()):
            out.append(torch.full_like(row, NAN))
        elif bool(most < SMALLEST):
            out.append(torch.zeros_like(row))
        else:
            codes = (row.numpy() * (127 / most).numpy()).round()  # ties to even
            out.append(torch.from_numpy(codes) * (most / 127))
    return torch.stack(out).view(x.shape) if out else x.float()


def run(family: Int8Units, layer: Layer, values: StoredValues) -> Tensor:
    return lanes_linear.linear(family, layer.x, values, layer.bias, layer.spec)


def check(layer: Layer, values: StoredValues) -> Tensor:
    """As exact as torch in fp32 with rounded rows, and the same bits by every way to multiply."""
    x = rows_of(layer.x)
    bias = None if layer.bias is None else layer.bias.float()
    torchs = torch.nn.functional.linear(x, weight(layer, values, torch.float32), bias)
    exact = torch.nn.functional.linear(
        x.double(), weight(layer, values), None if bias is None else bias.double()
    )
    results = [run(family, layer, values) for family in FAMILIES]
    for way, y in enumerate(results):
        assert y.dtype == layer.dtype
        brute.assert_accurate(y, exact, torchs.to(layer.dtype), f"way {way}: {layer}")
        assert y.equal(results[0]), f"way {way}: {layer}"
    return results[0]


def check_all(count: int = 4, seeds: range = range(8)) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        for layer in unit_layers.layers(count, seed):
            slots, granularity = layer.bank.shape
            present = rng.choice([0.0, 0.3, 0.9, 1.0, 1.0, 1.0])
            check(layer, stored(slots, granularity, rng.randrange(999), present))


@pytest.mark.parametrize("seed", range(8))
def test_against_the_written_out_weight(seed: int, workspaces: list[int]) -> None:
    check_all(8, range(seed, seed + 1))
    assert workspaces


@pytest.mark.parametrize("batch", range(1, 71, 3))
def test_batches_of_all_sizes(batch: int) -> None:
    torch.set_num_threads(1 + batch % 3)
    check(Layer((130, 150), batch, granularity=32), stored(700, 32, batch))
    check(
        Layer((70, 257), batch, granularity=128, laps=9, slots=90, bias=False),
        stored(90, 128, batch),
    )


@pytest.mark.parametrize("slots", [1, 2, 5, 7, 8, 9, 15, 16, 17, 24, 40, 41])
def test_rings_smaller_than_a_window(slots: int) -> None:
    for batch, present in ((2, 1.0), (2, 0.5), (20, 1.0), (20, 0.5)):
        layer = Layer((200, 90), batch, granularity=32, slots=slots, laps=2, start=10**9)
        check(layer, stored(slots, 32, batch, present))


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("batch", [1, 2, 3, 20, 70])
def test_sums_are_whole_numbers(block: int, batch: int) -> None:
    """With scales of one nothing is rounded but x, whose rows are whole numbers already."""
    layer = Layer((300, 4 * block), batch, granularity=block, scale=1.0, bias=False)
    made = torch.Generator().manual_seed(block)
    for low, high in ((-128, 128), (127, 128), (-128, -127)):
        codes = torch.randint(low, high, (700, block), generator=made).to(torch.int8)
        values = StoredValues(codes, torch.ones(700), activations="int8")
        layer.x = torch.randint(-127, 128, layer.x.shape, generator=made).float()
        layer.x[:, 0] = 127
        layer.x[0] = -127
        exact = layer.x.long() @ weight(layer, values).long().T
        for family in FAMILIES:
            assert run(family, layer, values).long().equal(exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [3, 4, 12])
def test_rows_of_all_magnitudes(dtype: torch.dtype, batch: int) -> None:
    layer = Layer((150, 130), 2 * batch, dtype=dtype)
    large, small = (6e4, 1e-7) if dtype == torch.float16 else (1e30, 1e-30)
    for row, factor in enumerate((0.0, large / 8, small, 1.0)):
        layer.x[row] *= factor
    layer.x[4], layer.x[5] = 0.75, torch.finfo(dtype).smallest_normal / 2
    values, x = stored(700, 64, 1), layer.x
    for part in (x[:batch], x[batch:]):  # each row by a kernel that takes so many
        for row in range(len(part)):
            layer.x = part[row : row + 1] if batch < 12 else part
            rows = rows_of(layer.x).double()
            exact = rows @ weight(layer, values).T + layer.bias.double()
            for family in FAMILIES:
                y = run(family, layer, values).double()
                off = (y - exact).abs().amax(1)
                # A relative error of each row, and what numbers below the normal ones lose.
                most = exact.abs().amax(1)
                assert (off <= 4 * torch.finfo(dtype).eps * most + 1e-30).all() or (
                    dtype == torch.float16 and not y.isfinite().all()
                )


@pytest.mark.parametrize("batch", [4, 20])
def test_rows_that_are_no_numbers(batch: int) -> None:
    layer = Layer((150, 130), batch)
    values = stored(700, 64, 2)
    wanted = run(INT8, layer, values)
    layer.x[0, 3], layer.x[2, 129], layer.x[3, 0] = NAN, INFINITY, -INFINITY
    for family in FAMILIES:
        y = run(family, layer, values)
        assert y[[0, 2, 3]].isnan().all()
        rest = [row for row in range(batch) if row not in (0, 2, 3)]
        assert y[rest].equal(wanted[rest])


@pytest.mark.parametrize("batch", [3, 20])
@pytest.mark.parametrize("present", [0.5, 1.0])
def test_memory_that_is_not_aligned(batch: int, present: float) -> None:
    layer = Layer((100, 110), batch, dtype=torch.bfloat16)
    values = stored(700, 64, 3, present)
    wanted = [run(family, layer, values) for family in FAMILIES]
    for name in ("codes", "scales", "places"):
        part = getattr(values, name)
        if part is not None:
            setattr(values, name, part.new_empty(part.numel() + 1)[1:].view(part.shape).copy_(part))
    layer.x = layer.x.new_empty(layer.x.numel() + 1)[1:].view(layer.x.shape).copy_(layer.x)
    for family, exact in zip(FAMILIES, wanted, strict=True):
        assert run(family, layer, values).equal(exact)


def test_numbers_of_threads_change_rounding_only() -> None:
    for batch in (2, 70):
        layer, values = Layer((1030, 250), batch), stored(700, 64, 4)
        results = []
        for threads in (1, 2, 3, 5, 40):  # of 4 columns, so some have none
            torch.set_num_threads(threads)
            results.append(check(layer, values))
        assert any(not results[0].equal(other) for other in results)


@pytest.mark.parametrize("leading", [(0,), (3, 0), (), (2, 3)])
def test_leading_dimensions(leading: tuple[int, ...], workspaces: list[int]) -> None:
    layer, values = Layer((100, 110), leading or (1,)), stored(700, 64, 5)
    layer.x = layer.x.view(*leading, 110)
    y = op.linear(layer.x, values, None, layer.bias, layer.spec, "cpu")
    assert y.shape == (*leading, 100)
    if y.numel():
        flat = op.linear(layer.x.view(-1, 110), values, None, layer.bias, layer.spec, "cpu")
        assert y.flatten().equal(flat.flatten())
    assert bool(workspaces) == bool(y.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("batch", [1, 9])
def test_the_reference(dtype: torch.dtype, batch: int) -> None:
    layer, values = Layer((90, 110), batch, dtype=dtype), stored(700, 64, 6, 0.8)
    values = values.double() if dtype == torch.float64 else values
    layer.x[0, 5] = NAN if batch > 1 else 1
    y = op.linear(layer.x, values, None, layer.bias, layer.spec, "reference")
    assert y.dtype == dtype
    if dtype == torch.float64:
        exact = rounded_rows(layer.x) @ weight(layer, values).T + layer.bias
        # A value of the bank is rounded to float32 when its code meets its scale.
        torch.testing.assert_close(y, exact, equal_nan=True, rtol=1e-5, atol=1e-5)
        return
    ours = run(INT8, layer, values)
    torch.testing.assert_close(ours, y, equal_nan=True, **tolerance(dtype))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Sums in another order, then one rounding."""
    return {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-4 if dtype != torch.float32 else 2e-5}


def test_rounded_rows_are_those_of_plain_loops() -> None:
    made = torch.Generator().manual_seed(7)
    x = torch.randn(40, 33, generator=made) * 10.0 ** torch.randint(
        -30, 30, (40, 1), generator=made
    )
    x[3], x[4, 2], x[5, 0] = 0, NAN, INFINITY
    x[6] = torch.arange(33) - 16.5  # ties, of steps of one
    x[6, 0] = 127
    codes = [[round(float(value * (127 / row.abs().max()))) for value in row] for row in x[6:]]
    plain = torch.tensor(codes) * (x[6:].abs().amax(1, keepdim=True) / 127)
    assert rounded_rows(x)[6:].equal(plain)
    torch.testing.assert_close(rounded_rows(x), rows_of(x), rtol=0, atol=0, equal_nan=True)


def test_what_rounds_rows() -> None:
    """Linear layers of the unit law alone, and only where the bank asks for it."""
    layer, values = Layer((90, 110), 9), stored(700, 64, 8)
    kept = StoredValues(values.codes, values.scales)
    rounds = op.linear(layer.x, values, None, None, layer.spec, "cpu")
    assert rounds.equal(run_without_bias(layer, values))
    keeps = op.linear(layer.x, kept, None, None, layer.spec, "cpu")
    assert not keeps.equal(rounds)
    for name in ("linear_input_grad",):
        arguments = (layer.dy, values, None, layer.spec, "cpu")
        assert getattr(op, name)(*arguments).equal(
            getattr(op, name)(layer.dy, kept, *arguments[2:])
        )
    p = Placement(Generator(700, 64, "vector"), 0, 0, (90, 110), 1.0).to_json()  # of law 1
    assert op.linear(layer.x, values, None, None, p, "cpu").equal(
        op.linear(layer.x, kept, None, None, p, "cpu")
    )


def run_without_bias(layer: Layer, values: StoredValues) -> Tensor:
    return lanes_linear.linear(INT8, layer.x, values, None, layer.spec)


def test_dispatch_takes_them() -> None:
    layer, values = Layer((90, 110), 9), stored(700, 64, 9)
    y = op.linear(layer.x, values, None, layer.bias, layer.spec, "")
    assert y.equal(run(INT8, layer, values))


def test_too_little_scratch() -> None:
    layer, values = Layer((900, 110), 40), stored(700, 64, 10)
    wanted = run(INT8, layer, values)
    for limit in brute.scratch_limits(lambda: run(INT8, layer, values)):
        with rpg.scratch_limit(limit):
            torch.testing.assert_close(run(INT8, layer, values), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_a_processor_with_less(isa: str) -> None:
    if isa not in native.build_info()["isas"]:
        pytest.skip(f"{isa} is not compiled in")
    program = "import test_cpu_int8 as t; t.check_all(); print(t.native.build_info()['isa'])"
    done = processes.python(program, RPG_KERNELS_ISA=isa)
    if f"RPG_KERNELS_ISA: got {isa}" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert (done.returncode, done.stdout) == (0, f"{isa}\n"), done.stderr


def test_tiles_are_left_as_they_were() -> None:
    """torch's own products of tiles in the same thread, before and after."""
    layer, values = Layer((90, 110), 40), stored(700, 64, 11)
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    before = a @ b
    wanted = run(INT8, layer, values)
    for _ in range(3):
        assert run(INT8, layer, values).equal(wanted)
        assert (a @ b).equal(before)
