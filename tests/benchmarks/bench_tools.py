"""Tiny cases and implementations for the tests of the benchmark harness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import baselines, harness
from benchmarks.harness.baselines import Implementation
from benchmarks.harness.cases import Case, Layer
from benchmarks.harness.problem import Problem, Stack

CPU = torch.device("cpu")
OURS = baselines.IMPLEMENTATIONS["rpg-reference"]
LAYERS = {
    "linear": Layer("linear", ("tiny.linear",), (24, 20)),
    "conv2d": Layer("conv2d", ("tiny.conv2d",), (12, 8, 3, 3), image=7, stride=2),
    "embedding": Layer("embedding", ("tiny.embedding",), (50, 12)),
}


def case(op: str = "linear", **settings: Any) -> Case:
    """A case that takes no time; 200 DoF, so that most elements are used more than once."""
    chosen: dict[str, Any] = {"batch": 3, "dof": 200, "granularity": 8, "reflect": "element"}
    return Case(LAYERS[op], **(chosen | settings))


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[Problem, int], Stack]:
    """Our layers with something done to their output."""

    def build(problem: Problem, copies: int) -> Stack:
        stack = OURS.build(problem, copies)
        return Stack(copies, lambda i: change(stack.forward(i)), stack.trained)

    return build


def implementation(
    name: str, build: Callable[[Problem, int], Stack], expected: int = 0
) -> Implementation:
    """An implementation for a test, which expects to need so many bytes."""
    return Implementation(
        name, "for a test", lambda c, d: "", lambda c: c.weight_bytes, lambda c: expected, build
    )


def install(monkeypatch: pytest.MonkeyPatch, *added: Implementation) -> None:
    """Make implementations known by name."""
    table = baselines.IMPLEMENTATIONS | {made.name: made for made in added}
    monkeypatch.setattr(baselines, "IMPLEMENTATIONS", table)


def run(*impls: str, cases: list[Case] | None = None, **options: Any) -> dict[str, Any]:
    """A run without roofline that lasts as short as it can."""
    settings: dict[str, Any] = {
        "device": "cpu", "seconds": 0.0, "roofs": False, "show": lambda line: None,
    }  # fmt: skip
    return harness.run(cases or [case()], impls=impls, **(settings | options))
