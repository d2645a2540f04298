"""Parts whose items are calls: dealt to processes of which each may lose its GPU.

A part is a module with ``RESULTS``, a file name, ``GOOD``, outcomes, ``every()``, all items,
``prepare()``, called once in each process, and ``answer(item)``, which gives a record.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.gpu_check.pool import Lines, Pool, Record
from tools.gpu_check.running import NOTHING_CODE
from tools.gpu_check.worker import serve


def main(
    module: str, arguments: Sequence[str] | None = None, chosen: Sequence[str] | None = None
) -> int:
    """Run a part, or one of its workers: 1 where an outcome is not good, 75 where nothing applies.

    Args:
        module: of the part; "__main__" finds its own.
        arguments: ``--out DIR [--jobs N]``, or ``--worker``.
        chosen: items instead of all.
    """
    name = f"tools.gpu_check.{Path(sys.argv[0]).stem}" if module == "__main__" else module
    part = importlib.import_module(name)
    parser = argparse.ArgumentParser(description=(part.__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--worker", action="store_true", help="answer what a pool deals")
    args = parser.parse_args(arguments)
    if args.worker:
        part.prepare()
        serve(part.answer)
        return 0
    command = [sys.executable, "-m", name, "--worker"]
    return deal(part, part.every() if chosen is None else chosen, command, args.out, args.jobs)


def deal(part: Any, every: Sequence[str], command: Sequence[str], out: Path, jobs: int) -> int:
    """Deal items of a part and write a line for each."""
    lines = Lines(out / part.RESULTS)
    counts = {"applies": 0, "bad": 0}

    def emit(record: Record) -> None:
        lines.write(record)
        outcome = record.get("outcome", "does not apply")
        counts["applies"] += outcome != "does not apply"
        if outcome not in part.GOOD:
            counts["bad"] += 1
            print(f"{outcome}: {record.get('item')}: {record.get('message')}", flush=True)

    # Many processes of many threads each would only wait for each other.
    environment = {"OMP_NUM_THREADS": "1"}
    pool = Pool(command, jobs, emit, every, _group, environment, item_seconds=45.0)
    left = pool.run()
    if counts["bad"] or left:
        return 1
    return 0 if counts["applies"] else NOTHING_CODE


def _group(item: str) -> str:
    """The first words of an item: what shares kernels."""
    return " ".join(item.split()[:2])


def run(command: Callable[[], int]) -> None:
    """End the process with the status of a command; an interrupt is no fault of it."""
    try:
        sys.exit(command())
    except KeyboardInterrupt:
        print("interrupted: what was found out is in the file")
        sys.exit(130)
