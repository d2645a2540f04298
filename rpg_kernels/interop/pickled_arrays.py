"""Pickled NumPy arrays of unknown origin, by an Unpickler that knows nothing else.

A list of allowed names keeps a pickle from running anything. It does not keep an opcode from asking
for gigabytes (a memo index or a length of four bytes), nor a state from reaching C code of NumPy
that trusts it. So the opcodes are looked through before (``pickletools``), the names stand for
objects of this module, which check whatever they are given, and so is what comes out.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import sys
from collections.abc import Callable
from typing import Any

from rpg_kernels._extras import require

WANTED = "NumPy arrays and plain values only"
MAX_OPCODES = 100_000  # far more than arrays need; each may take some 100 bytes of memory
NUMERIC = frozenset(
    ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
)
_OBJECT = frozenset(("O", "O4", "O8"))
_PLAIN = (type(None), bool, int, float, str, bytes)
_TUPLES = frozenset(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"))
_MAX_TUPLES = 1000  # beside a dict: a key's hash recurses through them without looking at the stack
_OPCODES = _TUPLES | {
    "PROTO", "FRAME", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "LONG", "LONG1", "LONG4",
    "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "BINSTRING", "SHORT_BINSTRING", "MARK", "EMPTY_TUPLE", "EMPTY_LIST", "LIST", "APPEND",
    "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT",
    "MEMOIZE", "GET", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
}  # fmt: skip


def loads(data: bytes, start: int = 0) -> Any:
    """The value of the pickle ``data[start:]``, which must end where the data end.

    That is an array, a plain value (a number, text, bytes, None), a list of plain values, or a dict
    of these with text or bytes as keys. Protocols 0 to 5 of Python 3, 1 and 2 of Python 2, whose
    ``str`` becomes ``bytes``; arrays of NumPy 1 and 2. They come read-only and in native byte
    order; an array of objects holds numeric arrays only. Memory is bounded by the size of the data
    plus a constant.

    Raises:
        ValueError: anything else, with what was got and wanted.
        MissingExtraError: NumPy is not installed.

    >>> import pickle, numpy
    >>> from rpg_kernels.interop import pickled_arrays
    >>> pickled_arrays.loads(pickle.dumps({"data": numpy.arange(3), "labels": [1, 2]}))
    {'data': array([0, 1, 2]), 'labels': [1, 2]}
    >>> pickled_arrays.loads(pickle.dumps(print))
    Traceback (most recent call last):
        ...
    ValueError: got a reference to builtins.print, wanted NumPy arrays and plain values only
    """
    _numpy()
    try:
        _check_opcodes(data, start)
        value = _ArrayUnpickler(data, start).load()
        if type(value) is not dict:
            return _finished(value)
        for key in value:
            if type(key) not in (str, bytes):
                raise ValueError(f"got a {type(key).__name__} as a key, wanted text or bytes")
        return {key: _finished(item) for key, item in value.items()}
    # A damaged pickle fails in whichever step the damage falls.
    except Exception as error:
        reason = shorten(str(error))
        if not reason.startswith("got "):
            reason = f"got a damaged pickle ({reason}), wanted {WANTED}"
        raise ValueError(reason) from error


def numeric_array(content: object, dtype: Any, shape: Any, fortran: object) -> Any:
    """A read-only array in native byte order over exactly the bytes given.

    Raises:
        ValueError: a dtype that is not numeric, a shape that is not one, or another number of
            bytes than they need.
    """
    np = _numpy()
    if not isinstance(content, bytes | bytearray):
        raise ValueError(f"got an array made of a {type(content).__name__}, wanted bytes")
    if not isinstance(dtype, np.dtype) or dtype.str[1:] not in NUMERIC:
        raise ValueError(f"got an array of dtype {shorten(str(dtype), 80)}, wanted numbers")
    if not all(type(size) is int and 0 <= size <= sys.maxsize for size in shape):
        raise ValueError("got a shape with an impossible size, wanted ints from 0")
    wanted = math.prod(shape) * dtype.itemsize
    if len(content) != wanted:
        raise ValueError(
            f"got {len(content)} bytes for an array of {dtype} {list(shape)}, wanted {wanted}"
        )
    array = np.ndarray(shape, dtype, content, order="F" if fortran else "C")
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="))
    array.flags.writeable = False
    return array


def shorten(text: str, limit: int = 200) -> str:
    """Text for an error message, which a file must not be able to flood."""
    return text if len(text) <= limit else text[:limit] + "…"


def _check_opcodes(data: bytes, start: int) -> None:
    """Refuse what no pickle of arrays holds, and lengths of what is not there."""
    stream = io.BytesIO(data)
    stream.seek(start)
    tuples, dicts = 0, False
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count == MAX_OPCODES:
            raise ValueError(f"got over {MAX_OPCODES} opcodes, wanted fewer")
        if opcode.name not in _OPCODES:
            raise ValueError(f"got the opcode {opcode.name}, wanted {WANTED}")
        # The memo is an array as long as the largest index of a PUT asks.
        limit = MAX_OPCODES if opcode.name.endswith("PUT") else 2**63
        if isinstance(argument, int) and not -limit <= argument < limit:
            got = f"an int of {argument.bit_length()} bits in {opcode.name}"
            raise ValueError(f"got {got}, wanted one below {limit}")
        tuples += opcode.name in _TUPLES
        dicts = dicts or opcode.name in ("DICT", "EMPTY_DICT")
    if dicts and tuples > _MAX_TUPLES:
        raise ValueError(f"got {tuples} tuples and a dict, wanted at most {_MAX_TUPLES} beside one")
    if stream.tell() != len(data):
        raise ValueError("got bytes after the end of the pickle, wanted none")


class _AllowedName:
    """What a name stands for. No state can change it, for it would change later files too."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        if self._call is None:
            raise ValueError(f"got a call of a name that is not for calling, wanted {WANTED}")
        return self._call(*arguments)

    def __setstate__(self, state: object) -> None:
        raise ValueError(f"got a state for a name, wanted {WANTED}")


class _PickledDtype:
    """A dtype; NumPy's own trusts the state that a pickle gives it."""

    __slots__ = ("_code", "value")

    def __init__(self, code: object, align: object, copy: object) -> None:
        text = _text(code)
        if text not in NUMERIC and text not in _OBJECT:
            raise ValueError(f"got the dtype {shorten(text, 80)!r}, wanted numbers or objects")
        self._code = "O" if text in _OBJECT else text
        self.value: Any = None

    def __setstate__(self, state: Any) -> None:
        version, order, *rest = state
        # No base, names or fields; size, alignment and flags follow from the code.
        if version != 3 or len(rest) != 6 or rest[:3] != [None] * 3:
            raise ValueError("got a dtype with fields or of unknown version, wanted a plain one")
        if _text(order) not in ("<", ">", "|", "="):
            raise ValueError("got a dtype of unknown byte order, wanted <, >, | or =")
        self.value = _numpy().dtype(self._code).newbyteorder(_text(order))


class _PickledArray:
    """An array, which a state gives its content; NumPy's own trusts that, too."""

    __slots__ = ("_spend", "value")

    def __init__(self, spend: Callable[[Any], None]) -> None:
        self._spend = spend
        self.value: Any = None

    def __setstate__(self, state: Any) -> None:
        if self.value is not None:
            raise ValueError("got a state for a finished array, wanted one state for each")
        version, shape, dtype, fortran, content = state
        if version != 1 or type(shape) is not tuple or not isinstance(dtype, _PickledDtype):
            raise ValueError("got an unknown array state, wanted shape, dtype, order and content")
        self._spend(content)
        make = _object_array if getattr(dtype.value, "hasobject", False) else numeric_array
        self.value = make(content, dtype.value, shape, fortran)


class _ArrayUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, start: int) -> None:
        stream = io.BytesIO(data)
        stream.seek(start)
        super().__init__(stream, fix_imports=False, encoding="bytes")
        # A file holds the bytes of all its arrays; up to protocol 2 they are text before.
        self._budget = 2 * (len(data) - start)
        self._ndarray = _AllowedName()
        self._names = {
            ("numpy", "ndarray"): self._ndarray,
            ("numpy", "dtype"): _AllowedName(_PickledDtype),
            # How Python 3 writes bytes with protocols 0 to 2, and how it writes none of them.
            ("_codecs", "encode"): _AllowedName(self._encode),
            ("__builtin__", "bytes"): _AllowedName(lambda: b""),
        }
        for core in ("numpy.core", "numpy._core"):  # NumPy 1 and NumPy 2
            self._names[f"{core}.multiarray", "_reconstruct"] = _AllowedName(self._reconstruct)
            self._names[f"{core}.numeric", "_frombuffer"] = _AllowedName(self._from_buffer)

    def find_class(self, module: str, name: str) -> Any:
        """The object of this module that a name stands for; nothing is imported."""
        if (module, name) not in self._names:
            got = shorten(f"{module}.{name}", 80)
            raise ValueError(f"got a reference to {got}, wanted {WANTED}")
        return self._names[module, name]

    def _reconstruct(self, kind: object, shape: object, typecode: object) -> _PickledArray:
        # The other two describe an empty array; the state replaces it.
        if kind is not self._ndarray:
            raise ValueError(f"got an array of another class, wanted {WANTED}")
        return _PickledArray(self._spend)

    def _from_buffer(
        self, content: object, dtype: object, shape: object, order: object, axes: object = None
    ) -> _PickledArray:
        """What protocol 5 makes arrays of; ``axes`` are those of order K."""
        if order not in ("C", "F", "K"):
            raise ValueError("got an unknown memory order, wanted C, F or K")
        array = _PickledArray(self._spend)
        array.__setstate__((1, shape, dtype, order == "F", content))
        if order == "K":
            array.value = array.value.transpose(axes)
        return array

    def _encode(self, text: str, encoding: object) -> bytes:
        if encoding != "latin1":
            raise ValueError("got bytes in an unknown encoding, wanted latin1")
        self._spend(text)
        return text.encode("latin1")

    def _spend(self, content: Any) -> None:
        """Count what an array is made of: by the memo, few bytes of a file could use it often."""
        self._budget -= len(content)
        if self._budget < 0:
            raise ValueError("got arrays larger than their file, wanted every byte used once")


def _finished(value: Any) -> Any:
    """An array, a plain value or a list of plain values; nothing else leaves this module."""
    if isinstance(value, _PickledArray) and value.value is not None:
        return value.value
    if type(value) not in _PLAIN and not (
        type(value) is list and all(type(item) in _PLAIN for item in value)
    ):
        raise ValueError(f"got a {type(value).__name__.lstrip('_')}, wanted {WANTED}")
    return value


def _object_array(content: Any, dtype: Any, shape: Any, fortran: object) -> Any:
    """A read-only array of objects, which must be numeric arrays.

    One level only: NumPy frees nested arrays of objects by recursion.
    """
    if type(content) is not list:
        raise ValueError(f"got objects as {type(content).__name__}, wanted a list")
    np = _numpy()
    array = np.empty(len(content), dtype)
    for i, item in enumerate(content):
        part = item.value if isinstance(item, _PickledArray) else item
        if not isinstance(part, np.ndarray) or part.dtype.hasobject:
            got = getattr(part, "dtype", type(part).__name__)
            raise ValueError(f"got a {got} in an array of objects, wanted arrays of numbers")
        array[i] = part
    array = array.reshape(shape, order="F" if fortran else "C")
    array.flags.writeable = False
    return array


def _numpy() -> Any:
    return require("numpy", "numpy", "an array file")


def _text(value: object) -> str:
    """Text that Python 2 may have written as bytes."""
    if not isinstance(value, str | bytes):
        raise ValueError(f"got a {type(value).__name__}, wanted text")
    return value if isinstance(value, str) else value.decode("latin1")
