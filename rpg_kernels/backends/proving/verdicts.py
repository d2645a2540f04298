"""Verdicts: which kinds of call a back end computed right, on which device, by which versions.

They are kept in memory, and in the user's cache folder: ``RPG_KERNELS_CACHE``, or ``rpg-kernels``
below ``XDG_CACHE_HOME`` or ``~/.cache``. There is one file for each identity: GPU, compute
capability, driver, torch, Triton and the sources of this package. Its lines are JSON objects, each
appended by one write, so that processes may write at once and a line cut short spoils itself only.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rpg_kernels import _checks, native
from rpg_kernels._sources import sources
from rpg_kernels._version import __version__

ENVIRONMENT_CACHE = "RPG_KERNELS_CACHE"
WAIT = 300.0  # seconds for another process's trial
_DRIVER = Path("/proc/driver/nvidia/version")


class Verdict(NamedTuple):
    """What a trial showed.

    Args:
        wrong: what was wrong, or "".
        lasting: whether another process may rely on it. One that could not be made, for lack of
            memory say, is tried again by the next process.
    """

    wrong: str
    lasting: bool = True


def folder() -> Path:
    """Where verdicts are kept; it need not exist."""
    given = os.environ.get(ENVIRONMENT_CACHE)
    if given:
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "rpg-kernels"
    except RuntimeError:  # a user without a home: nothing can be kept
        return Path(os.devnull) / "rpg-kernels"


@functools.cache
def identity(kind: str, index: int) -> dict[str, Any]:
    """What verdicts hold for.

    Args:
        kind, index: of the device.
    """
    said: dict[str, Any] = {
        "device": kind,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "rpg_kernels": __version__,
        "sources": sources(),
        "build": _build(),
    }
    if kind == "cuda":
        properties: Any = torch.cuda.get_device_properties(index)
        said["device"] = properties.name
        said["capability"] = f"{properties.major}.{properties.minor}"
        said["processors"] = properties.multi_processor_count
        said["driver"] = _driver()
        said["cuda"] = torch.version.cuda
    return said


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build() -> str:
    """The record of the native module's build; a module that is broken runs nothing."""
    try:
        info = native.build_info() if native.available() else {}
    except RuntimeError:  # the variable that names an instruction set names none
        info = {}
    return hashlib.sha256(repr(sorted(info.items())).encode()).hexdigest()[:16]


def _driver() -> str:
    """The kernel module's version, and the driver's CUDA version."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text("utf-8"))
    except (OSError, ValueError):
        found = None
    api = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return f"{found[0] if found else '?'} {api}"


def _append(path: Path, line: bytes) -> None:
    """By one write, which no other process's is mixed with."""
    with path.open("ab", buffering=0) as file:
        if file.write(line) != len(line):
            raise OSError("the disk is full")


def _lock(fcntl: Any, file: Any) -> None:
    """Lock a file, or give up: after WAIT, and where a network file system has no locks."""
    until = time.monotonic() + WAIT
    while time.monotonic() < until:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return
        else:
            return


class Book:
    """The verdicts of one device: in memory, and on disk where there is a place.

    Args:
        device: with an index where it is a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.identity = identity(device.type, device.index or 0)
        name = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder() / f"proved-{name}.jsonl"
        self._verdicts: dict[str, Verdict] = {}
        self._read = 0
        self._complained = False

    def find(self, key: str) -> Verdict | None:
        """The verdict on a kind of call; what other processes wrote since is read first."""
        if key not in self._verdicts:
            self._catch_up()
        return self._verdicts.get(key)

    def keep(self, key: str, verdict: Verdict, about: str) -> None:
        """Remember a verdict here and, where it is lasting, on disk.

        Args:
            about: the call and the back end, for people.
        """
        self._verdicts[key] = verdict
        if not verdict.lasting:
            return
        line = json.dumps({"key": key, "wrong": verdict.wrong, "about": about}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                line = json.dumps({"identity": self.identity}) + "\n" + line
            _append(self.path, line.encode())
        except OSError as error:
            self._complain(error)

    def records(self) -> list[dict[str, Any]]:
        """What the file holds, of each kind of call the last: key, wrong, about."""
        found = {line["key"]: line for line in self._lines(0)[0]}
        return [found[key] for key in sorted(found, key=lambda key: str(found[key]["about"]))]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While other processes that would make the same trials wait; where the folder lets us,
        and no longer than WAIT, since the one that is waited for may be stopped."""
        try:
            fcntl = importlib.import_module("fcntl")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_suffix(".lock").open("ab")
        except (ImportError, OSError):  # then several may make them at once, with one result
            yield
            return
        with lock:
            _lock(fcntl, lock)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # said, since a forked process keeps it open
                    fcntl.flock(lock, fcntl.LOCK_UN)

    def _catch_up(self) -> None:
        lines, self._read = self._lines(self._read)
        for line in lines:
            self._verdicts.setdefault(line["key"], Verdict(line["wrong"]))

    def _lines(self, start: int) -> tuple[list[dict[str, Any]], int]:
        """Whole lines of the file from a byte on, and where they end."""
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                text = file.read()
        except OSError:
            return [], start
        whole = text[: text.rfind(b"\n") + 1]
        found = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                fields = json.loads(line)
                if isinstance(fields, dict) and all(
                    isinstance(fields.get(name), str) for name in ("key", "wrong", "about")
                ):
                    found.append(fields)
        return found, start + len(whole)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            _checks.warn(
                f"what back ends proved could not be kept in {self.path.parent} ({error}), so "
                f"every process tests them again; {ENVIRONMENT_CACHE} names another folder"
            )
