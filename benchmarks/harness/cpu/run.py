"""A run of the CPU suite: point by point, into a file that a later call continues."""

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

from benchmarks.harness import harness, machine, roofline
from benchmarks.harness import schema as format_
from benchmarks.harness.cases import DTYPES
from benchmarks.harness.cpu import bandwidth, grid, rounds, schema, traffic
from benchmarks.harness.cpu.bandwidth import Level
from benchmarks.harness.cpu.grid import Bank, Point
from benchmarks.harness.cpu.opponents import Job
from benchmarks.harness.cpu.subject import Ours, Subject
from benchmarks.harness.timing import cpu_headline
from rpg_kernels import _checks

SECONDS = 1.5
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
    """Measure points and return what ``schema.LAYERS_FILE`` describes.

    The file is written after every point. Where ``out`` holds a run of the same sources, machine
    and options, what it has is kept, and only what it lacks is measured: other points, those that
    an interruption left, and those that other work disturbed. A row whose ratio is not quiet
    (``rounds.QUIET``) keeps no figure.

    Args:
        points: what to measure, see ``grid.choose``.
        threads: of the processor; None for one, whose process time other work adds little to.
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
    with harness.torch_settings(threads):
        record = continued(out, _record(points, seconds, seed, commit), load)
        todo = [point for point in points if _lacks(record, point)]
        if len(todo) < len(points):
            show(f"continues {out}, which has {len(points) - len(todo)} of {len(points)} points")
        if todo:
            _rates(record)
        try:
            for number, point in enumerate(todo, 1):
                show(f"[{number}/{len(todo)}] {point}")
                _measure(record, point)
                _save(record, out)
            record["complete"] = True
        finally:
            _save(record, out)
    return record


def check(threads: int, seconds: float, seed: int, out: Path | None) -> None:
    """Refuse options of a run before anything is measured.

    Raises:
        ValueError: a number that is out of range; several threads on a machine that is busy.
        OSError: ``out`` cannot be written.
    """
    _checks.integer("threads", threads, 1, 4096)
    _checks.integer("seed", seed, 0, 2**63 - 1)
    if not 0 <= seconds < math.inf:
        raise _checks.fail("seconds", repr(seconds), "a number from 0")
    busy = machine.busy_reasons(machine.load(), [], [], threads)
    if busy and threads > 1:
        raise _checks.fail("threads", threads, f"1 on a machine that is busy: {busy[0]}")
    harness.check_writable(out)


def _record(points: Sequence[Point], seconds: float, seed: int, commit: str | None) -> Record:
    return {
        "schema": schema.LAYERS,
        "version": schema.VERSION,
        "complete": False,
        "created": machine.now(),
        "command": machine.command(),
        "clock": cpu_headline(torch.get_num_threads()),
        "environment": machine.environment(torch.device("cpu"), commit),
        "options": {"points": list(map(str, points)), "seconds": seconds, "seed": seed},
        "lacks": machine.lacking(),
        "rates": [],
        "matrix_per_s": {},
        "load": {"before": machine.load(), "busy": []},
        "disturbed": {},
        "results": [],
    }


def continued(
    out: Path | None,
    record: Record,
    load: Callable[[Path], Record | None],
    also: Sequence[str] = (),
) -> Record:
    """The record with what ``out`` holds of the same sources, machine and options.

    Args:
        out: the file, which may not be there or may hold something else.
        record: of a run that begins.
        load: reads a file of this format; None for another.
        also: fields of this format that are kept beside those that every format has.
    """
    try:
        held = None if out is None or not out.exists() else load(out)
    except (OSError, ValueError):
        held = None  # something else, which will be replaced
    if held is None or _identity(held) != _identity(record):
        return record
    named = dict.fromkeys((*held["options"]["points"], *record["options"]["points"]))
    record["options"]["points"] = list(named)
    kept = ("created", "rates", "matrix_per_s", "load", "disturbed", "results", *also)
    return record | {key: held[key] for key in kept if key in held}


def _identity(record: Record) -> tuple[Any, ...]:
    """What two runs must have in common; sources say more than a commit that may be dirty."""
    environment = {k: v for k, v in record["environment"].items() if k != "commit"}
    return environment, record["options"]["seconds"], record["options"]["seed"]


def _lacks(record: Record, point: Point) -> bool:
    have = {name_of(row) for row in record["results"]}
    return any(_name(point, bank) not in have for bank in point.banks)


def levels_of(record: Record) -> list[Level]:
    """The measured rates of a file."""
    names = ("level", "capacity", "read_bytes_per_s", "update_bytes_per_s")
    return [Level(*(rate[name] for name in names)) for rate in record["rates"]]


def _rates(record: Record) -> None:
    """Measure bandwidths and products, and keep the best of this and earlier runs."""
    measured = bandwidth.measure(record["environment"]["threads"])
    record["rates"] = [
        {
            "level": level.name,
            "capacity": level.capacity,
            "read_bytes_per_s": level.read,
            "update_bytes_per_s": level.update,
        }
        for level in bandwidth.best(levels_of(record), measured)
    ]
    # Without bf16 instructions a product in bf16 is slower than in fp32, and takes seconds.
    names = [n for n in grid.DTYPES if n == "fp32" or "AVX512-BF16" not in record["lacks"]]
    for dtype in (DTYPES[name][0] for name in names):
        name = str(dtype).removeprefix("torch.")
        rate = roofline.matrix_rate(torch.device("cpu"), dtype)
        record["matrix_per_s"][name] = max(rate, record["matrix_per_s"].get(name, 0.0))


def _measure(record: Record, point: Point) -> None:
    """Judge everything of a point, time what is right in turn, and keep rows that are quiet."""
    seed, clock = record["options"]["seed"], record["clock"]
    cache = machine.cache_bytes(torch.device("cpu"))
    subject = Subject(point, cache, seed)
    names = {_name(point, bank) for bank in point.banks}
    record["results"] = [row for row in record["results"] if name_of(row) not in names]
    dense, missing = _dense(subject)
    rows = [(ours, _row(point, ours, subject)) for ours in subject.ours]
    right = [(ours, row) for ours, row in rows if row["status"] == format_.OK]
    samples = rounds.measure(
        [ours.job for ours, _ in right],
        dense,
        clock,
        record["options"]["seconds"],
        random.Random(seed),
        {ours.job.name: ours.reference for ours, _ in right},
    )
    levels, rates = levels_of(record), record["matrix_per_s"]
    roof = traffic.floors(traffic.dense(subject, cache), levels, rates)
    best = rounds.fastest(samples, [job.name for job in dense], clock)
    for ours, row in rows:
        row["roof"] = traffic.floors(traffic.ours(subject, ours), levels, rates)
        row.update(dense_missing=missing, dense_roof=roof)
        quiet = True
        if row["status"] == format_.OK:
            ratio = rounds.ratio(samples, best, ours.job.name, clock)
            read = samples[ours.job.name]
            row.update(
                rounds=len(read),
                ours_s=rounds.median(samples, ours.job.name, clock),
                reference_s=rounds.median(samples, ours.reference.name, clock),
                dense=best,
                dense_s=rounds.median(samples, best, clock),
                ratio=asdict(ratio),
                dense_all={job.name: rounds.median(samples, job.name, clock) for job in dense},
                wait=statistics.median(sample["wall"] / sample["process"] for sample in read),
            )
            quiet = ratio.error <= rounds.QUIET
        name = name_of(row)
        record["disturbed"].pop(name, None)
        if quiet:
            record["results"].append(row)
        else:
            record["disturbed"][name] = ratio.error


def _dense(subject: Subject) -> tuple[list[Job], dict[str, str]]:
    """Dense layers that are right, and why the others are not timed."""
    jobs, missing = subject.dense()
    right = []
    for job in jobs:
        try:
            accuracy = subject.judge_dense(job)
        except RuntimeError as error:
            missing[job.name] = str(error).splitlines()[0]
            continue
        if accuracy.passed:
            right.append(job)
        else:
            missing[job.name] = f"error {accuracy.error:.3g}, allowed {accuracy.allowed:.3g}"
    return right, missing


def _row(point: Point, ours: Ours, subject: Subject) -> Row:
    """A bank's row, judged and not yet timed."""
    accuracy = subject.judge(ours)
    reason = f"error {accuracy.error:.3g}, allowed {accuracy.allowed:.3g}"
    return {
        "layer": point.layer.names[0],
        "weight_shape": list(point.layer.weight),
        "dtype": point.dtype,
        "batch": point.batch,
        "what": point.what,
        "dof": ours.bank.dof,
        "laps": ours.bank.laps,
        "backend": ", ".join(ours.backends),
        "status": format_.OK if accuracy.passed else format_.WRONG,
        "reason": None if accuracy.passed else reason,
        "error": accuracy.error if math.isfinite(accuracy.error) else None,
        "allowed": accuracy.allowed,
        "copies": ours.job.copies,
        "rounds": 0,
        **dict.fromkeys(("ours_s", "reference_s", "dense", "dense_s", "ratio", "wait")),
        "dense_all": {},
    }


def _name(point: Point, bank: Bank) -> str:
    return f"{point}, {bank}"


def name_of(row: Row) -> str:
    """What a row is of, in words."""
    bank = Bank(row["dof"], row["laps"])
    return f"{row['layer']} {row['dtype']} batch {row['batch']} {row['what']}, {bank}"


def _save(record: Record, out: Path | None) -> None:
    """Check the record, and write it."""
    format_.validate(record, schema.LAYERS_FILE)
    if out is not None:
        machine.write_json(out, record)


def load(path: Path) -> Record | None:
    """A result file of this suite, or None where it is of another kind.

    Raises:
        ValueError: it does not keep to the format.
    """
    held = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(held, dict) or held.get("schema") != schema.LAYERS:
        return None
    return format_.load(path, schema.LAYERS_FILE)


def wrong(record: Record) -> list[str]:
    """A sentence for each result that is wrong."""
    return [
        f"{name_of(row)}: {row['reason']}"
        for row in record["results"]
        if row["status"] != format_.OK
    ]
