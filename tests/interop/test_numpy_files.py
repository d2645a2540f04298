"""Array files of unknown origin: what NumPy writes is read, and nothing else is."""

from __future__ import annotations

import base64
import io
import pickle
import random
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_arrays import HEADERS, HOSTILE, LAYERS, Call, npy, objects

from rpg_kernels._extras import MissingExtraError
from rpg_kernels.interop import pickled_arrays
from rpg_kernels.interop.numpy_files import read_object_array

# Text with a wrong escape, which pickletools decodes before anything can refuse it; old names of
# dtypes in headers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid escape sequence:DeprecationWarning", "ignore:Data type alias:DeprecationWarning"
)

# numpy.save of three int64 arrays of different lengths, by NumPy 1.23.5 under Python 3.11.
NUMPY_1_FILE = base64.b64decode(
    "k05VTVBZAQB2AHsnZGVzY3InOiAnfE8nLCAnZm9ydHJhbl9vcmRlcic6IEZhbHNlLCAnc2hhcGUnOiAoMywpLCB9ICAg"
    "ICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIAqAA2NudW1weS5j"
    "b3JlLm11bHRpYXJyYXkKX3JlY29uc3RydWN0CnEAY251bXB5Cm5kYXJyYXkKcQFLAIVxAkMBYnEDh3EEUnEFKEsBSwOF"
    "cQZjbnVtcHkKZHR5cGUKcQdYAgAAAE84cQiJiIdxCVJxCihLA1gBAAAAfHELTk5OSv////9K/////0s/dHEMYoldcQ0o"
    "aABoAUsAhXEOaAOHcQ9ScRAoSwFLA4VxEWgHWAIAAABpOHESiYiHcRNScRQoSwNYAQAAADxxFU5OTkr/////Sv////9L"
    "AHRxFmKJQxgFAAAAAAAAAAMAAAAAAAAABAAAAAAAAABxF3RxGGJoAGgBSwCFcRloA4dxGlJxGyhLAUsEhXEcaBSJQyAA"
    "AAAAAAAAAAEAAAAAAAAAAwAAAAAAAAAFAAAAAAAAAHEddHEeYmgAaAFLAIVxH2gDh3EgUnEhKEsBSwKFcSJoFIlDEAAA"
    "AAAAAAAAAAAAAAAAAABxI3RxJGJldHElYi4="
)
PROTOCOLS = range(6)


def as_numpy_1(content: bytes) -> bytes:
    """The same pickle with NumPy 1's module names, lengths put right."""
    for module in (b"multiarray", b"numeric"):
        new, old = b"numpy._core." + module, b"numpy.core." + module
        content = content.replace(
            b"\x8c" + bytes([len(new)]) + new, b"\x8c" + bytes([len(old)]) + old
        ).replace(new, old)
    if content[2:3] == b"\x95":  # a frame, from protocol 4
        content = content[:3] + struct.pack("<Q", len(content) - 11) + content[11:]
    return content


def read(tmp_path: Path, content: bytes) -> Any:
    path = tmp_path / "layers.npy"
    path.write_bytes(content)
    return read_object_array(path)


def assert_same(array: Any, expected: Any) -> None:
    assert isinstance(array, np.ndarray)
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    if expected.dtype == object:
        for one, other in zip(array.flat, expected.flat, strict=True):
            assert_same(one, other)
    else:
        assert array.tobytes() == expected.tobytes()


def test_a_file_of_numpy_1(tmp_path: Path) -> None:
    assert b"numpy.core.multiarray" in NUMPY_1_FILE
    assert_same(read(tmp_path, NUMPY_1_FILE), LAYERS)


def test_a_file_of_this_numpy(tmp_path: Path) -> None:
    np.save(tmp_path / "layers.npy", LAYERS)
    assert_same(read_object_array(str(tmp_path / "layers.npy")), LAYERS)


VALUES = [
    LAYERS,
    objects(np.arange(6.0).reshape(2, 3).T, np.zeros(0, np.uint8), np.ones((1, 2, 3), bool)),
    np.arange(6, dtype=np.int16).reshape(2, 3),
    np.arange(24, dtype=np.float16).reshape(2, 3, 4).transpose(0, 2, 1),
    np.array([[1 + 2j, 3]], np.complex64)[:, ::-1],
    np.asfortranarray(np.arange(256, dtype=np.uint8).reshape(16, 16)),
    np.array(3),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("flavour", ["NumPy 1", "NumPy 2"])
@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{value.dtype}{value.shape}")
def test_every_protocol_of_both_numpys(value: Any, flavour: str, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    if flavour == "NumPy 1":
        content = as_numpy_1(content)
        assert b"numpy.core" in content
        assert b"_core" not in content
    assert_same(pickled_arrays.loads(content), value)


def test_plain_values_beside_arrays() -> None:
    shared = np.arange(3)
    plain = [1, -2.5, None, True, 2**40, "é", b"\x00\xff", b""]
    value = {
        b"a": shared,
        "b": shared,
        "c": plain,
        "d": [],
        **dict(zip("efgh", plain, strict=False)),
    }
    for protocol in PROTOCOLS:
        result = pickled_arrays.loads(pickle.dumps(value, protocol))
        assert list(result) == list(value)
        assert all(result[key] == value[key] for key in "cdef")
        assert result[b"a"] is result["b"]
        assert_same(result["b"], shared)


def test_as_many_opcodes_as_a_batch_of_cifar_has() -> None:
    names = [f"image_s_{i:06}.png".encode() for i in range(10_000)]
    value = {b"labels": [i % 10 for i in range(10_000)], b"filenames": names}
    assert pickled_arrays.loads(pickle.dumps(value, 4)) == value


def test_arrays_come_in_native_order_and_read_only(tmp_path: Path) -> None:
    big_endian = objects(np.arange(3, dtype=">i4"), np.array([1.5], dtype=">f8"))
    native = objects(np.arange(3, dtype=np.int32), np.array([1.5]))
    assert_same(pickled_arrays.loads(pickle.dumps(big_endian)), native)
    array = read(tmp_path, NUMPY_1_FILE)
    for part in (array, array[0]):
        with pytest.raises(ValueError, match="read-only"):
            part[0] = 0


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(6, dtype=">u2"),
        np.zeros((0, 4), bool),
        np.array(2.5, np.float32),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}",
)
def test_plain_numbers(tmp_path: Path, value: Any) -> None:
    np.save(tmp_path / "a.npy", value)
    array = read_object_array(tmp_path / "a.npy")
    assert array.dtype == value.dtype.newbyteorder("=")
    assert array.shape == value.shape
    assert np.array_equal(array, value)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "layers.npy"
    path.write_bytes(npy(content))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"layers\.npy: .*{message}") as caught:
            read_object_array(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ", wanted " in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 400
    assert peak < 10 * len(content) + (100 << 20)


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(tmp_path: Path, name: str) -> None:
    content, message = HEADERS[name]
    with pytest.raises(ValueError, match=rf"layers\.npy: .*{message}"):
        read(tmp_path, content)


def files() -> dict[str, bytes]:
    numbers = io.BytesIO()
    np.save(numbers, np.arange(6, dtype=np.int16).reshape(2, 3))
    pickled = {f"protocol {p}": npy(pickle.dumps(LAYERS, p)) for p in PROTOCOLS}
    return {"NumPy 1": NUMPY_1_FILE, "numbers": numbers.getvalue(), **pickled}


@pytest.mark.parametrize("name", files())
def test_truncated_anywhere(tmp_path: Path, name: str) -> None:
    content = files()[name]
    for length in range(len(content)):
        with pytest.raises(ValueError, match=r"layers\.npy: got .*, wanted "):
            read(tmp_path, content[:length])


def assert_valid_or_refused(tmp_path: Path, content: bytes) -> bool:
    """Whether the file was read; what comes out is then numbers, no more than there are bytes."""
    try:
        result = read(tmp_path, content)
    except ValueError:
        return False
    parts = list(result.flat) if result.dtype == object else [result]
    for part in parts:
        assert isinstance(part, np.ndarray)
        assert part.dtype.kind in "biufc"
        assert part.sum() is not None  # every byte can be read
    assert sum(part.nbytes for part in parts) <= 2 * len(content)
    return True


@pytest.mark.parametrize("name", files())
def test_bit_flips(tmp_path: Path, name: str) -> None:
    content = files()[name]
    generator = random.Random(name)
    read_at_all = 0
    for _ in range(250):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 1, 1, 2, 5))):
            damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        read_at_all += assert_valid_or_refused(tmp_path, bytes(damaged))
    # Flips among the numbers themselves are valid files.
    assert 0 < read_at_all < 250


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_opcodes_in_another_order(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps(LAYERS, protocol)
    generator = random.Random(protocol)
    for _ in range(120):
        start, end, to = sorted(generator.randrange(len(content)) for _ in range(3))
        moved = content[:start] + content[end:to] + content[start:end] + content[to:]
        assert_valid_or_refused(tmp_path, npy(moved))


def test_nothing_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    content = pickle.dumps(objects(Call(Path.touch, mark)))
    with pytest.raises(ValueError, match="got a reference to"):
        read(tmp_path, npy(content, (1,)))
    assert not mark.exists()
    pickle.loads(content)  # the same bytes in Python's own unpickler
    assert mark.exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_object_array(tmp_path / "layers.npy")


def test_without_numpy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("numpy", "numpy.lib.format"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"a \.npy file needs numpy: pip install numpy"):
        read_object_array(tmp_path / "layers.npy")
    with pytest.raises(MissingExtraError, match="pip install numpy"):
        pickled_arrays.loads(b"N.")
