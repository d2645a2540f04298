"""JSON from files, read without the liberties that Python's reader takes."""

from __future__ import annotations

import json
from typing import Any


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text: UTF-8, no repeated keys, no NaN or infinity.

    Raises:
        ValueError: not such a text, or one nested too deeply to be read.

    Example:
        >>> parse_json(b'{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ValueError: key 'a' given twice
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} given twice")
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
