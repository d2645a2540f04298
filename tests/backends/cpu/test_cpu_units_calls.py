"""Where the CPU kernels of the unit law are called from: operators, transforms, limits, counts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import unit_layers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from unit_layers import Layer

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.backends.cpu import lanes, lanes_linear, units
from rpg_kernels.backends.cpu.units import UNITS
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import Placement

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")

op = torch.ops.rpg_kernels


@pytest.fixture(autouse=True)
def workspaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes in bytes of what the kernels were given to work in."""
    yield from unit_layers.guard(monkeypatch)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that the kernels of the unit law have run."""
    seen: list[str] = []
    check = units.Units.check

    def checked(self: units.Units, name: str, *how: Any) -> lanes.Lanes:
        seen.append(name)
        return check(self, name, *how)

    monkeypatch.setattr(units.Units, "check", checked)
    return seen


def close(got: Tensor, wanted: Tensor, unit: float = 1e-5) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert got.isfinite().all()
    assert (got - wanted).abs().max() <= unit * wanted.abs().max()


def leaves(layer: Layer) -> tuple[Tensor, Tensor]:
    return layer.x.clone().requires_grad_(), layer.bank.clone().requires_grad_()


@pytest.mark.parametrize("batch", [3, 70])
@pytest.mark.parametrize("name", lanes.PRODUCTS)
def test_scratch_limits(name: str, batch: int, workspaces: list[int]) -> None:
    torch.set_num_threads(2)
    layer = Layer((300, 110), batch)
    x, dy, bank, spec = layer.x, layer.dy, layer.bank, layer.spec
    arguments = {
        "linear": (x, bank, None, spec),
        "linear_input_grad": (dy, bank, spec),
        "linear_bank_grad": (dy, x, spec, bank.dtype),
        "linear_grads": (dy, bank, x, spec, bank.dtype),
    }[name]
    call = partial(getattr(lanes_linear, name), UNITS)
    wanted = call(*arguments)
    steps = lanes._choices(UNITS, name, spec, batch, 2)
    assert [step.threads for step in steps] == sorted((s.threads for s in steps), reverse=True)
    assert {step.lanes for step in steps} == set(UNITS.lanes(name, layer.p, batch))
    for step in steps:
        workspaces.clear()
        with rpg.scratch_limit(step.scratch):
            taken = UNITS.steps(name, spec, batch)
            results = call(*arguments)
        assert taken is not None
        assert taken.scratch <= step.scratch
        assert steps.index(taken) <= steps.index(step)
        assert workspaces == [taken.workspace]
        for got, exact in zip(tuple_of(results), tuple_of(wanted), strict=True):
            close(got, exact)
    least = min(step.scratch for step in steps)
    assert UNITS.smallest(name, spec, batch) == least
    with rpg.scratch_limit(least - 1):
        assert UNITS.steps(name, spec, batch) is None
        with pytest.raises(RuntimeError, match=f"got {least - 1} bytes, wanted at least {least} "):
            call(*arguments)


def tuple_of(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def test_scratch_for_one_gradient_at_a_time(ran: list[str]) -> None:
    """Both at once take more scratch than either: then they are made one after the other."""
    layer = Layer((300, 110), 20)
    of_one, of_both = (
        max(UNITS.smallest(name, layer.spec, 20) for name in names)
        for names in (lanes.PRODUCTS[:3], lanes.PRODUCTS[3:])
    )
    assert of_one < of_both
    wanted = layer.results("reference")
    for backend in ("", "cpu"):
        ran.clear()
        with rpg.scratch_limit(of_both - 1):
            results = layer.results(backend)
        assert ran == [*lanes.PRODUCTS[:3], *lanes.PRODUCTS[1:3]]
        for got, exact in zip(results, wanted, strict=True):
            close(got, exact)


@pytest.mark.parametrize("rows", [8, 64, 100, 1000, 2053, 4096])
@pytest.mark.parametrize(("laps", "window"), [(1, None), (3, 64), (4, None), (16, 248)])
def test_reads_and_multiplications(rows: int, laps: int, window: int | None) -> None:
    """Against the octets of slots that each unit reads, counted position by position."""
    for columns, start in ((64 * 5, 0), (250, 10**7)):
        g = Generator(1 << 22, 64, "vector", window=window, laps=laps)  # no slot is read again
        p = Placement(g, 2, start // (512 * laps) * 512 * laps, (rows, columns), 1.0)
        n, b = torch.arange(rows)[:, None], torch.arange(p.matrix.blocks)
        octets = p.law.slot(n, b) // 8
        column, group, _, _ = p.law.number(*torch.broadcast_tensors(n, b), 0)
        read = (
            torch.stack((b.expand_as(octets), column, group, octets), -1)
            .flatten(0, 1)
            .unique(dim=0)
        )
        elements = (columns - 64 * read[:, 0]).clamp(max=64)
        for name in lanes.PRODUCTS[:3]:
            assert UNITS.multiplications(name, p.to_json()) == 8 * int(elements.sum())
        assert units.reads(p.to_json()) == pytest.approx(rows * columns / (8 * int(elements.sum())))


def test_explain_says_how_many_rows_share() -> None:
    bank = rpg.ParameterBank(64 * 700, laps=4)
    for rows, shared in ((4096, "4"), (1000, "3.91"), (8, "1")):
        layer = rpg.nn.Linear(64, rows, bank=bank)
        wanted = f"shared by the rows that read it, {shared} on average"
        assert f"{units.reads(layer.virtual_weight.spec):.3g}" == shared
        explained = rpg.explain(layer, torch.empty(5, 64))
        assert (explained.backend, wanted in explained.reason) == ("cpu", True), explained
        with rpg.backend("cpu"):
            assert rpg.explain(layer, torch.empty(5, 64)) == explained
            assert rpg.explain(layer, torch.empty(0, 64)).backend == "cpu"
    explained = rpg.explain(layer, torch.empty(33, 64))  # dense products, of a gathered weight
    assert (explained.backend, "gathered" in explained.reason) == ("cpu", True), explained
    with rpg.scratch_limit(1000):
        assert rpg.explain(layer, torch.empty(5, 64)).backend == "reference"


def test_refusals() -> None:
    small = rpg.ParameterBank(64 * 512, granularity=4, laps=2)
    with rpg.backend("cpu"), pytest.raises(RuntimeError, match="16 to 128 elements, not of 4"):
        rpg.functional.linear(torch.randn(2, 64), small.place((100, 64)))
    element = rpg.ParameterBank(64 * 512, reflect="element", laps=2)
    with rpg.backend("cpu"), pytest.raises(RuntimeError, match="one sign for a slot use"):
        rpg.functional.linear(torch.randn(2, 64), element.place((100, 64)))


def test_gradients_of_both_gradients() -> None:
    def second(backend: str, of_dx: float, of_dw: float) -> list[Tensor]:
        layer = Layer((100, 110), 6)
        x, bank = leaves(layer)
        dy = layer.dy.clone().requires_grad_()
        y = op.linear(x, bank, None, layer.bias, layer.spec, backend)
        dx, dw = torch.autograd.grad(y, (x, bank), dy, create_graph=True)
        losses = [dx.pow(3).sum() * of_dx] * (of_dx > 0) + [dw.pow(2).sum()] * (of_dw > 0)
        grads = torch.autograd.grad(sum(losses), (x, bank, dy), allow_unused=True)
        found = zip(grads, (x, bank, dy), strict=True)
        return [torch.zeros_like(t) if grad is None else grad for grad, t in found]

    results = {}
    for which in ((0.1, 0), (0, 1), (0.1, 1)):
        results[which] = second("cpu", *which)
        for got, wanted in zip(results[which], second("reference", *which), strict=True):
            close(got, wanted, 1e-4)
    # Derivatives of a sum are sums, and nothing of either is lost.
    for of_dx, of_dw, of_both in zip(*results.values(), strict=True):
        close(of_both, of_dx + of_dw, 1e-4)


def test_infinities_of_what_is_not_differentiated() -> None:
    """Of the two gradients only dx is; x, which it does not depend on, may hold anything."""
    layer = Layer((100, 110), 6)
    layer.x[2, 3] = float("inf")
    dy, bank = layer.dy.clone().requires_grad_(), layer.bank
    dx, _ = op.linear_grads(dy, bank, None, layer.x, layer.spec, bank.dtype, "cpu")
    (ddy,) = torch.autograd.grad(dx.sum(), dy)
    assert ddy.isfinite().all()


def float64s() -> tuple[Layer, tuple[Any, ...]]:
    layer = Layer((5, 18), 2, slots=30, granularity=16, laps=2, dtype=torch.float64, bias=False)
    x, dy, bank = (t.clone().requires_grad_() for t in (layer.x, layer.dy, layer.bank))
    return layer, (dy, bank, None, x, layer.spec, torch.float64, "")


def test_derivatives_by_differences() -> None:
    _, arguments = float64s()
    assert torch.autograd.gradcheck(op.linear_grads, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(op.linear_grads, arguments, fast_mode=True)


def test_opcheck() -> None:
    layer = Layer((20, 110), 6, slots=50)
    x, bank = leaves(layer)
    dy = layer.dy.clone().requires_grad_()
    for backend in ("", "cpu", "reference"):
        arguments = (dy, bank, None, x, layer.spec, bank.dtype, backend)
        torch.library.opcheck(op.linear_grads.default, arguments)
    torch.library.opcheck(op.linear_grads.default, float64s()[1])


@pytest.mark.parametrize("batched", ["dy", "x", "bank", "dy x", "dy x bank"])
@pytest.mark.parametrize("backend", ["", "cpu", "reference"])
def test_vmap(batched: str, backend: str) -> None:
    layer, names, samples = Layer((100, 110), 5), batched.split(), 3
    operands = {"dy": layer.dy, "bank": layer.bank, "x": layer.x}
    for i, name in enumerate(names):
        operands[name] = torch.randn(samples, *operands[name].shape).movedim(0, i)
    dims = [names.index(name) if name in names else None for name in operands]

    def both(dy: Tensor, bank: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return op.linear_grads(dy, bank, None, x, layer.spec, bank.dtype, backend)

    results = torch.vmap(both, tuple(dims))(*operands.values())
    for i in range(samples):
        one = [
            tensor if dim is None else tensor.select(dim, i)
            for tensor, dim in zip(operands.values(), dims, strict=True)
        ]
        for got, wanted in zip(results, both(*one), strict=True):
            close(got[i], wanted)


def test_gradients_in_batches() -> None:
    layer = Layer((100, 110), 5)
    x, bank = leaves(layer)
    y = op.linear(x, bank, None, layer.bias, layer.spec, "cpu")
    dy = torch.randn(3, *y.shape)
    together = torch.autograd.grad(y, (x, bank), dy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        alone = torch.autograd.grad(y, (x, bank), dy[i], retain_graph=True)
        for got, wanted in zip(together, alone, strict=True):
            close(got[i], wanted)


def test_gradients_of_samples() -> None:
    layer = Layer((100, 110), 5)

    def loss(bank: Tensor, x: Tensor) -> Tensor:
        return op.linear(x, bank, None, None, layer.spec, "cpu").pow(2).sum()

    both = torch.func.grad(loss, (0, 1))
    together = torch.vmap(both, (None, 0))(layer.bank, layer.x)
    for i, x in enumerate(layer.x):
        for got, wanted in zip(together, both(layer.bank, x), strict=True):
            close(got[i], wanted)


@pytest.mark.parametrize("frozen", ["", "bank", "x"])
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_which_gradients_are_made(frozen: str, backend: str, ran: list[str]) -> None:
    layer = rpg.nn.Linear(110, 100, bank=rpg.ParameterBank(64 * 700, laps=4))
    bank = layer.virtual_weight.bank
    bank.weight.requires_grad_(frozen != "bank")
    x = torch.randn(6, 110, requires_grad=frozen != "x")
    with rpg.backend(backend):
        y = layer(x)
    y.sum().backward()  # on what the forward ran on
    grads = {"": "linear_grads", "bank": "linear_input_grad", "x": "linear_bank_grad"}[frozen]
    assert ran == ([] if backend == "reference" else ["linear", grads])
    assert (bank.weight.grad is None, x.grad is None) == (frozen == "bank", frozen == "x")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_counted_flops(shared: bool, backend: str) -> None:
    """As a dense layer's, or what is really multiplied."""
    layer = rpg.nn.Linear(110, 1024, bank=rpg.ParameterBank(64 * 700, laps=4))
    x = torch.randn(6, 110, requires_grad=True)
    mapping = rpg.flops.shared_products() if shared else None
    with rpg.backend(backend), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        layer(x).sum().backward()
    of_row = 256 * 110 if shared else 1024 * 110
    of = {
        str(name).rpartition(".")[2]: n for name, n in counter.get_flop_counts()["Global"].items()
    }
    assert of == {"linear": 2 * 6 * of_row, "linear_grads": 4 * 6 * of_row}


def test_compiled_whole() -> None:
    layer = rpg.nn.Linear(110, 100, bank=rpg.ParameterBank(64 * 700, laps=4, init_std=1.0))

    def step(x: Tensor) -> Tensor:
        return layer(x).relu().pow(2).sum()

    x = torch.randn(6, 110, requires_grad=True)
    bank = layer.virtual_weight.bank.weight
    wanted = torch.autograd.grad(step(x), (x, bank))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, exact in zip(torch.autograd.grad(compiled(x), (x, bank)), wanted, strict=True):
        close(got, exact)


def test_autocast(ran: list[str]) -> None:
    layer = rpg.nn.Linear(110, 100, bank=rpg.ParameterBank(64 * 700, laps=4, init_std=1.0))
    x = torch.randn(6, 110, requires_grad=True)
    bank = layer.virtual_weight.bank.weight
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    got = torch.autograd.grad(y.float().sum(), (x, bank))
    assert ran == ["linear", "linear_grads"]
    for one, exact in zip(got, torch.autograd.grad(layer(x).sum(), (x, bank)), strict=True):
        close(one, exact, 2e-2)


def test_training_steps() -> None:
    """A network of several layers, one of whose weights two layers share."""
    torch.set_num_threads(2)
    dense = nn.Sequential(
        nn.Linear(96, 250), nn.GELU(), nn.Linear(250, 250), nn.GELU(), nn.Linear(250, 40)
    )
    config = rpg.RPGConfig(dof=64 * 300, granularity=64, laps=4)
    net = rpg.convert(dense, config, filter_fn=lambda module, name: True)
    xs, wanted = torch.randn(3, 12, 96), torch.randn(3, 12, 40)
    trained = {}
    for backend in ("cpu", "reference"):
        one = copy.deepcopy(net)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
        for x, target in zip(xs, wanted, strict=True):
            optimizer.zero_grad()
            with rpg.backend(backend):
                nn.functional.mse_loss(one(x), target).backward()
            optimizer.step()
        trained[backend] = [p.detach() for p in one.parameters()]
    moved = 0
    for got, exact, before in zip(*trained.values(), net.parameters(), strict=True):
        close(got, exact)
        moved += not torch.equal(got, before)
    assert moved == len(trained["cpu"])
