"""The microbenchmarks of benchmarks/gpu, and the sanitizers over them and over our kernels.

    python -m tools.gpu_check.programs micro
    python -m tools.gpu_check.programs sanitizer --out DIR [--jobs N]

Each prints JSON objects, one a line, and exits with 75 when there is nothing for it to do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.gpu_check.pool import Lines
from tools.gpu_check.running import NOTHING_CODE, ROOT

SOURCES = ROOT / "benchmarks" / "gpu"
PROGRAMS = ("gather", "reduce", "shared")
COMPILED = ROOT / "build" / "gpu-check"  # kept: a later part, or a later check, runs them again
RESULTS = "sanitizer.jsonl"
GOOD = ("clean", "does not apply")
FINDINGS = 9  # the exit status that sanitizers are asked for
TOOLS = ("memcheck", "racecheck")
# (back end, case of benchmarks.harness.repeat), the most telling first.
OURS = (
    ("cuda", "repeat.windows"),
    ("cuda", "repeat.linear"),
    ("cuda", "repeat.one_of_windows"),
    ("triton", "repeat.windows"),
    ("triton", "repeat.conv2d"),
    ("triton", "repeat.embedding"),
    ("triton", "repeat.linear"),
)


def micro() -> int:
    """Compile the microbenchmarks for this GPU, where no earlier part did, and run them."""
    if compiler() is None:
        print("no nvcc on this machine")
        return NOTHING_CODE
    bad = 0
    for program in compiled(architecture()).values():
        bad += program is None or subprocess.run([str(program)]).returncode != 0
    return int(bad > 0)


def architecture() -> str:
    """nvcc's option for the GPU at hand; sm_90 and later with their own instructions."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    number = f"{major}{minor}{'a' if major >= 9 else ''}"
    return f"-gencode=arch=compute_{number},code=sm_{number}"


def compiler() -> str | None:
    """nvcc, on the PATH or in its usual place."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compiled(target: str, folder: Path | None = None) -> dict[str, Path | None]:
    """The microbenchmarks as programs by name, compiled at the same time where they are not there.

    None, with what nvcc said, for one that does not compile; without nvcc there are none.
    """
    nvcc = compiler()
    if nvcc is None:
        return {}
    place = folder or COMPILED
    place.mkdir(parents=True, exist_ok=True)

    def compile_one(name: str) -> Path | None:
        source = SOURCES / f"{name}.cu"
        texts = b"".join(path.read_bytes() for path in (source, *sorted(SOURCES.glob("*.cuh"))))
        key = hashlib.sha256(texts + target.encode()).hexdigest()[:12]
        program = place / f"{name}-{key}"
        if program.exists():
            return program
        made = program.with_name(f"{program.name}.{os.getpid()}")
        done = subprocess.run(
            [nvcc, "-O3", "-std=c++17", target, "-o", str(made), str(source)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"{source.name} does not compile:\n{done.stdout}{done.stderr}", flush=True)
            return None
        made.replace(program)  # whole or not at all
        return program

    with ThreadPoolExecutor(len(PROGRAMS)) as pool:
        return dict(zip(PROGRAMS, pool.map(compile_one, PROGRAMS), strict=True))


def sanitizer(out: Path, jobs: int) -> int:
    """memcheck, then racecheck, over a little of everything; a process each, some at a time."""
    tool = shutil.which("compute-sanitizer") or _beside_nvcc("compute-sanitizer")
    if tool is None:
        print("no compute-sanitizer on this machine")
        return NOTHING_CODE
    programs = [p for p in compiled(architecture()).values() if p] if compiler() else []
    if not programs:
        print("note: no nvcc, the microbenchmarks are left out")
    todo = commands(programs)
    lines, lock, bad = Lines(out / RESULTS), threading.Lock(), 0
    lines.write({"planned": len(todo)})

    def check(one: tuple[str, str, Sequence[str]]) -> None:
        nonlocal bad
        record, said = sanitized(tool, *one)
        with lock:
            lines.write(record)
            bad += record["outcome"] not in GOOD
            print(json.dumps(record), said, sep="\n", flush=True)

    pool = ThreadPoolExecutor(max(1, jobs))
    try:
        list(pool.map(check, todo))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupt waits for no program
    return int(bad > 0)


def commands(programs: Sequence[Path]) -> list[tuple[str, str, Sequence[str]]]:
    """(tool, what, command) of every run of a sanitizer: memcheck first, our CUDA kernels first."""
    repeat = (sys.executable, "-m", "benchmarks.harness.repeat", "--device", "cuda", "--runs", "1")
    ours = [
        (f"{name} {case}", (*repeat, "--dtype", "bf16", "--backend", name, "--case", case))
        for name, case in OURS
    ]
    theirs = [(path.name.split("-")[0], (str(path), "--smoke")) for path in programs]
    first = [each for each in ours if each[0].startswith("cuda")]
    ordered = [*first, *theirs, *(each for each in ours if each not in first)]
    return [(tool, name, command) for tool in TOOLS for name, command in ordered]


def sanitized(
    tool: str, name: str, program: str, command: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """(the record, what is to be read of it) of a program under one of the sanitizer's tools.

    PyTorch's caching allocator is off: within one of its blocks memcheck sees no bounds.
    """
    done = subprocess.run(
        [tool, "--tool", name, "--error-exitcode", str(FINDINGS), "--print-limit", "5", *command],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    output = done.stdout + done.stderr
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    verdict = summary[-1].strip("= ") if summary else f"no verdict, exit status {done.returncode}"
    clean = done.returncode == 0 and bool(summary)
    outcome = "clean" if clean else "findings" if summary else "no verdict"
    if done.returncode == NOTHING_CODE:  # the sanitizer hands on the program's own status
        outcome, clean = "does not apply", True
        verdict = (done.stdout.strip().splitlines() or ["it did nothing"])[-1]
    record = {"item": f"{name} of {program}", "outcome": outcome, "message": verdict}
    return record, "" if clean else output[-4000:]


def _beside_nvcc(name: str) -> str | None:
    nvcc = compiler()
    found = Path(nvcc).resolve().parent / name if nvcc else Path("/usr/local/cuda/bin") / name
    return str(found) if found.exists() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("micro", "sanitizer"))
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--jobs", type=int, default=4)
    args = parser.parse_args(arguments)
    return micro() if args.what == "micro" else sanitizer(args.out, args.jobs)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted")
        os._exit(130)  # threads wait for programs, which end with this session
