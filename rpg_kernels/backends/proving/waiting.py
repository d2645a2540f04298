"""One line on a terminal that says what takes long, from the third second on, and is wiped then."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

FROM = 3.0  # seconds that are waited in all before anything is written
_LOG = logging.getLogger("rpg_kernels")

_hidden: ContextVar[bool] = ContextVar("rpg_kernels_waiting_hidden", default=False)
_waited, _number = 0.0, 0  # in this process; callers hold the lock of trust.py


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Within, nothing is written: whoever waits shows a bar, or wants silence."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


@contextlib.contextmanager
def line(doing: str) -> Iterator[None]:
    """While the body runs, say what it does where the standard error is a terminal. Afterwards the
    line is wiped, and the logger "rpg_kernels" is told (INFO) how long it took.

    Args:
        doing: such as "testing linear in bfloat16".
    """
    global _waited, _number
    _number += 1
    stream, began, shown = sys.stderr, time.monotonic(), 0

    def write() -> None:
        nonlocal shown
        spent = _waited + time.monotonic() - began
        text = f"rpg-kernels: {doing} ({_number} so far, {spent:.0f} s; once on this machine)"
        text = text[: _width(stream)]
        shown = len(text)
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            stream.write(text)
            stream.flush()

    timer = threading.Timer(max(0.0, FROM - _waited), write)
    timer.daemon = True
    seen = _is_terminal(stream) and not _hidden.get()
    if seen:
        try:
            timer.start()
        except RuntimeError:  # no more threads
            seen = False
    try:
        yield
    finally:
        if seen:
            timer.cancel()
            timer.join()
        took = time.monotonic() - began
        _waited += took  # after the thread, which reads it
        if shown:
            with contextlib.suppress(OSError, ValueError):
                stream.write("\r" + " " * shown + "\r")
                stream.flush()
        _LOG.info("%s took %.1f s", doing, took)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (OSError, ValueError, AttributeError):  # closed, None, or not a file
        return False


def _width(stream: Any) -> int:
    """Characters that fit one row: what wraps cannot be wiped."""
    try:
        return max(os.get_terminal_size(stream.fileno()).columns, 2) - 1
    except (OSError, ValueError, AttributeError):
        return 79
