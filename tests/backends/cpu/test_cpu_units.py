"""The compiled CPU kernels of the unit law against written-out weights, in float64."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import processes
import pytest
import torch
import unit_layers
from torch import Tensor
from unit_layers import NAMES, Layer

from rpg_kernels import native
from rpg_kernels.backends.cpu import lanes_linear
from rpg_kernels.backends.cpu.units import UNITS

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")

INFINITY, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def workspaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes in bytes of what the kernels were given to work in."""
    yield from unit_layers.guard(monkeypatch)


@pytest.mark.parametrize("seed", range(8))
def test_against_the_written_out_weight(seed: int, workspaces: list[int]) -> None:
    for layer in unit_layers.layers(8, seed):
        first = layer.check()
        assert len(workspaces) == 4, layer
        for name, one, again in zip(NAMES, first, layer.results(), strict=True):
            assert one.equal(again), f"{name}: {layer}"
        workspaces.clear()


# A unit of one octet, of one more than the entries that are made together, and of many; and layers
# of several groups, the first of which are larger.
@pytest.mark.parametrize("rows", [1, 8, 8 * 33, 8 * 65, 8 * 129, 8 * 517])
@pytest.mark.parametrize("batch", [1, 20])
def test_units_of_all_sizes(rows: int, batch: int) -> None:
    for laps, window in ((1, 4096), (64, None), (5, 8), (3, 248)):
        Layer((rows, 32), batch, granularity=32, laps=laps, window=window, slots=1000).check()


@pytest.mark.parametrize("slots", [1, 2, 5, 7, 8, 9, 15, 16, 17, 24, 40, 41])
def test_rings_smaller_than_a_window(slots: int) -> None:
    for batch, threads in ((2, 1), (3, 4), (20, 1), (20, 2), (20, 5)):
        torch.set_num_threads(threads)
        Layer((200, 90), batch, granularity=32, slots=slots, laps=2, start=10**9).check()


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_zones_that_end_inside_an_octet(threads: int) -> None:
    """What threads own of a ring ends between octets, inside of them, and behind its end."""
    torch.set_num_threads(threads)
    for slots, laps, start in (
        (333, 1, 0),
        (334, 3, 12345678),
        (336, 3, 7 * 10**6),
        (339, 1, 10**6),
    ):
        for batch in (6, 17):
            layer = Layer((150, 70), batch, granularity=32, slots=slots, laps=laps, start=start)
            layer.check()


def test_numbers_of_threads_change_rounding_only() -> None:
    layer = Layer((1030, 250), 70, laps=4)
    results = []
    for threads in (1, 2, 3, 4, 5, 40):  # of 4 columns, so some have none
        torch.set_num_threads(threads)
        results.append(layer.check())
    assert any(not one.equal(two) for one, two in zip(results[0], results[2], strict=True))
    # As many tiles of lanes as threads: each tile is one thread's.
    assert results[0][0].equal(results[1][0])


def test_both_gradients_are_those_of_one() -> None:
    for batch in (3, 40):
        torch.set_num_threads(2)
        _, dx, dw, both_dx, both_dw = Layer((300, 110), batch, laps=3).results()
        assert dx.equal(both_dx)
        assert dw.equal(both_dw)


@pytest.mark.parametrize("name", ["x", "dy", "bank", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [3, 20])
def test_memory_that_is_not_aligned(name: str, dtype: torch.dtype, batch: int) -> None:
    layer = Layer((100, 110), batch, dtype=dtype)
    wanted, tensor = layer.results(), getattr(layer, name)
    apart = tensor.new_full((*tensor.shape, 2), NAN)[..., 1]
    shifted = tensor.new_full((tensor.numel() + 1,), NAN)[1:].view(tensor.shape)
    turned = tensor.t().contiguous().t() if tensor.dim() > 1 else shifted
    for other in (shifted, apart, turned):
        setattr(layer, name, other.copy_(tensor))
        for got, exact in zip(layer.results(), wanted, strict=True):
            assert got.equal(exact)


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (3, 1, 2)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    layer = Layer((100, 110), leading or (1,))
    layer.x, layer.dy = layer.x.view(*leading, 110), layer.dy.view(*leading, 100)
    y, dx, _, both_dx, _ = results = layer.results()
    assert (y.shape, dx.shape, both_dx.shape) == (layer.dy.shape, layer.x.shape, layer.x.shape)
    layer.x, layer.dy = layer.x.view(-1, 110), layer.dy.view(-1, 100)
    for got, wanted in zip(results, layer.results(), strict=True):
        assert got.flatten().equal(wanted.flatten())


@pytest.mark.parametrize("leading", [(0,), (0, 3), (3, 0)])
def test_empty_batches(leading: tuple[int, ...], workspaces: list[int]) -> None:
    y, dx, dw, both_dx, both_dw = Layer((100, 110), leading).results()
    assert y.shape == (*leading, 100)
    assert dx.shape == both_dx.shape == (*leading, 110)
    assert dw.shape == both_dw.shape == (700, 64)
    assert not dw.any()
    assert not both_dw.any()
    assert not workspaces


def test_rows_of_zeros() -> None:
    for batch in (2, 20):
        layer = Layer((100, 110), batch, bias=False)
        layer.x[1], layer.dy[1] = 0, 0
        y, dx, *_ = layer.check()
        assert not y[1].any()
        assert not dx[1].any()


def unread(layer: Layer) -> Tensor:
    """Of the bank's elements, those that are no virtual weight: slots, and padding of blocks."""
    out = torch.ones(layer.bank.numel(), dtype=torch.bool)
    out[layer.index] = False
    return out


def check_infinities(layer: Layer) -> None:
    """What is no number is there, and only there, where the definition puts it."""
    results = layer.results()
    for name, got, exact in zip(NAMES, results, layer.defined(torch.float64), strict=True):
        what, finite = f"{name}: {layer}", exact.isfinite()
        assert got.isfinite().equal(finite), what
        # Backward, slots add up what their rows share before it meets an infinity.
        if name == "y":
            kinds = [result.nan_to_num(2, 3, 4)[~finite].double() for result in (got, exact)]
            assert kinds[0].equal(kinds[1]), what
        got, exact = (torch.where(finite, result.double(), 0.0) for result in (got, exact))
        assert (got - exact).abs().max() <= 0.02 * exact.abs().max() + 1e-4, what
    unused = unread(layer)
    for dw in (results[2], results[4]):
        assert not dw.flatten()[unused].any(), layer


KINDS = [
    {"laps": 1, "slots": 700},
    {"laps": 3, "slots": 101},
    {"laps": 4, "slots": 700, "granularity": 32},
    {"laps": 7, "slots": 700, "start": 10**7, "permute": False},
    {"laps": 64, "slots": 30, "granularity": 128},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 5, 70])
def test_infinities_stay_where_they_are(kind: dict[str, int], batch: int) -> None:
    for rows, columns, dtype, threads, values in (
        (13, 110, torch.float32, 1, (INFINITY, NAN, -INFINITY)),
        (301, 110, torch.float32, 2, (-INFINITY, INFINITY, NAN)),
        (77, 60, torch.bfloat16, 1, (NAN, -INFINITY, INFINITY)),
    ):
        torch.set_num_threads(threads)
        layer = Layer((rows, columns), batch, dtype=dtype, bias=False, **kind)  # type: ignore[arg-type]
        unused = unread(layer)
        for value in (INFINITY, NAN):
            layer.bank.view(-1)[unused] = value
            results = layer.check()
            for dw in (results[2], results[4]):
                assert not dw.flatten()[unused].any(), layer
        for tensor, value in zip((layer.x, layer.dy, layer.bank), values, strict=True):
            kept, flat = tensor.clone(), tensor.view(-1)
            flat[layer.index[columns // 2] if tensor is layer.bank else len(flat) // 2] = value
            check_infinities(layer)
            tensor.copy_(kept)


@pytest.mark.parametrize("rows", [1, 9, 12, 100])
def test_slots_that_padding_rows_would_read(rows: int) -> None:
    """Rows behind the last share its octets' slots: infinities of x reach no gradient of them."""
    layer = Layer((rows, 64), 6, laps=1, slots=1000, bias=False)
    padding = Layer((-(-rows // 8) * 8, 64), 6, laps=1, slots=1000)
    assert unread(layer).sum() > unread(padding).sum()
    layer.x[2, 5] = INFINITY
    check_infinities(layer)


def check_all() -> None:
    """The program of the process below, in which another instruction set is chosen."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for _ in unit_layers.guard(monkeypatch):
            for layer in unit_layers.layers(16, seed=100):
                layer.check()
            # Units of less than the entries that are made together.
            for rows in (1, 100, 8 * 33, 8 * 97):
                for batch in (1, 4, 20):
                    Layer((rows, 90), batch, granularity=32).check()


def peak(call: Callable[[], object]) -> int:
    """Bytes that the process grows by in a call."""
    Path("/proc/self/clear_refs").write_text("5")
    status = [Path("/proc/self/status").read_text()]
    call()
    status.append(Path("/proc/self/status").read_text())
    sizes = [
        re.findall(rf"Vm{name}:\s+(\d+) kB", s)[0]
        for name, s in zip(("RSS", "HWM"), status, strict=True)
    ]
    return 1024 * (int(sizes[1]) - int(sizes[0]))


def check_memory() -> None:
    """The program of the process below, whose memory nobody else uses."""
    torch.set_num_threads(2)
    layer = Layer((2000, 4096), 256, bias=False)
    x, dy, bank = layer.x, layer.dy, layer.bank
    lanes_linear.linear_grads(UNITS, dy[:1], bank, x[:1], layer.spec, bank.dtype)
    for name, call, results in (
        ("linear", lambda: lanes_linear.linear(UNITS, x, bank, None, layer.spec), dy.nbytes),
        (
            "linear_input_grad",
            lambda: lanes_linear.linear_input_grad(UNITS, dy, bank, layer.spec),
            x.nbytes,
        ),
        (
            "linear_grads",
            lambda: lanes_linear.linear_grads(UNITS, dy, bank, x, layer.spec, bank.dtype),
            x.nbytes + bank.nbytes,
        ),
    ):
        step = UNITS.check(name, layer.spec, len(x))
        grown = peak(call)
        assert step.workspace > 2 << 20, name
        assert grown <= step.workspace + results + (1 << 20), (name, grown, step, results)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc to write to")
def test_memory_is_what_is_counted() -> None:
    done = processes.python("import test_cpu_units as t; t.check_memory(); print('right')")
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_a_processor_with_less(isa: str) -> None:
    if isa not in native.build_info()["isas"]:
        pytest.skip(f"{isa} is not compiled in")
    program = "import test_cpu_units as t; t.check_all(); print(t.native.build_info()['isa'])"
    done = processes.python(program, RPG_KERNELS_ISA=isa)
    if f"RPG_KERNELS_ISA: got {isa}" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert (done.returncode, done.stdout) == (0, f"{isa}\n"), done.stderr


def test_sums_of_many_rows_are_as_exact_as_torchs() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for shape, laps in (((4096, 128), 1), ((64, 4096), 2)):
            Layer(shape, 5, slots=6000, laps=laps, bias=False, dtype=dtype).check()
