"""Everything that needs a GPU, in one call of under nine minutes, without a network.

    PYTHONPATH=. python3 tools/gpu_check.py --out DIR [--parts NAME ...]

Each part runs in a process of its own with a time of its own, and survives the failure of the
others. DIR receives ``gpu_check.json``, ``log.txt`` (all output), ``tests.xml`` and ``bench.json``;
a short table comes last. The package need not be installed. Without a CUDA device nothing is run.

The exit status is 0 when every part passed or did not apply, 1 when one failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 520.0  # seconds for everything
LEAST = 10.0  # seconds that every later part keeps
PASSED, FAILED, TIMED_OUT, NOTHING = "passed", "failed", "timed out", "nothing to do"


@dataclass(frozen=True)
class Part:
    """One thing to do.

    Args:
        name: for the table and ``--parts``.
        command: what runs.
        budget: seconds.
        summarise: (output, folder) -> one line for people and data for the JSON file.
        nothing: the exit status that says that there was nothing to do.
    """

    name: str
    command: Sequence[str]
    budget: float
    summarise: Callable[[str, Path], tuple[str, Any]]
    nothing: int = 75


def parts(out: Path) -> list[Part]:
    """What a check consists of."""
    python, own = sys.executable, str(ROOT / "tools" / "gpu_parts.py")
    pytest = ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider")
    # A test file that needs a package which is not there must not keep the others from running.
    pytest += ("--continue-on-collection-errors",)
    bench = ("-m", "benchmarks.harness", "--suite", "quick", "--device", "cuda")
    return [
        Part("machine", (python, own, "machine"), 40, last_json),
        Part("build", (python, own, "build"), 120, last_line),
        Part(
            "tests",
            (python, *pytest, "tests", f"--junitxml={out / 'tests.xml'}"),
            120,
            tests,
            nothing=5,  # no test was collected
        ),
        Part(
            "repeat",
            (python, "-m", "benchmarks.harness.repeat", "--device", "cuda", "--runs", "20"),
            50,
            repeat,
        ),
        Part("micro", (python, own, "micro"), 90, figures),
        Part(
            "bench",
            (python, *bench, "--seconds", "1.5", "--out", str(out / "bench.json")),
            130,
            benchmark,
        ),
        Part("sanitizer", (python, own, "sanitizer"), 120, findings),
    ]


def run_parts(chosen: Sequence[Part], out: Path, limit: float = LIMIT) -> dict[str, Any]:
    """Run parts one after the other within a limit; what each did, by name.

    ``gpu_check.json`` and ``log.txt`` are brought up to date after every part.
    """
    out.mkdir(parents=True, exist_ok=True)
    for left in ("bench.json", "tests.xml"):  # of an earlier check
        (out / left).unlink(missing_ok=True)
    deadline = time.monotonic() + limit
    report: dict[str, Any] = {}
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        for number, part in enumerate(chosen):
            kept = LEAST * (len(chosen) - number - 1)
            seconds = min(part.budget, max(LEAST, deadline - time.monotonic() - kept))
            print(f"{part.name} (at most {seconds:.1f} s) ...", flush=True)
            report[part.name] = _run(part, seconds, out)
            output = report[part.name].pop("output")
            log.write(f"==== {part.name}: {' '.join(part.command)}\n{output}\n")
            log.flush()
            (out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _run(part: Part, seconds: float, out: Path) -> dict[str, Any]:
    begin = time.monotonic()
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    # A session of its own, so that everything it started can be ended with it.
    process = subprocess.Popen(
        part.command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    timed_out = False
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        timed_out = True
        output = _end(process)
    except BaseException:
        _end(process)
        raise
    code = process.returncode
    status = PASSED if code == 0 else NOTHING if code == part.nothing else FAILED
    try:
        summary, data = part.summarise(output, out)
    except Exception:  # whatever a broken part printed
        summary, data = f"no result: {last_line(output, out)[0]}", None
        status = FAILED if status == PASSED else status
    return {
        "status": TIMED_OUT if timed_out else status,
        "seconds": round(time.monotonic() - begin, 1),
        "code": code,
        "summary": summary,
        "data": data,
        "output": output,
    }


def _end(process: subprocess.Popen[str]) -> str:
    """Kill a process and what it started; what it had printed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        output, _ = process.communicate(timeout=5)
    except subprocess.TimeoutExpired as error:  # something that left its session holds the pipe
        output = error.stdout.decode(errors="replace") if error.stdout else ""
    return output


def last_line(output: str, out: Path) -> tuple[str, Any]:
    """The last line that a part printed."""
    lines = [line for line in output.splitlines() if line.strip()]
    return (lines[-1] if lines else "printed nothing"), None


def json_lines(output: str) -> list[dict[str, Any]]:
    """The JSON objects among the lines of an output."""
    found = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # cut off in the middle
    return found


def last_json(output: str, out: Path) -> tuple[str, Any]:
    """The machine: its GPU and versions."""
    data = json_lines(output)[-1]
    e = data["environment"]
    return f"{e['device_name']}, torch {e['torch']}, triton {e['triton']}, CUDA {e['cuda']}", data


def tests(output: str, out: Path) -> tuple[str, Any]:
    """Counts, and the names of what failed, from pytest's own record."""
    cases = list(ET.parse(out / "tests.xml").iter("testcase"))
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    ran = len(cases) - skipped
    summary = f"{ran - len(failed)} passed, {len(failed)} failed, {skipped} skipped"
    return ", ".join([summary, *failed[:3]]), {"passed": ran - len(failed), "failed": failed}


def repeat(output: str, out: Path) -> tuple[str, Any]:
    """How many cases gave other bits from run to run."""
    records = json_lines(output)
    errors = [r for r in records if "error" in r]
    counts = [
        sum(
            bool(r.get("output") or r.get("gradients")) for r in records if r["deterministic"] is on
        )
        for on in (True, False)
    ]
    each = len(records) // 2
    summary = f"of {each} cases {counts[0]} differ in deterministic mode, {counts[1]} otherwise"
    return summary + (f", {len(errors)} raised: {errors[0]['error']}" if errors else ""), records


def figures(output: str, out: Path) -> tuple[str, Any]:
    """What the microbenchmarks measured."""
    records = json_lines(output)
    return f"{len(records)} figures", records


def findings(output: str, out: Path) -> tuple[str, Any]:
    """What the sanitizers said of each program."""
    records = json_lines(output)
    bad = [f"{r['tool']} of {r['program']}: {r['verdict']}" for r in records if not r["clean"]]
    summary = f"{len(records) - len(bad)} runs without findings, {len(bad)} with"
    notes = [line for line in output.splitlines() if line.startswith("note: ")]
    return "; ".join([summary, *bad[:2], *notes]), records


def benchmark(output: str, out: Path) -> tuple[str, Any]:
    """Status counts and the times of the quick benchmark."""
    record = json.loads((out / "bench.json").read_text())
    clock = record["headline"]
    lines, counts = [], dict.fromkeys((row["status"] for row in record["results"]), 0)
    for row in record["results"]:
        counts[row["status"]] += 1
        clocks = row["times"].get("full", {}).get("cold", {})
        if clocks:
            cold = clocks.get(clock) or next(iter(clocks.values()))
            bank = f"{row['dof']} g{row['granularity']} {row['reflect']}"
            lines.append(
                {
                    "name": f"{row['case']} {bank} {row['impl']}",
                    "value": cold["median_s"] * 1e6,
                    "unit": "us",
                }
            )
    return ", ".join(f"{n} {status}" for status, n in counts.items()), lines


def table(report: dict[str, Any]) -> str:
    """The short table that comes last."""
    width = max(len(name) for name in report)
    lines = []
    for name in ("micro", "bench"):
        for figure in (report.get(name) or {}).get("data") or []:
            lines.append(f"  {figure['name']:64} {figure['value']:10.4g} {figure['unit']}")
    for name, part in report.items():
        lines.append(
            f"{name:{width}}  {part['status']:13} {part['seconds']:6.1f} s  {part['summary']}"
        )
    return "\n".join(lines)


def gpu_missing() -> str:
    """Why nothing can be checked here, or ""."""
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "torch did not answer within two minutes"
    return {0: "", 3: "this torch sees no CUDA device"}.get(
        done.returncode, f"{sys.executable} cannot import torch"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status; see the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--parts", nargs="+", default=[], metavar="NAME", help="only these")
    args = parser.parse_args(arguments)
    every = parts(args.out.resolve())
    names = [part.name for part in every]
    unknown = [name for name in args.parts if name not in names]
    if unknown:
        print(f"gpu-check: got part {unknown[0]!r}, wanted one of {', '.join(names)}")
        return 2
    missing = gpu_missing()
    if missing:
        print(f"gpu-check: {missing}; it needs one, and nothing was checked")
        return 2
    chosen = [part for part in every if not args.parts or part.name in args.parts]
    report = run_parts(chosen, args.out.resolve())
    print(table(report))
    return int(any(part["status"] in (FAILED, TIMED_OUT) for part in report.values()))


if __name__ == "__main__":
    sys.exit(main())
