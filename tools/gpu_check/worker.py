"""The workers' side of ``pool``: items from standard input, records to the pool."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tools.gpu_check.pool import LOST, RECORDS


class Channel:
    """What connects a worker to its pool."""

    def __init__(self) -> None:
        self._records = os.fdopen(int(os.environ.pop(RECORDS)), "w", encoding="utf-8")
        # What the items start must not read the pool's items.
        self._items = os.fdopen(os.dup(0), encoding="utf-8")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def send(self, record: Mapping[str, Any]) -> None:
        """One record."""
        self._records.write(json.dumps(record) + "\n")
        self._records.flush()

    def items(self) -> Iterator[str]:
        """The items, as they are dealt."""
        for line in self._items:
            yield json.loads(line)


def serve(answer: Callable[[str], Mapping[str, Any]], items: Sequence[str] | None = None) -> None:
    """Answer every item that is dealt.

    Args:
        answer: item -> its record; whatever it raises becomes one.
        items: to be dealt, where it is the worker that knows them.
    """
    channel = Channel()
    channel.send({"ready": items})
    for item in channel.items():
        try:
            record = dict(answer(item))
        except Exception as error:
            record = {"outcome": "raised", "message": one_line(error)}
        lost = gpu_lost()
        if lost:
            record |= {LOST: True, "outcome": "raised", "message": record.get("message") or lost}
        channel.send({"item": item, **record})
        if lost:
            # An orderly end would call the driver, which can only fail, and may hang.
            os._exit(1)


def gpu_lost() -> str:
    """Why nothing more can be computed on this process's GPU, or "".

    A kernel that reads where it must not ends the context, and every later call fails.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return f"the GPU is lost to this process: {one_line(error)}"
    return ""


def one_line(error: BaseException) -> str:
    """An exception as a sentence."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:1000]
