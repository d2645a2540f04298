"""A suite of benchmarks, case by case in a process that is replaced when it loses its GPU.

    python -m tools.gpu_check.bench --out DIR --suite NAME --seconds S [--impl NAME ...]

DIR/bench.json is a result file of ``benchmarks.harness``, written after each case. A case that
ended a process is measured again without the implementation that is to blame. No case is begun
when the time is over; the file is then marked as incomplete.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.gpu_check.items import run
from tools.gpu_check.pool import LOST, Pool, Record
from tools.gpu_check.worker import serve

RESULTS = "bench.json"
# Who is left out in turn, where a process ended and nothing says who was to blame.
SUSPECTS = ("rpg-cuda", "rpg-triton", "unpack")
CASE_SECONDS = 60.0  # for a case, its compiling counted


def items(suite: str, impls: Sequence[str]) -> list[str]:
    """One item for each case: suite, number, implementations."""
    from benchmarks.harness import suites

    count = len(suites.suite(suite, "bf16"))
    return [" ".join((suite, str(number), *impls)) for number in range(count)]


def answer(item: str, device: str = "cuda", dtype: str = "bf16") -> dict[str, Any]:
    """The result file of one case, as an object."""
    from benchmarks import harness
    from benchmarks.harness import suites
    from benchmarks.harness.harness import run as measure

    suite, number, *impls = item.split()
    case = suites.suite(suite, dtype)[int(number)]
    record = measure(
        [case], impls=impls, device=device, seconds=harness.SECONDS[suite], roofs=False, suite=suite
    )
    bad = [row for row in record["results"] if row["status"] in ("failed", "wrong")]
    ours = [row for row in bad if row["impl"].startswith("rpg-")]
    return {
        "outcome": ours[0]["status"] if ours else "measured",
        "message": "; ".join(f"{row['impl']}: {row['reason']}" for row in bad),
        "record": record,
    }


class Results:
    """What the cases gave, as one result file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._record: dict[str, Any] | None = None

    def add(self, record: dict[str, Any]) -> None:
        """One case more; of an implementation that was measured before, the new row counts."""
        if self._record is None:
            self._record = {**record, "results": [], "load": {**record["load"], "busy": []}}
        rows = self._record["results"]
        new = {_key(row) for row in record["results"]}
        rows[:] = [row for row in rows if _key(row) not in new] + record["results"]
        busy = [*self._record["load"]["busy"], *record["load"]["busy"]]
        self._record["load"]["busy"] = list(dict.fromkeys(busy))
        self.write(complete=False)

    def write(self, complete: bool) -> None:
        """Write the file, where there is anything."""
        from benchmarks.harness import machine, schema

        if self._record is not None:
            self._record["complete"] = complete
            machine.write_json(self._path, schema.validate(self._record))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("case", "dof", "granularity", "reflect", "window", "laps", "dtype", "impl")
    return tuple(row[name] for name in names)


def without_one(item: str, record: Record) -> str:
    """The item without the implementation that ended the process, as far as that can be told; ""
    where nothing is left to leave out."""
    suite, number, *impls = item.split()
    rows = record.get("record", {}).get("results", ())
    failed = [row["impl"] for row in rows if row["status"] == "failed"]
    suspects = [name for name in (*failed[:1], *SUSPECTS) if name in impls and name != "dense"]
    if not suspects:
        return ""
    return " ".join((suite, number, *(name for name in impls if name != suspects[0])))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 when a result of ours was wrong or a case ended its process."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--suite", default="gpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="no case is begun later")
    parser.add_argument("--impl", nargs="+", default=["dense", *SUSPECTS])
    parser.add_argument("--worker", action="store_true", help="answer what a pool deals")
    args = parser.parse_args(arguments)
    if args.worker:
        serve(answer)
        return 0
    command = [sys.executable, "-m", "tools.gpu_check.bench", "--worker"]
    deadline = begin + args.seconds
    return deal(command, items(args.suite, args.impl), args.out / RESULTS, deadline)


def deal(command: Sequence[str], every: Sequence[str], path: Path, deadline: float) -> int:
    """Deal the cases to one process at a time; the exit status."""
    results, bad = Results(path), 0

    def emit(record: Record) -> None:
        nonlocal bad
        if "item" not in record:
            return
        item = record["item"]
        if "record" in record:
            results.add(record["record"])
        if record["outcome"] != "measured":
            bad += 1
            said = {name: record.get(name) for name in ("item", "outcome", "message")}
            print(json.dumps(said), flush=True)
        if record.get(LOST) or "record" not in record:
            again = without_one(item, record)
            if again:
                pool.again(again)

    pool = Pool(command, 1, emit, every, item_seconds=CASE_SECONDS, until=deadline)
    left = pool.run()
    results.write(complete=not left)
    return int(bad > 0)


if __name__ == "__main__":
    run(main)
