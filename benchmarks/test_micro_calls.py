"""Cost of a call in Python: operators on weights so small that nothing else takes time.

    python -m pytest benchmarks -k call --benchmark-timer=time.process_time

Each of ours stands beside what it replaces.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpg_kernels as rpg
from rpg_kernels import models

SIZE = 8


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def forward(kind: str, x: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
    """A linear layer's forward, and what it trains."""
    if kind == "torch":
        weight = torch.randn(SIZE, SIZE, requires_grad=True)
        return lambda: F.linear(x, weight), weight
    bank = rpg.ParameterBank(dof=SIZE * SIZE, granularity=SIZE)
    if kind == "module":
        layer = rpg.nn.Linear(SIZE, SIZE, bias=False, bank=bank)
        return lambda: layer(x), bank.weight
    virtual = bank.place((SIZE, SIZE))
    return lambda: rpg.functional.linear(x, virtual), bank.weight


@pytest.mark.parametrize("kind", ["torch", "functional", "module"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_call_linear(benchmark: Callable[..., object], kind: str, grad: bool) -> None:
    call, _ = forward(kind, torch.randn(1, SIZE, requires_grad=True))
    with torch.set_grad_enabled(grad):
        benchmark(call)


@pytest.mark.parametrize("kind", ["torch", "functional"])
def test_call_linear_with_backward(benchmark: Callable[..., object], kind: str) -> None:
    x = torch.randn(1, SIZE, requires_grad=True)
    call, trained = forward(kind, x)
    dy = torch.ones(1, SIZE)
    benchmark(lambda: torch.autograd.grad(call(), (x, trained), dy))


def test_call_place(benchmark: Callable[..., object]) -> None:
    def place() -> None:
        bank = rpg.ParameterBank(dof=64, granularity=8, device="meta")
        for _ in range(20):
            bank.place((64, 64))

    benchmark(place)


def test_call_convert(benchmark: Callable[..., object]) -> None:
    """ResNet-18 on the meta device: nothing but Python."""

    def convert() -> nn.Module:
        with torch.device("meta"):
            model = models.resnet18(10)
        return rpg.convert(model, rpg.RPGConfig(dof=2_000_000))

    benchmark(convert)


def test_call_placement_from_text(benchmark: Callable[..., object]) -> None:
    """What an operator does with its placement: parsed once, then looked up."""
    from rpg_kernels.law.placement import parse

    text = rpg.ParameterBank(dof=64, granularity=8).place((8, 8)).spec
    benchmark(lambda: parse(text))
