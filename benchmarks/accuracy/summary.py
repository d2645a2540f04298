"""What the runs of a results file say: means, standard errors, differences, a power law."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from benchmarks.accuracy.records import Record
from benchmarks.accuracy.rows import LAW, ROWS, law_name

ENOUGH = 3  # seeds, for a row that is to decide something


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` runs and its standard error; None with one run."""

    mean: float
    error: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")


@dataclass(frozen=True)
class Summary:
    """All runs of a row, by seed."""

    row: str
    settings: Mapping[str, Any]
    runs: Mapping[int, Record]

    @property
    def compression(self) -> float:
        return float(self.settings.get("compression", 1.0))

    @property
    def dof(self) -> int:
        return int(self.any["dof"])

    @property
    def any(self) -> Record:
        """One of the runs, for what is the same in all."""
        return next(iter(self.runs.values()))

    @property
    def accuracy(self) -> Estimate:
        """Final test accuracy in per cent."""
        return estimate([run["test_accuracy"] for run in self.runs.values()])

    @property
    def curve(self) -> list[float]:
        """Mean accuracy after each epoch."""
        runs = [run["accuracy_by_epoch"] for run in self.runs.values()]
        return [fmean(values) for values in zip(*runs, strict=True)]


@dataclass(frozen=True)
class PowerLaw:
    """100 - accuracy = factor * dof ** exponent, by least squares of the logarithms."""

    factor: float
    exponent: float
    error: float  # standard error of the exponent
    determination: float  # R squared
    sizes: tuple[int, ...]

    def accuracy(self, dof: float) -> float:
        error: float = self.factor * dof**self.exponent
        return 100 - error


def summaries(runs: Sequence[Record]) -> dict[str, Summary]:
    """By row, those known first and in their order."""
    grouped: dict[str, dict[int, Record]] = {}
    for run in runs:
        grouped.setdefault(run["row"], {})[run["seed"]] = run
    order = [*(name for name in ROWS if name in grouped), *sorted(set(grouped) - set(ROWS))]
    return {
        name: Summary(name, next(iter(grouped[name].values()))["settings"], grouped[name])
        for name in order
    }


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error.

    Example:
        >>> str(estimate([1.0, 2.0, 3.0])), str(estimate([1.0]))
        ('2.00 ± 0.58', '1.00')
    """
    count = len(values)
    return Estimate(fmean(values), stdev(values) / math.sqrt(count) if count > 1 else None, count)


def against(summary: Summary, other: Summary | None) -> Estimate | None:
    """Accuracy minus another row's, over the seeds that both have."""
    if other is None or other.row == summary.row:
        return None
    seeds = sorted(set(summary.runs) & set(other.runs))
    accuracy = "test_accuracy"
    differences = [summary.runs[s][accuracy] - other.runs[s][accuracy] for s in seeds]
    return estimate(differences) if differences else None


def element_wise(summary: Summary, found: Mapping[str, Summary]) -> Summary | None:
    """The paper's map at a row's compression."""
    return found.get(law_name(summary.compression, 1, "element"))


def whole_ring(summary: Summary, found: Mapping[str, Summary]) -> Summary | None:
    """The default law at a row's compression: granularity 64, a sign per slot, no laps."""
    return found.get(law_name(summary.compression, 64, "vector"))


def spread(found: Mapping[str, Summary]) -> tuple[float, int] | None:
    """Standard deviation between seeds, pooled over all rows, and its degrees of freedom."""
    squares, freedom = 0.0, 0
    for summary in found.values():
        values = [run["test_accuracy"] for run in summary.runs.values()]
        if len(values) > 1:
            squares += stdev(values) ** 2 * (len(values) - 1)
            freedom += len(values) - 1
    return (math.sqrt(squares / freedom), freedom) if freedom else None


def sweep(found: Mapping[str, Summary]) -> list[Summary]:
    """The rows that differ in degrees of freedom only, smallest first."""
    rows = [s for s in found.values() if set(s.settings) <= {"map", "compression"}]
    return sorted((s for s in rows if s.settings["map"] == LAW), key=lambda s: s.dof)


def power_law(rows: Sequence[Summary]) -> PowerLaw | None:
    """The fit, or None with fewer than three sizes; rows without an error have no logarithm."""
    rows = [s for s in rows if s.accuracy.mean < 100]
    points = [(math.log(s.dof), math.log(100 - s.accuracy.mean)) for s in rows]
    if len({x for x, _ in points}) < 3:
        return None
    mean_x, mean_y = fmean(x for x, _ in points), fmean(y for _, y in points)
    xx = sum((x - mean_x) ** 2 for x, _ in points)
    yy = sum((y - mean_y) ** 2 for _, y in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / xx
    rest = max(yy - slope**2 * xx, 0.0)
    return PowerLaw(
        factor=math.exp(mean_y - slope * mean_x),
        exponent=slope,
        error=math.sqrt(rest / (len(points) - 2) / xx),
        determination=1 - rest / yy if yy else 1.0,
        sizes=tuple(s.dof for s in rows),
    )
