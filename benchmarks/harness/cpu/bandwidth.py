"""What this processor's caches and memory give per second: measured, one rate for each level."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from benchmarks.harness import machine
from rpg_kernels import native

LEVELS = ("L1", "L2", "L3", "memory")
_TYPICAL = {1: 32 << 10, 2: 1 << 20, 3: 32 << 20}
_ROUNDS = 7
_SAMPLE = 1 << 28  # bytes


@dataclass(frozen=True)
class Level:
    """A cache, or memory, as the threads of a call use it together.

    Args:
        name: one of ``LEVELS``.
        capacity: bytes of one thread's data that it holds; of memory 0, which holds all.
        read: bytes per second that all threads read.
        update: bytes per second, those read and those written, of all threads.
    """

    name: str
    capacity: int
    read: float
    update: float


def measure(threads: int) -> list[Level]:
    """The rates of a number of threads, the best of several samples; about a second.

    A cache is read in half of its size, memory in four times that of the last cache, which all
    threads share. Empty without the native module.
    """
    if not native.available():
        return []
    sizes = _TYPICAL | machine.cpu_caches()
    shared = {1: sizes[1], 2: sizes[2], 3: sizes[3] // threads}
    levels = []
    for name, level in zip(LEVELS, (1, 2, 3, 4), strict=True):
        bytes_ = shared[level] // 2 if level < 4 else 4 * sizes[3] // threads
        words = torch.ones(threads, bytes_ // 256 * 32, dtype=torch.int64)
        read, update = (_rate(words, write) for write in (False, True))
        levels.append(Level(name, shared.get(level, 0), read, 2 * update))
    return levels


def _rate(words: torch.Tensor, write: bool) -> float:
    passes = max(1, _SAMPLE // words.nbytes)
    clock = time.process_time if len(words) == 1 else time.perf_counter
    samples = []
    for _ in range(_ROUNDS):
        begin = clock()
        native.stream(words, write=write, passes=passes)
        samples.append(clock() - begin)
    return passes * words.nbytes / min(samples)


def holding(levels: list[Level], bytes_: int) -> Level:
    """The first level that holds so many bytes of one thread.

    Example:
        >>> levels = [Level("L1", 1000, 9.0, 9.0), Level("memory", 0, 1.0, 1.0)]
        >>> holding(levels, 900).name, holding(levels, 1100).name
        ('L1', 'memory')
    """
    return next((level for level in levels if bytes_ <= level.capacity), levels[-1])


def best(one: list[Level], other: list[Level]) -> list[Level]:
    """The higher rates of two measurements: what disturbs one of them only lowers it.

    Example:
        >>> best([Level("memory", 0, 9.0, 2.0)], [Level("memory", 0, 8.0, 3.0)])
        [Level(name='memory', capacity=0, read=9.0, update=3.0)]
    """
    if not one:
        return other
    return [
        Level(a.name, a.capacity, max(a.read, b.read), max(a.update, b.update))
        for a, b in zip(one, other, strict=True)
    ]
