"""Pickles of NumPy arrays, read without running anything that the file names.

Limiting ``pickle.Unpickler.find_class`` is not enough for files of unknown origin: an opcode may
still ask for gigabytes (a memo index, a length), hash a tuple nested a million times, or hand NumPy
a state that its C code trusts. So the few opcodes that array pickles consist of are interpreted
here. ``pickletools.genops`` takes them apart; names stand for six known functions and are never
imported; ``_numpy_arrays`` makes the arrays.
"""

from __future__ import annotations

import enum
import io
import pickletools
from collections.abc import Callable
from typing import Any

from rpg_kernels.interop import numpy_arrays as arrays
from rpg_kernels.interop.numpy_arrays import shorten

WANTED = "NumPy arrays and built-in containers only"
# Far more than arrays need. One may take some 100 bytes of memory (an empty dict, a memo entry).
MAX_OPCODES = 1_000_000
MAX_PROTOCOL = 5


class _Name(enum.Enum):
    """What a pickle may refer to."""

    NDARRAY = "ndarray"
    DTYPE = "dtype"
    RECONSTRUCT = "_reconstruct"
    FROM_BUFFER = "_frombuffer"
    ENCODE = "encode"
    BYTES = "bytes"


_NAMES = {
    ("numpy", "ndarray"): _Name.NDARRAY,
    ("numpy", "dtype"): _Name.DTYPE,
    # NumPy 1 and NumPy 2.
    ("numpy.core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _Name.FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _Name.FROM_BUFFER,
    # How Python 3 writes bytes with protocols 0 to 2, and how it writes none of them.
    ("_codecs", "encode"): _Name.ENCODE,
    ("__builtin__", "bytes"): _Name.BYTES,
}


class _Unfinished:
    """An array or dtype between its creation and the BUILD that gives it its state."""

    def __init__(self, code: str | None) -> None:
        self.code = code  # of a dtype; None for an array
        self.value: Any = None


def loads(data: bytes, start: int = 0) -> Any:
    """The value of the pickle ``data[start:]``, which must end where the data end.

    Protocols 0 to 5 of Python 3, 1 and 2 of Python 2, whose ``str`` becomes ``bytes``; arrays of
    NumPy 1 and 2. They come read-only and in native byte order. An array of objects may hold
    numeric arrays only, a dict only keys that are text or bytes. Memory is bounded by the size of
    the data plus a constant.

    Raises:
        ValueError: anything else, with what was got and wanted.
        MissingExtraError: NumPy is not installed.

    >>> import pickle, numpy
    >>> from rpg_kernels.interop import array_pickle as _array_pickle
    >>> _array_pickle.loads(pickle.dumps([numpy.arange(3), "text"]))
    [array([0, 1, 2]), 'text']
    >>> _array_pickle.loads(pickle.dumps(print))
    Traceback (most recent call last):
        ...
    ValueError: got a reference to builtins.print, wanted NumPy arrays and built-in containers only
    """
    arrays.numpy()
    try:
        return _Reader(data, start).read()
    # A damaged pickle fails in whichever step the damage falls.
    except Exception as error:
        reason = shorten(str(error))
        if not reason.startswith("got "):
            reason = f"got a damaged pickle ({reason}), wanted {WANTED}"
        raise ValueError(reason) from error


class _Reader:
    """A stack machine for the opcodes of array pickles."""

    def __init__(self, data: bytes, start: int) -> None:
        self.stream = io.BytesIO(data)
        self.stream.seek(start)
        # A file holds the bytes of all its arrays; up to protocol 2 they are text before.
        self.budget = 2 * (len(data) - start)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.stream)):
            if count == MAX_OPCODES:
                raise ValueError(f"got over {MAX_OPCODES} opcodes, wanted fewer")
            if opcode.name == "STOP":
                break
            action = _ACTIONS.get(opcode.name)
            if action is None:
                raise ValueError(f"got the opcode {opcode.name}, wanted {WANTED}")
            action(self, argument)
        if self.stream.read(1):
            raise ValueError("got bytes after the end of the pickle, wanted none")
        result = self.pop()
        if self.stack or self.marks:
            raise ValueError("got several values, wanted one")
        _check_finished(result)
        return result

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("nothing on the stack")
        return self.stack.pop()

    def mark(self, _: object) -> None:
        self.marks.append(len(self.stack))

    def marked(self) -> list[Any]:
        """Take everything above the last mark from the stack."""
        if not self.marks:
            raise ValueError("no mark on the stack")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def integer(self, value: int) -> None:
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"got an int of {value.bit_length()} bits, wanted at most 64, signed")
        self.push(value)

    def several(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def extend(self, items: list[Any]) -> None:
        target = self.pop()
        if type(target) is not list:
            raise ValueError(f"items for a {type(target).__name__}")
        target.extend(items)
        self.push(target)

    def update(self, items: list[Any]) -> None:
        target = self.pop()
        if type(target) is not dict or len(items) % 2:
            raise ValueError(f"{len(items)} keys and values for a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of a tuple may recurse for ever, and ints can be chosen to collide.
            if type(key) not in (str, bytes):
                raise ValueError(f"got a {type(key).__name__} as a key, wanted text or bytes")
            target[key] = value
        self.push(target)

    def put(self, index: int) -> None:
        if not 0 <= index < MAX_OPCODES:
            raise ValueError(f"got a memo index beyond {MAX_OPCODES}, wanted one below")
        value = self.pop()
        self.memo[index] = value
        self.push(value)

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("a memo entry that is not there")
        value = self.memo[index]
        finished = isinstance(value, _Unfinished) and value.value is not None
        self.push(value.value if finished else value)

    def refer(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a reference without a name")
        if (module, name) not in _NAMES:
            got = shorten(f"{module}.{name}", 80)
            raise ValueError(f"got a reference to {got}, wanted {WANTED}")
        self.push(_NAMES[module, name])

    def reduce(self, _: object) -> None:
        arguments, name = self.pop(), self.pop()
        if type(arguments) is not tuple:
            raise ValueError(f"a call with a {type(arguments).__name__}")
        match name:
            case _Name.RECONSTRUCT if len(arguments) == 3 and arguments[0] is _Name.NDARRAY:
                # The other two describe an empty array; the state replaces it.
                self.push(_Unfinished(None))
            case _Name.DTYPE:
                self.push(_Unfinished(arrays.dtype_code(*arguments)))
            case _Name.FROM_BUFFER:
                self.push(self.from_buffer(*arguments))
            case _Name.ENCODE:
                self.push(self.encode(*arguments))
            case _Name.BYTES if not arguments:
                self.push(b"")
            case _:
                raise ValueError(f"got a call of something else, wanted {WANTED}")

    def build(self, _: object) -> None:
        state, target = self.pop(), self.pop()
        if not isinstance(target, _Unfinished) or target.value is not None:
            raise ValueError(f"got a state for a {type(target).__name__}, wanted {WANTED}")
        if type(state) is not tuple:
            raise ValueError(f"a state that is a {type(state).__name__}")
        if target.code is None:
            target.value = self.array(*state)
        else:
            target.value = arrays.dtype_of(target.code, state)
        self.push(target.value)

    def array(
        self, version: object, shape: object, dtype: Any, fortran: object, content: Any
    ) -> Any:
        if type(version) is not int or version != 1:
            raise ValueError("got an array state of unknown version, wanted 1")
        self.spend(content)
        if getattr(dtype, "hasobject", False):
            return arrays.object_array(content, shape, fortran)
        return arrays.numeric_array(content, dtype, shape, fortran)

    def from_buffer(
        self, content: Any, dtype: Any, shape: object, order: object, axes: object = None
    ) -> Any:
        """What protocol 5 makes arrays of; ``axes`` are those of order K."""
        if type(order) is not str or order not in ("C", "F", "K"):
            raise ValueError("got an unknown memory order, wanted C, F or K")
        self.spend(content)
        array = arrays.numeric_array(content, dtype, shape, order == "F")
        return arrays.transposed(array, axes) if order == "K" else array

    def encode(self, text: object, encoding: object) -> bytes:
        if type(text) is not str or type(encoding) is not str or encoding != "latin1":
            raise ValueError("got bytes in an unknown encoding, wanted latin1")
        self.spend(text)
        return text.encode("latin1")

    def spend(self, content: Any) -> None:
        """Count what an array is made of: by the memo, few bytes of a file could use it often."""
        self.budget -= len(content)
        if self.budget < 0:
            raise ValueError("got arrays larger than their file, wanted every byte used once")


def _check_finished(result: object) -> None:
    """Refuse what is left of names and unfinished arrays; each container is looked at once."""
    todo, seen = [result], set()
    while todo:
        value = todo.pop()
        if isinstance(value, _Name | _Unfinished):
            raise ValueError(f"got a bare name or an array without content, wanted {WANTED}")
        if isinstance(value, list | tuple | dict) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(value.values() if isinstance(value, dict) else value)


def _protocol(_: _Reader, version: int) -> None:
    if version > MAX_PROTOCOL:
        raise ValueError(f"got pickle protocol {version}, wanted 0 to {MAX_PROTOCOL}")


def _pair_of(reader: _Reader) -> list[Any]:
    value, key = reader.pop(), reader.pop()
    return [key, value]


def _new_dict(reader: _Reader) -> None:
    items = reader.marked()
    reader.push({})
    reader.update(items)


_Action = Callable[[_Reader, Any], None]
_TEXTS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_BYTES = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8")
_INTS = ("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2")
_PYTHON_2_TEXTS = ("BINSTRING", "SHORT_BINSTRING")
_ACTIONS: dict[str, _Action] = {
    "PROTO": _protocol,
    "FRAME": lambda reader, size: None,
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    **dict.fromkeys(_INTS, _Reader.integer),
    **dict.fromkeys((*_TEXTS, *_BYTES, "FLOAT", "BINFLOAT"), _Reader.push),
    # pickletools hands these over as latin-1 text.
    **dict.fromkeys(_PYTHON_2_TEXTS, lambda reader, text: reader.push(text.encode("latin1"))),
    "MARK": _Reader.mark,
    "EMPTY_TUPLE": lambda reader, _: reader.several(0),
    "TUPLE1": lambda reader, _: reader.several(1),
    "TUPLE2": lambda reader, _: reader.several(2),
    "TUPLE3": lambda reader, _: reader.several(3),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.marked())),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "LIST": lambda reader, _: reader.push(reader.marked()),
    "APPEND": lambda reader, _: reader.extend([reader.pop()]),
    "APPENDS": lambda reader, _: reader.extend(reader.marked()),
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    "DICT": lambda reader, _: _new_dict(reader),
    "SETITEM": lambda reader, _: reader.update(_pair_of(reader)),
    "SETITEMS": lambda reader, _: reader.update(reader.marked()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Reader.put),
    "MEMOIZE": lambda reader, _: reader.put(len(reader.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Reader.get),
    # pickletools joins module and name by a space.
    "GLOBAL": lambda reader, both: reader.refer(*both.rsplit(" ", 1)),
    "STACK_GLOBAL": lambda reader, _: reader.refer(*reversed([reader.pop(), reader.pop()])),
    "REDUCE": _Reader.reduce,
    "BUILD": _Reader.build,
}
