"""The results file: one line of JSON for each finished run, whole or not there at all."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """All finished runs of a file; none when there is no file.

    A last line without its end was being written when its process was killed, and is left out.

    Raises:
        ValueError: another line is no run, with its number.
    """
    if not path.exists():
        return []
    records = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if not isinstance(record, dict) or not {"row", "seed", "settings", "recipe", "data"} <= set(
            record
        ):
            raise ValueError(f"{path}:{number}: got {line[:60]!r}, wanted a run")
        records.append(record)
    return records


def append(path: Path, record: Record) -> None:
    """Add a run, and take away what a killed process left of one.

    Several processes may write to one file.
    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def find(records: list[Record], row: str, seed: int) -> Record | None:
    """The finished run of a row and a seed."""
    return next((r for r in records if (r["row"], r["seed"]) == (row, seed)), None)
