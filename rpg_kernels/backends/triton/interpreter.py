"""Triton's interpreter (TRITON_INTERPRET=1), repaired in three places, found in Triton 3.6 and 3.9.

It turns a loop bound, an array of one element, into an int by ``int(array)``, which NumPy 2.4
refuses. It patches ``triton.language`` anew in every call of a device function without taking
that back, so that each operation runs through one more wrapper than the last. And it records the
operands' dtype as that of a comparison, so that a scalar condition becomes int32 when it is
broadcast, which 3.9 refuses as a mask.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from triton.runtime import interpreter

_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
_patch_tensor, _patch_lang = interpreter._patch_lang_tensor, interpreter._patch_lang
_binary_op = interpreter.InterpreterBuilder.binary_op
_patched: dict[frozenset[int], Any] = {}  # in the launch under way: modules -> what undoes them


def _patch_tensor_once(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


class _Launch:
    """Undoes every patch of a launch, the last one first."""

    def restore(self) -> None:
        for scope in reversed(list(_patched.values())):
            scope.restore()
        _patched.clear()


@functools.cache
def _languages(fn: Any) -> frozenset[int]:
    known = (interpreter.tl, interpreter.tl.core)
    return frozenset(id(v) for v in fn.__globals__.values() if any(v is m for m in known))


def _patch_lang_once(fn: Any) -> Any:
    seen = _languages(fn)
    if seen not in _patched:
        _patched[seen] = _patch_lang(fn)
    return _Launch()


def _binary_op_of_booleans(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    result = _binary_op(self, lhs, rhs, op)
    if op in _COMPARISONS:
        return interpreter.TensorHandle(result.data.astype(bool), interpreter.tl.int1)
    return result


def repair() -> None:
    """Repair the interpreter of this process; may be called again."""
    interpreter.InterpreterBuilder.binary_op = _binary_op_of_booleans
    interpreter._patch_lang_tensor = _patch_tensor_once
    interpreter._patch_lang = _patch_lang_once
