"""One case from setup to figures: gate first, then memory, then interleaved timing."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from benchmarks.harness import baselines, calls, gate, machine, memory, roofline
from benchmarks.harness.baselines import Implementation
from benchmarks.harness.cases import PASSES, Case
from benchmarks.harness.problem import Problem, copies, turns
from benchmarks.harness.schema import (
    DOES_NOT_APPLY,
    FAILED,
    OK,
    OUT_OF_MEMORY,
    SKIPPED,
    WRONG,
)
from benchmarks.harness.timing import COLD, WARM, Sample, Work, quoted
from rpg_kernels.backends import dispatch
from rpg_kernels.timing import figure

MIN_ROUNDS, MAX_ROUNDS = 3, 100
Row = dict[str, Any]


class Clock(Protocol):
    """A timer, see ``timing`` and ``cuda_clock``."""

    headline: str

    def sample(self, work: Work, kind: str, state: str) -> Sample:
        """Seconds of one call by clock name."""
        ...

    def note(self, work: Work) -> str | None:
        """What a reader of its times should know."""
        ...

    def forget(self) -> None:
        """Let go of everything that was prepared for earlier work."""
        ...


@dataclass(frozen=True)
class Plan:
    """What every case of a run is measured with.

    Args:
        device: where.
        clock: the timer; one for all cases.
        ceilings: of the device, or None for no roofline.
        impls: names; none gives the usual ones.
        seconds: time budget for the samples of a case; at least MIN_ROUNDS rounds are made.
        seed: of values and of the order of samples.
        memory_limit: bytes that one implementation may expect to need.
        cache_bytes: of the last-level cache.
    """

    device: torch.device
    clock: Clock
    ceilings: roofline.Ceilings | None
    impls: Sequence[str]
    seconds: float
    seed: int
    memory_limit: int
    cache_bytes: int


@dataclass
class _Entry:
    """An implementation of a case, and what is known about it so far."""

    implementation: Implementation
    row: Row
    work: Work | None = None
    passes: tuple[str, ...] = ()
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)

    def stop(self, status: str, reason: str) -> None:
        """Give up on it; what it holds is freed, and no figure is kept."""
        self.row.update(status=status, reason=reason, times={}, memory=None)
        self.work, self.passes, self.samples = None, (), {}


def rows(case: Case, plan: Plan) -> list[Row]:
    """Measure every implementation of a case: rows as ``schema.RESULT`` lists them.

    Raises:
        ValueError: an unknown implementation.
    """
    entries = [
        _Entry(implementation, _blank(case, implementation, plan))
        for implementation in baselines.choose(plan.impls, case, plan.device)
    ]
    try:
        _build(case, plan, entries)
        for entry in entries:
            _guarded(entry, lambda entry=entry: _memory(entry))
        _time(plan, entries)
    finally:
        plan.clock.forget()
        for entry in entries:
            entry.work = None
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    for entry in entries:
        _finish(case, plan, entry)
    return [entry.row for entry in entries]


def _blank(case: Case, implementation: Implementation, plan: Plan) -> Row:
    """A row that says what would be measured."""
    count = copies(case, implementation.layer_bytes(case), plan.cache_bytes)
    layers = count * implementation.layer_bytes(case)
    chosen = dispatch.choose(calls.of(case, plan.device)[0]).name
    return {
        "case": case.name,
        "op": case.op,
        "weight_shape": list(case.layer.weight),
        "input_shape": list(case.input_shape),
        "virtual_weights": case.layer.virtual_weights,
        "batch": case.batch,
        "dtype": case.dtype,
        "dof": case.dof,
        "granularity": case.granularity,
        "reflect": case.reflect,
        "window": case.window,
        "laps": case.laps,
        "impl": implementation.name,
        "chosen": implementation.name == f"rpg-{chosen}",
        "status": OK,
        "reason": None,
        "copies": count,
        "cold_bytes": (
            turns(case, plan.cache_bytes) * case.output_bytes if case.rows_only else layers
        )
        + case.input_bytes
        + case.output_bytes,
        "accuracy": {},
        "times": {},
        "memory": None,
        "floors": {},
    }


def _build(case: Case, plan: Plan, entries: Sequence[_Entry]) -> None:
    """Refuse what cannot run, then set up and judge the others."""
    limit = min(plan.memory_limit, machine.available_bytes(plan.device))
    needs = _problem_bytes(case)
    held = 0
    problem = wanted = None
    for entry in entries:
        implementation, count = entry.implementation, entry.row["copies"]
        reason = implementation.refuse(case, plan.device)
        if reason:
            entry.stop(DOES_NOT_APPLY, reason)
            continue
        expected = implementation.expected_bytes(case, count) + held
        if max(expected, needs) > limit:
            reason = (
                f"expects to need {max(expected, needs) / 1e9:.1f} GB, "
                f"and may use {limit / 1e9:.1f} GB"
            )
            entry.stop(SKIPPED, reason)
            continue

        def judge(entry: _Entry = entry, count: int = count) -> None:
            nonlocal problem, wanted
            if problem is None or wanted is None:
                problem = Problem(case, plan.device, plan.seed)
                wanted = gate.exact(problem)
                problem.take_turns(turns(case, plan.cache_bytes))
            stack = entry.implementation.build(problem, count)
            own = wanted if stack.own_map is None else gate.exact(problem, stack.own_map)
            only = entry.implementation.refuse_backward(case, plan.device)
            accuracy = gate.check(problem, stack, own, backward=not only)
            entry.passes = gate.allowed_passes(accuracy)
            entry.work = Work(problem, stack, entry.passes)
            if only:
                entry.row["reason"] = f"forward only: {only}"
            entry.row["accuracy"] = {
                name: {"error": a.error if math.isfinite(a.error) else None, "allowed": a.allowed}
                for name, a in accuracy.items()
            }
            missed = gate.failures(accuracy)
            if missed:
                entry.row.update(status=WRONG, reason="; ".join(missed))

        if _guarded(entry, judge):
            held += count * implementation.layer_bytes(case)


def _problem_bytes(case: Case) -> int:
    """What the exact result takes in float64: map, weight and gradient, x, y and theirs."""
    weights = case.layer.virtual_weights
    if case.rows_only:
        weights = min(weights, case.batch * case.layer.weight[1])
    images = math.prod(case.input_shape) + math.prod(case.output_shape)
    return weights * (9 + 4 * 8) + 6 * 8 * images + 6 * 8 * case.dof


def _guarded(entry: _Entry, action: Any) -> bool:
    """Run something of one implementation; what goes wrong ends that one, not the suite."""
    try:
        action()
    except Exception as error:
        memory_ran_out = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
            isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        )
        text = (str(error).strip() or repr(error)).splitlines()[0]
        entry.stop(OUT_OF_MEMORY if memory_ran_out else FAILED, text)
        return False
    return True


def _memory(entry: _Entry) -> None:
    """Fill in the row's memory, for an implementation that is right."""
    work = entry.work
    if work is None or len(entry.passes) < len(PASSES):
        return
    stack, problem = work.stack, work.problem
    forward, full = (
        memory.peak(partial(work.prepare, kind, WARM), problem.device)
        for kind in ("forward", "full")
    )
    stays = memory.with_adam(stack.trained(0), stack.tables)
    saved = memory.saved(lambda: stack.forward(0), (problem.x, *stack.trained(0)))
    measured = {
        "forward_peak": forward.peak,
        "full_peak": full.peak,
        "full_largest": full.largest,
        "saved": saved,
        "persistent": stays.total,
    }

    def per(count: int) -> dict[str, float]:
        return {name: size / count for name, size in measured.items()}

    entry.row["memory"] = {
        **measured,
        **asdict(stays),
        "per_virtual_weight": per(entry.row["virtual_weights"]),
        "per_dof": None if stack.trains == "weight" else per(problem.bank.dof),
    }


def _time(plan: Plan, entries: Sequence[_Entry]) -> None:
    """Sample all implementations, passes and states in turn, in a new order every round."""
    todo = [
        (entry, kind, state)
        for entry in entries
        for kind in entry.passes
        # A layer larger than the cache is cold whatever one does.
        for state in ((COLD, WARM) if entry.row["copies"] > 1 or _turning(entry) else (COLD,))
    ]
    order = random.Random(plan.seed)
    for round_ in range(MAX_ROUNDS + 1):
        if round_ == 1:  # the first only warmed up
            begin = time.perf_counter()
            for entry in entries:
                entry.samples.clear()
        if round_ > MIN_ROUNDS and time.perf_counter() - begin > plan.seconds:
            break
        order.shuffle(todo)
        for entry, kind, state in todo:
            if entry.work is None:
                continue

            def sample(entry: _Entry = entry, kind: str = kind, state: str = state) -> None:
                assert entry.work is not None
                measured = plan.clock.sample(entry.work, kind, state)
                entry.samples.setdefault((kind, state), []).append(measured)

            _guarded(entry, sample)
    for entry in entries:
        if entry.work is not None and entry.row["status"] == OK:
            notes = (entry.row["reason"], plan.clock.note(entry.work))
            entry.row["reason"] = "; ".join(filter(None, notes)) or None


def _turning(entry: _Entry) -> bool:
    return entry.work is not None and len(entry.work.problem.turns) > 1


def _finish(case: Case, plan: Plan, entry: _Entry) -> None:
    """Samples to figures, and the roofline."""
    for (kind, state), samples in sorted(entry.samples.items()):
        entry.row["times"].setdefault(kind, {})[state] = {
            clock: asdict(figure([sample[clock] for sample in samples])) for clock in samples[0]
        }
    if plan.ceilings is None:
        return
    for kind in PASSES:
        dense = entry.implementation.name == "dense"
        least = roofline.floor(case, kind, dense, plan.ceilings)
        clocks = entry.row["times"].get(kind, {}).get(COLD, {})
        cold = quoted(clocks, plan.clock.headline)
        entry.row["floors"][kind] = {
            "bytes": least.bytes,
            "gathered_bytes": least.gathered_bytes,
            "operations": least.operations,
            "floor_s": least.seconds,
            "bound": least.bound,
            "percent": 100 * least.seconds / cold["median_s"] if cold else None,
        }
