"""Everything that needs a GPU, in one command of at most seven minutes, without a network.

    PYTHONPATH=. python3 -m tools.gpu_check --out DIR [--parts NAME ...] [--longer]

Each part runs in a process of its own with a time of its own, and survives the failure of the
others. DIR receives ``gpu_check.json`` after each part, ``log.txt`` (all output), a file of one
JSON object a line for each part that has many results, and ``bench.json``; a short table comes
last. The package need not be installed. Without a CUDA device nothing is run.

The exit status is 0 when every part passed or did not apply, 1 when one failed, ran out of time or
was interrupted, 2 when nothing could be checked: without a GPU, or with a wrong option.
"""

from __future__ import annotations

import argparse
import math
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tools.gpu_check import plan
from tools.gpu_check.running import FAILED, INTERRUPTED, TIMED_OUT, run_parts
from tools.gpu_check.summaries import table

# torch.cuda.is_available only warns of a driver that is too old; init says it.
_ASK = """
import sys, torch
why = "" if torch.backends.cuda.is_built() else f"torch {torch.__version__} is built without CUDA"
try:
    if not why:
        torch.cuda.init()
        why = "" if torch.cuda.device_count() else "none is visible"
except Exception as error:
    why = str(error).strip().partition(chr(10))[0] or type(error).__name__
print(why)
sys.exit(3 if why else 0)
"""


def gpu_missing() -> str:
    """Why nothing can be checked here, or ""."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        return "torch did not answer within a minute"
    said = f"this torch sees no CUDA device ({done.stdout.strip()})"
    return {0: "", 3: said}.get(done.returncode, f"{sys.executable} cannot import torch")


def not_writable(out: Path) -> str:
    """Why nothing can be written to a folder, or ""."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out):
            return ""
    except OSError as error:
        return f"out: cannot write to {out}: {error.strerror or error}"


def refused(args: argparse.Namespace, names: Sequence[str]) -> str:
    """What is wrong with the options, or ""."""
    unknown = [name for name in args.parts if name not in names]
    if unknown:
        return f"got part {unknown[0]!r}, wanted one of {', '.join(names)}"
    if not 0 < args.limit < math.inf:
        return f"limit: got {args.limit:g}, wanted a number of seconds above 0"
    if args.jobs < 1:
        return f"jobs: got {args.jobs}, wanted a number of processes from 1"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status; see the module's text."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="gpu-check", description=(__doc__ or "").splitlines()[0].rstrip(".")
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--parts", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--longer", action="store_true", help="the longer benchmark instead")
    parser.add_argument("--limit", type=float, help="seconds for everything (420; longer: 180)")
    parser.add_argument("--jobs", type=int, default=plan.usual_jobs(), help="processes at a time")
    args = parser.parse_args(arguments)
    if args.limit is None:
        args.limit = plan.LONGER_LIMIT if args.longer else plan.LIMIT
    out = args.out.resolve()
    every = (plan.longer_parts if args.longer else plan.parts)(out, max(1, args.jobs))
    wrong = refused(args, [part.name for part in every])
    missing = "" if wrong else gpu_missing()
    if missing:
        wrong = f"{missing}; it needs one, and nothing was checked"
    wrong = wrong or not_writable(out)
    if wrong:
        print(f"gpu-check: {wrong}")
        return 2
    # Whoever ends this command, by Ctrl-C or from outside, gets what was found out.
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *arguments: stopping.set())
    chosen = [part for part in every if not args.parts or part.name in args.parts]
    report = run_parts(chosen, out, begin + max(1.0, args.limit - plan.RESERVE), stopping)
    print(table(report))
    bad = (FAILED, TIMED_OUT, INTERRUPTED)
    return int(any(part["status"] in bad for part in report.values()))


if __name__ == "__main__":
    sys.exit(main())
