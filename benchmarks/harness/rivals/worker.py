"""The process of a family: makes its layers, and answers requests, one JSON object a line.

``python -m benchmarks.harness.rivals.worker`` reads the first line as ``Orders``; then ``{"do":
"check"}`` and ``{"do": "turn"}``, with the name of a way and a batch. ``turns`` is the other side.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from benchmarks.harness.rivals.contender import ALLOWED, FORWARD, Layers, Problem, Way
from benchmarks.harness.rivals.flush import Flush
from benchmarks.harness.rivals.registry import FAMILIES
from benchmarks.harness.timing import cpu_headline

_CLOCKS = {"process": time.process_time, "wall": time.perf_counter}
_LONGEST = 300  # characters of an error that is told


@dataclass(frozen=True)
class Orders:
    """What a process is for.

    Args:
        family: a name of ``registry.FAMILIES``.
        what: ``"forward"`` or ``"training"``.
        shape: N and K of the weight.
        batches: that will be asked for.
        dofs: sizes of banks; none takes all.
        threads: of every way.
        copies: layers that are timed in a turn.
        seed: of values.
        flush: file descriptor of ``flush.shared``.
    """

    family: str
    what: str
    shape: tuple[int, int]
    batches: tuple[int, ...]
    dofs: tuple[int, ...]
    threads: int
    copies: int
    seed: int
    flush: int


class Worker:
    """Layers of a family, made one way after the other.

    Args:
        orders: what to make.
    """

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        torch.set_num_threads(orders.threads)
        self._flush = Flush(orders.flush, orders.threads)
        self._clock = _CLOCKS[cpu_headline(orders.threads)]
        self._problem = Problem(
            orders.shape, orders.batches, orders.threads, orders.copies, orders.seed
        )
        self._made: dict[str, tuple[Way, Layers]] = {}

    def prepare(self) -> Iterator[dict[str, Any]]:
        """Make everything; for each way what it holds, or why it cannot run."""
        batch = self._orders.batches[0]
        family = FAMILIES[self._orders.family]
        for way in family.ways(self._orders.what, self._orders.dofs):
            about = {"name": way.name, "kind": way.kind, "ours": way.ours}
            _ = self._problem.int8, self._problem.int4  # what all share counts for none
            before = resident()
            try:
                layers = way.make(self._problem)
                for i in range(layers.count):
                    layers.call(i, batch)
            except Exception as error:  # whatever a package may raise is that package's answer
                yield about | {"reason": _told(error)}
                continue
            held = max(0, resident() - before)
            self._made[way.name] = way, layers
            yield about | {
                "reason": None,
                "nbytes": layers.nbytes,
                "parameters": layers.parameters,
                "resident": held if way.ours else held // layers.count,
                "layers": layers.count,
            }

    def check(self, name: str, batch: int) -> dict[str, Any]:
        """The error of layer 0, after every layer has run once at this batch."""
        way, layers = self._made[name]
        for i in range(layers.lead, layers.count):
            layers.call(i, batch)
        if layers.check:
            error = layers.check(batch)
        else:
            error = self._problem.error(layers.call(0, batch), batch, layers.exact)
        finite = error if math.isfinite(error) else None
        return {"error": finite, "allowed": ALLOWED[way.kind]}

    def turn(self, name: str, batch: int) -> dict[str, Any]:
        """Seconds of a layer when nothing is in a cache, and of layers that follow others.

        Layers that lead read what those that are timed share with them. Between the first and
        the last of them the batch is the smallest: it reads the bank all the same.
        """
        layers = self._made[name][1]
        self._flush()
        flushed = self._seconds(lambda: layers.call(0, batch))
        for i in range(1, layers.lead):
            layers.call(i, batch if i + 1 == layers.lead else self._orders.batches[0])
        timed = range(layers.lead, layers.count)
        following = self._seconds(lambda: [layers.call(i, batch) for i in timed])
        return {"flushed": flushed, "following": following / len(timed)}

    def _seconds(self, run: Callable[[], object]) -> float:
        begin = self._clock()
        run()
        return self._clock() - begin


def resident() -> int:
    """Bytes of this process in memory, after what is free was given back."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:_LONGEST]


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer until there are no more requests."""

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    given = json.loads(requests.readline())
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    orders = Orders(**fields)
    with torch.set_grad_enabled(orders.what != FORWARD):
        try:
            worker = Worker(orders)
            for about in worker.prepare():
                say(about)
        except Exception as error:
            say({"refused": _told(error)})
            return
        say({"ready": True})
        for line in requests:
            asked = json.loads(line)
            try:
                do = {"check": worker.check, "turn": worker.turn}[asked["do"]]
                say(do(asked["name"], asked["batch"]))
            except Exception as error:
                say({"reason": _told(error)})


def main() -> None:
    """Serve on standard input and output; what packages print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
