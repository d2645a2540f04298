"""Parts of ``gpu_check.py`` that are more than one command: machine, build, micro, sanitizer.

    PYTHONPATH=. python3 tools/gpu_parts.py NAME

Each prints JSON objects, one a line, and exits with 75 when there is nothing for it to do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "benchmarks" / "gpu"
PROGRAMS = ("gather", "reduce", "shared")
NOTHING_CODE = 75
FINDINGS = 9  # the exit status that sanitizers are asked for
OURS = ("triton", "cuda")


def machine() -> int:
    """Versions, and the GPU's state as nvidia-smi gives it."""
    import torch

    from benchmarks.harness.machine import environment

    fields = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used"
    smi = _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"])
    versions = _output(["nvcc", "--version"]).splitlines()[-1:]
    show(environment=environment(torch.device("cuda")), nvidia_smi=smi, nvcc=versions)
    return 0


def build() -> int:
    """The native part, beside the sources, where the checkout has one."""
    if not (ROOT / "csrc").is_dir():
        print("no csrc: this version has no native part")
        return NOTHING_CODE
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT)
    built = [str(path.relative_to(ROOT)) for path in (ROOT / "rpg_kernels").rglob("*.so")]
    print(f"setup.py build_ext exited with {done.returncode}; {', '.join(built) or 'no library'}")
    return done.returncode


def micro() -> int:
    """Compile the microbenchmarks for this GPU and run them."""
    if compiler() is None:
        print("no nvcc on this machine")
        return NOTHING_CODE
    with tempfile.TemporaryDirectory() as folder:
        bad = 0
        for program in compiled(Path(folder), architecture()):
            bad += program is None or subprocess.run([str(program)]).returncode != 0
    return int(bad > 0)


def sanitizer() -> int:
    """memcheck and racecheck over the microbenchmarks and our kernels, a little of each."""
    import torch

    from benchmarks.harness.repeat import chosen

    tool = shutil.which("compute-sanitizer") or _beside_nvcc("compute-sanitizer")
    if tool is None:
        print("no compute-sanitizer on this machine")
        return NOTHING_CODE
    names = sorted({name for name, _ in chosen(torch.device("cuda"), OURS)})
    if not names:
        print("note: no Triton or CUDA kernels of ours in this version")
    if compiler() is None:
        print("note: no nvcc, the microbenchmarks are left out")
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        commands = [[str(p), "--smoke"] for p in compiled(Path(folder), architecture()) if p]
        repeat = [sys.executable, "-m", "benchmarks.harness.repeat", "--device", "cuda"]
        commands += [[*repeat, "--runs", "1", "--dtype", "bf16", "--backend", n] for n in names]
        for command in commands:
            for name in ("memcheck", "racecheck"):
                bad += not sanitized(tool, name, command)
    return int(bad > 0)


def sanitized(tool: str, name: str, command: Sequence[str]) -> bool:
    """Run a program under one of the sanitizer's tools and print its verdict.

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
    if not clean:
        print(output[-4000:])
    show(
        tool=name,
        program=command[-1] if command[0] == sys.executable else Path(command[0]).name,
        clean=clean,
        verdict=verdict,
    )
    return clean


def architecture() -> str:
    """nvcc's option for the GPU at hand; sm_90 and later with their own instructions."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    number = f"{major}{minor}{'a' if major >= 9 else ''}"
    return f"-gencode=arch=compute_{number},code=sm_{number}"


def compiler() -> str | None:
    """nvcc, on the PATH or in its usual place."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compiled(folder: Path, target: str) -> list[Path | None]:
    """The microbenchmarks as programs; None, with what nvcc said, for one that does not compile.

    Without nvcc there are none.
    """
    nvcc = compiler()
    programs: list[Path | None] = []
    if nvcc is None:
        return programs
    for name in PROGRAMS:
        source, program = SOURCES / f"{name}.cu", folder / name
        done = subprocess.run(
            [nvcc, "-O3", "-std=c++17", target, "-o", str(program), str(source)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"{source.name} does not compile:\n{done.stdout}{done.stderr}", flush=True)
        programs.append(None if done.returncode else program)
    return programs


def show(**values: Any) -> None:
    """One line of JSON."""
    print(json.dumps(values), flush=True)


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"


def _beside_nvcc(name: str) -> str | None:
    nvcc = shutil.which("nvcc")
    found = Path(nvcc).resolve().parent / name if nvcc else Path("/usr/local/cuda/bin") / name
    return str(found) if found.exists() else None


PARTS = {"machine": machine, "build": build, "micro": micro, "sanitizer": sanitizer}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PARTS:
        sys.exit(f"gpu_parts: wanted one of {', '.join(PARTS)}")
    sys.exit(PARTS[sys.argv[1]]())
