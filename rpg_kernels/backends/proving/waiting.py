"""One line on a terminal that says what takes long, from the third second on, and goes again."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar

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
    stream = sys.stderr
    text = f"rpg-kernels: {doing} ({_number} so far, {_waited:.0f} s; once on this machine)"
    written = threading.Event()

    def write() -> None:
        written.set()
        stream.write(text)
        stream.flush()

    seen = stream is not None and stream.isatty() and not _hidden.get()
    timer = threading.Timer(max(0.0, FROM - _waited), write)
    timer.daemon = True
    began = time.monotonic()
    if seen:
        timer.start()
    try:
        yield
    finally:
        took = time.monotonic() - began
        _waited += took
        if seen:
            timer.cancel()
            timer.join()
        if written.is_set():
            stream.write("\r" + " " * len(text) + "\r")
            stream.flush()
        _LOG.info("%s took %.1f s", doing, took)
