"""A run of a CPU suite: every group several times over, and a file that a later call continues."""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import harness, machine, roofline
from benchmarks.harness import schema as format_
from benchmarks.harness.cases import DTYPES
from benchmarks.harness.cpu import bandwidth, grid, schema, traffic
from benchmarks.harness.cpu.bandwidth import Level
from benchmarks.harness.cpu.grid import Group, Point, Suite
from benchmarks.harness.cpu.subject import Job, Subject
from benchmarks.harness.timing import cpu_headline
from rpg_kernels import _checks

MIN_ROUNDS, MAX_ROUNDS = 3, 50
_SETTLE = 2e-3  # seconds that a job runs before it counts: other threads stop spinning meanwhile
_SAMPLE = 2e-3  # seconds that a sample lasts at least, if it is no single call
Record = dict[str, Any]
Row = dict[str, Any]


def run(
    name: str,
    suite: Suite,
    *,
    part: bool = False,
    threads: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    commit: str | None = None,
    out: Path | None = None,
    show: Callable[[str], None] | None = None,
) -> Record:
    """Measure a suite and return what ``schema.LAYERS_FILE`` describes.

    The file is written after every group of a series. Where ``out`` holds an incomplete run of the
    same suite, sources and machine, that run is continued.

    Args:
        name: of the suite.
        suite: what to measure, see ``grid.choose``.
        part: it is not all of the suite.
        threads: of the processor; None for torch's present number.
        seconds: for the samples of a group in a series; None for the suite's.
        seed: of values and of the order of samples.
        commit: to record outside a git checkout.
        out: where to write; None writes nothing.
        show: called with a line for people before every group; None prints them.

    Raises:
        ValueError: a number that is out of range.
        OSError: ``out`` cannot be written; it is tried before anything is measured.
    """
    threads = torch.get_num_threads() if threads is None else threads
    _checks.integer("threads", threads, 1, 4096)
    _checks.integer("seed", seed, 0, 2**63 - 1)
    seconds = suite.seconds if seconds is None else seconds
    if not 0 <= seconds < math.inf:
        raise _checks.fail("seconds", repr(seconds), "a number from 0")
    harness.check_writable(out)
    show = show or harness.to_stderr
    with harness.torch_settings(threads):
        record = _record(name, suite, part, seconds, seed, commit)
        earlier = _earlier(out, record)
        if earlier is not None:
            record = earlier
            show(f"continues {out}, where {len(record['done'])} parts are done")
        work = [(series, group) for series in range(suite.series) for group in suite.groups]
        try:
            for number, (series, group) in enumerate(work, 1):
                key = f"{group} {series}"
                if key in record["done"]:
                    continue
                show(f"[{number}/{len(work)}] {group}, series {series + 1}")
                if group is suite.groups[0] or not record["matrix_per_s"]:
                    _rates(record, suite)
                _measure(record, group, series)
                record["done"].append(key)
                _save(record, out)
            record["complete"] = True
        finally:
            _save(record, out)
    return record


def _record(
    name: str, suite: Suite, part: bool, seconds: float, seed: int, commit: str | None
) -> Record:
    return {
        "schema": schema.LAYERS,
        "version": schema.VERSION,
        "complete": False,
        "created": machine.now(),
        "command": machine.command(),
        "clock": cpu_headline(torch.get_num_threads()),
        "environment": machine.environment(torch.device("cpu"), commit),
        "options": {
            "suite": name,
            "part": [str(group) for group in suite.groups] if part else [],
            "series": suite.series,
            "seconds": seconds,
            "seed": seed,
        },
        "rates": [],
        "matrix_per_s": {},
        "load": {"before": machine.load(), "busy": []},
        "done": [],
        "results": [],
    }


def levels_of(record: Record) -> list[Level]:
    """The measured rates of a file."""
    names = ("level", "capacity", "read_bytes_per_s", "update_bytes_per_s")
    return [Level(*(rate[name] for name in names)) for rate in record["rates"]]


def _rates(record: Record, suite: Suite) -> None:
    """Measure bandwidths and products, and keep the best of this and earlier series."""
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
    for dtype in dict.fromkeys((torch.float32, *(DTYPES[g.dtype][0] for g in suite.groups))):
        name = str(dtype).removeprefix("torch.")
        rate = roofline.matrix_rate(torch.device("cpu"), dtype)
        record["matrix_per_s"][name] = max(rate, record["matrix_per_s"].get(name, 0.0))


def _earlier(out: Path | None, record: Record) -> Record | None:
    """An incomplete run of the same thing in ``out``."""
    if out is None or not out.exists():
        return None
    try:
        held = format_.load(out, schema.LAYERS_FILE)
    except (OSError, ValueError):
        return None  # something else, which will be replaced
    same = all(held[key] == record[key] for key in ("environment", "options", "clock"))
    return held if same and not held["complete"] else None


def _measure(record: Record, group: Group, series: int) -> None:
    """One series of a group: judged first if it is the first, then timed."""
    seed = record["options"]["seed"]
    cache = machine.cache_bytes(torch.device("cpu"))
    subject = Subject(group, cache, seed)
    jobs = subject.jobs()
    levels = levels_of(record)
    rows = {_key(row): row for row in record["results"]}
    first = [job for job in jobs if _key_of(group, job.point) not in rows]
    for job, accuracy in zip(first, subject.judge(first), strict=True):
        row = _row(group, job)
        if accuracy is not None:
            error = accuracy.error if math.isfinite(accuracy.error) else None
            row.update(error=error, allowed=accuracy.allowed)
            if not accuracy.passed:
                reason = f"output: error {accuracy.error:.3g}, allowed {accuracy.allowed:.3g}"
                row.update(status=format_.WRONG, reason=reason)
        if levels and group.layer.op == "linear" and traffic.known(job):
            case = subject.case(job.point.batch)
            threads = record["environment"]["threads"]
            moved = traffic.count(job, case.input_bytes, case.output_bytes, threads, levels)
            row["traffic"] = asdict(moved)
        record["results"].append(row)
        rows[_key(row)] = row
    timed = [job for job in jobs if rows[_key_of(group, job.point)]["status"] == format_.OK]
    order = random.Random(seed + series)
    for job, samples in _times(timed, record["options"]["seconds"], order):
        row = rows[_key_of(group, job.point)]
        read = [sample[record["clock"]] for sample in samples]
        row["series_s"].append(statistics.median(read))
        row["median_s"] = statistics.median(row["series_s"])
        row["samples"] += len(samples)
        row["wait"] = statistics.median(s["wall"] / s["process"] for s in samples)


def _times(
    jobs: Sequence[Job], seconds: float, order: random.Random
) -> list[tuple[Job, list[dict[str, float]]]]:
    """Samples of every job, in turn, in a new order every round."""
    todo = [(job, list[dict[str, float]]()) for job in jobs]
    shuffled = list(todo)
    begin = time.perf_counter()
    with torch.no_grad():
        for round_ in range(MAX_ROUNDS):
            if round_ >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
                break
            order.shuffle(shuffled)
            for job, samples in shuffled:
                samples.append(_sample(job))
    return todo


def _sample(job: Job) -> dict[str, float]:
    """Seconds of a call on two clocks: the mean of calls that last as long as a sample should."""
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


def _row(group: Group, job: Job) -> Row:
    point = job.point
    return {
        "layer": group.layer.names[0],
        "op": group.layer.op,
        "weight_shape": list(group.layer.weight),
        "batch": point.batch,
        "dtype": group.dtype,
        "impl": point.impl,
        "dof": point.bank and point.bank.dof,
        "window": point.bank and point.bank.window,
        "laps": point.bank and point.bank.laps,
        "backend": job.backend,
        "status": format_.OK,
        "reason": None,
        "error": None,
        "allowed": None,
        "copies": job.copies,
        "series_s": [],
        "median_s": None,
        "samples": 0,
        "wait": None,
        "traffic": None,
    }


Key = tuple[Any, ...]


def _key(row: Row) -> Key:
    names = ("layer", "dtype", "impl", "dof", "window", "laps", "batch")
    return tuple(row[name] for name in names)


def _key_of(group: Group, point: Point) -> Key:
    bank = point.bank
    settings = (None, None, None) if bank is None else (bank.dof, bank.window, bank.laps)
    return (group.layer.names[0], group.dtype, point.impl, *settings, point.batch)


def spread(row: Row) -> float:
    """What the series of a row lie apart, relative to their median."""
    series = row["series_s"]
    return (max(series) - min(series)) / statistics.median(series) if len(series) > 1 else 0.0


def _save(record: Record, out: Path | None) -> None:
    """Bring the remarks on load up to date, check the record, and write it."""
    timed = [row for row in record["results"] if row["median_s"]]
    threads = record["environment"]["threads"]
    waits = [row["wait"] for row in timed]
    busy = machine.busy_reasons(record["load"]["before"], waits, [], threads)
    apart = sum(spread(row) > machine.BUSY_SPREAD for row in timed)
    if apart > len(timed) // 10:
        limit = f"{machine.BUSY_SPREAD:.0%}"
        busy.append(f"the series of {apart} of {len(timed)} figures lie more than {limit} apart")
    record["load"]["busy"] = busy
    format_.validate(record, schema.LAYERS_FILE)
    if out is not None:
        machine.write_json(out, record)


def load(path: Path) -> Record | None:
    """A result file of these suites, or None where it is of another kind.

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
        f"{row['layer']} {row['dtype']} batch {row['batch']} "
        f"{grid.Bank(row['dof'], row['laps'], row['window'])} {row['impl']}: {row['reason']}"
        for row in record["results"]
        if row["status"] != format_.OK
    ]
