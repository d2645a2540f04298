"""The safetensors format, in one pass and with a digest of everything that a file says.

Eight bytes hold the header's length, little endian. The header is JSON, padded with blanks: dtype,
shape and offsets for each name, and text under ``__metadata__``. The tensors' bytes follow without
gaps. (https://github.com/huggingface/safetensors, "Format")

The library of that name reads these files, but its writer wants every tensor in CPU memory at once
and the digest, which is part of the header, before it begins.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from io import BufferedReader
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from rpg_kernels._json import parse_json
from rpg_kernels._tensors import memory

DIGEST = "rpg_sha256"
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the library's limit too
_MAX_ELEMENTS = 2**60  # more overflow torch's strides, even beside a size of 0
_MAX_DIMENSIONS = 64


class Entry(NamedTuple):
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a file says before its data; entries in the order of their data."""

    metadata: dict[str, str]
    entries: dict[str, Entry]


def write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of dtypes in ``NAMES`` and metadata, the digest added.

    One tensor at a time is copied, and only if it is on another device or not contiguous. Its
    bytes are digested as they are written, so the file fits its digest whatever else goes on.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {}
    end = 0
    for name in order:
        t = tensors[name]
        begin, end = end, end + t.numel() * t.element_size()
        offsets = [begin, end]
        entries[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": offsets}

    def header(digest: str) -> bytes:
        text = json.dumps(
            {METADATA: {**metadata, DIGEST: digest}, **entries}, separators=(",", ":")
        )
        text += " " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text.encode()

    file.write(header("0" * 64))
    hashes = {}
    for name in order:
        host = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
        data = memory(host)
        hashes[name] = hashlib.sha256(data).hexdigest()
        file.write(data)
    file.seek(0)
    file.write(header(_digest(metadata, entries, hashes)))


def read_header(file: BufferedReader) -> Header:
    """The checked header of a file; every byte of the data belongs to one entry.

    Raises:
        ValueError: not such a file, or not all of it.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        got = f"a header of {length} bytes in a file of {size}"
        raise ValueError(f"not a safetensors file, or truncated ({got})")
    try:
        record = parse_json(file.read(length))
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__}, not an object")
        metadata = _metadata(record.pop(METADATA, {}))
        found = {name: _entry(name, value) for name, value in record.items()}
    except ValueError as error:
        raise ValueError(f"not a safetensors file, or damaged (header: {error})") from error
    entries = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 0
    for name, entry in entries.items():
        if entry.begin != end:
            raise ValueError(f"damaged: {name} begins at byte {entry.begin} of the data, not {end}")
        end = entry.end
    if 8 + length + end != size:
        raise ValueError(f"truncated or continued: got {size} bytes, wanted {8 + length + end}")
    return Header(metadata, entries)


def read_tensors(file: BufferedReader, header: Header) -> dict[str, Tensor]:
    """The tensors that follow the header, on the CPU, if everything fits the digest.

    Raises:
        ValueError: the file was changed, in its header or in its data.
    """
    tensors, entries, hashes = {}, {}, {}
    for name, (dtype, shape, begin, end) in header.entries.items():
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        data = memory(tensor)
        if file.readinto(data) != len(data):
            raise ValueError(f"truncated within {name}")
        offsets = [begin, end]
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        hashes[name] = hashlib.sha256(data).hexdigest()
        tensors[name] = tensor
    given = header.metadata.get(DIGEST)
    if given != (digest := _digest(header.metadata, entries, hashes)):
        raise ValueError(f"damaged: its contents have sha256 {digest}, wanted {given}")
    for name, tensor in tensors.items():
        # Other bytes are undefined behaviour as bool.
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise ValueError(f"{name}: got bytes above 1, wanted bool")
    return tensors


def _digest(
    metadata: Mapping[str, str], entries: Mapping[str, Any], hashes: Mapping[str, str]
) -> str:
    """sha256 over everything but itself, whatever the order in the file."""
    contents = {n: [e["dtype"], e["shape"], hashes[n]] for n, e in entries.items()}
    rest = {key: value for key, value in metadata.items() if key != DIGEST}
    text = json.dumps([rest, contents], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _metadata(record: object) -> dict[str, str]:
    if not isinstance(record, dict) or not all(isinstance(v, str) for v in record.values()):
        raise ValueError(f"{METADATA} is not an object of texts")
    return record


def _entry(name: str, record: object) -> Entry:
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} has not dtype, shape and data_offsets")
    shape, offsets = record["shape"], record["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or len(numbers) > _MAX_DIMENSIONS:
            raise ValueError(f"{name!r} has a shape or offsets that are no short list")
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{name!r} has a shape or offsets that are no sizes")
    if not isinstance(record["dtype"], str) or record["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} is of an unknown dtype")
    dtype = DTYPES[record["dtype"]]
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has offsets {offsets}, which do not fit its shape")
    if math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
        raise ValueError(f"{name!r} has shape {shape}, more than torch can hold")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])
