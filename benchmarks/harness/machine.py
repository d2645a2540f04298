"""The machine and the software that made a result, and how busy the machine was."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rpg_kernels import native
from rpg_kernels._sources import sources
from rpg_kernels._version import __version__
from rpg_kernels.doctor.machine import commit, cpu_name

_CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_MEMINFO = Path("/proc/meminfo")
_CPU_INFO = Path("/proc/cpuinfo")
_UNKNOWN_CACHE = 32 << 20
# By the flag that the system shows, instruction sets that dense products are faster with.
_SETS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX"}

# Above these a run says that the machine did other work.
BUSY_LOAD = 0.5  # processes that want a core, over the number of cores, before the run
BUSY_WAIT = 1.10  # wall time over process time on one thread
BUSY_SPREAD = 0.25  # of the middle 80 % of samples, relative to the median


def environment(device: torch.device, commit_given: str | None = None) -> dict[str, Any]:
    """Hardware and versions, as ``schema.ENVIRONMENT`` lists them.

    Args:
        device: that was measured on.
        commit_given: the commit, where the sources lie outside a git checkout.
    """
    on_gpu = device.type == "cuda"
    gpu = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "device": device.type,
        "device_name": gpu.name if gpu else cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
        "memory_bytes": gpu.total_memory if gpu else memory_bytes(),
        "multiprocessors": gpu.multi_processor_count if gpu else None,
        "capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version_of("triton"),
        "rpg_kernels": __version__,
        "commit": commit_given or commit(),
        "sources": sources(),
        "native": _native(),
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith("RPG_KERNELS_")},
    }


def lacking() -> list[str]:
    """Instruction sets that the processor does not have; empty where nothing tells."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return []
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), None)
    return [name for flag, name in _SETS.items() if flags is not None and flag not in flags]


def cpu_caches() -> dict[int, int]:
    """Bytes of the caches that a core sees, by level; instruction caches left out. Empty where
    nothing tells: another system, or a virtual machine that hides its caches."""
    sizes: dict[int, int] = {}
    try:
        for index in _CPU_CACHE.glob("index*"):
            if (index / "type").read_text().strip() != "Instruction":
                text = (index / "size").read_text().strip()
                bytes_ = int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
                sizes[int((index / "level").read_text())] = bytes_
    except (OSError, KeyError, ValueError):
        return {}
    return sizes


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: L2 of a GPU, L3 (or L2) of a CPU; 32 MiB where nothing tells."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or (
            _UNKNOWN_CACHE
        )
    return max(cpu_caches().values(), default=_UNKNOWN_CACHE)


def memory_bytes(key: str = "MemTotal") -> int:
    """Bytes of main memory by a key of /proc/meminfo; 0 where nothing tells."""
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) << 10
    except (OSError, IndexError, ValueError):
        pass  # There is no such file outside Linux.
    return 0


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; a control group's limit counts."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held: int = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + held
    free = memory_bytes("MemAvailable") or 1 << 62
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # No control groups, or of the first version.
    return max(0, free)


def _native() -> str:
    """The native module in use, or why there is none."""
    info = native.build_info()
    if not native.available():
        return f"not in use: {native.why_not()}"
    return f"{info['isa']}, {info['compiler']}"


def load() -> float:
    """Processes that want a core, averaged over the last minute; 0 where nothing tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def busy_reasons(
    load_before: float,
    waits: Sequence[float],
    spreads: Sequence[tuple[str, float]],
    threads: int,
) -> list[str]:
    """Why the times of a run are to be doubted; nothing when they are not.

    Args:
        load_before: ``load()`` before the run began.
        waits: wall time over process time, of every measurement; of a CPU only.
        spreads: of every headline figure, with the name of its case.
        threads: that torch used; process time says little about more than one.

    Example:
        >>> busy_reasons(0.0, [1.0, 1.0, 1.01], [("a/1", 0.02), ("a/1", 0.5), ("a/1", 0.1)], 1)
        []
        >>> busy_reasons(0.0, [], [("a/1", 0.02), ("b/1", 0.5), ("b/1", 0.3)], threads=1)
        ['samples of b/1 spread over 50% of their median']
        >>> busy_reasons(0.0, [1.9, 2.0, 2.1], [], threads=1)
        ['wall time was 2.00 times process time']
    """
    reasons = []
    if load_before > BUSY_LOAD * (os.cpu_count() or 1):
        reasons.append(f"load average {load_before:.1f} before the run")
    wait = _median(waits)
    if threads == 1 and wait > BUSY_WAIT:
        reasons.append(f"wall time was {wait:.2f} times process time")
    for case in dict.fromkeys(name for name, _ in spreads):
        spread = _median([value for name, value in spreads if name == case])
        if spread > BUSY_SPREAD:
            reasons.append(f"samples of {case} spread over {spread:.0%} of their median")
    return reasons


def now() -> str:
    """The time as ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def command() -> str:
    """The command line that is running, without folders of this machine."""
    return " ".join(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write by renaming, so that a run cut short leaves the last whole file."""
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _version_of(module: str) -> str | None:
    """The version of a package that is installed; it is not imported."""
    from importlib import metadata

    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return None
