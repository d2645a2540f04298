"""Clocks: what a call takes, on a CPU and on a GPU, and how samples become figures.

On a CPU every call is read on two clocks. ``process`` counts the time that the process computed;
``wall`` also counts the time that it waited while others computed. With one thread ``process`` is
the figure to quote: on an idle machine the two agree, and on a busy one only ``wall`` grows. With
several threads ``process`` adds up threads that spin while they wait for each other, so ``wall``
is quoted.

On a GPU ``graph`` is the time of a call inside a captured CUDA graph, which has no launch gaps;
``eager`` is the time between two events around a call as Python makes it. ``graph`` is quoted.

``cold`` runs layers in turn, so that a layer's data comes from memory, as in a network; ``warm``
runs the same layer again, whose data is then in the cache where it fits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.harness.cases import PASSES
from benchmarks.harness.problem import Problem, Stack

COLD, WARM = "cold", "warm"
_MAX_CALLS = 100
_SLOW = 0.2  # seconds of a call that is not repeated only to warm up


@dataclass
class Work:
    """One implementation's layers, to be run one after the other.

    Args:
        problem: x and dy.
        stack: the layers.
        passes: that may run; a back end may have a forward only.
    """

    problem: Problem
    stack: Stack
    passes: tuple[str, ...] = PASSES
    _next: int = field(init=False, default=0)
    _turn: int = field(init=False, default=0)

    def layer(self, state: str) -> int:
        """The layer to run now: the next one when cold, always the first when warm."""
        if state == WARM:
            return 0
        self._next = (self._next + 1) % self.stack.copies
        return self._next

    @property
    def with_gradients(self) -> bool:
        """Whether a backward may run too."""
        return self.passes == PASSES

    def backward(self, i: int, y: Tensor, retain: bool = False) -> Sequence[Tensor]:
        """Gradients of layer i by its inputs and what it trains."""
        leaves = [*self.problem.inputs, *self.stack.trained(i)]
        return torch.autograd.grad(y, leaves, self.problem.dy, retain_graph=retain)

    def prepare(self, kind: str, state: str) -> Callable[[], object]:
        """What to time for one call of a pass; a backward's forward has been run by then."""
        i = self.layer(state)
        self.problem.x = self._input(state)
        if kind == "forward":
            return lambda: self._forward(i)
        if kind == "full":
            return lambda: self.backward(i, self.stack.forward(i))
        y = self.stack.forward(i)
        return lambda: self.backward(i, y)

    def _input(self, state: str) -> Tensor:
        """x of the call to be made: the next one when cold, always the first when warm."""
        if state == WARM:
            return self.problem.turns[0]
        self._turn = (self._turn + 1) % len(self.problem.turns)
        return self.problem.turns[self._turn]

    def _forward(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.stack.forward(i)


Sample = dict[str, float]  # clock -> seconds of one call
_T = TypeVar("_T")


def quoted(clocks: Mapping[str, _T], headline: str) -> _T | None:
    """What to quote of figures by clock: the headline's, else the only one there is.

    A call that could not be captured in a graph has no figure there. None of no figures.

    Example:
        >>> quoted({"eager": 2.0}, "graph"), quoted({"eager": 2.0, "graph": 1.0}, "graph")
        (2.0, 1.0)
    """
    return clocks.get(headline, next(iter(clocks.values()), None))


def cpu_headline(threads: int) -> str:
    """The clock to quote: process time counts nothing of other work, but adds up all threads."""
    return "process" if threads == 1 else "wall"


class CpuClock:
    """Times calls on a CPU.

    Args:
        threads: that torch uses; one makes process time the headline.
        shortest: seconds that a sample should last.
    """

    def __init__(self, threads: int, shortest: float = 2e-3) -> None:
        self.headline = cpu_headline(threads)
        self.shortest = shortest
        self._calls: dict[tuple[int, str, str], int] = {}

    def sample(self, work: Work, kind: str, state: str) -> Sample:
        """Seconds of a call on each clock, the mean of as many as ``shortest`` asks for."""
        key = (id(work), kind, state)
        if key not in self._calls:
            once = self._run(work, kind, state, 1)["wall"]
            if once < _SLOW:  # the first call also warms up
                once = self._run(work, kind, state, 2)["wall"]
            self._calls[key] = min(_MAX_CALLS, max(1, int(self.shortest / max(once, 1e-9))))
        return self._run(work, kind, state, self._calls[key])

    def note(self, work: Work) -> str | None:
        """Nothing to say."""
        return None

    def forget(self) -> None:
        """Forget how many calls made a sample."""
        self._calls.clear()

    def _run(self, work: Work, kind: str, state: str, calls: int) -> Sample:
        process = wall = 0
        for _ in range(calls):
            call = work.prepare(kind, state)
            wall_begin, process_begin = time.perf_counter_ns(), time.process_time_ns()
            call()
            process += time.process_time_ns() - process_begin
            wall += time.perf_counter_ns() - wall_begin
        return {"process": process * 1e-9 / calls, "wall": wall * 1e-9 / calls}
