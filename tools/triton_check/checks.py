"""What is checked of every launch beside its results: the order of its programs, and its hints.

Races, bounds and memory that nobody wrote are ttsem's own checks. The functions of ttsem that are
replaced here are no promises of its authors, which is why its version is fixed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from ttsem import harness, interp, mlir, sanitize, values

_HINTS = ("tt.divisibility", "tt.contiguity", "tt.constancy")
_Array = np.ndarray[Any, Any]


class SameThread(Executor):
    """Calls what it is given at once: ttsem pretends to be a GPU in one thread only."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*args, **kwargs))
        return future


class Launches:
    """Judges every launch while ``judging``, and counts.

    Args:
        turned: launches that were executed in the reverse order of their programs too.
        kernels: compilations.
        hints: values that a hint was compared with.
    """

    def __init__(self) -> None:
        self.turned = self.hints = 0
        self._texts: dict[tuple[Any, ...], str] = {}
        self._execute, self._bind = harness.execute, interp.Interp.bind_results
        self._write_back, self._text = sanitize._write_back, ""
        self._parse = lru_cache(maxsize=64)(mlir.parse)

    @property
    def kernels(self) -> int:
        return len(self._texts)

    @contextlib.contextmanager
    def judging(self) -> Iterator[None]:
        """Within a session of ttsem, which asks torch and Triton less than the kernels do."""
        from rpg_kernels.backends.triton import law

        mlir.enable_generic_printing()  # the form that ttsem reads, for good
        with (
            mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
            mock.patch.object(law, "ThreadPoolExecutor", return_value=SameThread()),
            mock.patch.object(harness, "ir_for_launch", self._text_of),
            mock.patch.object(mlir, "parse", self._parse),
            mock.patch.object(harness, "execute", self._remember),
            mock.patch.object(sanitize, "_write_back", self._turn),
            mock.patch.object(interp.Interp, "bind_results", self._with_hints()),
        ):
            yield

    def _text_of(self, record: harness.LaunchRecord, stage: str, target: Any) -> str:
        """The kernel in Triton's intermediate form: ttsem's own way goes on to machine code, which
        takes a third of the time, and which the files aot*.py see to."""
        how = harness._specialize(record.fn, record.args, record.kwargs, target)
        key = (record.fn, *(repr(getattr(part, "__dict__", part)) for part in how))
        if key not in self._texts:
            self._texts[key] = mlir.to_generic(harness._stage_text(record, stage, target), None)
        return self._texts[key]

    def _remember(self, record: harness.LaunchRecord, text: str, **how: Any) -> harness.Execution:
        self._text = text
        return self._execute(record, text, **how)

    def _turn(self, record: harness.LaunchRecord, first: harness.Execution) -> None:
        """When ttsem has found no fault, and no race, which it can say more about."""
        if np.prod(harness._grid3(record.grid)) > 1:
            with mock.patch.dict(os.environ, TTSEM_GRID_ORDER="reverse"):
                second = self._execute(record, self._text, raise_faults=True)
            assert second.failure is None, second.failure
            adds = "tt.atomic_rmw" in self._text  # sums, whose last bits depend on their order
            for base, a in first.memory.buffers().items():
                b = second.memory.buffers()[base]
                assert _same(np.asarray(a), np.asarray(b), adds), (
                    f"{record.fn_name}: its programs in reverse order leave other values"
                )
            self.turned += 1
        self._write_back(record, first)

    def _with_hints(self) -> Callable[..., None]:
        def bind(interpreter: interp.Interp, op: Any, results: list[Any]) -> None:
            self._bind(interpreter, op, results)
            if op.attrs and any(name in op.attrs for name in _HINTS):
                value = np.asarray(results[0])
                self.hints += value.size
                check_hints(op.attrs, value)

        return bind


def _same(a: _Array, b: _Array, adds: bool) -> bool:
    if adds and a.dtype == np.float32:
        size = float(np.abs(a[np.isfinite(a)]).max(initial=0))
        return np.allclose(a, b, rtol=1e-4, atol=1e-5 * size, equal_nan=True)
    return np.array_equal(a.view(np.uint8), b.view(np.uint8))


def check_hints(attributes: dict[str, Any], value: _Array) -> None:
    """What tl.multiple_of, max_contiguous and max_constancy promise of a value.

    Raises:
        values.Poison: it is not so. ttsem calls that an operation with an undefined result, and
            names its line.
    """
    whole = value.astype(np.int64).reshape(value.shape or (1,))
    multiples, runs, equals = (_of_each(attributes.get(name), whole.ndim) for name in _HINTS)
    for d, (multiple, run, equal) in enumerate(zip(multiples, runs, equals, strict=True)):
        lines = np.moveaxis(whole, d, -1)
        in_runs = _cut(lines, run)
        if (np.diff(in_runs, axis=-1) != 1).any():
            raise values.Poison(f"a hint of {run} contiguous values in dimension {d} is false")
        if (in_runs[..., 0] % multiple != 0).any():
            raise values.Poison(f"a hint of multiples of {multiple} in dimension {d} is false")
        in_equals = _cut(lines, equal)
        if (in_equals != in_equals[..., :1]).any():
            raise values.Poison(f"a hint of {equal} equal values in dimension {d} is false")


def _of_each(attribute: Any, dimensions: int) -> list[int]:
    """An attribute's number for each dimension; 1 promises nothing."""
    if attribute is None:
        return [1] * dimensions
    data = getattr(attribute, "data", attribute)
    numbers = np.asarray(getattr(data, "value", data)).reshape(-1)
    return [int(n) for n in np.broadcast_to(numbers, dimensions)]


def _cut(lines: _Array, length: int) -> _Array:
    """The last dimension in pieces of a length, or of all of it where it is shorter."""
    length = min(length, lines.shape[-1])
    return lines.reshape(*lines.shape[:-1], -1, length)
