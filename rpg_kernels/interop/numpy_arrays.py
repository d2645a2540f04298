"""NumPy arrays made from the parts that files give, each part checked before NumPy sees it.

Array states never reach ``ndarray.__setstate__`` or ``dtype.__setstate__``, which are C code that
trusts them.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from rpg_kernels._extras import require

MAX_DIMENSIONS = 32
NUMERIC = frozenset(
    ["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]
)
OBJECT = frozenset(("O", "O4", "O8"))


def numpy() -> Any:
    """The module, or an error that says how to get it."""
    return require("numpy", "numpy", "an array file")


def shorten(text: str, limit: int = 200) -> str:
    """Text for an error message, which a file must not be able to flood."""
    return text if len(text) <= limit else text[:limit] + "…"


def text_of(value: object) -> str:
    """Text that Python 2 may have written as bytes."""
    if not isinstance(value, str | bytes):
        raise ValueError(f"got a {type(value).__name__}, wanted text")
    return value if isinstance(value, str) else value.decode("latin1")


def is_numeric(dtype: Any) -> bool:
    """Whether a NumPy dtype is one of plain ints, floats, complex numbers or bools."""
    return f"{dtype.kind}{dtype.itemsize}" in NUMERIC


def dtype_code(code: object, align: object, copy: object) -> str:
    """The code of a dtype that is allowed; the arguments are those of ``numpy.dtype``."""
    text = text_of(code)
    if text not in NUMERIC and text not in OBJECT:
        raise ValueError(f"got the dtype {shorten(text, 80)!r}, wanted numbers or objects")
    return text


def dtype_of(code: str, state: tuple[Any, ...]) -> Any:
    """The dtype whose code is ``code`` and whose pickled state is ``state``."""
    version, order, *rest = state
    # No base, names, fields, size or alignment of its own; the flags follow from the code.
    if type(version) is not int or version != 3 or len(rest) != 6:
        raise ValueError("got a dtype state of unknown version, wanted 3")
    if any(part is not None for part in rest[:3]) or any(
        type(part) is not int for part in rest[3:]
    ):
        raise ValueError("got a dtype with fields, wanted a plain one")
    if text_of(order) not in ("<", ">", "|", "="):
        raise ValueError("got a dtype of unknown byte order, wanted <, >, | or =")
    return numpy().dtype("O" if code in OBJECT else code).newbyteorder(text_of(order))


def numeric_array(content: object, dtype: Any, shape: object, fortran: object) -> Any:
    """A read-only array in native byte order over exactly the bytes given.

    Raises:
        ValueError: a dtype that is not numeric, a shape that is not one, or another number of
            bytes than they need.
    """
    np = numpy()
    if not isinstance(content, bytes | bytearray):
        raise ValueError(f"got an array made of a {type(content).__name__}, wanted bytes")
    if not isinstance(dtype, np.dtype) or not is_numeric(dtype):
        raise ValueError(f"got an array of dtype {shorten(str(dtype), 80)}, wanted numbers")
    size = _shape(shape)
    wanted = math.prod(size) * dtype.itemsize
    if len(content) != wanted:
        raise ValueError(
            f"got {len(content)} bytes for an array of {dtype} {list(size)}, wanted {wanted}"
        )
    array = np.ndarray(size, dtype, content, order=_order(fortran))
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="))
    array.flags.writeable = False
    return array


def object_array(content: object, shape: object, fortran: object) -> Any:
    """A read-only array of objects, which must be numeric arrays.

    One level only: NumPy frees nested arrays of objects by recursion.
    """
    np = numpy()
    size = _shape(shape)
    if type(content) is not list or len(content) != math.prod(size):
        got = f"{len(content)} objects" if type(content) is list else type(content).__name__
        raise ValueError(f"got {got} for an array of shape {list(size)}, wanted as many objects")
    array = np.empty(len(content), dtype=object)
    for i, item in enumerate(content):
        if not isinstance(item, np.ndarray) or not is_numeric(item.dtype):
            got = getattr(item, "dtype", type(item).__name__)
            raise ValueError(f"got a {got} in an array of objects, wanted arrays of numbers")
        array[i] = item
    array = array.reshape(size, order=_order(fortran))
    array.flags.writeable = False
    return array


def transposed(array: Any, axes: object) -> Any:
    """``array.transpose(axes)``."""
    if type(axes) is not tuple or not all(type(axis) is int for axis in axes):
        raise ValueError(f"got {type(axes).__name__} for the order of axes, wanted a tuple of ints")
    if sorted(axes) != list(range(array.ndim)):
        raise ValueError(f"got axes out of order, wanted a permutation of {array.ndim}")
    return array.transpose(axes)


def _shape(shape: object) -> tuple[int, ...]:
    """A shape whose product can be formed at once."""
    if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"got a shape that is none, wanted at most {MAX_DIMENSIONS} ints")
    if not all(type(size) is int and 0 <= size <= sys.maxsize for size in shape):
        raise ValueError("got a shape with an impossible size, wanted ints from 0")
    return shape


def _order(fortran: object) -> str:
    # Python 2 wrote bools as ints.
    if type(fortran) not in (bool, int):
        raise ValueError(f"got a {type(fortran).__name__} as memory order, wanted a bool")
    return "F" if fortran else "C"
