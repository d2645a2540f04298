"""Bytes that a network keeps while it trains, counted on the network itself."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from examples.demo.train import Schedule, autocast


@dataclass(frozen=True)
class StateBytes:
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


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> StateBytes:
    """Count parameters, gradients, optimiser state and tables, each storage once.

    Call it after an optimiser step and before the gradients are cleared.
    """
    parameters = list(model.parameters())
    seen: set[int] = set()
    return StateBytes(
        parameters=_storage_bytes(parameters, seen),
        gradients=_storage_bytes((p.grad for p in parameters if p.grad is not None), seen),
        optimizer=_storage_bytes(_tensors(list(optimizer.state.values())), seen),
        tables=_storage_bytes(_held(model), seen),
    )


def saved_bytes(model: nn.Module, batch: Tensor, schedule: Schedule) -> SavedBytes:
    """Count what one training forward saves, by running a copy of ``model`` on two batches.

    Args:
        model: left as it is.
        batch: the size and kind of batch to count for, ``[B, C, H, W]``; the second batch is its
            images turned upside down and negated.
        schedule: says whether autocast is on.
    """
    model = copy.deepcopy(model).train()
    held = [(tensor, tensor.clone()) for tensor in _held(model)]
    first = _saved_by(model, batch, schedule)
    second = _saved_by(model, -batch.flip(2), schedule)
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


def _saved_by(model: nn.Module, batch: Tensor, schedule: Schedule) -> list[Tensor]:
    """Everything that autograd packs in one forward, kept alive so that no address is reused."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor), autocast(batch.device, schedule):
        model(batch)
    return saved


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
