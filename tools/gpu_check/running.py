"""Runs the parts of a check one after the other, each in a process and a time of its own.

What a part has found out when its time is over stands: it is interrupted before it is killed, its
findings are read from the files that it wrote line by line, and the report is written after each
part. Nothing that a part started outlives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, TIMED_OUT, NOTHING = "passed", "failed", "timed out", "nothing to do"
INTERRUPTED = "interrupted"
NOTHING_CODE = 75  # the exit status of a part that had nothing to do
GRACE = 6.0  # seconds between an interrupt and the end, in which a part writes what it has
_SWEEPS = 40  # a twentieth of a second each: a process that a driver holds is not waited for
LEAST = 1.0  # seconds that a part gets, however late it is
LOG_BYTES = 12 << 20  # of log.txt, so that the folder stays small enough to send
REPORT, LOG = "gpu_check.json", "log.txt"


@dataclass(frozen=True)
class Part:
    """One thing to do.

    Args:
        name: for the table and ``--parts``.
        command: what runs; ``{seconds}`` in a word becomes the time in which it may begin things.
        budget: seconds that it has in any case; what earlier parts left comes on top.
        summarise: (output, folder) -> one line for people and data for the report.
        writes: files in the folder, of which none may be left of an earlier check.
        last: seconds that the last thing which it begins may take.
    """

    name: str
    command: Sequence[str]
    budget: float
    summarise: Callable[[str, Path], tuple[str, Any]]
    writes: Sequence[str] = ()
    last: float = 0.0


def run_parts(
    parts: Sequence[Part],
    out: Path,
    deadline: float,
    stopping: threading.Event | None = None,
) -> dict[str, Any]:
    """Run all parts and write the report; what came of each, by name.

    Args:
        parts: in this order.
        out: folder for all files.
        deadline: on ``time.monotonic``; nothing runs any more when it is reached.
        stopping: when it is set, the part that runs is interrupted, and no other begins.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As behind `nohup ... &`: parts would inherit it, and could not be interrupted.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    out.mkdir(parents=True, exist_ok=True)
    for left in (name for part in parts for name in part.writes):
        (out / left).unlink(missing_ok=True)
    report: dict[str, Any] = {}
    room = LOG_BYTES // max(1, len(parts))
    with (out / LOG).open("w", encoding="utf-8") as log:
        for number, part in enumerate(parts):
            seconds = share(parts[number:], deadline - time.monotonic())
            print(f"{part.name} (at most {seconds:.1f} s) ...", flush=True)
            report[part.name] = done = run(part, seconds, out, stopping or threading.Event())
            output = done.pop("output")
            log.write(f"==== {part.name}: {' '.join(part.command)}\n{shortened(output, room)}\n")
            log.flush()
            _write(out / REPORT, report)
            if done["status"] == INTERRUPTED:
                break
    return report


def share(parts: Sequence[Part], left: float) -> float:
    """Seconds for the first of the parts that are left: all but the budgets of the others.

    Budgets of more than there is become smaller by the same factor.

    Example:
        >>> few, many = (Part(str(b), (), b, lambda output, out: ("", None)) for b in (10, 30))
        >>> share([few, many], 100.0), share([many], 90.0), share([few, many], 20.0)
        (70.0, 90.0, 5.0)
    """
    wanted = sum(part.budget for part in parts)
    later = wanted - parts[0].budget
    return max(LEAST, left - later if wanted <= left else left * parts[0].budget / wanted)


def run(part: Part, seconds: float, out: Path, stopping: threading.Event) -> dict[str, Any]:
    """Run one part; its status, time and summary, and under "output" what it printed."""
    begin = time.monotonic()
    status = ""
    with tempfile.TemporaryFile() as file:
        process = _start(part, seconds - GRACE - part.last, file)
        if _wait(process, seconds - min(GRACE, seconds / 2), stopping) is None:
            status = INTERRUPTED if stopping.is_set() else TIMED_OUT
        code = end(process, min(GRACE, begin + seconds - time.monotonic()) if status else 0.0)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LOG_BYTES))
        output = file.read().decode(errors="replace")
    if not status:
        status = PASSED if code == 0 else NOTHING if code == NOTHING_CODE else FAILED
    try:
        summary, data = part.summarise(output, out)
    except Exception:  # whatever a broken part printed
        summary, data = f"no result: {last_line(output)}", None
        status = FAILED if status == PASSED else status
    return {
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "code": code,
        "summary": summary,
        "data": data,
        "output": output,
    }


def _start(part: Part, seconds: float, output: Any) -> subprocess.Popen[bytes]:
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment["PYTHONFAULTHANDLER"] = "1"  # where it was when a library ended the process
    environment.pop("TRITON_INTERPRET", None)  # kernels are to be compiled
    environment["RPG_KERNELS_PROVE"] = "0"  # the parts judge by themselves; trials take their time
    return subprocess.Popen(
        [word.replace("{seconds}", f"{max(LEAST, seconds):.1f}") for word in part.command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        # A session of its own, so that everything that it started can be ended with it.
        start_new_session=True,
    )


def _wait(
    process: subprocess.Popen[bytes], seconds: float, stopping: threading.Event
) -> int | None:
    """The exit status, or None where it takes longer, or must not go on."""
    limit = time.monotonic() + seconds
    while not stopping.is_set():
        try:
            return process.wait(max(0.0, min(0.2, limit - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= limit:
                break
    return process.poll()


def end(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Interrupt a part, wait for it, kill it and whatever it started; its exit status.

    Args:
        process: leads a session.
        seconds: that it has to write what it knows; from 0, it is only cleared up behind it.
    """
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, seconds))
    for _ in range(_SWEEPS):
        left = session(process.pid)
        if process.poll() is None:
            left.append(process.pid)
        if not left:
            break
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)  # until they have let go of the GPU
    return process.wait()


def session(leader: int) -> list[int]:
    """The processes of a session, of which each may lead a group of its own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, _, _, number = entry.read_text().rpartition(")")[2].split()[:4]
            if int(number) == leader and state != "Z":
                found.append(int(entry.parent.name))
    return found


def shortened(text: str, size: int) -> str:
    """The text without its middle, where it has more bytes than ``size``.

    Example:
        >>> shortened("abcdefghij" * 9, 50)
        'abcdefghij ... 70 bytes left out ... abcdefghij'
    """
    data = text.encode(errors="replace")
    if len(data) <= size:
        return text
    keep = max(0, size - 30) // 2
    first, last = data[:keep].decode(errors="ignore"), data[len(data) - keep :]
    left_out = len(data) - 2 * keep
    return f"{first} ... {left_out} bytes left out ... {last.decode(errors='ignore')}"


def last_line(output: str) -> str:
    """The last line that a part printed."""
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip()[:500] if lines else "printed nothing"


def _write(path: Path, report: Mapping[str, Any]) -> None:
    """Whole or not at all: the one before stays where this is interrupted."""
    made = path.with_name(f"{path.name}.new")
    made.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    made.replace(path)


def own_command(name: str, *words: str) -> tuple[str, ...]:
    """The command of a part that is a module of this folder."""
    return (sys.executable, "-m", f"tools.gpu_check.{name}", *words)
