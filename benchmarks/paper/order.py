"""What the means of an experiment's runs say about the order of its rows, and no more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

from benchmarks.accuracy.records import Record
from benchmarks.accuracy.summary import Estimate, estimate
from benchmarks.paper.experiment import Experiment, Metric

SURE = 2.0  # standard errors of a difference


def estimates(
    experiment: Experiment, metric: Metric, runs: Sequence[Record]
) -> dict[str, Estimate]:
    """By row, in their order: mean and standard error of a metric over seeds.

    A row without runs, or with one whose number was not finite, is left out.
    """
    found = {}
    for row in experiment.rows:
        values = [run.get(metric.key) for run in runs if run["row"] == row.name]
        numbers = [float(value) for value in values if value is not None]
        if numbers and len(numbers) == len(values):
            found[row.name] = estimate(numbers)
    return found


def differs(one: Estimate, other: Estimate) -> bool:
    """Whether two means differ by more than two standard errors of their difference.

    Example:
        >>> differs(Estimate(60.0, 0.3, 3), Estimate(59.0, 0.3, 3))
        True
        >>> differs(Estimate(60.0, 0.5, 3), Estimate(59.0, None, 1))
        False
    """
    if one.error is None or other.error is None:
        return False
    return abs(one.mean - other.mean) > SURE * math.hypot(one.error, other.error)


def statements(experiment: Experiment, runs: Sequence[Record]) -> list[str]:
    """Markdown: the rows by their means, the pairs that differ, and the paper's order."""
    metric = experiment.metrics[0]
    found = estimates(experiment, metric, runs)
    if not found:
        return [f"{metric.title}: no runs."]
    best = sorted(found, key=lambda name: found[name].mean, reverse=metric.higher)
    ranked = "; ".join(f"{name} ({found[name].mean:.{metric.digits}f})" for name in best)
    lines = [f"By the means of “{metric.title}”, best first: {ranked}.", ""]
    below = {
        name: [other for other in best[place + 1 :] if differs(found[name], found[other])]
        for place, name in enumerate(best)
    }
    pairs = [f"- {name} before {'; '.join(rest)}" for name, rest in below.items() if rest]
    if pairs:
        lines += ["Pairs that differ by more than two standard errors of their difference:", ""]
        lines += [*pairs, ""]
    else:
        lines += ["No pair differs by more than two standard errors of their difference.", ""]
    alone = [name for name in best if found[name].error is None]
    if alone:
        lines += [f"One seed, and so no standard error: {'; '.join(alone)}.", ""]
    for key, title in paper_columns(experiment, metric):
        text = _beside_paper(experiment, found, key, title)
        lines += [text, ""] if text else []
    return lines[:-1]


def paper_columns(experiment: Experiment, metric: Metric) -> list[tuple[str, str]]:
    """Keys of the paper's numbers that stand beside a metric, with what they are.

    Those by titles of their own stand beside the first.
    """
    keys = dict.fromkeys(k for row in (*experiment.rows, *experiment.quoted) for k in row.paper)
    metrics = {other.key for other in experiment.metrics}
    first = metric == experiment.metrics[0]
    of = f", {experiment.paper_data}" if experiment.paper_data else ""
    return [
        (key, f"{metric.title}{of}" if key in metrics else key)
        for key in keys
        if key == metric.key or (first and key not in metrics)
    ]


def _beside_paper(
    experiment: Experiment, found: Mapping[str, Estimate], key: str, title: str
) -> str:
    """How many pairs are in the paper's order; "" where there is no pair to ask about."""
    paper = {row.name: row.paper[key] for row in experiment.rows if key in row.paper}
    rows = [name for name in paper if name in found]
    pairs = [(a, b) for a, b in combinations(rows, 2) if paper[a] != paper[b]]
    if not pairs:
        return ""
    others = [(a, b) for a, b in pairs if (paper[a] > paper[b]) != (found[a].mean > found[b].mean)]
    sure = [(a, b) for a, b in others if differs(found[a], found[b])]
    text = (
        f"The paper ({title}) has {len(pairs)} pairs of these rows whose numbers differ; "
        f"{len(pairs) - len(others)} of them are in the same order here"
    )
    if others:
        text += ". Of the others "
        text += "these differ" if sure else "none differs"
        text += " by more than two standard errors"
        text += ": " + "; ".join(f"{a} and {b}" for a, b in sure) if sure else ""
    return text + "."
