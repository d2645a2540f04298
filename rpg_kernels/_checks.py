"""Argument checks: every error names the argument, what was got and what was wanted."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from types import FrameType

from torch import Tensor

INT32_MAX = 2**31 - 1
_INSIDE = ("rpg_kernels.", "torch.")  # modules whose lines a warning is not about


def fail(argument: str, got: object, wanted: str) -> ValueError:
    """A ValueError in the package's one form."""
    return ValueError(f"{argument}: got {got}, wanted {wanted}")


def integer(argument: str, value: object, low: int, high: int, unit: str = "") -> int:
    """An int in [low, high]; bool and float are refused with a TypeError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: got {value!r} ({type(value).__name__}), wanted an int")
    if not low <= value <= high:
        raise fail(argument, value, f"an int from {low} to {high}{unit}")
    return value


def finite(argument: str, value: object) -> float:
    """A finite float, given as float or int."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument}: got {value!r} ({type(value).__name__}), wanted a float")
    try:
        number = float(value)
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not math.isfinite(number):
        raise fail(argument, number, "a finite number")
    return number


def boolean(argument: str, value: object) -> bool:
    """A bool, nothing that merely behaves like one."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: got {value!r} ({type(value).__name__}), wanted a bool")
    return value


def choice(argument: str, value: object, options: Sequence[str]) -> str:
    """One of a few names."""
    if not isinstance(value, str) or value not in options:
        raise fail(argument, repr(value), "one of " + ", ".join(map(repr, options)))
    return value


def text(argument: str, value: object) -> str:
    """A str that should hold JSON."""
    if not isinstance(value, str):
        raise TypeError(f"{argument}: got {value!r} ({type(value).__name__}), wanted a JSON text")
    return value


def tensor(argument: str, value: object) -> Tensor:
    """A torch tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: got a {type(value).__name__}, wanted a tensor")
    return value


def granularity(value: object) -> int:
    """A power of two from 1 to 128."""
    integer("granularity", value, 1, 128)
    assert isinstance(value, int)
    if value & (value - 1):
        raise fail("granularity", value, "a power of two from 1 to 128")
    return value


def warn(message: str) -> None:
    """A UserWarning at the line that called into the package, or into torch, last."""
    caller: FrameType | None = sys._getframe(1)
    level = 2
    while caller is not None and caller.f_globals.get("__name__", "").startswith(_INSIDE):
        caller, level = caller.f_back, level + 1
    warnings.warn(message, stacklevel=level)
