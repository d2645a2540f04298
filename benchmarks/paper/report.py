"""Pages, plots and pictures of the paper's tables, from results files alone."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accuracy.records import Record
from benchmarks.accuracy.report import size_ticks
from benchmarks.accuracy.running import RESULTS, ROOT
from benchmarks.accuracy.summary import Estimate
from benchmarks.harness.chart import THEMES, Chart, Point, Series
from benchmarks.harness.report import stale_charts, write
from benchmarks.harness.table import markdown, ratio
from benchmarks.paper import costs, order, running
from benchmarks.paper.experiment import Experiment, Metric
from rpg_kernels.timing import seconds

PAGES = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"
NOT_RUN, NO_COUNTERPART = "not run", "only in the paper"
_PICTURES = re.compile(r"<!-- pictures (\w+) -->\n(.*?)<!-- /pictures -->", re.DOTALL)
_SHOWN = re.compile(r"\]\(([^()\s]+\.png)\)")
# The colours of a chart go around after seven series.
_MARKS = ("circle", "square", "diamond")


def parser() -> argparse.ArgumentParser:
    """The options of ``report``."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.paper report")
    made.add_argument("names", nargs="*", metavar="NAME", help="default: all that have runs")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the files")
    made.add_argument("--pages", type=Path, default=PAGES, help="folder of the pages")
    made.add_argument("--images", type=Path, default=IMAGES, help="folder of plots and pictures")
    made.add_argument("--check", action="store_true", help="change nothing, fail when stale")
    return made


def main(args: argparse.Namespace) -> int:
    """Write what is stale; the exit status, 1 when ``--check`` finds something.

    Raises:
        ValueError: an experiment is not there or has no runs, or a file is damaged.
    """
    stale: dict[Path, Callable[[], str]] = {}
    for name in args.names or running.names():
        results = args.results / f"paper_{name}.jsonl"
        if args.names or results.exists():
            stale |= files(running.load(name), results, args.pages, args.images, args.check)
    return write(stale, args.check)


def files(
    experiment: Experiment, results: Path, pages: Path, images: Path, check: bool
) -> dict[Path, Callable[[], str]]:
    """The page and the plots of an experiment that are not as they would be written.

    Pictures are drawn on the way, unless ``check``, where they or the runs are other ones.

    Raises:
        ValueError: there are no runs, or costs were measured with another recipe.
    """
    runs, timed = running.runs_of(experiment, results), costs.read(results)
    if not runs:
        raise ValueError(f"results: got {results} without runs, wanted a file that has some")
    if timed is not None and any(timed[key] != runs[0][key] for key in ("recipe", "data")):
        raise ValueError(
            f"costs: got {costs.path_of(results)}, measured with another recipe or other data than "
            f"{results}, wanted the same; measure again with --costs"
        )
    path = pages / f"paper_{experiment.name}.md"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    drawn = plots(experiment, runs, timed)
    stale = stale_charts(
        {
            images / f"{name}_{theme}.svg": (chart, theme)
            for name, chart in drawn.items()
            for theme in THEMES
        }
    )
    shown = _pictures(experiment, runs, before, images, check)
    text = page(experiment, runs, timed, drawn, shown)
    if text != before:
        stale[path] = partial(str, text)
    return stale


def page(
    experiment: Experiment,
    runs: Sequence[Record],
    timed: Mapping[str, Any] | None,
    drawn: Mapping[str, Chart],
    shown: Sequence[str] = (),
) -> str:
    """The whole page as Markdown.

    Args:
        experiment: whose page it is.
        runs: all of its runs.
        timed: its costs, or None.
        drawn: its plots by the name of their files, without theme.
        shown: lines that show its pictures.
    """
    lines = [f"# {experiment.title}", ""]
    lines += ["<!-- Written by `python -m benchmarks.paper report`. -->", ""]
    if experiment.text:
        lines += [experiment.text.strip(), ""]
    lines += [*results_table(experiment, runs), "", *provenance(experiment, runs), ""]
    lines += ["## Order", "", *order.statements(experiment, runs), ""]
    if timed is not None:
        lines += ["## Time and memory", "", *costs_table(experiment, timed), ""]
    for name, chart in drawn.items():
        light, dark = (f"../images/{name}_{theme}.svg" for theme in THEMES)
        lines += [
            "<picture>",
            f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">',
            f'<img alt="{chart.title}" src="{light}">',
            "</picture>",
            "",
        ]
    return "\n".join([*lines, *shown]).rstrip() + "\n"


def results_table(experiment: Experiment, runs: Sequence[Record]) -> list[str]:
    """One line for each row: sizes, metrics as mean ± standard error, the paper's numbers."""
    head, of_metric = ["network", "DoF", "virtual weights", "trainable"], []
    for metric in experiment.metrics:
        columns = order.paper_columns(experiment, metric)
        of_metric.append((metric, order.estimates(experiment, metric, runs), columns))
        head += [metric.title, *(f"paper: {title}" for _, title in columns)]
    table = []
    for row in (*experiment.rows, *experiment.quoted):
        own = [run for run in runs if run["row"] == row.name]
        sizes = [own[0].get(k) if own else None for k in ("dof", "virtual_weights", "trainable")]
        cells = [row.name, *("" if size is None else f"{size:,}" for size in sizes)]
        for metric, found, columns in of_metric:
            has = any(metric.key in run for run in own)  # not every network has every number
            none = NOT_RUN if row.settings else NO_COUNTERPART
            empty = "not finite" if has else "–" if own else none
            cells.append(_cell(found[row.name], metric) if row.name in found else empty)
            cells += [f"{row.paper[key]:g}" if key in row.paper else "" for key, _ in columns]
        table.append((*cells, str(len(own))))
    return markdown((*head, "seeds"), table)


def provenance(experiment: Experiment, runs: Sequence[Record]) -> list[str]:
    """What the numbers are and where they come from, from the records alone."""
    first = runs[0]
    own = [run for run in runs if "borrowed" not in run]
    environments = [run["environment"] for run in runs]
    machines = _several(
        f"{e['device_name']}, {e['threads']} thread{'s' * (e['threads'] > 1)}" for e in environments
    )
    versions = _several(
        f"torch {e['torch']}, Python {e['python']}, rpg-kernels {e['rpg_kernels']}"
        for e in environments
    )
    commits = _several((e["commit"] or "unknown")[:12] for e in environments)
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
    of_paper = (
        f" The paper's numbers are of {experiment.paper_data}." if experiment.paper_data else ""
    )
    lines = [
        f"Mean over seeds ± its standard error.{of_paper} DoF: numbers that the shared weights "
        "come from, or, where nothing is shared, those that they stand for; trainable: all numbers "
        "that are trained.",
        "",
        f"Data: {_listed(first['data'])}. Recipe: {_listed(first['recipe'])}.",
        "",
        f"{len(own)} runs with seeds {seeds}, {_minutes(own, 'seconds')} minutes in all "
        f"({_minutes(own, 'process_seconds')} of the processor). "
        f"Machine: {machines}; {versions}; commit {commits}.",
    ]
    others = [run for run in runs if "borrowed" in run]
    if others:
        names = ", ".join(sorted({run["borrowed"] for run in others}))
        rows = "; ".join(dict.fromkeys(run["row"] for run in others))
        lines += [
            "",
            f"{len(others)} further runs were made for {names}, with the same recipe, data and "
            f"settings: {rows}.",
        ]
    return lines


def costs_table(experiment: Experiment, timed: Mapping[str, Any]) -> list[str]:
    """One line for each row, beside the unshared one."""
    infers = any("inference_seconds" in one for one in timed["rows"].values())
    head = ["network", "training step", "of unshared", "memory between steps", "of unshared",
            "saved beyond activations"]  # fmt: skip
    head += ["inference", "of unshared"] if infers else []
    table = []
    for row in experiment.rows:
        one = timed["rows"].get(row.name)
        if one is None:
            table.append((row.name, *["not measured"] * (len(head) - 1)))
            continue
        base = timed["rows"].get(row.unshared or experiment.unshared, {})
        saved = one["saved_beyond_activations_bytes"]
        forward = one.get("inference_seconds")
        beside = (seconds(forward), ratio(forward, base.get("inference_seconds"))) if infers else ()
        table.append(
            (
                row.name,
                seconds(one["step_seconds"]),
                ratio(one["step_seconds"], base.get("step_seconds")),
                f"{one['state_bytes'] / 1e6:.1f} MB",
                ratio(one["state_bytes"], base.get("state_bytes")),
                "not measured" if saved is None else f"{saved / 1e6:.2f} MB",
                *beside,
            )
        )
    e, rounds = timed["environment"], len(next(iter(timed["rows"].values()))["rounds"])
    unshared = (row.unshared or experiment.unshared for row in experiment.rows)
    note = (
        f"Unshared: {' and '.join(dict.fromkeys(unshared))}. A training step is the median of "
        f"{rounds} rounds, in each of which all rows ran one after the other, by {timed['clock']}. "
        "Memory between steps: weights, gradients, the optimiser's state, and tables and buffers. "
        "Saved beyond activations: what a forward keeps for the backward that is the same for any "
        "batch, that is tables and copies of weights. "
        f"{'Inference: a forward of the same batch. ' if infers else ''}"
        f"{e['device_name']}, {e['threads']} thread{'s' * (e['threads'] > 1)}, torch {e['torch']}, "
        f"commit {(e['commit'] or 'unknown')[:12]}."
    )
    return [*markdown(head, table), "", note]


def plots(
    experiment: Experiment, runs: Sequence[Record], timed: Mapping[str, Any] | None
) -> dict[str, Chart]:
    """The first metric against degrees of freedom, and against time and memory where measured."""
    metric = experiment.metrics[0]
    found = order.estimates(experiment, metric, runs)
    sizes = {run["row"]: float(run["dof"]) for run in runs if run["row"] in found}
    measured = timed["rows"] if timed else {}
    axes = {
        "dof": ("degrees of freedom", sizes, size_ticks([*sizes.values()])),
        "step": (
            "seconds of a training step",
            {name: row["step_seconds"] for name, row in measured.items()},
            [],
        ),
        "memory": (
            "memory of training between steps (MB)",
            {name: row["state_bytes"] / 1e6 for name, row in measured.items()},
            [],
        ),
    }
    drawn = {}
    for name, (label, places, ticks) in axes.items():
        series = [
            Series(
                row.name,
                [_point(found[row.name], places[row.name])],
                "none",
                # A row that shares nothing is told apart.
                "triangle" if _unshared(row.name, runs) else _MARKS[number // 7 % len(_MARKS)],
            )
            for number, row in enumerate(experiment.rows)
            if row.name in found and row.name in places
        ]
        if series:
            title = f"{experiment.title.partition(':')[0]}: {metric.title}"
            drawn[f"paper_{experiment.name}_{name}"] = Chart(
                title, label, metric.title, series, ticks, log_x=True
            )
    return drawn


def _unshared(name: str, runs: Sequence[Record]) -> bool:
    run = next(run for run in runs if run["row"] == name)
    return run["virtual_weights"] in (None, run["dof"])


def _point(value: Estimate, x: float) -> Point:
    if value.error is None:
        return Point(x, value.mean)
    return Point(x, value.mean, value.mean - value.error, value.mean + value.error)


def _cell(value: Estimate, metric: Metric) -> str:
    text = f"{value.mean:.{metric.digits}f}"
    return text if value.error is None else f"{text} ± {value.error:.{metric.digits + 1}f}"


def _listed(values: Mapping[str, Any]) -> str:
    """A recipe, or data, in words.

    Example:
        >>> _listed({"name": "digits", "batch_size": 64, "augment": True})
        'digits, batch size 64, augment yes'
    """
    said = {True: "yes", False: "no", None: "none"}
    return ", ".join(
        ("" if name == "name" else f"{name.replace('_', ' ')} ")
        + f"{said[value] if value is None or isinstance(value, bool) else value}"
        for name, value in values.items()
    )


def _minutes(runs: Sequence[Record], clock: str) -> str:
    return f"{sum(run[clock] for run in runs) / 60:.1f}"


def _several(texts: Any) -> str:
    return " and ".join(sorted(set(texts)))


def _pictures(
    experiment: Experiment, runs: Sequence[Record], before: str, images: Path, check: bool
) -> list[str]:
    """Lines of the page that show the pictures, which are drawn where they are not there.

    A digest of runs and of the code that draws says whether they are as they would be drawn.
    """
    if experiment.pictures is None:
        return []
    source = inspect.getsource(inspect.getmodule(experiment.pictures) or experiment.pictures)
    parts = (source, json.dumps(runs, sort_keys=True))
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    mark = _PICTURES.search(before)
    shown = mark[2] if mark else ""
    there = all((images / Path(name).name).exists() for name in _SHOWN.findall(shown))
    if mark is None or mark[1] != digest or not there:
        if check:
            return ["<!-- pictures are to be drawn -->"]
        images.mkdir(parents=True, exist_ok=True)
        made = experiment.pictures([*runs], images)
        shown = _SHOWN.sub(lambda found: f"](../images/{Path(found[1]).name})", made).strip() + "\n"
    return [f"<!-- pictures {digest} -->", *shown.strip().splitlines(), "<!-- /pictures -->"]
