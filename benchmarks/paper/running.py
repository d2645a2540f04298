"""Trains the rows of an experiment that its results file lacks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

import rpg_kernels as rpg
from benchmarks.accuracy import jobs, records
from benchmarks.accuracy.records import Record
from benchmarks.accuracy.running import RESULTS, ROOT
from benchmarks.harness import machine
from benchmarks.paper.experiment import Experiment, Row, Task

FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """The experiments that there are: modules of this folder that define one."""
    files = sorted(FOLDER.glob("*.py"))
    return [path.stem for path in files if "\nEXPERIMENT" in path.read_text("utf-8")]


def load(name: str) -> Experiment:
    """An experiment by its name; nothing is imported for the others.

    Raises:
        ValueError: there is none, with those that there are.
    """
    if name not in names():
        raise ValueError(f"name: got {name!r}, wanted one of: {', '.join(names())}")
    experiment: Experiment = importlib.import_module(f"benchmarks.paper.{name}").EXPERIMENT
    return experiment


def results_of(name: str, size: str = "full") -> Path:
    """The results file of an experiment; what is not full size is not kept in the repository."""
    if size == "full":
        return RESULTS / f"paper_{name}.jsonl"
    return ROOT / "build" / f"paper_{name}_{size}.jsonl"


def chosen(experiment: Experiment, pattern: str = "*") -> list[Row]:
    """The rows whose names match, as a shell writes patterns.

    Raises:
        ValueError: there are none.
    """
    rows = [row for row in experiment.rows if fnmatchcase(row.name, pattern)]
    if not rows:
        wanted = ", ".join(row.name for row in experiment.rows)
        raise ValueError(f"only: got {pattern!r}, wanted a pattern of: {wanted}")
    return rows


def plan(
    experiment: Experiment, task: Task, seeds: Sequence[int], pattern: str = "*"
) -> list[jobs.Job]:
    """All rows at the first seed, then at the next."""

    def job(row: Row, seed: int) -> jobs.Job:
        def run(on_step: Callable[[], object]) -> Record:
            return {**_sizes(task, row, seed), **task.run(row, seed, on_step)}

        return jobs.Job(row.name, seed, row.settings, task.steps(row), run)

    rows = chosen(experiment, pattern)
    return [job(row, seed) for seed in seeds for row in rows]


def run(
    experiment: Experiment,
    task: Task,
    out: Path,
    seeds: Sequence[int],
    pattern: str = "*",
    budget: float | None = None,
) -> int:
    """Train what ``out`` does not have; how many runs that were.

    Args:
        experiment, task: of one size.
        out: the results file.
        seeds: in their order: all rows at the first, then at the next.
        pattern: of the names of rows.
        budget: minutes; no run is begun that would end later, going by the slowest so far.

    Raises:
        ValueError: no such rows, or ``out`` was made with another recipe, data or settings.
    """
    first = experiment.metrics[0]
    return jobs.work(
        plan(experiment, task, seeds, pattern),
        common(task),
        machine.environment(torch.device("cpu")),
        out,
        budget,
        lambda record: f"{first.title} {number(record.get(first.key), first.digits)}",
        borrowed(experiment, out, common(task)),
    )


def common(task: Task) -> dict[str, Any]:
    """What all runs of a results file have in common, as a file gives it back."""
    shared: dict[str, Any] = jobs.as_json({"recipe": dict(task.recipe), "data": dict(task.data)})
    return shared


def runs_of(experiment: Experiment, out: Path) -> list[Record]:
    """All runs of an experiment: those of its own file, and those that count here as well."""
    own = records.read(out)
    return own + (borrowed(experiment, out, own[0]) if own else [])


def borrowed(experiment: Experiment, out: Path, like: Record) -> list[Record]:
    """Runs in the files of ``experiment.also`` beside ``out`` that would come out the same.

    Args:
        experiment: whose rows they are.
        out: its results file, whose own runs are left out.
        like: has the recipe and the data of its runs.
    """
    own = {(run["row"], run["seed"]) for run in records.read(out)}
    settings = {row.name: jobs.as_json(dict(row.settings)) for row in experiment.rows}
    found = []
    for name in experiment.also:
        other = out.with_name(out.name.replace(experiment.name, name))
        for run in records.read(other) if other != out else ():
            same = all(run[key] == like[key] for key in ("recipe", "data"))
            meant = settings.get(run["row"]) == run["settings"]
            if same and meant and (run["row"], run["seed"]) not in own:
                found.append({**run, "borrowed": name})
    return found


def number(value: float | None, digits: int) -> str:
    """A metric of a run; None is a number that was not finite."""
    return "not finite" if value is None else f"{value:.{digits}f}"


def _sizes(task: Task, row: Row, seed: int) -> Record:
    """What the package knows of a network; a task that knows better says it itself.

    A network without a bank has its parameters as degrees of freedom, and no virtual weights.
    """
    found = rpg.summary(task.build(row, seed))
    return {
        "dof": found.dof or found.unshared,
        "virtual_weights": found.virtual_weights or None,
        "trainable": found.dof + found.unshared,
    }
