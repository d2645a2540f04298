"""Memory: what a call allocates, what it saves for its backward, and what stays between steps.

Allocations are memory events of torch's profiler: they show what a compiled operator allocates
inside, which hooks on operators do not. What is saved comes from autograd's own hooks.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class Peak:
    """Bytes that a call allocates: the most alive at once, and the largest single piece.

    Results count; inputs, the bank or weight, and tables were there before.
    """

    peak: int
    largest: int


@dataclass(frozen=True)
class Persistent:
    """Bytes alive between two optimiser steps.

    ``tables`` are all buffers and other tensors that modules hold: index and sign tables, and the
    running statistics of norms.
    """

    parameters: int
    gradients: int
    optimizer: int
    tables: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.tables


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that autograd saves in one forward pass, parameters and the input batch left out.

    Storages are counted once and whole. ``activations`` are those whose content depends on the
    input batch, statistics of norms among them. The rest is the same for every batch: ``tables``
    are tensors that the model holds, and ``weights`` are copies of weights made in the forward
    (materialised, or cast by autocast).
    """

    activations: int
    weights: int
    tables: int

    @property
    def total(self) -> int:
        return self.activations + self.weights + self.tables

    @property
    def beyond_activations(self) -> int:
        return self.weights + self.tables


def peak(prepare: Callable[[], Callable[[], object]], device: torch.device) -> Peak:
    """Allocations of one call, once another has made caches and workspaces.

    From the profiler's memory events on a CPU. On a GPU the peak is the allocator's statistic and
    the largest piece comes from the profiler, whose events there do not count what the allocator
    rounds up.

    Args:
        prepare: gives the call; what it allocates itself is not counted.
        device: that the call allocates on.
    """
    prepare()()
    call = prepare()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        gc.collect()  # what is freed while we look would be subtracted
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


def saved(forward: Callable[[], object], left_out: Iterable[Tensor]) -> int:
    """Bytes that a forward saves for its backward, each storage once and whole.

    Tables count, as do weights made in the forward.

    Args:
        forward: returns what keeps the graph alive.
        left_out: tensors that are there anyway: the input and what is trained.

    Example:
        >>> x, w = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
        >>> saved(lambda: (x.exp() @ w.t()).exp(), [x, w])
        56
    """
    there = {_key(tensor) for tensor in left_out}
    sizes = {_key(t): t.untyped_storage().nbytes() for t in _saved_by(forward)}
    return sum(size for key, size in sizes.items() if key not in there)


def with_adam(trained: Sequence[Tensor], tables: Iterable[Tensor]) -> Persistent:
    """Count tensors, and Adam's own state for those that are trained, made on the meta device."""
    shadows = [nn.Parameter(torch.empty_like(t, device="meta")) for t in trained]
    optimizer = torch.optim.Adam(shadows)
    for shadow in shadows:
        shadow.grad = torch.empty_like(shadow)
    optimizer.step()
    seen: set[int] = set()
    return Persistent(
        parameters=_storage_bytes(trained, seen),
        gradients=sum(s.grad.nbytes for s in shadows if s.grad is not None),
        optimizer=sum(t.nbytes for t in _tensors([*optimizer.state.values()])),
        tables=_storage_bytes(tables, seen),
    )


def of_model(model: nn.Module, optimizer: torch.optim.Optimizer) -> Persistent:
    """Count parameters, gradients, optimiser state and tables, each storage once.

    Call it after an optimiser step and before the gradients are cleared.
    """
    parameters = list(model.parameters())
    seen: set[int] = set()
    return Persistent(
        parameters=_storage_bytes(parameters, seen),
        gradients=_storage_bytes((p.grad for p in parameters if p.grad is not None), seen),
        optimizer=_storage_bytes(_tensors(list(optimizer.state.values())), seen),
        tables=_storage_bytes(_held(model), seen),
    )


def saved_by_model(model: nn.Module, batch: Tensor, bfloat16: bool = False) -> SavedBytes:
    """Count what one training forward saves, by running a copy of ``model`` on two batches.

    Args:
        model: left as it is.
        batch: the size and kind of batch to count for, ``[B, C, H, W]``; the second batch is its
            images turned upside down and negated.
        bfloat16: whether autocast is on.
    """
    model = copy.deepcopy(model).train()

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            y: Tensor = model(x)
        return y

    held = [(tensor, tensor.clone()) for tensor in _held(model)]
    first, second = _saved_by(lambda: forward(batch)), _saved_by(lambda: forward(-batch.flip(2)))
    if len(first) != len(second):
        raise RuntimeError(f"saved tensors: got {len(first)} and then {len(second)}, wanted equal")
    left_out = {_key(tensor) for tensor in (*model.parameters(), batch)}
    tables = {_key(tensor) for tensor, _ in held}
    sizes: dict[int, int] = {}
    # Running statistics are saved as well: held by the model, but changed by every batch.
    dependent = {_key(tensor) for tensor, before in held if not torch.equal(tensor, before)}
    for one, other in zip(first, second, strict=True):
        key = _key(one)
        if key not in left_out:
            sizes[key] = one.untyped_storage().nbytes()
            if one.shape != other.shape or not torch.equal(one, other):
                dependent.add(key)
    counts = {"activations": 0, "weights": 0, "tables": 0}
    for key, size in sizes.items():
        part = "activations" if key in dependent else "tables" if key in tables else "weights"
        counts[part] += size
    return SavedBytes(**counts)


def _saved_by(forward: Callable[[], object]) -> list[Tensor]:
    """Everything that autograd packs in one forward, kept alive so that no address is reused."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return kept


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Buffers, and tensors that modules hold as plain attributes."""
    parameters = {_key(parameter) for parameter in model.parameters()}
    yield from model.buffers()
    for module in model.modules():
        for tensor in _tensors(vars(module)):
            if _key(tensor) not in parameters:
                yield tensor


def _tensors(value: object) -> Iterator[Tensor]:
    """Tensors in nested built-in containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _storage_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if _key(tensor) not in seen:
            seen.add(_key(tensor))
            total += tensor.untyped_storage().nbytes()
    return total


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
