"""What a plain attribute of a module leads to: modules that its ``children()`` do not tell of."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import nn

_TORCHS_OWN = ("_modules", "_parameters", "_buffers")


def plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and values of what a module holds without having registered it, hooks included."""
    return ((key, value) for key, value in vars(module).items() if key not in _TORCHS_OWN)


def reached(value: object, seen: set[int] | None = None) -> Iterator[object]:
    """Modules and parameters that a value leads to, and the functions and weak references between.

    Goes through containers, bound methods, partial functions, and what functions hold in closures
    and defaults; not into modules, nor into objects of other classes.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> [found is layer for found in reached([{"a": layer.forward}, functools.partial(layer)])]
        [True]
    """
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module | nn.Parameter | FunctionType | weakref.ref):
        yield value
    for part in _parts(value):
        yield from reached(part, seen)


def held_by(function: object) -> Iterator[object]:
    """What a function, or a weak reference, leads to."""
    for part in _parts(function):
        yield from reached(part)


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, FunctionType):
        empty = type((lambda: value).__closure__[0])()  # type: ignore[index]
        cells = [cell for cell in value.__closure__ or () if cell != empty]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*(cell.cell_contents for cell in cells), *defaults]
    return ()
