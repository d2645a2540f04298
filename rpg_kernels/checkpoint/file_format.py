"""A file of tensors and texts: written and read by the safetensors library, sealed by a digest.

The library knows the format and refuses what does not follow it. What it leaves open is added here:
a sha256 of everything that a file says, one order of the metadata (so that equal models give equal
bytes), and a file that appears under its name only when it is whole and on disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

from rpg_kernels._tensors import memory

FORMAT, STORED_FORMAT = "1", "2"  # of files with float banks, and with banks in fewer bytes
METADATA = "__metadata__"
_DIGEST = "rpg_sha256"
_MAX_HEADER = 100_000_000  # the library's limit too
_CHUNK = 2**20


def dtype_code(dtype: torch.dtype) -> str | None:
    """The format's name of a dtype; None for those that it lacks.

    >>> dtype_code(torch.bfloat16), dtype_code(torch.complex128)
    ('BF16', None)
    """
    if dtype == torch.float4_e2m1fn_x2:  # two values in an element, which the library cannot read
        return None
    try:
        return _spec(torch.empty(0, dtype=dtype, device="cpu")).dtype
    except SafetensorError:
        return None


def write(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata, with the digest, under ``path``: all of it or nothing.

    A tensor is copied only if it is on another device or not contiguous; all copies are held at
    once. The digest is of the bytes that reached the file, so it fits whatever else goes on.

    Raises:
        OSError: the path cannot be written; what it held is unchanged.
    """
    if os.path.lexists(path) and not os.path.isfile(path):
        raise OSError(f"path: got {path}, which is not a file, wanted a file or nothing there")
    here = {
        name: tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        for name, tensor in tensors.items()
    }
    temporary = os.path.join(os.path.dirname(path), f".rpg-{secrets.token_hex(8)}.tmp")
    try:
        # The library's own files are readable by their owner only; one made here is as usual.
        with open(temporary, "xb"):
            mode = os.stat(path if os.path.isfile(path) else temporary).st_mode
        specs = {name: _spec(tensor) for name, tensor in here.items()}
        serialize_file(specs, temporary, {**metadata, _DIGEST: "0" * 64})
        with open(temporary, "r+b") as file:
            os.chmod(temporary, stat.S_IMODE(mode))
            _seal(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError | SafetensorError):
            number = _error_number(error)
            reason = f"cannot be written ({os.strerror(number)})"
            raise OSError(number, reason, path) from error
        raise


def read(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, in memory of their own on the CPU, and the metadata of a file of ours.

    Raises:
        ValueError: not a safetensors file, not one of ours, not all of it, or changed since.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        got = f"a header of {length} bytes in a file of {size}"
        raise ValueError(f"not a safetensors file, or truncated ({got})")
    try:
        # Not mapped into memory: what was checked must still be there when it is copied.
        with torch.device("cpu"), safe_open(path, "pt", backend="pread") as opened:
            metadata = opened.metadata() or {}
            _check_format(metadata)
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            entries = {name: [p.get_dtype(), p.get_shape()] for name, p in parts.items()}
            tensors: dict[str, Tensor] = opened.get_tensors()
    # The last two are of torch, for shapes that it cannot hold.
    except (SafetensorError, RuntimeError, TypeError) as error:
        wanted = "not a safetensors file, or damaged, truncated or continued"
        raise ValueError(f"{wanted} ({error})") from error
    hashes = {name: hashlib.sha256(memory(t)).hexdigest() for name, t in tensors.items()}
    given, digest = metadata.get(_DIGEST), _digest(metadata, entries, hashes)
    if given != digest:
        raise ValueError(f"damaged: its contents have sha256 {digest}, wanted {given}")
    for name, tensor in tensors.items():
        # Other bytes are undefined behaviour as bool.
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8).flatten() > 1).any()):
            raise ValueError(f"{name}: got bytes above 1, wanted bool")
    return tensors, metadata


def _spec(tensor: Tensor) -> TensorSpec:
    """What the library is told of a contiguous CPU tensor, which must outlive this."""
    return TensorSpec(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tensor.shape,
        data_ptr=tensor.data_ptr(),
        data_len=tensor.numel() * tensor.element_size(),
    )


def _seal(file: BinaryIO) -> None:
    """Put the digest into a written file, and its metadata in order; the length is unchanged."""
    length = int.from_bytes(file.read(8), "little")
    entries = json.loads(file.read(length))
    metadata = entries.pop(METADATA)
    hashes = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        hashes[name] = _sha256(file, 8 + length + begin, end - begin)
    described = {name: [entry["dtype"], entry["shape"]] for name, entry in entries.items()}
    metadata[_DIGEST] = _digest(metadata, described, hashes)
    header = {METADATA: dict(sorted(metadata.items())), **entries}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    file.seek(8)
    file.write(text.ljust(length))


def _sha256(file: BinaryIO, begin: int, size: int) -> str:
    """Of a part of a file, without holding it."""
    file.seek(begin)
    sha256 = hashlib.sha256()
    for start in range(0, size, _CHUNK):
        sha256.update(file.read(min(_CHUNK, size - start)))
    return sha256.hexdigest()


def _digest(
    metadata: Mapping[str, str], entries: Mapping[str, list[Any]], hashes: Mapping[str, str]
) -> str:
    """sha256 over everything but itself, whatever the order in the file.

    The entries are dtype and shape of each tensor, the hashes are of its bytes.
    """
    contents = {name: [*entry, hashes[name]] for name, entry in entries.items()}
    rest = {key: value for key, value in metadata.items() if key != _DIGEST}
    text = json.dumps([rest, contents], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_format(metadata: Mapping[str, str]) -> None:
    given = metadata.get("rpg_format")
    if given is None:
        raise ValueError(
            "not written by rpg.save, so that nothing tells which map its values belong to; to "
            "load it all the same: model.load_state_dict(safetensors.torch.load_file(path))"
        )
    if given not in (FORMAT, STORED_FORMAT):
        writer = metadata.get("rpg_version")
        wanted = f"{FORMAT} or {STORED_FORMAT}"
        raise ValueError(f"format: got {given} (of rpg-kernels {writer}), wanted {wanted}")


def _error_number(error: OSError | SafetensorError) -> int:
    """The library says the system's error in its text only."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else errno.EIO
