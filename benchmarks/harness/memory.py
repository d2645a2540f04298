"""Memory of one layer: what a call allocates, what it saves, and what stays between steps."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.harness.timing import WARM, Work


@dataclass(frozen=True)
class Peak:
    """Bytes that a call allocates: the most alive at once, and the largest single piece.

    Results count; inputs, the bank or weight, and tables were there before.
    """

    peak: int
    largest: int


@dataclass(frozen=True)
class Persistent:
    """Bytes of one layer alive between two optimiser steps, with Adam."""

    parameters: int
    gradients: int
    optimizer: int
    tables: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.tables


def peak(work: Work, kind: str) -> Peak:
    """Allocations of one warm call of a pass.

    From the profiler's memory events on a CPU. On a GPU the peak is the allocator's statistic and
    the largest piece comes from the profiler, whose events there do not count what the allocator
    rounds up.
    """
    device = work.problem.device
    work.prepare(kind, WARM)()  # caches and workspaces are made in the first call
    call = work.prepare(kind, WARM)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with (
        _without_messages(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        results = call()
    sizes = _allocations(profile, device)
    del results, call
    largest = max(sizes, default=0)
    if on_gpu:
        torch.cuda.synchronize()
        return Peak(torch.cuda.max_memory_allocated() - before, largest)
    return Peak(highest(sizes), largest)


@contextlib.contextmanager
def _without_messages() -> Iterator[None]:
    """Keep what the profiler's library prints to the process's stderr off the screen."""
    sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def highest(sizes: Iterable[int]) -> int:
    """The largest running sum of allocations (positive) and frees (negative).

    Example:
        >>> highest([100, 50, -100, 80, -130])
        150
    """
    alive = most = 0
    for size in sizes:
        alive += size
        most = max(most, alive)
    return most


def _allocations(profile: torch.profiler.profile, device: torch.device) -> list[int]:
    """Bytes of the device's memory events in order; frees are negative."""
    results: Any = profile.profiler.kineto_results if profile.profiler else None
    events = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and event.device_type().name == device.type.upper()
    ]
    return [size for _, size in sorted(events, key=lambda event: event[0])]


def saved(work: Work) -> int:
    """Bytes that a forward saves for its backward, each storage once and whole.

    x and the trained tensors are left out: they are there anyway. Tables count, as do weights
    made in the forward.
    """
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = work.stack.forward(0)
    left_out = {_key(t) for t in (work.problem.x, *work.stack.trained(0))}
    sizes = {_key(t): t.untyped_storage().nbytes() for t in kept}
    del y
    return sum(size for key, size in sizes.items() if key not in left_out)


def persistent(work: Work) -> Persistent:
    """Count one layer's tensors, and Adam's own state for them, made on the meta device."""
    trained = work.stack.trained(0)
    shadows = [torch.nn.Parameter(torch.empty_like(t, device="meta")) for t in trained]
    optimizer = torch.optim.Adam(shadows)
    for shadow in shadows:
        shadow.grad = torch.empty_like(shadow)
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return Persistent(
        parameters=_bytes(trained),
        gradients=sum(s.grad.nbytes for s in shadows if s.grad is not None),
        optimizer=sum(t.nbytes for t in state),
        tables=_bytes(work.stack.tables),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({_key(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
