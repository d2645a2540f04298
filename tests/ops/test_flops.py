"""torch's FLOP counter reports what it reports for the dense network, whatever runs it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import brute_force as brute
import other_torchvision
import processes
import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.model_summary import ModelSummary
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import rpg_kernels as rpg
from rpg_kernels.backends import registry
from rpg_kernels.backends.call import OPERATORS, Call
from rpg_kernels.backends.reference.rules import Reference
from rpg_kernels.functional import linear
from rpg_kernels.law.placement import parse
from rpg_kernels.ops import _flops

assert other_torchvision  # which Lightning imports where it is installed
Run = Callable[[nn.Module, Tensor], Any]
CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"dilation": 2, "padding": (2, 0)},
    {"groups": 2, "stride": (1, 2)},
    {"groups": 8, "padding": "same"},
    {"groups": 4, "stride": 2, "dilation": 2, "padding": 2},
]
LEADING = [(), (1,), (5,), (2, 3), (0,), (2, 1, 2, 2)]


def counts(run: Callable[[], Any], **settings: Any) -> dict[str, int]:
    """FLOPs by the name of the module."""
    with FlopCounterMode(display=False, **settings) as counter:
        run()
    return {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}


def forward(net: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        net(x)


def training(net: nn.Module, x: Tensor) -> None:
    net(x).square().sum().backward()


def training_from_leaf(net: nn.Module, x: Tensor) -> None:
    net(x.detach().requires_grad_()).square().sum().backward()


def input_gradient(net: nn.Module, x: Tensor) -> None:
    net.requires_grad_(False)
    training_from_leaf(net, x)
    net.requires_grad_()


RUNS = [forward, training, training_from_leaf, input_gradient]


def converted(net: nn.Module) -> nn.Module:
    config = rpg.RPGConfig(dof=512, granularity=8)
    return rpg.convert(copy.deepcopy(net), config, filter_fn=lambda m, n: True)


def compare(net: nn.Module, x: Tensor, run: Run) -> None:
    """Module by module, and in all."""
    shared = converted(net)
    wanted = counts(lambda: run(net, x))
    got = counts(lambda: run(shared, x))
    assert wanted["Global"] > 0 or not x.numel()
    # A Sequential runs the bank, its last module, which gives back what it is given. The counter
    # says of such modules, torch.nn.Identity too, that the backward pass of others is theirs.
    got.pop("Sequential.rpg_bank", None)
    assert {name: n for name, n in got.items() if n} == {n: m for n, m in wanted.items() if m}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(leading: tuple[int, ...], bias: bool, run: Run) -> None:
    net = nn.Sequential(nn.Linear(12, 7, bias), nn.ReLU(), nn.Linear(7, 20, bias))
    compare(net, torch.randn(*leading, 12), run)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_conv2d(geometry: dict[str, Any], run: Run) -> None:
    net = nn.Sequential(
        nn.Conv2d(8, 16, (3, 2), **geometry), nn.ReLU(), nn.Conv2d(16, 3, 1, bias=False)
    )
    compare(net, torch.randn(2, 8, 9, 11), run)


@pytest.mark.parametrize("run", [forward, training])
def test_embedding(run: Run) -> None:
    net = nn.Sequential(nn.Embedding(11, 12), nn.Linear(12, 5))
    compare(net, torch.randint(11, (2, 3)), run)
    shared = converted(net)[0]
    assert counts(lambda: run_embedding(shared))["Global"] == 0


def run_embedding(table: nn.Module) -> None:
    table(torch.tensor([1, 2])).sum().backward()


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_formula(name: str) -> None:
    assert _flops.packet(name) in flop_counter.flop_registry


def test_unpack_and_pack_multiply_nothing() -> None:
    weight = brute.bank_of(300, granularity=8).place((6, 20))
    assert counts(lambda: weight.pack(weight.unpack()))["Global"] == 0


def test_gradients_of_gradients_are_products_too() -> None:
    weight = brute.bank_of(300, granularity=8).place((6, 20))
    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)

    def twice() -> None:
        y = linear(x, weight)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        torch.autograd.grad(dx.sum(), [x, weight.bank.weight])

    product = 2 * 3 * 6 * 20
    # y, dx and dbank, which nobody asked for but a Python function cannot know that; then of dx by
    # dy and by the bank, and of y by x and by the bank.
    assert counts(twice)["Global"] == 7 * product


@pytest.mark.parametrize("limit", [5_000, 1 << 22])
@pytest.mark.parametrize("run", RUNS)
def test_the_reference_is_counted_from_outside(run: Run, limit: int) -> None:
    """Its own products, of which there are several with little scratch, are not counted."""
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 20))
    with rpg.backend("reference"), rpg.scratch_limit(limit):
        compare(net, torch.randn(2, 8, 4, 4), run)


def test_calls_by_keyword() -> None:
    weight = brute.bank_of(300, granularity=8).place((6, 20))
    arguments = {"x": torch.randn(3, 20, dtype=torch.float64), "bank": weight.bank.weight}
    arguments |= {"table": None, "bias": None, "placement": weight.spec, "backend": ""}
    run = lambda: torch.ops.rpg_kernels.linear(**arguments)  # noqa: E731
    for settings in ({}, {"custom_mapping": rpg.flops.shared_products()}):
        assert counts(run, **settings)["Global"] == 2 * 3 * 6 * 20


def test_meta_tensors() -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 20))
    x, meta = torch.randn(2, 8, 4, 4), torch.empty(2, 8, 4, 4, device="meta")
    wanted = counts(lambda: training(net, x))["Global"]
    shared = converted(net).to("meta")
    assert counts(lambda: training(shared, meta))["Global"] == wanted
    by_call = {"custom_mapping": rpg.flops.shared_products()}
    assert counts(lambda: training(shared, meta), **by_call)["Global"] == wanted


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("when", ["compiled while counting", "compiled before"])
def test_compiled_networks(compiler: str, when: str) -> None:
    net = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 20))
    x, shared = torch.randn(3, 12), converted(net)
    wanted = counts(lambda: training(net, x))["Global"]
    torch._dynamo.reset()
    fast = torch.compile(shared, backend=compiler)
    if when == "compiled before":
        training(fast, x)
    assert counts(lambda: training(fast, x))["Global"] == wanted


class Halves(Reference):
    """A back end that says that it makes half of a linear layer's multiplications."""

    name = "halves"

    def multiplications(self, call: Call) -> int | None:
        return call.rows * parse(call.placement).numel // 2 if call.op == "linear" else None

    def operator(self, call: Call) -> Callable[..., Tensor]:
        return registry.find("reference").operator(call)


def test_back_ends_say_what_they_multiply() -> None:
    weight = brute.bank_of(300, granularity=8).place((6, 20))
    x = torch.randn(3, 20, dtype=torch.float64)
    product = 2 * 3 * 6 * 20
    registry.register(Halves())
    try:
        for name, forward in (("halves", product // 2), ("reference", product)):
            with rpg.backend(name):
                run = lambda: linear(x, weight).sum().backward()  # noqa: E731
                mapping = rpg.flops.shared_products()
                assert counts(run, custom_mapping=mapping)["Global"] == forward + product
                assert counts(run)["Global"] == 2 * product
    finally:
        registry.unregister("halves")


def test_lightnings_summary() -> None:
    class Module(LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.example_input_array = net, torch.randn(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    net = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 20))
    dense = ModelSummary(Module(net)).total_flops
    assert ModelSummary(Module(converted(net))).total_flops == dense == 2 * 4 * (12 * 7 + 7 * 20)


PRODUCT = 2 * 2 * 8 * 4  # y, and the gradient of the bank
COUNT = """
layer = rpg.nn.Linear(8, 4, bank=rpg.ParameterBank(dof=64, granularity=8))
with FlopCounterMode(display=False) as counter:
    layer(torch.ones(2, 8)).sum().backward()
print(counter.get_total_flops())
"""
# Looked for without being imported, then imported by several threads at once.
COUNTER_LAST = f"""
import importlib.util, inspect, sys, threading
import torch, rpg_kernels as rpg
name = "torch.utils.flop_counter"
assert importlib.util.find_spec(name) and importlib.util.find_spec(name)
assert name not in sys.modules
threads = [threading.Thread(target=importlib.import_module, args=(name,)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
from torch.utils.flop_counter import FlopCounterMode
{COUNT}
module = sys.modules[name]
print([f for f in sys.meta_path if type(f).__module__.startswith("rpg")])
print(vars(module.__loader__).keys() - {{"name", "path"}}, "mm_flop" in inspect.getsource(module))
"""
# And what somebody registered before stays.
COUNTER_FIRST = f"""
import torch, torch.utils.flop_counter as flop_counter
from torch.utils.flop_counter import FlopCounterMode
import rpg_kernels as rpg
from rpg_kernels.ops import _flops
{COUNT}
flop_counter.flop_registry[torch.ops.rpg_kernels.linear] = lambda *args, out_val: 7
_flops.register()
{COUNT}
"""


def test_the_counter_may_be_imported_last() -> None:
    result = processes.python(COUNTER_LAST)
    assert result.returncode == 0, result.stderr
    # Nothing is left behind: no finder, and the module's loader is as it was.
    assert result.stdout.splitlines() == [str(2 * PRODUCT), "[]", "set() True"]


def test_the_counter_may_be_imported_first() -> None:
    result = processes.python(COUNTER_FIRST)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(2 * PRODUCT), str(PRODUCT + 7)]
