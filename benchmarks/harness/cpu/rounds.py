"""Samples of everything of a point in turn, and the ratios that come of them."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from benchmarks.harness.cpu.opponents import Job, running

MIN_ROUNDS, MAX_ROUNDS = 5, 40
FEW_ROUNDS, LONG = 3, 10.0  # so few where they took so many seconds
ENDLESS = 5.0  # seconds of a call of ours that is timed once
PATIENCE = 3  # times the budget, where ratios have not settled by then
QUIET = 0.04  # of its median, the most that a ratio may err to be kept
_LEFT = 1.5, 1.1  # times the fastest: slower dense layers are left after round 1, round 2
_SETTLE = 2e-3  # seconds that a job runs before it counts: other threads stop spinning meanwhile
_SAMPLE = 1e-2  # seconds that a sample lasts at least, if it is no single call
Sample = Mapping[str, float]  # clock -> seconds of a call
Samples = dict[str, list[Sample]]  # by the job's name, one a round


@dataclass(frozen=True)
class Ratio:
    """How many times faster ours is than the fastest dense layer, over all rounds."""

    q25: float
    median: float
    q75: float
    rounds: int

    @property
    def error(self) -> float:
        """The standard error of the median, relative to it.

        Of a normal distribution it is 1.253 deviations over the square root of the rounds, and the
        quartiles lie 1.349 deviations apart.

        Example:
            >>> round(Ratio(1.9, 2.0, 2.1, 25).error, 4)
            0.0186
        """
        return 1.253 / 1.349 * (self.q75 - self.q25) / (self.median * math.sqrt(self.rounds))


def measure(
    ours: Sequence[Job],
    dense: Sequence[Job],
    clock: str,
    seconds: float,
    order: random.Random,
    reference: Mapping[str, Job] = MappingProxyType({}),
) -> Samples:
    """Samples of every job in a new order every round.

    Dense layers that are far behind the fastest are left after one or two rounds, and a call of
    ours that takes many seconds after one: it is a loss that needs no quartiles. Rounds go on
    until the budget is spent, and then until ratios are quiet or patience is at its end.

    Args:
        ours, dense: to time.
        clock: that is read: ``"process"`` or ``"wall"``.
        seconds: budget.
        order: of jobs within a round.
        reference: by the name of one of ours, what it runs on where dispatch leaves it; left as
            dense layers are.
    """
    samples: Samples = {job.name: [] for job in (*ours, *dense, *reference.values())}
    lasting, rivals, others = list(ours), list(dense), dict(reference)
    begin = time.perf_counter()
    for round_ in range(MAX_ROUNDS):
        jobs = [*lasting, *rivals, *others.values()]
        order.shuffle(jobs)
        for job in jobs:
            samples[job.name].append(_sample(job, samples[job.name]))
        for job in ours if round_ < 2 else ():
            other = others.get(job.name)
            if other and other not in _near([job, other], samples, clock, _LEFT[round_]):
                del others[job.name]
        lasting = [job for job in lasting if samples[job.name][0]["wall"] <= ENDLESS]
        if round_ < 2:
            rivals = _near(rivals, samples, clock, _LEFT[round_])
        spent = time.perf_counter() - begin
        if round_ + 1 >= FEW_ROUNDS and spent > LONG:
            break
        if round_ + 1 < MIN_ROUNDS or spent < seconds:
            continue
        best = fastest(samples, [job.name for job in rivals], clock)
        settled = all(ratio(samples, best, job.name, clock).error <= QUIET for job in lasting)
        if settled or spent > PATIENCE * seconds:
            break
    return samples


def in_turn(
    groups: Mapping[str, Sequence[Job]], clock: str, seconds: float, order: random.Random
) -> Samples:
    """Samples of the jobs of several groups in a new order every round, each in one call.

    Of a group what is far behind its fastest is left after one or two rounds. Rounds go on until
    the budget is spent, at least ``FEW_ROUNDS``, and then until ratios of the first group's fastest
    to the others' are quiet or patience is at its end.
    """
    lasting = {name: list(jobs) for name, jobs in groups.items()}
    samples: Samples = {job.name: [] for jobs in groups.values() for job in jobs}
    begin = time.perf_counter()
    for round_ in range(MAX_ROUNDS):
        jobs = [job for of_group in lasting.values() for job in of_group]
        if not round_:
            for job in jobs:  # caches and workspaces
                with running(job):
                    job.call(0)
        order.shuffle(jobs)
        for job in jobs:
            samples[job.name].append(_sample(job, samples[job.name]))
        if round_ < 2:
            lasting = {n: _near(of, samples, clock, _LEFT[round_]) for n, of in lasting.items()}
        spent = time.perf_counter() - begin
        if round_ + 1 < FEW_ROUNDS or spent < seconds:
            continue
        first, *others = [fastest(samples, [j.name for j in of], clock) for of in lasting.values()]
        if spent > PATIENCE * seconds or all(
            ratio(samples, first, name, clock).error <= QUIET for name in others
        ):
            break
    return samples


def _near(rivals: list[Job], samples: Samples, clock: str, within: float) -> list[Job]:
    least = {job.name: min(sample[clock] for sample in samples[job.name]) for job in rivals}
    return [job for job in rivals if least[job.name] <= within * min(least.values())]


def median(samples: Samples, name: str, clock: str) -> float:
    """Seconds of a job's call."""
    return statistics.median(sample[clock] for sample in samples[name])


def fastest(samples: Samples, names: Sequence[str], clock: str) -> str:
    """The job whose median is least, of those that ran in every round."""
    rounds = max(len(samples[name]) for name in names)
    whole = [name for name in names if len(samples[name]) == rounds]
    return min(whole, key=lambda name: median(samples, name, clock))


def ratio(samples: Samples, dense: str, ours: str, clock: str) -> Ratio:
    """Of two jobs, round by round: what slows a whole round down slows both."""
    pairs = zip(samples[dense], samples[ours], strict=False)
    ratios = [of_dense[clock] / of_ours[clock] for of_dense, of_ours in pairs]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0], rounds=1)
    q25, median_, q75 = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(q25, median_, q75, len(ratios))


def _sample(job: Job, earlier: Sequence[Sample]) -> Sample:
    """Seconds of a call on two clocks: the mean of calls that last as long as a sample should."""
    with running(job):
        if not earlier or earlier[-1]["wall"] < _SETTLE * 10:
            _calls(job, 0, _SETTLE)
        wall, process = time.perf_counter_ns(), time.process_time_ns()
        calls = _calls(job, 1, _SAMPLE)
        process, wall = time.process_time_ns() - process, time.perf_counter_ns() - wall
    return {"wall": wall * 1e-9 / calls, "process": max(process, 1) * 1e-9 / calls}


def _calls(job: Job, first: int, seconds: float) -> int:
    """Run layers in turn until so many seconds are over; how many it were."""
    end = time.perf_counter() + seconds
    done = 0
    while not done or time.perf_counter() < end:
        job.call((first + done) % job.copies)
        done += 1
    return done
