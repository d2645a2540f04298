"""The tensors of one group: dense weights, banks, virtual weights, and what is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.cases import DTYPES, Case
from benchmarks.harness.cpu.grid import GRANULARITY, REFERENCE, Bank, Group, Point
from benchmarks.harness.gate import Accuracy, Quantity, quantity
from benchmarks.harness.problem import MAX_COPIES, images_last
from rpg_kernels import functional
from rpg_kernels.backends import dispatch
from rpg_kernels.backends.call import Call
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight

_CHUNK = 1 << 22  # weights that are written out at a time in float64


@dataclass(frozen=True)
class Job:
    """Something to time.

    Args:
        point: what it is.
        call: runs layer i of ``copies``; gives y.
        copies: layers to run in turn.
        backend: that runs it: ``"torch"``, ``"cpu"``, ``"reference"``.
        weight: the first of its virtual weights; None of a dense layer.
        weights: elements of the weight.
        weight_bytes: of the weight, as if it were stored.
        dtype: of x, as torch names it.
    """

    point: Point
    call: Callable[[int], Tensor]
    copies: int
    backend: str
    weight: VirtualWeight | None
    weights: int
    weight_bytes: int
    dtype: str


class Subject:
    """A group on the CPU; random, the same for the same seed.

    Dense weights are so many that twice the last-level cache is read between two uses of one. A
    bank's layers are so many that together they read as much, or the whole bank where that is
    smaller: what a network would find in the cache is found there, nothing else.

    Args:
        group: what to measure.
        cache_bytes: of the last-level cache.
        seed: of all values.
    """

    def __init__(self, group: Group, cache_bytes: int, seed: int) -> None:
        self.group = group
        self.cache_bytes = cache_bytes
        self.dtype = DTYPES[group.dtype][0]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            most = self.case(max((*group.batches, *group.referred_batches)))
            self._x = images_last(torch.randn(most.input_shape).to(self.dtype))
            banks = (*group.banks, *group.referred)
            self._banks = {bank: self._bank(bank, self.dtype) for bank in banks}

    def case(self, batch: int) -> Case:
        """Shapes of the layer at a batch."""
        return Case(self.group.layer, batch, dtype=self.group.dtype)

    def x(self, batch: int) -> Tensor:
        """The first rows or images of the input."""
        return images_last(self._x[:batch])

    def _bank(self, bank: Bank, dtype: torch.dtype) -> ParameterBank:
        return ParameterBank(bank.dof, GRANULARITY, laps=bank.laps, window=bank.window, dtype=dtype)

    def _weights(self, bank: Bank) -> list[VirtualWeight]:
        parameters, shape = self._banks[bank], self.group.layer.weight
        scale = 1 / (parameters.init_std * math.sqrt(math.prod(shape[1:])))
        size = parameters.weight.nbytes
        read = min(size, math.prod(shape) * self.dtype.itemsize // (bank.laps or 1))
        copies = min(MAX_COPIES, 1 + -(-min(2 * self.cache_bytes, size) // read))
        return [parameters.place(shape, scale=scale) for _ in range(copies)]

    def jobs(self) -> list[Job]:
        """Everything to time."""
        group, weights = self.group, {b: self._weights(b) for b in self._banks}
        layer = weights[group.banks[0]][0].unpack().detach()
        copies = min(MAX_COPIES, 1 + -(-2 * self.cache_bytes // layer.nbytes))
        dense = [images_last(layer), *(images_last(layer).clone() for _ in range(copies - 1))]
        return [
            self._dense_job(point, dense)
            if point.bank is None
            else self._job(point, weights[point.bank])
            for point in group.points()
        ]

    def _dense_job(self, point: Point, dense: list[Tensor]) -> Job:
        x = self.x(point.batch)

        def call(i: int) -> Tensor:
            return self.apply(x, dense[i])

        return Job(point, call, len(dense), "torch", None, *self._sizes)

    def _job(self, point: Point, weights: list[VirtualWeight]) -> Job:
        x, layer = self.x(point.batch), self.group.layer
        forced = "reference" if point.impl == REFERENCE else None

        def ours(i: int) -> Tensor:
            if layer.op == "linear":
                return functional.linear(x, weights[i])
            return functional.conv2d(x, weights[i], None, layer.stride, layer.padding)

        def call(i: int) -> Tensor:
            if forced is None:
                return ours(i)
            with dispatch.backend(forced):
                return ours(i)

        bank = weights[0].bank.weight
        how = Call(layer.op, x, weights[0].spec, bank, layer.geometry, forced or "")
        chosen = dispatch.choose(how).name
        return Job(point, call, len(weights), chosen, weights[0], *self._sizes)

    @property
    def _sizes(self) -> tuple[int, int, str]:
        case = self.case(1)
        name = str(self.dtype).removeprefix("torch.")
        return case.layer.virtual_weights, case.weight_bytes, name

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """torch's product of x with a weight in torch's layout."""
        layer = self.group.layer
        if layer.op == "linear":
            return torch.nn.functional.linear(x, weight)
        return torch.nn.functional.conv2d(x, weight, None, layer.stride, layer.padding)

    def wanted(self, bank: Bank, weight: VirtualWeight) -> dict[int, Quantity]:
        """By batch, what a bank's first layer should give in float64, and the error allowed: twice
        what torch makes of the same weight rounded to the dtype (see ``gate``), at that batch,
        since torch has other routines for one row than for many."""
        exact_bank = self._bank(bank, torch.float64)
        with torch.no_grad():
            exact_bank.weight.copy_(weight.bank.weight)
        whole = VirtualWeight(exact_bank, weight.placement)
        shape = self.group.layer.weight
        step = max(1, _CHUNK // math.prod(shape[1:]))
        x = self._x.double()
        batches = dict.fromkeys((*self.group.batches, *self.group.referred_batches))
        exact: list[Tensor] = []
        same: dict[int, list[Tensor]] = {batch: [] for batch in batches}
        for first in range(0, shape[0], step):
            with torch.no_grad(), dispatch.backend("reference"):
                part = whole.narrow(0, first, min(step, shape[0] - first)).unpack()
            exact.append(self.apply(x, part))
            rounded = images_last(part.to(self.dtype))
            for batch in batches:
                same[batch].append(self.apply(self.x(batch), rounded))
        y = torch.cat(exact, 1)
        return {batch: quantity(y[:batch], torch.cat(same[batch], 1)) for batch in batches}

    def judge(self, jobs: list[Job]) -> list[Accuracy | None]:
        """For each job its error and what is allowed; None of a dense one, which nothing beside it
        defines."""
        wanted: dict[Bank, dict[int, Quantity]] = {}
        results: list[Accuracy | None] = []
        for job in jobs:
            point = job.point
            if point.bank is None or job.weight is None:
                results.append(None)
                continue
            if point.bank not in wanted:
                wanted[point.bank] = self.wanted(point.bank, job.weight)
            with torch.no_grad():
                torch.full(self.case(point.batch).output_shape, float("nan"), dtype=self.dtype)
                y = job.call(0)
            results.append(wanted[point.bank][point.batch].judge(y))
        return results
