"""A run of suite ``networks``: point by point, into a file that a later call continues."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import harness, machine
from benchmarks.harness import schema as format_
from benchmarks.harness.cpu import networks_subject as subject
from benchmarks.harness.cpu import rounds, schema
from benchmarks.harness.cpu.grid import TRAINING, Bank
from benchmarks.harness.cpu.networks import Point
from benchmarks.harness.cpu.run import check, continued
from benchmarks.harness.timing import cpu_headline

SECONDS = 20.0
DENSE, PUBLISHED, OURS = "dense", "published", "rpg-kernels"
# Of the outputs, relative to the largest: what rounding may make of a network.
ALLOWED = {"fp32": 1e-3, "bf16": 1e-1}
Record = dict[str, Any]
Row = dict[str, Any]


def run(
    points: Sequence[Point],
    *,
    threads: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    commit: str | None = None,
    out: Path | None = None,
    show: Callable[[str], None] | None = None,
) -> Record:
    """Measure points and return what ``schema.NETWORKS_FILE`` describes.

    The file is written after every point, and continued where ``out`` holds a run of the same
    sources, machine and options. A row whose ratio is not quiet keeps no figure.

    Args:
        points: what to measure, see ``networks.choose``.
        threads: of the processor; None for one, by process time.
        seconds: for the samples of a point; None for ``SECONDS``.
        seed: of values and of the order of samples.
        commit: to record outside a git checkout.
        out: where to write; None writes nothing.
        show: called with a line for people before every point; None prints them.

    Raises:
        ValueError: a number that is out of range; several threads on a machine that is busy.
        OSError: ``out`` cannot be written; it is tried before anything is measured.
    """
    threads = 1 if threads is None else threads
    seconds = SECONDS if seconds is None else seconds
    check(threads, seconds, seed, out)
    show = show or harness.to_stderr
    with harness.torch_settings(threads), torch.random.fork_rng():
        record = continued(out, _record(points, seconds, seed, commit), load)
        done = {row["point"] for row in record["results"]} - {
            name.partition(":")[0] for name in record["disturbed"]
        }
        todo = [point for point in points if str(point) not in done]
        if len(todo) < len(points):
            show(f"continues {out}, which has {len(points) - len(todo)} of {len(points)} points")
        for number, point in enumerate(todo, 1):
            show(f"[{number}/{len(todo)}] {point}")
            missing = point.case.missing()
            if missing:
                record["missing"][point.case.name] = missing
                continue
            torch.manual_seed(seed)
            _measure(record, point)
            _save(record, out)
        record["complete"] = True
        _save(record, out)
    return record


def _record(points: Sequence[Point], seconds: float, seed: int, commit: str | None) -> Record:
    return {
        "schema": schema.NETWORKS,
        "version": schema.VERSION,
        "complete": False,
        "created": machine.now(),
        "command": machine.command(),
        "clock": cpu_headline(torch.get_num_threads()),
        "environment": machine.environment(torch.device("cpu"), commit),
        "options": {"points": list(map(str, points)), "seconds": seconds, "seed": seed},
        "lacks": machine.lacking(),
        "load": {"before": machine.load(), "busy": []},
        "disturbed": {},
        "missing": {},
        "results": [],
    }


def _measure(record: Record, point: Point) -> None:
    """Judge every bank of a point, time what is right in turn, and keep rows that are quiet."""
    data = point.case.batch(point.batch)
    dense = point.case.make()
    ways = {DENSE: subject.dense(dense, point, data)}
    rows: dict[str, Row] = {}
    if point.case.published and point.what == TRAINING and point.dtype == "fp32":
        bank = Bank(point.banks[0].dof)
        model = point.case.published(point.case.make(), bank.dof)
        ways[PUBLISHED] = subject.ways(model, point, data, point.dtype)
        rows[PUBLISHED] = _row(point, PUBLISHED, bank)
    for bank in point.banks:
        model = point.case.share(point.case.make(), bank)
        name, row = str(bank), _row(point, OURS, bank)
        error = subject.error(model, point, data)
        row["error"] = error if math.isfinite(error) else None
        rows[name] = row
        if error <= ALLOWED[point.dtype]:
            ways[name] = subject.ways(model, point, data, point.dtype)
        else:
            row["status"] = format_.WRONG
    samples = rounds.in_turn(
        {name: [way.job(name) for way in of_name] for name, of_name in ways.items()},
        record["clock"],
        record["options"]["seconds"],
        random.Random(record["options"]["seed"]),
    )
    record["results"] = [row for row in record["results"] if row["point"] != str(point)]
    weighs = point.what == TRAINING and len(point.case.sample) == 3 and not point.case.is_layer
    held = {name: of_name[0].memory() for name, of_name in ways.items() if weighs}
    for name, row in rows.items():
        full = f"{point}: {name}"
        record["disturbed"].pop(full, None)
        if row["status"] == format_.OK:
            _fill(row, name, samples, record["clock"])
            row.update(memory=held.get(name), dense_memory=held.get(DENSE))
            error = rounds.Ratio(**row["ratio"]).error
            if error > rounds.QUIET:
                record["disturbed"][full] = error
                continue
        record["results"].append(row)


def _fill(row: Row, name: str, samples: rounds.Samples, clock: str) -> None:
    """The figures of a row: the fastest way of it beside the fastest dense one."""
    best = {
        of: rounds.fastest(samples, [job for job in samples if job.startswith(f"{of}: ")], clock)
        for of in (DENSE, name)
    }
    ours = samples[best[name]]
    row.update(
        way=best[name].removeprefix(f"{name}: "),
        dense=best[DENSE].removeprefix(f"{DENSE}: "),
        seconds=rounds.median(samples, best[name], clock),
        dense_seconds=rounds.median(samples, best[DENSE], clock),
        ratio=asdict(rounds.ratio(samples, best[DENSE], best[name], clock)),
        all={job: rounds.median(samples, job, clock) for job in samples},
        wait=statistics.median(sample["wall"] / sample["process"] for sample in ours),
    )


def _row(point: Point, network: str, bank: Bank) -> Row:
    """A row that is not timed yet."""
    return {
        "point": str(point),
        "case": point.case.name,
        "dtype": point.dtype,
        "batch": point.batch,
        "what": point.what,
        "network": network,
        "dof": bank.dof,
        "laps": bank.laps,
        "unit": point.case.unit,
        "units": point.batch * point.case.per_sample,
        "status": format_.OK,
        "error": 0.0,
        **dict.fromkeys(("way", "seconds", "dense", "dense_seconds", "ratio", "wait")),
        "all": {},
        "memory": None,
        "dense_memory": None,
    }


def _save(record: Record, out: Path | None) -> None:
    """Check the record, and write it."""
    format_.validate(record, schema.NETWORKS_FILE)
    if out is not None:
        machine.write_json(out, record)


def load(path: Path) -> Record | None:
    """A result file of this suite, or None where it is of another kind.

    Raises:
        ValueError: it does not keep to the format.
    """
    held = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(held, dict) or held.get("schema") != schema.NETWORKS:
        return None
    return format_.load(path, schema.NETWORKS_FILE)


def wrong(record: Record) -> list[str]:
    """A sentence for each result that is wrong."""
    return [
        f"{row['point']}, {Bank(row['dof'], row['laps'])}: error {row['error'] or math.inf:.3g} of "
        f"the largest output, allowed {ALLOWED[row['dtype']]:g}"
        for row in record["results"]
        if row["status"] == format_.WRONG
    ]
