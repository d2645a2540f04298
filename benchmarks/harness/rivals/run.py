"""A run of suite ``rivals``: point by point, into a file that a later call continues."""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import harness, machine
from benchmarks.harness import schema as format_
from benchmarks.harness.cpu import bandwidth, rounds
from benchmarks.harness.cpu.bandwidth import Level
from benchmarks.harness.cpu.rounds import Ratio
from benchmarks.harness.cpu.run import check, continued, levels_of
from benchmarks.harness.rivals import flush, schema, tokens, turns
from benchmarks.harness.rivals.points import DECODER, Point
from benchmarks.harness.rivals.registry import FAMILIES
from benchmarks.harness.rivals.worker import Orders
from benchmarks.harness.timing import cpu_headline
from rpg_kernels import _checks
from rpg_kernels.models import DecoderConfig

SECONDS = 15.0
TOKENS, SERIES = 24, 5
Record = dict[str, Any]
Row = dict[str, Any]
_Read = Mapping[str, Any]
Asked = list[tuple[turns.Process, dict[str, Any]]]


def run(
    chosen: Sequence[Point],
    decoder: DecoderConfig | None = None,
    *,
    families: Sequence[str] = (),
    dofs: Sequence[int] = (),
    threads: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    commit: str | None = None,
    out: Path | None = None,
    flush_bytes: int | None = None,
    show: Callable[[str], None] | None = None,
) -> Record:
    """Measure points and return what ``schema.FILE`` describes.

    Every family of packages runs in a process of its own; a family that is not installed is left
    out with a sentence. The file is written after every point, and continued where ``out`` holds a
    run of the same sources, machine and options: a point whose ratios had not settled is measured
    anew.

    Args:
        chosen: what to measure, see ``points.choose``.
        decoder: sizes of the decoder whose tokens are counted; None leaves it out.
        families: names of ``registry.FAMILIES``; none takes all.
        dofs: sizes of banks; none takes all.
        threads: of the processor; None for torch's present number.
        seconds: for the samples of a point; None for ``SECONDS``.
        seed: of values and of the order of samples.
        commit: to record outside a git checkout.
        out: where to write; None writes nothing.
        flush_bytes: read between two turns; None for twice the last-level cache.
        show: called with a line for people before every point; None prints them.

    Raises:
        ValueError: an unknown family; a number that is out of range; several threads on a machine
            that is busy.
        OSError: ``out`` cannot be written; it is tried before anything is measured.
    """
    threads = torch.get_num_threads() if threads is None else threads
    seconds = SECONDS if seconds is None else seconds
    for name in families:
        _checks.choice("impl", name, tuple(FAMILIES))
    check(threads, seconds, seed, out)
    show = show or harness.to_stderr
    if flush_bytes is None:
        flush_bytes = 2 * machine.cache_bytes(torch.device("cpu"))
    options: dict[str, Any] = {
        "points": [*map(str, chosen), *([DECODER] if decoder else [])],
        "families": list(families or FAMILIES), "dofs": list(dofs),
        "seconds": seconds, "seed": seed,
    }  # fmt: skip
    with harness.torch_settings(threads):
        fresh = _record(options, flush_bytes, commit)
        record = continued(out, fresh, lambda path: _same(load(path), fresh), ("tokens", "model"))
        done = {row["point"] for row in record["results"]} - set(record["disturbed"])
        todo = [point for point in chosen if str(point) not in done]
        if len(todo) < len(chosen):
            show(f"continues {out}, which has {len(chosen) - len(todo)} of {len(chosen)} points")
        handle = flush.shared(flush_bytes)
        try:
            for (layer, what), some in itertools.groupby(todo, lambda p: (p.layer, p.what)):
                _rates(record)
                show(f"{layer.names[0]} {what}: starting {', '.join(options['families'])}")
                _measure(record, list(some), handle, show, out)
            if decoder and not record["tokens"]:
                _rates(record)
                show(DECODER)
                clock = {"process": time.process_time, "wall": time.perf_counter}[record["clock"]]
                record["model"], record["tokens"] = tokens.measure(
                    decoder, [b for b in tokens.BANKS if b.dof in (dofs or [b.dof])],
                    flush.Flush(handle, threads), clock, tokens=TOKENS, series=SERIES, seed=seed,
                )  # fmt: skip
        finally:
            os.close(handle)
        record["complete"] = True
        _save(record, out)
    return record


def _record(options: dict[str, Any], flush_bytes: int, commit: str | None) -> Record:
    versions: dict[str, str] = {}
    for name in options["families"]:
        versions |= FAMILIES[name].versions()
    return {
        "schema": schema.RIVALS,
        "version": schema.VERSION,
        "complete": False,
        "created": machine.now(),
        "command": machine.command(),
        "clock": cpu_headline(torch.get_num_threads()),
        "environment": machine.environment(torch.device("cpu"), commit),
        "load": {"before": machine.load(), "busy": []},
        "options": options,
        "lacks": machine.lacking(),
        "rates": [],
        "versions": versions,
        "flush_bytes": flush_bytes,
        "skipped": {},
        "disturbed": {},
        "results": [],
        "model": {},
        "tokens": [],
    }


def _same(held: Record | None, fresh: Record) -> Record | None:
    """A file that this run may continue: of the same families, banks and versions."""
    if held is None or held["versions"] != fresh["versions"]:
        return None
    alike = all(held["options"][key] == fresh["options"][key] for key in ("families", "dofs"))
    return held if alike else None


def _rates(record: Record) -> None:
    """Measure bandwidths, and keep the best of this and earlier measurements."""
    measured = bandwidth.measure(record["environment"]["threads"])
    best: list[Level] = bandwidth.best(levels_of(record), measured)
    record["rates"] = [
        {"level": level.name, "capacity": level.capacity, "read_bytes_per_s": level.read,
         "update_bytes_per_s": level.update}
        for level in best
    ]  # fmt: skip


def _measure(
    record: Record,
    some: Sequence[Point],
    handle: int,
    show: Callable[[str], None],
    out: Path | None,
) -> None:
    """Points of one layer and pass: processes are started once for all of them."""
    first, options = some[0], record["options"]
    running: list[turns.Process] = []
    asked: Asked = []
    refused: list[tuple[turns.Process, dict[str, Any]]] = []
    try:
        for name in options["families"]:
            why = FAMILIES[name].missing()
            if why:
                record["skipped"][name] = why
                continue
            orders = Orders(
                name, first.what, first.shape, tuple(point.batch for point in some),
                tuple(options["dofs"]), record["environment"]["threads"], first.copies,
                options["seed"], handle,
            )  # fmt: skip
            running.append(turns.Process(orders))
        for process in running:  # which have begun together
            made, why = process.prepared()
            show(f"{process.family}: {len(made)} ways")
            if why:
                record["skipped"][process.family] = why
            for way in made:
                (refused if way["reason"] else asked).append((process, way))
        for point in some:
            show(str(point))
            record["results"] = [r for r in record["results"] if r["point"] != str(point)]
            rows = [*_timed(record, point, asked), *_refused(point, refused)]
            record["results"] += rows
            _settled(record, point, rows)
            _save(record, out)
    finally:
        for process in running:
            process.end()


def _timed(record: Record, point: Point, asked: Asked) -> Iterator[Row]:
    """Rows of a point: every way is judged, and what is right is timed in turn."""
    rows: dict[str, Row] = {}
    right: Asked = []
    for process, way in asked:
        answer = process.ask("check", way["name"], point.batch)
        row = rows[way["name"]] = _row(point, process.family, way) | answer
        if "error" not in answer:
            row["status"] = format_.FAILED
        elif answer["error"] is None or answer["error"] > answer["allowed"]:
            row["status"], row["reason"] = format_.WRONG, "its error is more than is allowed"
        else:
            right.append((process, way))
    order = random.Random(record["options"]["seed"])
    samples, failed = turns.take(right, point.batch, record["options"]["seconds"], order)
    for name, row in rows.items():
        if name in failed:
            row["status"], row["reason"] = format_.FAILED, failed[name]
        elif name in samples:
            row.update(samples[name])
    yield from rows.values()


def _refused(point: Point, refused: Asked) -> Iterator[Row]:
    for process, way in refused:
        yield _row(point, process.family, way) | {
            "status": format_.SKIPPED, "reason": way["reason"],
        }  # fmt: skip


def _row(point: Point, family: str, way: dict[str, Any]) -> Row:
    """Of a way that is neither judged nor timed yet."""
    return {
        "point": str(point),
        "layer": point.layer.names[0],
        "weight_shape": list(point.layer.weight),
        "what": point.what,
        "batch": point.batch,
        "family": family,
        **{key: way[key] for key in ("name", "kind", "ours", "reason")},
        "status": format_.OK,
        "error": None,
        "allowed": 0.0,
        **{key: way.get(key, 0) for key in ("parameters", "nbytes", "resident")},
        **{state: [] for state in turns.STATES},
    }


def fastest(rows: Sequence[_Read], state: str = "following") -> _Read | None:
    """The rival whose median is least, of those that ran in every round; None without one."""
    timed = [row for row in rows if row[state] and not row["ours"]]
    most = max((len(row[state]) for row in timed), default=0)
    whole = [row for row in timed if len(row[state]) == most]
    return min(whole, key=lambda row: statistics.median(row[state]), default=None)


def ratio(of: _Read, ours: _Read, state: str = "following") -> Ratio:
    """How many times faster ours is than a rival, round by round."""
    pairs = zip(of[state], ours[state], strict=False)
    ratios = [rival / own for rival, own in pairs]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0], 1)
    q25, median, q75 = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(q25, median, q75, len(ratios))


def _settled(record: Record, point: Point, rows: Sequence[Row]) -> None:
    """Note a point where the ratio of one of ours to the fastest rival did not settle."""
    record["disturbed"].pop(str(point), None)
    best = fastest(rows)
    own = [row for row in rows if row["ours"] and row["following"]]
    if best is None or not own:
        return
    worst = max(ratio(best, row).error for row in own)
    if worst > rounds.QUIET:
        record["disturbed"][str(point)] = worst


def _save(record: Record, out: Path | None) -> None:
    """Check the record, and write it."""
    format_.validate(record, schema.FILE)
    if out is not None:
        machine.write_json(out, record)


def load(path: Path) -> Record | None:
    """A result file of this suite, or None where it is of another kind.

    Raises:
        ValueError: it does not keep to the format.
    """
    held = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(held, dict) or held.get("schema") != schema.RIVALS:
        return None
    return format_.load(path, schema.FILE)


def wrong(record: Record) -> list[str]:
    """A sentence for each result of ours that is wrong or failed."""
    bad = [
        f"{row['point']}, {row['name']}: {row['reason']}"
        for row in record["results"]
        if row["ours"] and row["status"] in (format_.WRONG, format_.FAILED)
    ]
    return bad + [
        f"decoder, {row['name']}: logits differ by {row['error']} of the largest, allowed "
        f"{row['allowed']:g}"
        for row in record["tokens"]
        if row["error"] is None or row["error"] > row["allowed"]
    ]
