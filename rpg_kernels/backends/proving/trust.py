"""Whether a call may be given to a back end: asked for every call, known from memory mostly."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rpg_kernels import _checks, settings
from rpg_kernels._processors import processors
from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.proving import trial, trial_process, trial_run, waiting
from rpg_kernels.backends.proving.verdicts import Book, Verdict
from rpg_kernels.backends.registry import Backend

MOST_AT_ONCE = 16  # trials, one for each processor: the time of one is enough for all of them
_LOG = logging.getLogger("rpg_kernels")
MOST = 1 << 14  # calls that are remembered, by their sizes

_known: dict[Any, Verdict] = {}
_books: dict[torch.device, Book] = {}
_lock = threading.RLock()
_warned: set[tuple[str, str, torch.dtype, str]] = set()


def _after_fork() -> None:
    """The lock may be held by a thread that is not in the forked process."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def proved(backend: Backend, call: Call) -> bool:
    """Whether a back end may run a call, which is tried first where nothing is known of its kind.

    Args:
        backend: that the call would be given to.
        call: with its operands, which may be described only.

    Raises:
        RuntimeError: a trial would be needed while a CUDA graph is captured.
        ValueError: RPG_KERNELS_PROVE says nothing that it may.
    """
    if not _asked(backend, call):
        return True
    key = _call_key(backend, call)
    verdict = _known.get(key)
    if verdict is None:
        with _lock:
            verdict = _found(backend, call) or _tried(backend, call)
            _remember(key, verdict)
    return not verdict.wrong


def compile_ahead(calls: Sequence[tuple[Backend, Call]]) -> None:
    """Compile what the trials of calls will run, many kernels at once, before they are made one by
    one. What goes wrong is left to them to find.

    Args:
        calls: each with the back end that would run it.
    """
    if settings.proving() != "1":
        return
    by_process: dict[tuple[str, torch.device], dict[str, trial.Trial]] = {}
    for backend, call in calls:
        compiles = type(backend).compile_ahead is not Backend.compile_ahead
        if not compiles or _is_captured(call.device) or state(backend, call) != "not tried":
            continue
        made = trial.made(backend, call)
        kinds = by_process.setdefault((backend.name, _with_index(call.device)), {})
        kinds.setdefault(made.key, made)
    for (name, device), kinds in by_process.items():
        trials = list(kinds.values())
        at_once = max(1, min(MOST_AT_ONCE, processors()))
        with contextlib.suppress(trial_process.CannotStartError):
            for at in range(0, len(trials), at_once):
                if not _compiled(name, device, trials[at : at + at_once]):
                    _LOG.info("compiling %s ended early; its trials compile what is left", name)
                    break


def _compiled(name: str, device: torch.device, trials: Sequence[trial.Trial]) -> bool:
    """Whether the process of trials lives on, having compiled those that no other one has tried."""
    book = _book(device)
    with _lock, waiting.line(f"compiling {name} for {len(trials)} kinds of calls"), book.alone():
        left = [each for each in trials if book.find(each.key) is None]
        return not left or trial_process.of(device).compile_ahead(left)


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refused(backend: Backend, call: Call) -> str:
    """What was wrong when a back end was tried with a call's kind; "" where nothing was, or where
    it was not tried. Tries nothing."""
    verdict = _look(backend, call)
    return "" if verdict is None else verdict.wrong


def state(backend: Backend, call: Call) -> str:
    """One of "not asked", "not tried", "proved" and "refused"."""
    if not _asked(backend, call):
        return "not asked"
    verdict = _look(backend, call)
    if verdict is None:
        return "not tried"
    return "refused" if verdict.wrong else "proved"


def said(device: torch.device) -> list[dict[str, Any]]:
    """The verdicts that are kept for a device: records of ``key``, ``about`` and ``wrong``."""
    return _book(_with_index(device)).records()


def warn_once(backend: Backend, call: Call, instead: str) -> None:
    """One warning for each back end, operator and dtype that is left aside on a device.

    Args:
        instead: name of the back end that runs the call.
    """
    label = backend.on_trial(call)
    about = (label, call.op, call.dtype, str(call.device))
    if about in _warned:
        return
    _warned.add(about)
    verdict = _look(backend, call)
    assert verdict is not None
    what = f"{call.op} in {call.dtype} on {call.device}: {verdict.wrong}. It is left aside for such"
    instead = f"calls and {instead} runs instead; results are right, and may take longer."
    if not verdict.lasting:
        _checks.warn(
            f"the back end {label} could not be tested for {what} {instead} The next process tries "
            "again; `rpg.prove(model)` does it before the model's own tensors fill the memory, and "
            f"{settings.ENVIRONMENT_PROVE}=0 trusts it untested"
        )
        return
    _checks.warn(
        f"the back end {label} failed its test for {what} {instead} Please report this with what "
        "`rpg-kernels doctor` prints. It is tested again when the driver, torch, triton or "
        "rpg-kernels changes, or when the folder "
        f"{_book(_with_index(call.device)).path.parent} is emptied"
    )


def forget() -> None:
    """What this process knows, so that the cache folder is read again."""
    with _lock:
        _known.clear()
        _books.clear()
        _warned.clear()


def _asked(backend: Backend, call: Call) -> bool:
    """Whether a call is one that needs proof; where a tensor is empty nothing is computed."""
    if call.forced or not call.operands:
        return False
    if not all(o.numel() for o in call.operands if isinstance(o, Tensor)):
        return False
    return settings.proving() != "0" and bool(backend.on_trial(call))


def _look(backend: Backend, call: Call) -> Verdict | None:
    if not _asked(backend, call):
        return None
    key = _call_key(backend, call)
    verdict = _known.get(key)
    if verdict is None:
        with _lock:
            verdict = _found(backend, call)
            if verdict is not None:
                _remember(key, verdict)
    return verdict


def _remember(key: Any, verdict: Verdict) -> None:
    if len(_known) >= MOST:
        _known.clear()
    _known[key] = verdict


def _call_key(backend: Backend, call: Call) -> Any:
    """Tells apart all that ``trial.made`` may look at; cheap, since every call makes one."""
    x = call.x
    key: list[Any] = [backend.name, call.op, call.placement]
    for o in call.operands:
        if isinstance(o, Tensor):
            key += (o.shape, o.stride(), o.dtype, trial.misses(o))
            if isinstance(o, StoredValues):
                key.append(o.activations)
                for name, part in o.parts().items():
                    key += (name, part.shape, part.dtype, trial.misses(part))
        elif isinstance(o, list):
            key += o
        elif o is not call.placement:
            key.append(o)
    dtype, device = x.dtype, x.device
    if dtype == torch.float32:
        key += trial.precision()
    key += (device, settings.scratch_bytes(device.type))
    key.append(torch.are_deterministic_algorithms_enabled())
    return tuple(key)


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device.type, device.index)


def _book(device: torch.device) -> Book:
    if device not in _books:
        _books[device] = Book(device)
    return _books[device]


def _found(backend: Backend, call: Call) -> Verdict | None:
    """What an earlier trial of the kind showed, in this process or another."""
    return _book(_with_index(call.device)).find(trial.made(backend, call).key)


def _tried(backend: Backend, call: Call) -> Verdict:
    device = _with_index(call.device)
    if _is_captured(device):
        raise RuntimeError(
            f"backend: {backend.on_trial(call)} has not been tested for {call.op} in {call.dtype} "
            "with these sizes on this GPU, and cannot be while a CUDA graph is captured; run the "
            "call once before the capture, or rpg.prove(model), or set "
            f"{settings.ENVIRONMENT_PROVE}=0"
        )
    made, book = trial.made(backend, call), _book(device)
    with waiting.line(f"testing {made.label}: {made.about()}"), book.alone():
        verdict = book.find(made.key)  # by a process that was waited for
        if verdict is None:
            verdict = _verdict(made, device)
            book.keep(made.key, verdict, f"{made.label}: {made.about()}")
    return verdict


def _verdict(made: trial.Trial, device: torch.device) -> Verdict:
    if settings.proving() != "here":
        try:
            return trial_process.of(device).verdict(made)
        except trial_process.CannotStartError:
            pass  # such as on a GPU that one process may use at a time
    answer, _ = trial_run.attempt(made)
    return Verdict(answer["wrong"], answer["lasting"])
