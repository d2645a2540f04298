"""Calls of every operator at random small sizes, for comparing a back end with ``naive``."""

from __future__ import annotations

import random
from typing import Any

import brute_force as brute
import torch
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels.backends.reference import naive

F64 = torch.float64
REFLECT = ("element", "vector", "none")
LAPS = (None, None, 1, 3, 4)  # of law 3; None of law 1
KERNELS = ((1, 1), (3, 3), (2, 3), (1, 4))


def drawn(rng: random.Random, shape: tuple[int, ...], **fixed: Any) -> rpg.VirtualWeight:
    """A weight behind another one on a bank of its own; by default of any law."""
    settings = {
        "granularity": rng.choice([1, 2, 8, 32, 64, 128]),
        "reflect": rng.choice(REFLECT),
        "permute": rng.random() < 0.8,
        "seed": rng.randrange(1000),
        "laps": rng.choice(LAPS),
    } | fixed
    dof = rng.choice([3, 50, 77]) * settings["granularity"]
    bank = brute.bank_of(dof, F64, **settings)
    bank.place((rng.choice([1, 9]), rng.choice([7, 64])))
    return bank.place(shape, scale=rng.choice([0.5, -1.25]))


def part(rng: random.Random, weight: rpg.VirtualWeight) -> rpg.VirtualWeight:
    """The weight, or some of its rows and columns, which then begin anywhere."""
    for dim in (0, 1):
        size = weight.shape[dim]
        if size > 2 and rng.random() < 0.6:
            start = rng.randrange(size - 1)
            weight = weight.narrow(dim, start, rng.randint(1, size - start))
    return weight


def chosen(rng: random.Random, weight: rpg.VirtualWeight) -> rpg.VirtualWeight:
    """Some rows and columns that are not neighbours, of the weight or of a part of it."""
    weight = part(rng, weight)
    for dim in (0, 1):
        size = weight.shape[dim]
        count = rng.choice([1, 2, size // 2 + 1, size])
        weight = weight.select(dim, sorted(rng.sample(range(size), min(size, count))))
    return weight


def arguments(
    weight: rpg.VirtualWeight, rng: random.Random, dtype: torch.dtype, groups: int = 1
) -> dict[str, list[Any]]:
    """For each operator that reads such a weight, its arguments, activations in float64.

    ``dtype`` is what bank gradients are asked for in.
    """
    bank, table, spec = weight.bank.weight.detach(), weight.bank.table, weight.spec
    rows, columns = weight.shape[:2]
    dense = torch.randn(weight.shape, dtype=F64)
    calls: dict[str, list[Any]] = {
        "unpack": [bank, table, spec],
        "pack": [dense, table, spec, dtype],
    }
    if len(weight.shape) == 2:
        batch = rng.choice([(1,), (5,), (2, 3)])
        x = torch.randn(*batch, columns, dtype=F64)
        dy = torch.randn(*batch, rows, dtype=F64)
        bias = rng.choice([None, torch.randn(rows, dtype=F64)])
        indices = torch.randint(rows, (2, 4))
        calls["linear"] = [x, bank, table, bias, spec]
        calls["linear_input_grad"] = [dy, bank, table, spec]
        calls["linear_bank_grad"] = [dy, x, table, spec, dtype]
        calls["embedding"] = [bank, table, indices, spec]
        calls["embedding_bank_grad"] = [
            torch.randn(2, 4, columns, dtype=F64),
            indices,
            table,
            spec,
            dtype,
        ]
        return calls
    stride, padding, dilation = ([rng.randint(low, 2), 1] for low in (1, 0, 1))
    geometry = [stride, padding, dilation, groups]
    x = torch.randn(2, columns * groups, 7, 8, dtype=F64)
    bias = rng.choice([None, torch.randn(rows, dtype=F64)])
    y = torch.nn.functional.conv2d(x, dense, None, *geometry)
    dy = torch.randn_like(y)
    calls["conv2d"] = [x, bank, table, bias, spec, *geometry]
    calls["conv2d_input_grad"] = [dy, bank, table, list(x.shape), spec, *geometry]
    calls["conv2d_bank_grad"] = [dy, x, table, spec, *geometry, dtype]
    return calls


def cast(arguments: list[Any], dtype: torch.dtype) -> list[Any]:
    """The same arguments with every floating-point tensor in another dtype."""
    return [
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    ]


def compare(name: str, arguments: list[Any], got: Tensor, dtype: torch.dtype) -> None:
    """By the accuracy criterion: at most twice the error of torch in the same dtype."""
    exact = naive.OPERATORS[name](*cast(cast(arguments, dtype), F64))
    torchs = naive.OPERATORS[name](*cast(arguments, dtype))
    brute.assert_accurate(got.cpu(), exact, torchs, name)
