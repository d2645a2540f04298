"""The roof line: what a linear layer must at least read and multiply, and the time that takes.

A forward reads its weight once, or of a bank the slots that the layer uses; training reads it
again and writes its gradient. They come from the smallest level of cache or memory that holds all
layers that run in turn. Multiplications are those that the back end says it makes. Neither the
additions that hand shared products out to the rows, nor the casts and copies of activations are
counted, so the line is one that nothing reaches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.harness.cpu import bandwidth
from benchmarks.harness.cpu.bandwidth import Level
from benchmarks.harness.cpu.grid import FORWARD
from benchmarks.harness.cpu.subject import Ours, Subject
from benchmarks.harness.problem import MAX_COPIES


@dataclass(frozen=True)
class Work:
    """What a call must do at least.

    Args:
        read: bytes of weight or slots, every time that they are read.
        written: bytes of their gradient.
        held: bytes that must stay somewhere until they are read again.
        activations: bytes of x, y and in training their gradients.
        operations: multiplications and additions of products.
    """

    read: int
    written: int
    held: int
    activations: int
    operations: int


def dense(subject: Subject, cache_bytes: int) -> Work:
    """Of a layer whose weight is stored in the dtype of x."""
    weight, activations = subject.dense_bytes
    copies = min(MAX_COPIES, 1 + -(-2 * cache_bytes // weight))
    passes = 1 if subject.point.what == FORWARD else 3
    operations = 2 * passes * math.prod(subject.point.layer.weight) * subject.point.batch
    return _work(weight, weight, weight * copies, activations, operations, passes == 1)


def ours(subject: Subject, one: Ours) -> Work:
    """Of a layer that reads a bank; as products count what its back ends say."""
    weight, activations = subject.dense_bytes
    bank = one.weight.bank.weight.nbytes
    used = min(bank, weight // (one.bank.laps or 1))
    forward = subject.point.what == FORWARD
    return _work(used, bank, bank, activations, one.operations, forward)


def _work(
    weight: int, gradient: int, held: int, activations: int, operations: int, forward: bool
) -> Work:
    if forward:
        return Work(weight, 0, held, activations, operations)
    return Work(2 * weight, gradient, held, 2 * activations, operations)


def floors(work: Work, levels: list[Level], rates: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a call at the measured rates of memory, and of products; the longest is its roof.

    Args:
        work: of the call.
        levels: with their rates; empty leaves the traffic out.
        rates: operations per second by dtype, of which the best counts.
    """
    times = {"arithmetic": work.operations / max(rates.values())}
    if levels:
        level = bandwidth.holding(levels, work.held)
        near = bandwidth.holding(levels, work.activations)
        times[level.name] = work.read / level.read + work.written / level.update
        times[near.name] = times.get(near.name, 0.0) + work.activations / near.read
    return times
