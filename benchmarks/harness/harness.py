"""A whole run: the cases one after the other, and the file that comes of it."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import baselines, machine, measure, roofline, schema
from benchmarks.harness.cases import Case
from benchmarks.harness.measure import Clock, Plan
from benchmarks.harness.timing import CpuClock, quoted
from rpg_kernels import _checks, timing

Record = dict[str, Any]


def run(
    cases: Sequence[Case],
    *,
    impls: Sequence[str] = (),
    device: str | None = None,
    threads: int = 1,
    seconds: float = 8.0,
    seed: int = 0,
    memory_limit: int | None = None,
    graphs: bool = True,
    roofs: bool = True,
    suite: str | None = None,
    commit: str | None = None,
    limit: float | None = None,
    out: Path | None = None,
    show: Callable[[str], None] | None = None,
) -> Record:
    """Measure cases and return what ``schema.FILE`` describes.

    The file is written after every case. A run that is interrupted leaves what it finished,
    marked as incomplete, and raises KeyboardInterrupt.

    Args:
        cases: what to measure.
        impls: names of implementations; none gives the usual ones.
        device: ``"cpu"`` or ``"cuda"``; None takes CUDA where there is one.
        threads: of the processor.
        seconds: time budget for the samples of one case.
        seed: of values, and of the order of samples.
        memory_limit: bytes that an implementation may expect to need; None: 80 % of what is free.
        graphs: on CUDA, also time calls inside CUDA graphs.
        roofs: measure ceilings, for the percentages.
        suite: its name, for the record.
        commit: to record outside a git checkout.
        limit: seconds after which no other case is begun; the file is then marked as incomplete.
        out: where to write; None writes nothing.
        show: called with a line for people before every case; None shows a progress bar on a
            terminal, and lines elsewhere.

    Raises:
        ValueError: an unknown device or implementation, with what exists; no cases; a number
            that is out of range.
        OSError: ``out`` cannot be written; it is tried before anything is measured.
    """
    began = time.monotonic()
    where = timing.device(device)
    if not cases:
        raise _checks.fail("cases", "none", "at least one")
    for name in impls:
        baselines.choose([name], cases[0], where)
    _checks.integer("threads", threads, 1, 4096)
    _checks.integer("seed", seed, 0, 2**63 - 1)
    if not 0 <= seconds < math.inf:
        raise _checks.fail("seconds", repr(seconds), "a number from 0")
    if limit is not None and not 0 <= limit < math.inf:
        raise _checks.fail("limit", repr(limit), "a number of seconds from 0")
    if memory_limit is not None and memory_limit < 0:
        raise _checks.fail("memory_limit", repr(memory_limit), "a number of bytes from 0")
    check_writable(out)
    free = int(0.8 * machine.available_bytes(where))
    load = machine.load()
    with torch_settings(threads):
        plan = Plan(
            device=where,
            clock=_clock(where, threads, graphs),
            ceilings=roofline.measure(cases, where, machine.cache_bytes(where)) if roofs else None,
            impls=impls,
            seconds=seconds,
            seed=seed,
            memory_limit=free if memory_limit is None else memory_limit,
            cache_bytes=machine.cache_bytes(where),
        )
        record = _record(plan, suite, commit, load)
        try:
            for case in _progress(cases, show):
                if limit is not None and time.monotonic() - began > limit:
                    break
                record["results"] += measure.rows(case, plan)
                _save(record, plan, load, out)
            else:
                record["complete"] = True
        finally:
            _save(record, plan, load, out)
    return record


def check_writable(out: Path | None) -> None:
    """Fail before minutes of measuring, not after."""
    if out is None:
        return
    if out.is_dir():
        raise IsADirectoryError(f"out: got the folder {out}, wanted a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=out.parent):
        pass


def _clock(device: torch.device, threads: int, graphs: bool) -> Clock:
    if device.type == "cpu":
        return CpuClock(threads)
    from benchmarks.harness.cuda_clock import CudaClock

    return CudaClock(graphs)


@contextlib.contextmanager
def torch_settings(threads: int) -> Iterator[None]:
    """Threads as asked for, fp32 that is fp32, and the vendor's own choice of convolutions."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def _record(plan: Plan, suite: str | None, commit: str | None, load: float) -> Record:
    ceilings = plan.ceilings
    return {
        "schema": schema.SCHEMA,
        "version": schema.VERSION,
        "complete": False,
        "created": machine.now(),
        "command": machine.command(),
        "headline": plan.clock.headline,
        "environment": machine.environment(plan.device, commit),
        "options": {
            "suite": suite,
            "seconds": plan.seconds,
            "seed": plan.seed,
            "memory_limit": plan.memory_limit,
        },
        "ceilings": None
        if ceilings is None
        else {
            "copy_bytes_per_s": ceilings.copy,
            "matrix_per_s": ceilings.matrix,
            "gather": [
                {"bank_bytes": bank, "slot_bytes": slot, "bytes_per_s": rate}
                for (bank, slot), rate in ceilings.gather.items()
            ],
        },
        "load": {"before": load, "busy": []},
        "results": [],
    }


def _save(record: Record, plan: Plan, load: float, out: Path | None) -> None:
    """Bring the remarks on load up to date and write the file, whole or not at all."""
    waits: list[float] = []
    spreads: list[tuple[str, float]] = []
    for row in record["results"]:
        for states in row["times"].values():
            for clocks in states.values():
                figure = quoted(clocks, plan.clock.headline)
                if figure is not None:
                    spread = (figure["q90_s"] - figure["q10_s"]) / figure["median_s"]
                    spreads.append((row["case"], spread))
                if "process" in clocks:
                    waits.append(clocks["wall"]["median_s"] / clocks["process"]["median_s"])
    threads = record["environment"]["threads"]
    record["load"]["busy"] = machine.busy_reasons(load, waits, spreads, threads)
    schema.validate(record)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        machine.write_json(out, record)


def _progress(cases: Sequence[Case], show: Callable[[str], None] | None) -> Iterator[Case]:
    """The cases, with a bar where tqdm is installed, otherwise with a line for each."""
    if show is None and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        tqdm = importlib.import_module("tqdm").tqdm
        bar = tqdm(cases, unit="case")
        for case in bar:
            bar.set_description(f"{case.name} {case.setting}")
            yield case
        return
    show = show or to_stderr
    for number, case in enumerate(cases, 1):
        show(f"[{number}/{len(cases)}] {case.name} {case.setting}")
        yield case


def to_stderr(line: str) -> None:
    """Show a line to people."""
    print(line, file=sys.stderr, flush=True)
