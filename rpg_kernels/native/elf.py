"""Whether a shared library is all there, as far as its headers say."""

from __future__ import annotations

import struct
from pathlib import Path

_ELF64 = b"\x7fELF\x02\x01"  # little-endian
_HEADER = struct.Struct("<32xQ14xHH6x")  # offset, size and number of the program headers
_PROGRAM = struct.Struct("<I4xQ16xQ16x")  # type, offset and bytes in the file
_LOADED = 1


def cut_short(path: Path) -> str:
    """What is missing of a library that ends before what would be mapped of it, or "".

    The loader maps such a file without complaint, and the first access beyond its end is a bus
    error, which ends the process. Of anything but a 64-bit little-endian ELF file, and of other
    damage, nothing is said: the loader may know more.

    Args:
        path: of the library.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
            if not header.startswith(_ELF64) or len(header) < _HEADER.size:
                return ""
            offset, size, count = _HEADER.unpack(header)
            file.seek(offset)
            table = file.read(size * count)
            have = path.stat().st_size
    except (OSError, ValueError):  # ValueError: an offset beyond what a file can have
        return ""
    need = offset + size * count
    if size >= _PROGRAM.size and need <= have:
        for at in range(0, size * count, size):
            kind, begin, length = _PROGRAM.unpack_from(table, at)
            if kind == _LOADED:
                need = max(need, begin + length)
    return f"{path} has {have} bytes, wanted at least {need}" if have < need else ""
