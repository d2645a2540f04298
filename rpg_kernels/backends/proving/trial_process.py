"""The process that trials are made in: started when it is needed, and again when it ended.

What a kernel may do to a process is done there: a crash, a lost CUDA context, an endless loop.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import IO, Any

import torch

from rpg_kernels import settings
from rpg_kernels.backends.proving.trial import Trial
from rpg_kernels.backends.proving.verdicts import Verdict

START = 120.0  # seconds to import torch and reach the device
LIMIT = 120.0  # seconds for a trial; most of it is compilation
# Modules are found where this process finds them, and not in its current folder, which Python puts
# first; an interrupt from the keyboard, which this process may survive, says nothing of a kernel.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from rpg_kernels.backends.proving import trial_run; trial_run.main(sys.argv[1])"
)
# By which others end a process; what a kernel does to its process ends it by others.
_FROM_OUTSIDE = tuple(
    getattr(signal, name).value
    for name in ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")
    if hasattr(signal, name)
)


class CannotStartError(RuntimeError):
    """No process can use the device: sys.executable is no Python (an embedded interpreter), or the
    device is for one process, or full."""


class TrialProcess:
    """One process for the trials of a device.

    Args:
        device: where.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._process: subprocess.Popen[str] | None = None
        self._said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._errors: IO[str] | None = None

    def verdict(self, trial: Trial) -> Verdict:
        """Make a trial.

        Raises:
            CannotStartError: there is no process to make it in.
        """
        try:
            return self._asked(trial)
        except BaseException:  # such as KeyboardInterrupt: its answer is not the next trial's
            self.close()
            raise

    def compile_ahead(self, trials: Sequence[Trial]) -> bool:
        """Let it compile what trials will run; whether it did. They are to be made all the same.

        Raises:
            CannotStartError: as ``verdict``.
        """
        try:
            self._begin(json.dumps([trial.to_json() for trial in trials]))
            done = self._answer(LIMIT) is not None
        except BaseException:
            self.close()
            raise
        if not done:
            self.close()
        return done

    def _begin(self, asked: str) -> None:
        for _ in range(2):  # a process that was idle may end as it is asked
            if self._process is None or self._process.poll() is not None:
                self._start()
            if self._ask(asked):
                return
        raise CannotStartError("the process for tests ends when it is asked")

    def _asked(self, trial: Trial) -> Verdict:
        self._begin(trial.to_json())
        answer = self._answer(LIMIT)
        if answer is None:
            return self._ended()
        if self._process is not None and answer["wrong"]:
            self.close()
        return Verdict(answer["wrong"], answer["lasting"])

    def close(self) -> None:
        """End it, and what it started."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, self._errors):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _start(self) -> None:
        self.close()
        environment = {**os.environ, settings.ENVIRONMENT_PROVE: "0"}
        environment.pop(settings.ENVIRONMENT_BACKEND, None)
        try:
            self._errors = tempfile.TemporaryFile(  # noqa: SIM115  closed with the process
                "w+", encoding="utf-8", errors="replace"
            )
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, self._device, *_paths()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
                env=environment,
            )
        except (OSError, ValueError, TypeError) as error:
            raise CannotStartError(str(error)) from error
        self._said = queue.Queue()
        threading.Thread(target=_listen, args=(self._process, self._said), daemon=True).start()
        ready = self._answer(START)
        if ready is None:
            said = self._last_words()
            self.close()
            raise CannotStartError(said)

    def _ask(self, asked: str) -> bool:
        """Whether it has begun with a line."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(asked + "\n")
            self._process.stdin.flush()
        except OSError:
            self.close()
            return False
        if self._answer(START) is None:
            self.close()
            return False
        return True

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """What it says next; None where it says nothing in time, or ended."""
        try:
            return self._said.get(timeout=seconds)
        except queue.Empty:
            return None

    def _ended(self) -> Verdict:
        """Of a trial without an answer."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.poll()
        said = self._last_words()
        self.close()
        if code is None:
            return Verdict(f"it was not done after {LIMIT:g} seconds")
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        lasting = -code not in _FROM_OUTSIDE
        return Verdict(f"the process that ran it ended with {how}: {said}", lasting)

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"


def _listen(process: subprocess.Popen[str], said: queue.Queue[dict[str, Any] | None]) -> None:
    """Pass on what a process says; None when it ends."""
    assert process.stdout is not None
    with contextlib.suppress(ValueError, OSError):  # closed here
        for line in process.stdout:
            answer = None
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
            if isinstance(answer, dict) and "state" in answer:  # not what imports print
                said.put(answer)
    said.put(None)


def _paths() -> list[str]:
    """Where modules are found: sys.path, in which "" is the current folder and what is no string
    is passed over."""
    with contextlib.suppress(FileNotFoundError):  # the current folder was removed
        return [path or os.getcwd() for path in sys.path if isinstance(path, str)]
    return [path for path in sys.path if path and isinstance(path, str)]


_processes: dict[str, TrialProcess] = {}
_of_parent: list[dict[str, TrialProcess]] = []


def _after_fork() -> None:
    """A forked process has processes of its own. Its parent's are kept, since the thread that reads
    from them is not here, and closing the pipe would wait for it."""
    global _processes
    _of_parent.append(_processes)
    _processes = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def of(device: torch.device) -> TrialProcess:
    """The process for a device."""
    return _processes.setdefault(str(device), TrialProcess(str(device)))


@atexit.register
def close_all() -> None:
    """End every process."""
    for process in _processes.values():
        process.close()
