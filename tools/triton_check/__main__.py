"""Every file of cases below ttsem, and every planted fault, each in a process of its own.

    python -m tools.triton_check [--jobs N] [FILES OF CASES] [mutants]

Without names, everything. The last line says what passed, failed and was skipped, and how many of
the planted faults were seen; the exit status is 0 only if nothing failed and all were.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.triton_check.counts import Counts
from tools.triton_check.mutants import MUTANTS, Mutant, plant

ROOT = Path(__file__).resolve().parents[2]
CASES = Path("tests/backends/triton/cases")
# Not for this: what is compiled to machine code, and what asks a GPU for streams and graphs.
OTHERS = re.compile(r"aot.*|surroundings")
_SHOWN = 12_000  # characters of what a failed process wrote


def files(root: Path = ROOT) -> list[str]:
    """Names of the files of cases that are run, the largest first, since they take longest."""
    paths = [path for path in (root / CASES).glob("*.py") if not OTHERS.fullmatch(path.stem)]
    return [path.name for path in sorted(paths, key=lambda path: -path.stat().st_size)]


def run(root: Path, words: Sequence[str]) -> tuple[Counts, str]:
    """What came of a process of cases.py in a checkout, and what it wrote.

    One that broke, or in which no test ran, counts as a failure.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {
        "TRITON_INTERPRET": "0",  # kernels are compiled
        "RPG_KERNELS_NATIVE": "0",  # the native module is of another environment
        "RPG_KERNELS_PROVE": "0",  # cases judge by themselves
        "OMP_NUM_THREADS": "1",  # the processes share the cores already
    }
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        done = subprocess.run(
            [sys.executable, "-m", "tools.triton_check.cases", "--results", results, *words],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        counts = Counts()
        if results.exists():
            counts = Counts(**json.loads(results.read_text(encoding="utf-8")))
    ran = counts.passed + counts.failed
    if ran == 0 or (done.returncode != 0 and counts.failed == 0):
        counts += Counts(failed=1)
    return counts, done.stdout


def check(name: str) -> Counts:
    """Run a file of cases, and say what came of it."""
    begin = time.monotonic()
    counts, output = run(ROOT, [str(CASES / name)])
    if counts.failed:
        print(output[-_SHOWN:])
    print(f"{name}: {counts}; {time.monotonic() - begin:.0f} s", flush=True)
    return counts


def caught(mutant: Mutant) -> bool:
    """Whether the fault is seen, as what it is."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        plant(mutant, ROOT, Path(folder))
        races = [] if mutant.races else ["--no-races"]
        cases = str(CASES / mutant.cases)
        counts, output = run(Path(folder), [*races, cases, "--", "-x", "-k", mutant.test])
    seen = counts.failed > 0 and re.search(mutant.seen, output) is not None
    if not seen:
        print(output[-_SHOWN:])
    verdict = "caught" if seen else "NOT CAUGHT"
    print(f"mutant {verdict}: {mutant.what}; {time.monotonic() - begin:.0f} s", flush=True)
    return seen


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status; see the module's text."""
    begin = time.monotonic()
    known = [*files(), "mutants"]
    parser = argparse.ArgumentParser(prog="triton-check")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    jobs = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=jobs, help=f"processes at a time ({jobs})")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.names if name not in known]
    if unknown:
        parser.error(f"names: got {unknown[0]}, wanted some of {', '.join(known)}")
    if args.jobs < 1:
        parser.error(f"jobs: got {args.jobs}, wanted a number of processes from 1")
    names = args.names or known
    planted = MUTANTS if "mutants" in names else ()
    with ThreadPoolExecutor(args.jobs) as pool:
        checked = pool.map(check, [name for name in names if name != "mutants"])
        seen = sum(pool.map(caught, planted))
        total = sum(checked, Counts())
    print(
        f"{total.launches} launches of {total.kernels} kernels, {total.turned} of them in reverse "
        f"order too; {total.hints} values as hints say; {total.unchecked} launches too large to "
        "look for races in"
    )
    print(
        f"triton-check: {total}; {seen} of {len(planted)} mutants caught; "
        f"{time.monotonic() - begin:.0f} s"
    )
    return int(total.failed > 0 or seen < len(planted))


if __name__ == "__main__":
    sys.exit(main())
