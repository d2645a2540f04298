"""The correctness gate: what it takes for exact is exact, and what is wrong does not pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import bench_tools as tools
import brute_force as brute
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import baselines, gate
from benchmarks.harness.cases import DTYPES
from benchmarks.harness.problem import Problem, Stack

OPS = ("linear", "conv2d", "embedding")
NAMES = ("dense", "published", "unpack", "rpg-reference")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("reflect", ["element", "vector", "none"])
def test_the_map_is_the_laws(op: str, reflect: str) -> None:
    problem = Problem(tools.case(op, reflect=reflect), tools.CPU)
    index, sign = problem.index_and_sign()
    wanted_index, wanted_sign = brute.index_and_sign(problem.weight)
    assert torch.equal(index, wanted_index)
    assert torch.equal(sign.double(), wanted_sign)
    if op == "embedding":
        rows = problem.rows
        assert rows is not None
        assert torch.equal(problem.map()[0], index[rows])
        assert torch.equal(problem.map()[1], sign[rows])


@pytest.mark.parametrize("op", OPS)
def test_exact_results_against_brute_force(op: str) -> None:
    problem = Problem(tools.case(op, dtype="bf16"), tools.CPU)
    wanted = gate.exact(problem)
    ring = brute.ring(problem.bank)
    weight = brute.unpack(problem.weight, ring)
    x = problem.x.detach()
    x = x.double().requires_grad_() if x.is_floating_point() else x
    if op == "linear":
        y = F.linear(x, weight)
    elif op == "conv2d":
        y = F.conv2d(x, weight, None, 2, 1)
    else:
        y = F.embedding(x, weight)
    leaves = [ring] if op == "embedding" else [ring, x]
    grads = torch.autograd.grad(y, leaves, problem.dy.double())
    brute.assert_exact(wanted.output.exact, y.detach(), "output")
    brute.assert_exact(wanted.bank_grad.exact.flatten(), grads[0], "bank gradient")
    if op == "embedding":
        assert wanted.input_grad is None
    else:
        assert wanted.input_grad is not None
        brute.assert_exact(wanted.input_grad.exact, grads[1], "input gradient")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", NAMES)
def test_what_is_right_passes(op: str, dtype: str, name: str) -> None:
    problem = Problem(tools.case(op, dtype=dtype), tools.CPU)
    stack = baselines.IMPLEMENTATIONS[name].build(problem, copies=2)
    accuracy = gate.check(problem, stack, gate.exact(problem))
    missed = gate.failures(accuracy)
    if name == "published" and dtype in ("bf16", "fp16"):
        # Its bank gradient adds up in the bank's dtype, and may miss; nothing else may.
        missed = [sentence for sentence in missed if "parameter grad" not in sentence]
    assert not missed
    assert set(accuracy) == {"output", "parameter_grad"} | (
        set() if op == "embedding" else {"input_grad"}
    )
    for i in range(2):  # layer 1 works too
        assert stack.forward(i).shape == problem.case.output_shape


def one_off(y: Tensor) -> Tensor:
    off = torch.zeros_like(y)
    off[(0,) * y.dim()] = 1e-3
    return y + off


def no_gradient_of_x(y: Tensor) -> Tensor:
    return y * 1.0 + 0.5 * (y - y.detach())


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (one_off, ()),
        (lambda y: y * float("nan"), ()),
        (lambda y: y.flip(0), ()),
        (no_gradient_of_x, ("forward",)),
        (lambda y: y, ("forward", "backward", "full")),
    ],
)
def test_what_is_wrong_does_not_pass(
    change: Callable[[Tensor], Tensor], passes: tuple[str, ...]
) -> None:
    problem = Problem(tools.case(), tools.CPU)
    stack = tools.changed(change)(problem, 1)
    accuracy = gate.check(problem, stack, gate.exact(problem))
    assert gate.allowed_passes(accuracy) == passes
    assert bool(gate.failures(accuracy)) == (len(passes) < 3)


def test_a_wrong_shape_does_not_pass() -> None:
    quantity = gate.Quantity(torch.zeros(2, 3, dtype=torch.float64), 1.0)
    assert math.isinf(quantity.judge(torch.zeros(3, 2)).error)
    assert not quantity.judge(torch.zeros(3, 2)).passed
    assert quantity.judge(torch.ones(2, 3)).passed
    assert not quantity.judge(torch.full((2, 3), 1.01)).passed


def test_another_map_is_judged_by_itself() -> None:
    """As rz_linear is: its own index, without signs."""
    problem = Problem(tools.case(), tools.CPU)
    index = torch.randint(problem.bank.dof, problem.case.layer.weight)
    sign = torch.ones_like(index, dtype=torch.int8)
    bank = problem.bank.weight
    stack = Stack(
        1,
        lambda i: F.linear(problem.x, bank.view(-1)[index]),
        lambda i: [bank],
        own_map=(index, sign, 1.0),
    )
    assert not gate.failures(gate.check(problem, stack, gate.exact(problem, stack.own_map)))
    assert gate.failures(gate.check(problem, stack, gate.exact(problem)))


def test_rz_linear_is_refused_with_a_reason() -> None:
    refuse = baselines.IMPLEMENTATIONS["rz_linear"].refuse
    assert "not installed" in refuse(tools.case(), tools.CPU)


def test_rz_linear_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the package's interface: the adapter reads its map off and judges it."""
    import sys
    import types

    class RzLinear(torch.nn.Module):
        def __init__(self, columns: int, rows: int, *, hashed_weight: Tensor, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.index = torch.randint(hashed_weight.numel(), (columns, rows))
            self._hashed_weight = torch.nn.Parameter(hashed_weight)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self._hashed_weight[self.index]

    package, module = types.ModuleType("rz_linear"), types.ModuleType("rz_linear.RzLinearFunction")
    module.controls = {"triton_allow_tf32": True}  # type: ignore[attr-defined]
    package.RzLinear = RzLinear  # type: ignore[attr-defined]
    package.__path__ = []
    package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "rz_linear", package)
    monkeypatch.setitem(sys.modules, "rz_linear.RzLinearFunction", module)

    refuse = baselines.IMPLEMENTATIONS["rz_linear"].refuse
    cuda = torch.device("cuda")
    assert "on CUDA only" in refuse(tools.case(), tools.CPU)
    assert "on CUDA only" in refuse(tools.case("conv2d"), cuda)
    assert "multiples of 32" in refuse(tools.case(), cuda)

    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    problem = Problem(tools.case(), tools.CPU)
    stack = baselines.IMPLEMENTATIONS["rz_linear"].build(problem, copies=2)
    assert torch.equal(drawn, torch.rand(1))
    assert module.controls == {"triton_allow_tf32": False}  # type: ignore[attr-defined]
    assert not gate.failures(gate.check(problem, stack, gate.exact(problem, stack.own_map)))
    assert not torch.equal(stack.forward(0), stack.forward(1))
