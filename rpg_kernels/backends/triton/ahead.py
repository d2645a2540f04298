"""Compiling what calls will launch, before they launch it, on many threads at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any

import triton

from rpg_kernels._processors import processors

_only: ContextVar[bool] = ContextVar("rpg_kernels_only_compiles", default=False)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``kernel[grid]``; within ``compiled`` what compiles it and launches nothing."""
    if _only.get():
        return partial(kernel.warmup, grid=grid)
    started: Callable[..., Any] = kernel[grid]
    return started


def compiled(calls: Iterable[Callable[[], object]], threads: int | None = None) -> None:
    """Make calls whose kernels are compiled and not launched, and wait for the compiler.

    What they compute is of no meaning. One that raises, or whose kernel does not compile, is passed
    over: the real call will say it. Triton keeps the machine code on the disk.

    Args:
        calls: made one after the other, while kernels of earlier ones are compiled.
        threads: that compile; as many as there are processors for this process.
    """
    if not hasattr(triton, "AsyncCompileMode"):
        return
    given = _only.set(True)
    try:
        with (
            ThreadPoolExecutor(threads or processors()) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            for call in calls:
                with contextlib.suppress(Exception):
                    call()
    finally:
        _only.reset(given)
