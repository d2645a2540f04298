"""The tensors of one point: banks, virtual weights, dense weights, and what is exact."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.cases import DTYPES
from benchmarks.harness.cpu import opponents
from benchmarks.harness.cpu.grid import FORWARD, GRANULARITY, TRAINING, Bank, Point
from benchmarks.harness.cpu.opponents import Dense, Job
from benchmarks.harness.gate import Accuracy, Quantity, quantity
from benchmarks.harness.problem import MAX_COPIES
from rpg_kernels import functional
from rpg_kernels.backends import dispatch
from rpg_kernels.backends.call import Call
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight

_CHECKED_WEIGHTS, _CHECKED_ROWS = 1 << 22, 16  # of the weight and of the batch, in float64
_LOOSE, _TIGHT = 3e-2, 1e-4  # of the largest value: what a dense layer may err, in bf16 and fp32
_OPERATORS = {
    FORWARD: ("linear",),
    TRAINING: ("linear", "linear_input_grad", "linear_bank_grad"),
}


@dataclass(frozen=True)
class Ours:
    """A bank's layers to time.

    Args:
        bank: that they read.
        job: what to run.
        reference: the same on the reference, which a call runs on that dispatch leaves.
        backends: that run the forward, and the gradients where there are any, each named once.
        operations: multiplications, counted twice as torch counts.
        weight: the first of them.
    """

    bank: Bank
    job: Job
    reference: Job
    backends: tuple[str, ...]
    operations: int
    weight: VirtualWeight


class Subject:
    """A point on the CPU; random, the same for the same seed.

    Dense weights are so many that twice the last-level cache is read between two uses of one. A
    bank's layers are so many that together they read as much, or the whole bank where that is
    smaller: what a network would find in the cache is found there, nothing else.

    Args:
        point: what to measure.
        cache_bytes: of the last-level cache.
        seed: of all values.
    """

    def __init__(self, point: Point, cache_bytes: int, seed: int) -> None:
        self.point = point
        self._cache_bytes = cache_bytes
        self._shape = point.layer.weight
        self._dtype = DTYPES[point.dtype][0]
        rows, columns = self._shape
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._x = torch.randn(point.batch, columns).to(self._dtype)
            self._dy = torch.randn(point.batch, rows).to(self._dtype)
            self.ours = [self._ours(bank) for bank in point.banks]
            height = min(rows, max(1, _CHECKED_WEIGHTS // columns))
            self._first = int(torch.randint(rows - height + 1, (1,)))
        self._height = height
        self._checked = torch.linspace(0, point.batch - 1, _CHECKED_ROWS).long().unique()

    def _bank(self, bank: Bank, dtype: torch.dtype) -> ParameterBank:
        return ParameterBank(bank.dof, GRANULARITY, laps=bank.laps, dtype=dtype)

    def _ours(self, bank: Bank) -> Ours:
        parameters, shape = self._bank(bank, self._dtype), self._shape
        scale = 1 / (parameters.init_std * math.sqrt(shape[1]))
        size = parameters.weight.nbytes
        read = min(size, math.prod(shape) * self._dtype.itemsize // (bank.laps or 1))
        copies = min(MAX_COPIES, 1 + -(-min(2 * self._cache_bytes, size) // read))
        weights = [parameters.place(shape, scale=scale) for _ in range(copies)]
        x = self._x if self.point.what == FORWARD else self._x.detach().requires_grad_()

        def call(i: int) -> tuple[Tensor, ...]:
            if self.point.what == FORWARD:
                with torch.no_grad():
                    return (functional.linear(x, weights[i]),)
            y = functional.linear(x, weights[i])
            return (y.detach(), *torch.autograd.grad(y, (x, parameters.weight), self._dy))

        def by_reference(i: int) -> tuple[Tensor, ...]:
            with dispatch.backend("reference"):
                return call(i)

        backends, operations = [], 0
        for op in _OPERATORS[self.point.what]:
            how = Call(
                op, self._x, weights[0].spec, parameters.weight, self.point.layer.geometry, ""
            )
            chosen = dispatch.choose(how)
            backends.append(chosen.name)
            made = chosen.multiplications(how)
            operations += 2 * (math.prod(shape) * len(x) if made is None else made)
        used = tuple(dict.fromkeys(backends))
        reference = Job(f"{bank}, reference", by_reference, copies)
        job = Job(str(bank), call, copies)
        return Ours(bank, job, reference, used, operations, weights[0])

    def dense(self) -> tuple[list[Job], dict[str, str]]:
        """Opponents with the weights of the first bank's layer, see ``opponents.jobs``."""
        with torch.no_grad():
            layer = self.ours[0].weight.unpack()
        copies = min(MAX_COPIES, 1 + -(-2 * self._cache_bytes // layer.nbytes))
        weights = [layer, *(layer.clone() for _ in range(copies - 1))]
        return opponents.jobs(Dense(weights, self._x, self._dy), self.point.what)

    @property
    def dense_bytes(self) -> tuple[int, int]:
        """Of a dense weight, and of x and y."""
        item = self._dtype.itemsize
        return math.prod(self._shape) * item, item * self.point.batch * sum(self._shape)

    def judge(self, ours: Ours) -> Accuracy:
        """Of what a call gives, that which errs most of what is allowed.

        In float64 some rows of the batch, from first to last, meet a range of the weight's rows.
        dy is zero outside of both while a call is judged, so that gradients are exact with them
        too. Allowed is twice what torch makes of the same weight rounded to the dtype (``gate``).
        """
        exact_bank = self._bank(ours.bank, torch.float64)
        with torch.no_grad():
            exact_bank.weight.copy_(ours.weight.bank.weight)
        whole = VirtualWeight(exact_bank, ours.weight.placement)
        with torch.no_grad(), dispatch.backend("reference"):
            part = whole.narrow(0, self._first, self._height)
            exact = self._products(part.unpack())
            torchs = self._products(part.unpack().to(self._dtype))
            wanted = [quantity(e, t) for e, t in zip(exact[:2], torchs[:2], strict=True)]
            if self.point.what == TRAINING:
                packed = [part.pack(dw.double()).to(d) for dw, d in
                          ((exact[2], torch.float64), (torchs[2], self._dtype))]  # fmt: skip
                wanted.append(quantity(*packed))
        return self._worst(self._called(ours.job), wanted)

    def judge_dense(self, job: Job) -> Accuracy:
        """As ``judge``; allowed is a share of the largest value."""
        with torch.no_grad():
            layer = self.ours[0].weight.unpack()[self._range].double()
        allowed = _TIGHT if job.exact else _LOOSE
        wanted = [Quantity(e, allowed * float(e.abs().max())) for e in self._products(layer)]
        got = self._called(job)
        if len(got) > 2:
            got = (*got[:2], got[2][self._range])
        return self._worst(got, wanted)

    @property
    def _range(self) -> slice:
        return slice(self._first, self._first + self._height)

    def _products(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, dx and the weight's gradient of the rows that are checked, in the weight's dtype."""
        x = self._x.detach()[self._checked].to(weight.dtype)
        dy = self._dy[self._checked][:, self._range].to(weight.dtype)
        return x @ weight.t(), dy @ weight, dy.t() @ x

    def _called(self, job: Job) -> tuple[Tensor, ...]:
        """A call on memory that held NaN, with dy zero where nothing is checked."""
        kept = self._dy.clone()
        self._dy.zero_()
        rows = self._checked[:, None], torch.arange(self._height) + self._first
        self._dy[rows] = kept[rows]
        torch.full_like(kept, float("nan"))
        try:
            with opponents.running(job):
                return tuple(t.clone() for t in job.call(0))
        finally:
            self._dy.copy_(kept)

    def _worst(self, got: tuple[Tensor, ...], wanted: list[Quantity]) -> Accuracy:
        whole = [(bool(t.isfinite().all())) for t in got]
        y, *gradients = got
        parts = [y[self._checked][:, self._range]]
        if gradients:
            parts += [gradients[0][self._checked], gradients[1]]
        judged = [q.judge(t) if fine else Accuracy(float("inf"), q.allowed)
                  for q, t, fine in zip(wanted, parts, whole, strict=False)]  # fmt: skip
        return max(judged, key=lambda a: a.error / max(a.allowed, 1e-300))
