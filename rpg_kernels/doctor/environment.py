"""What the doctor looks at: versions, machine, devices, compilers, the build, settings.

Each function makes one part of the report; ``rpg_kernels.doctor`` documents their keys.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rpg_kernels import native, settings
from rpg_kernels._sources import sources
from rpg_kernels._tensors import DTYPES
from rpg_kernels._version import __version__
from rpg_kernels.backends import dispatch, proving, registry
from rpg_kernels.backends.call import OPERATORS, Call
from rpg_kernels.doctor.machine import commit, cpu_name
from rpg_kernels.doctor.report import one_line
from rpg_kernels.law.generator import LAWS
from rpg_kernels.law.ring import LAW_VERSION

PACKAGES = ("triton", "numpy", "safetensors", "matplotlib", "pillow", "scikit-learn", "tqdm")
# Other people's variables that decide what runs here, and how fast.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET")
REINSTALL = "`pip install --force-reinstall --no-deps --no-cache-dir .` in the source folder"
_SECONDS = 20  # for a tool to say its version


def versions() -> dict[str, Any]:
    """Versions of the package, its laws, and what it stands on."""
    return {
        "rpg_kernels": __version__,
        "commit": commit(),
        "sources": sources(),
        "law": LAW_VERSION,
        "laws": list(LAWS),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "packages": {name: _installed(name) for name in PACKAGES},
    }


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Operating system and processor."""
    return {
        "system": platform.platform(),
        "processor": cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
    }


def _cores() -> int | None:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def devices() -> dict[str, Any]:
    """The CUDA devices, or why there is none, and the driver."""
    reason = _no_cuda()
    return {"cuda": [] if reason else _cuda_devices(), "driver": _driver(), "reason": reason}


def _cuda_devices() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return found


def _no_cuda() -> str:
    """Why torch has no CUDA device; "" when it has one."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch repeats them as the exception
            torch.cuda.init()
            if torch.cuda.device_count():
                return ""
        why = "none is visible"
    except Exception as error:
        why = one_line(error)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return why if visible is None else f"{why} (CUDA_VISIBLE_DEVICES={visible!r} is set)"


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    program = shutil.which("nvidia-smi")
    if program:
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        said, error = _output(program, *query)
        if said and not error:
            return said.split()[0]
    try:
        line = Path("/proc/driver/nvidia/version").read_text("utf-8").partition("\n")[0]
    except (OSError, ValueError):
        return None
    found = re.search(r"\d+\.\d+(\.\d+)?", line)
    return found[0] if found else None


def compilers() -> dict[str, Any]:
    """The tools that an installation from source would find now, as the build looks for them."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return {
        "c++": _asked("CXX") or _found("c++", "g++", "clang++"),
        "cmake": _found("cmake"),
        "nvcc": _asked("CUDACXX") or _found(f"{home}/bin/nvcc" if home else None, "nvcc"),
    }


def _asked(variable: str) -> dict[str, Any] | None:
    """The tool that a variable names, with its first arguments; None where it names none."""
    value = os.environ.get(variable, "")
    try:
        words = shlex.split(value)
    except ValueError as error:
        return {"path": value, "version": None, "error": f"{variable}: {one_line(error)}"}
    if not words:
        return None
    path = shutil.which(words[0])
    if path is None:
        why = f"{variable}: got {words[0]!r}, wanted a program that is there"
        return {"path": value, "version": None, "error": why}
    return _tool(path, *words[1:])


def _found(*names: str | None) -> dict[str, Any] | None:
    """The first of some tools that is on PATH."""
    path = next((path for name in names if name and (path := shutil.which(name))), None)
    return None if path is None else _tool(path)


def _tool(*command: str) -> dict[str, Any]:
    said, error = _output(*command, "--version")
    lines = said.splitlines() or [""]
    version = next((line for line in lines if "release" in line), lines[0])  # nvcc: its fourth
    if not (error or version):
        error = "it says no version"
    return {
        "path": " ".join(command),
        "version": None if error else version.strip(),
        "error": error,
    }


def _output(*command: str) -> tuple[str, str]:
    """What a program prints, and what went wrong with it or ""."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", one_line(error)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().partition("\n")[0]
        return done.stdout.strip(), f"exit status {done.returncode}: {said}"
    return done.stdout.strip(), ""


def build() -> dict[str, Any]:
    """What was compiled, whether it is in use, and whether this machine's GPUs are served."""
    if native.broken():
        raise RuntimeError(native.broken())
    info = native.build_info()
    architectures = str(info.get("cuda_architectures") or "").split()
    gpus = [
        {"device": gpu["device"], "covered": native.covers(architectures, gpu["capability"])}
        for gpu in ([] if _no_cuda() else _cuda_devices())
    ]
    why_not = native.why_not()
    reason = info.get("reason", "")
    return {
        "in_use": native.available(),
        "why_not": why_not,
        "law": info.get("law"),
        "compiler": info.get("compiler"),
        "openmp": info.get("openmp"),
        "instruction_sets": list(info.get("isas", [])),
        "instruction_set": info.get("isa"),
        "cuda": info.get("cuda") or None,
        "cuda_architectures": architectures,
        "note": info.get("note") or (reason if reason != why_not else ""),
        "advice": _advice(info, [gpu["covered"] for gpu in gpus]),
        "gpus": gpus,
    }


def _advice(info: dict[str, Any], covered: list[bool | None]) -> str:
    """How to get what was not compiled, where the record of the build does not say so itself."""
    reason = info.get("reason", "")
    if reason:
        if "pip install" in reason or sys.platform not in ("linux", "darwin"):
            return ""
        return f"with a C++ compiler on PATH and without RPG_KERNELS_BUILD: {REINSTALL}"
    if info.get("cuda") and False in covered:
        return f"without RPG_KERNELS_CUDA_ARCHITECTURES, or with this GPU's: {REINSTALL}"
    return ""


def settings_in_force() -> dict[str, Any]:
    """Scratch limits, the forced back end, and the environment variables that matter here.

    Raises:
        ValueError: RPG_KERNELS_BACKEND names no back end.
    """
    forced = settings.forced_backend()
    return {
        "scratch_limit": {kind: settings.scratch_bytes(kind) for kind in ("cpu", "cuda")},
        "backend": registry.find(forced).name if forced else "auto",
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("RPG_KERNELS_") or name in VARIABLES
        },
    }


def torch_devices() -> list[torch.device]:
    """The CPU and every CUDA device that torch can use."""
    count = 0 if _no_cuda() else torch.cuda.device_count()
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


def backends() -> list[dict[str, Any]]:
    """What is chosen for every operator, device and dtype, and why."""
    forced = settings.forced_backend()
    chosen: list[dict[str, Any]] = []
    for device in torch_devices():
        for dtype in DTYPES:
            x = torch.empty(0, dtype=dtype, device=device)
            for op in OPERATORS:
                line: dict[str, Any] = {
                    "op": op,
                    "device": str(device),
                    "dtype": str(dtype).split(".")[1],
                }
                try:
                    backend, reason = _chosen(Call(op, x, forced=forced))
                    chosen.append({**line, "backend": backend, "reason": reason})
                except Exception as error:
                    chosen.append({**line, "backend": None, "reason": one_line(error)})
    return chosen


def proved() -> dict[str, Any]:
    """What back ends that have to prove themselves showed on the devices of this machine.

    Raises:
        ValueError: RPG_KERNELS_PROVE holds nothing that it may.
    """
    return {
        "proving": settings.proving(),
        "folder": str(proving.folder()),
        "verdicts": [
            {"device": str(device), "about": kept["about"], "wrong": kept["wrong"]}
            for device in torch_devices()
            for kept in proving.said(device)
        ],
    }


def _chosen(call: Call) -> tuple[str, str]:
    """The back end for calls of a kind with any weight, and what it is; those that are asked
    before it may take some."""
    backend = dispatch.choose(call)
    asked = itertools.takewhile(lambda b: b is not backend, registry.backends())
    before = [b.name for b in asked if b.device_types != () and not b.unsupported(call)]
    if call.forced or not before:
        return backend.name, backend.summary
    others = " or ".join(before)
    return backend.name, f"{backend.summary}; by {others} where that is faster for the weight"
