"""Does what a results file lacks, one training run after another, until a budget is used up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy import records
from benchmarks.accuracy.records import Record
from rpg_kernels._extras import require


@dataclass(frozen=True)
class Job:
    """One run: a row at a seed.

    Args:
        row: name of the row.
        seed: of the run.
        settings: what the row means, as JSON takes it.
        steps: optimiser steps, for the progress bar.
        run: trains, calls its argument after each step, and returns what belongs into the record.
    """

    row: str
    seed: int
    settings: Mapping[str, Any]
    steps: int
    run: Callable[[Callable[[], object]], Record]


def work(
    jobs: Sequence[Job],
    common: Mapping[str, Any],
    environment: Mapping[str, Any],
    out: Path,
    budget: float | None = None,
    say: Callable[[Record], str] = lambda record: "",
    also: Sequence[Record] = (),
) -> int:
    """Do the jobs that ``out`` does not have, in order, and append each when it has finished.

    Args:
        jobs: in order.
        common: recipe and data of all of them, recorded with each.
        environment: recorded with each.
        out: the results file, made by the same recipe from the same data.
        budget: minutes; no job is begun that would end later, going by the slowest so far.
        say: what of a record is shown.
        also: runs of other files that count as done.

    Returns:
        How many were done.

    Raises:
        ValueError: ``out`` holds runs of another recipe, or of rows that meant something else.
    """
    todo = missing(jobs, common, out, also)
    print(f"{out}: {len(jobs) - len(todo)} of {len(jobs)} runs are there", flush=True)
    begin, slowest, done = time.perf_counter(), 0.0, 0
    tqdm = require("tqdm", "tqdm", "the progress bar")
    # disable=None: no bar where the output is not a terminal.
    with tqdm.tqdm(total=sum(job.steps for job in todo), unit="step", disable=None) as bar:
        for job in todo:
            if budget is not None and time.perf_counter() - begin + slowest > 60 * budget:
                bar.write(f"the budget of {budget:g} minutes is used up")
                break
            bar.set_description(f"{job.row}, seed {job.seed}")
            if records.find(records.read(out), job.row, job.seed):
                bar.update(job.steps)  # by another process, meanwhile
                continue
            start, process_start = time.perf_counter(), time.process_time()
            made = job.run(bar.update)
            record = {
                "row": job.row,
                "seed": job.seed,
                "settings": job.settings,
                "seconds": time.perf_counter() - start,
                "process_seconds": time.process_time() - process_start,
                **made,
                **common,
                "environment": environment,
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            records.append(out, record)
            done += 1
            slowest = max(slowest, time.perf_counter() - start)
            bar.write(
                f"{done:3} {job.row}, seed {job.seed}: {say(record)} after "
                f"{record['seconds']:.0f} s; {(time.perf_counter() - begin) / 60:.1f} min in all"
            )
    return done


def missing(
    jobs: Sequence[Job], common: Mapping[str, Any], out: Path, also: Sequence[Record] = ()
) -> list[Job]:
    """The jobs that are neither in the file nor in ``also``, once the file is found comparable.

    Raises:
        ValueError: as of ``work``.
    """
    common = as_json(common)
    done = records.read(out)
    for record in done:
        for key, wanted in common.items():
            changed = {k: record[key].get(k) for k, v in wanted.items() if record[key].get(k) != v}
            if changed:
                raise ValueError(
                    f"out: got {out}, made with {key} {changed}, wanted "
                    f"{ {k: wanted[k] for k in changed} }, or another file"
                )
    todo = []
    for job in jobs:
        found, wanted = records.find(done, job.row, job.seed), as_json(job.settings)
        if found is None and records.find([*also], job.row, job.seed) is None:
            todo.append(job)
        elif found is not None and found["settings"] != wanted:
            raise ValueError(
                f"{out}: row {job.row!r}: got {found['settings']}, wanted {wanted}; "
                "a row with another meaning needs another name"
            )
    return todo


def show(jobs: Sequence[Job], done: Sequence[Record]) -> None:
    """Print every job, and whether it is done."""
    for job in jobs:
        state = "done" if records.find([*done], job.row, job.seed) else ""
        print(f"{job.row:40} seed {job.seed}  {state}")


def as_json(value: Any) -> Any:
    """A value as a file gives it back.

    Example:
        >>> as_json({"depths": (2, 2)})
        {'depths': [2, 2]}
    """
    return json.loads(json.dumps(value))
