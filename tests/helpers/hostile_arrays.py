"""Array files that mean harm, and what is said about each."""

from __future__ import annotations

import io
import os
import pickle
import struct
from typing import Any

import numpy as np


def objects(*items: Any) -> Any:
    array = np.empty(len(items), dtype=object)
    for i, item in enumerate(items):
        array[i] = item
    return array


LAYERS = objects(np.array([5, 3, 4]), np.array([0, 1, 3, 5]), np.array([0, 0]))


def npy(content: bytes, shape: tuple[int, ...] = (3,), descr: str = "|O") -> bytes:
    """An ``.npy`` file with a header of our own."""
    stream = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + content


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


RECONSTRUCT = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
DTYPE_STATE = b"(K\x03X\x01\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def dtype(code: bytes) -> bytes:
    return b"cnumpy\ndtype\nX" + struct.pack("<I", len(code)) + code + b"\x89\x88\x87R"


def array(shape: bytes, content: bytes, of: bytes = dtype(b"i8") + DTYPE_STATE) -> bytes:
    """A pickle of an array; shape, content and dtype are opcodes."""
    return RECONSTRUCT + b"(K\x01" + shape + of + b"\x89" + content + b"tb"


EIGHT = b"C\x08" + bytes(8)
ONE = b"K\x01\x85"
HUGE = b"\x8a\x08" + struct.pack("<q", 2**62)  # LONG1
# What each of these would do to an unpickler is said in its name.
HOSTILE: dict[str, tuple[bytes, str]] = {
    "runs a command": (pickle.dumps(Call(os.system, "true")), r"reference to posix.system"),
    "evaluates": (pickle.dumps(Call(eval, "1"), 0), r"reference to __builtin__.eval"),
    "loads a pickle": (pickle.dumps(Call(np.load, "x.npy", None, True)), r"reference to numpy"),
    "imports": (pickle.dumps(Call(__import__, "this")), r"reference to builtins.__import__"),
    "in an array": (pickle.dumps(objects(Call(os.system, "true"))), r"reference to posix.system"),
    "names a class": (b"\x80\x02cnumpy\nmatrix\n.", r"reference to numpy.matrix"),
    "dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.sum\x93.", "numpy.ndarray.sum"),
    "long name": (b"\x80\x02c" + b"m" * 9999 + b"\nn\n.", r"reference to m{80}…, wanted NumPy"),
    "name of another type": (b"\x80\x04K\x01K\x02\x93.", "STACK_GLOBAL requires str"),
    "numpy scalar": (pickle.dumps(np.float32(1)), "multiarray.scalar"),
    "calls ndarray": (b"\x80\x02cnumpy\nndarray\n" + HUGE + b"\x85\x85R.", "call of a name"),
    "calls a list": (b"\x80\x02])R.", "not callable"),
    "call without a tuple": (b"\x80\x02cnumpy\ndtype\n]R.", "must be a tuple"),
    "dtype with too few arguments": (b"\x80\x02cnumpy\ndtype\n)R.", "damaged pickle"),
    "subclass of ndarray": (
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85C\x01b\x87R.",
        "array of another class",
    ),
    "bare name": (b"\x80\x02cnumpy\nndarray\n.", "got a AllowedName"),
    "bare name in a list": (b"\x80\x02]cnumpy\nndarray\na.", "got a list"),
    "array without state": (b"\x80\x02" + RECONSTRUCT + b".", "got a PickledArray"),
    "empty array of terabytes": (
        b"\x80\x02" + RECONSTRUCT.replace(b"K\x00\x85", HUGE + b"\x85") + b".",
        "got a PickledArray",
    ),
    "persistent id": (b"\x80\x02P1\n.", "opcode PERSID"),
    "binary persistent id": (b"\x80\x02K\x01Q.", "opcode BINPERSID"),
    "text of Python 2 in protocol 0": (b"S'true'\n.", "opcode STRING"),
    "instance": (b"(Vtrue\nios\nsystem\n.", "opcode INST"),
    "object": (b"\x80\x02(cnumpy\ndtype\no.", "opcode OBJ"),
    "new object": (b"\x80\x02cnumpy\ndtype\n)\x81.", "opcode NEWOBJ"),
    "new object with keywords": (b"\x80\x04cnumpy\ndtype\n)}\x92.", "opcode NEWOBJ_EX"),
    "extension registry": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "out-of-band buffer": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "duplicate": (b"\x80\x02K\x012.", "opcode DUP"),
    "set of tuples": (b"\x80\x04\x8f(K\x01\x85\x90.", "opcode EMPTY_SET"),
    "state for a list": (b"\x80\x02]}b.", "no attribute"),
    "state for a name": (b"\x80\x02cnumpy\ndtype\n}b.", "state for a name"),
    "state for a finished array": (
        b"\x80\x02" + array(ONE, EIGHT) + b")b.",
        "state for a finished array",
    ),
    "takes off the stack": (
        b"\x80\x02" + RECONSTRUCT + b"q\x00(K\x01K\x01\x85" + dtype(b"i8") + DTYPE_STATE
        + b"\x89" + EIGHT + b"tb0h\x00)b.",
        "opcode POP",
    ),
    "state that is a dict": (b"\x80\x02" + RECONSTRUCT + b"}b.", "damaged pickle"),
    "short state": (b"\x80\x02" + RECONSTRUCT + ONE + b"b.", "damaged pickle"),
    "array of a later version": (b"\x80\x02" + array(ONE, EIGHT).replace(b"(K\x01", b"(K\x02", 1)
                                 + b".", "unknown array state"),
    "dtype that is text": (b"\x80\x02" + array(ONE, EIGHT, of=b"X\x02\0\0\0i8") + b".",
                           "unknown array state"),
    "dtype without state": (b"\x80\x02" + array(ONE, EIGHT, of=dtype(b"i8")) + b".",
                            "wanted numbers"),
    "dtype of voids": (b"\x80\x02" + array(ONE, EIGHT, of=dtype(b"V8")) + b".", "dtype 'V8'"),
    "dtype of text": (pickle.dumps(np.array(["abc"])), "dtype 'U3'"),
    "dtype of dates": (pickle.dumps(np.array([1], "M8[s]")), "dtype 'M8'"),
    "dtype with fields": (pickle.dumps(np.zeros(1, [("a", "i4")])), "dtype 'V4'"),
    "numeric dtype with fields": (
        b"\x80\x02" + array(ONE, EIGHT, of=dtype(b"i8") + DTYPE_STATE.replace(b"NNN", b"N)}"))
        + b".", "dtype with fields",
    ),
    "dtype with a base": (
        b"\x80\x02" + array(ONE, EIGHT, of=dtype(b"i8") + DTYPE_STATE.replace(b"NNN", b")NN"))
        + b".", "dtype with fields",
    ),
    "dtype of a later version": (
        b"\x80\x02" + array(ONE, EIGHT, of=dtype(b"i8") + DTYPE_STATE.replace(b"K\x03", b"K\x04"))
        + b".", "dtype with fields or of unknown version",
    ),
    "unknown byte order": (
        b"\x80\x02" + array(ONE, EIGHT, of=dtype(b"i8") + DTYPE_STATE.replace(b"<", b"s")) + b".",
        "unknown byte order",
    ),
    "bytes taken for objects": (
        b"\x80\x02" + array(ONE, EIGHT, of=dtype(b"O8") + DTYPE_STATE) + b".",
        "got objects as bytes",
    ),
    "objects taken for bytes": (b"\x80\x02" + array(ONE, b"](K\x01e") + b".", "made of a list"),
    "too few bytes": (b"\x80\x02" + array(b"K\x02\x85", EIGHT) + b".", "8 bytes for an array"),
    "too many bytes": (b"\x80\x02" + array(b"K\x00\x85", EIGHT) + b".", "8 bytes for an array"),
    "gigabytes": (b"\x80\x02" + array(HUGE + b"\x85", EIGHT) + b".", "8 bytes for an array"),
    "overflowing product": (b"\x80\x02" + array(HUGE * 3 + b"\x87", EIGHT) + b".", "8 bytes for"),
    "nothing of a huge shape": (
        b"\x80\x02" + array(b"K\x00" + HUGE * 2 + b"\x87", b"C\x00") + b".", "damaged pickle",
    ),
    "negative size": (b"\x80\x02" + array(b"J\xff\xff\xff\xff\x85", EIGHT) + b".", "impossible"),
    "two negative sizes": (b"\x80\x02" + array(b"J\xff\xff\xff\xff" * 2 + b"\x86", EIGHT) + b".",
                           "impossible"),
    "size that is a float": (b"\x80\x02" + array(b"G" + struct.pack(">d", 1) + b"\x85", EIGHT)
                             + b".", "impossible"),
    "size that is a bool": (b"\x80\x02" + array(b"\x88\x85", EIGHT) + b".", "impossible"),
    "shape that is a list": (b"\x80\x02" + array(b"]", EIGHT) + b".", "unknown array state"),
    "too many dimensions": (b"\x80\x02" + array(b"(" + b"K\x01" * 65 + b"t", EIGHT) + b".",
                            "dimension"),
    "huge int": (b"\x80\x02\x8b" + struct.pack("<i", 90000) + bytes(89999) + b"\x01.", "an int of"),
    "huge decimal": (b"L" + b"9" * 5000 + b"L\n.", "damaged pickle"),
    "object of objects": (pickle.dumps(objects(objects(np.arange(2)))), "got a object in an array"),
    "object of numbers": (pickle.dumps(objects(1, 2)), "got a int in an array of objects"),
    "object of lists": (pickle.dumps(objects([1], [2])), "got a list in an array of objects"),
    "memo entry of gigabytes": (b"\x80\x02Nr\xff\xff\xff\xff.", "LONG_BINPUT"),
    "negative memo index": (b"Np-1\n.", "negative PUT"),
    "bytes of exabytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"ab.", "damaged pickle"),
    "bytearray of terabytes": (b"\x80\x05\x96" + struct.pack("<Q", 2**42) + b"ab.", "damaged"),
    "text of gigabytes": (b"\x80\x02X\xff\xff\xff\x7fab.", "damaged pickle"),
    "frame of exabytes": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.", "damaged pickle"),
    "tuple as a key": (b"\x80\x02})K\x01s.", "got a tuple as a key"),
    "deep tuple as a key": (b"\x80\x02})" + b"\x85" * 90_000 + b"K\x01s.", "tuples and a dict"),
    "tuples as a key": (b"\x80\x02})" + b"\x85" * 999 + b"K\x01s.", "got a tuple as a key"),
    "int as a key": (b"\x80\x02}K\x01K\x01s.", "got a int as a key"),
    "deep tuple": (b"\x80\x02)" + b"\x85" * 90_000 + b".", "got a tuple, wanted"),
    "deep list": (b"\x80\x02" + b"]" * 45_000 + b"a" * 44_999 + b".", "got a list, wanted"),
    "endless list": (b"\x80\x02]q\x00h\x00a.", "got a list, wanted"),
    "doubled again and again": (b"\x80\x02)" + b"q\x00h\x00\x86" * 100 + b".", "got a tuple, want"),
    "array that holds itself": (
        b"\x80\x02" + RECONSTRUCT + b"q\x00(K\x01" + ONE + dtype(b"O8") + DTYPE_STATE
        + b"\x89]h\x00atb.", "in an array of objects",
    ),
    "list of the unfinished": (
        b"\x80\x02]" + RECONSTRUCT + b"q\x00ah\x00(K\x01" + ONE + dtype(b"i8") + DTYPE_STATE
        + b"\x89" + EIGHT + b"tb\x86.", "got a tuple",
    ),
    "opcodes without end": (b"\x80\x02" + b"}" * 110_000 + b".", "over 100000 opcodes"),
    "same bytes again and again": (
        b"\x80\x02(" + b"B\xd0\x07\0\0" + bytes(2000) + b"q\x00"
        + (RECONSTRUCT + b"(K\x01K\xfa\x85" + dtype(b"i8") + DTYPE_STATE + b"\x89h\x00tb") * 50
        + b"t.",
        "arrays larger than their file",
    ),
    "same text encoded again and again": (
        b"\x80\x02X\xe8\x03\0\0" + b"a" * 1000 + b"q\x00c_codecs\nencode\nq\x01"
        + b"h\x01h\x00X\x06\0\0\0latin1\x86R" * 30 + b".",
        "arrays larger than their file",
    ),
    "unknown encoding": (b"\x80\x02c_codecs\nencode\nX\1\0\0\0aX\3\0\0\0hex\x86R.", "encoding"),
    "unknown memory order": (pickle.dumps(np.arange(6).reshape(2, 3).T, 5).replace(
        b"\x8c\x01F", b"\x8c\x01A"), "unknown memory order"),
    "axes of nothing": (pickle.dumps(np.zeros((2, 3, 4)).transpose(0, 2, 1), 5).replace(
        b"K\x00K\x02K\x01\x87", b"K\x00K\x02K\x02\x87"), "axis"),
    "two values": (b"\x80\x02NN.", "got a NoneType"),
    "open mark": (b"\x80\x02(.", "unexpected MARK"),
    "state for a function": (
        b"\x80\x02cnumpy\ndtype\nN}X\x07\0\0\0__doc__K\x01s\x86b.", "state for a name",
    ),
    "value under a mark": (b"\x80\x02N(.", "unexpected MARK"),
    "mark left over": (b"\x80\x02(N.", "got a NoneType"),
    "no mark": (b"\x80\x02t.", "could not find MARK"),
    "key without a value": (b"\x80\x02}(X\1\0\0\0au.", "odd number of items"),
    "items for a dict": (b"\x80\x02}Na.", "no attribute"),
    "memo entry that is not there": (b"\x80\x02h\x07.", "Memo value not found"),
    "protocol 6": (b"\x80\x06N.", "pickle protocol: 6"),
    "bytes behind the end": (pickle.dumps(LAYERS) + b"x", "bytes after the end"),
    "nothing": (b"", "damaged pickle"),
    "noise": (bytes(range(128, 256)), "damaged pickle|got the opcode|protocol"),
    "object of another shape": (pickle.dumps(LAYERS[:2]), r"got object \[2\], wanted object \[3\]"),
    "numbers under a header of objects": (pickle.dumps(np.arange(3)), r"got int64 \[3\]"),
}  # fmt: skip


HEADERS = {
    "no file of numpy": (b"PK\x03\x04", "header that cannot be read"),
    "empty": (b"", "header that cannot be read"),
    "format version 9": (b"\x93NUMPY\x09\x00" + bytes(100), "header that cannot be read"),
    "format version 3": (b"\x93NUMPY\x03\x00" + bytes(100), r"format version \(3, 0\)"),
    "no dict": (b"\x93NUMPY\x01\x00\x04\x00[1]\n", "header that cannot be read"),
    "code in the header": (
        b"\x93NUMPY\x01\x00\x12\x00__import__('this')", "header that cannot be read",
    ),
    "deep header": (
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"-" * 8999 + b"1",
        "header that cannot be read",
    ),
    "long header": (
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b" " * 50, "header that cannot be read",
    ),
    "gigabytes": (npy(bytes(80), (2**40,), "<i8"), r"got 80 bytes for an array of int64"),
    "negative size": (npy(bytes(8), (-1,), "<i8"), "impossible size"),
    "too few bytes": (npy(bytes(15), (2,), "<i8"), r"got 15 bytes .* wanted 16"),
    "too many bytes": (npy(bytes(17), (2,), "<i8"), r"got 17 bytes .* wanted 16"),
    "text": (npy(bytes(8), (2,), "<U1"), "dtype <U1, wanted numbers"),
    "voids": (npy(bytes(8), (1,), "|V8"), r"dtype \|V8, wanted numbers"),
    "subarrays": (npy(bytes(8), (1,), "(2,)i4"), "wanted numbers"),
}  # fmt: skip
