"""Layers on a bank: in bf16, and of int8 where the package has ``quantize``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

import rpg_kernels as rpg
from benchmarks.harness.cpu.grid import GRANULARITY, Bank
from benchmarks.harness.rivals.contender import TRAINING, Layers, Problem, Way
from benchmarks.harness.rivals.gradients import trained

# What is done to a bank: "" keeps it in bf16, "kept" and "int8" are the activations of an int8 one.
BF16, STORED, ROUNDED = "bf16", "int8 bank", "int8 bank and x"
_ACTIVATIONS = {STORED: "kept", ROUNDED: "int8"}
_MOST = 128  # layers that lead
_TRAINED = 20_000_000  # elements of the largest bank in training
_LAPS = (4, 16)  # of banks of other sizes than these
BANKS = (
    Bank(2_000_000, 4),
    Bank(2_000_000, 9),
    Bank(2_000_000, 16),
    Bank(20_000_000, 4),
    Bank(20_000_000, 16),
    Bank(100_000_000, 4),
    Bank(100_000_000, 16),
)


def values() -> tuple[str, ...]:
    """What a bank's elements can be here."""
    return (BF16, *_ACTIVATIONS) if hasattr(rpg, "quantize") else (BF16,)


def quantized(model: nn.Module, of: str) -> nn.Module:
    """A model on a bank, with its elements as ``values`` names them; changed in place."""
    model = model.to(torch.bfloat16)
    if of in _ACTIVATIONS:
        quantize = getattr(rpg, "quantize")  # noqa: B009
        quantize(model, "int8", activations=_ACTIVATIONS[of])
    return model


def stored_bytes(bank: rpg.ParameterBank) -> int:
    """Of a bank's elements as they are kept, with their scales."""
    weight = bank.weight
    return int(getattr(weight, "bytes", weight.nbytes))


def _model(
    problem: Problem, bank: Bank, count: int
) -> tuple[nn.Module, list[rpg.nn.Linear], rpg.ParameterBank]:
    """A model of layers on a bank of normal values in fp32, the layers, and the bank."""
    rows, columns = problem.shape
    with torch.random.fork_rng():
        torch.manual_seed(problem.seed)
        held = rpg.ParameterBank(bank.dof, GRANULARITY, laps=bank.laps)
        scale = 1 / (held.init_std * math.sqrt(columns))
        layers = [
            rpg.nn.Linear(columns, rows, bias=False, bank=held, scale=scale) for _ in range(count)
        ]
    return rpg.attach(nn.ModuleList(layers), held), layers, held


def _read(problem: Problem, bank: Bank) -> int:
    """Layers that together read every element of a bank once; of small layers not so many."""
    uses = math.prod(problem.shape) / (bank.laps or 1)
    return min(_MOST, max(1, math.ceil(bank.dof / uses)))


def _forward(bank: Bank, of: str, problem: Problem) -> Layers:
    lead = _read(problem, bank)
    model, layers, held = _model(problem, bank, lead + problem.copies)
    with torch.no_grad():
        exact = problem.product(layers[0].virtual_weight.unpack())
    quantized(model, of).eval().requires_grad_(False)
    return Layers(
        lambda i, batch: layers[i](problem.x_bf16[batch]),
        len(layers),
        stored_bytes(held),
        held.weight.numel(),
        lead,
        exact,
    )


def _training(bank: Bank, problem: Problem) -> Layers:
    model, layers, held = _model(problem, bank, 1 + problem.copies)
    model.bfloat16()

    def forward(i: int, x: Tensor) -> Tensor:
        y: Tensor = layers[i](x)
        return y

    def weight() -> Tensor:
        with torch.no_grad():
            return layers[0].virtual_weight.unpack().float()

    return trained(problem, torch.bfloat16, forward, [[held.weight] for _ in layers], weight)


def ways(dofs: Sequence[int]) -> tuple[Way, ...]:
    """On every bank of these sizes, with what its elements can be here.

    Args:
        dofs: sizes; none takes those of ``BANKS``.
    """
    banks = [bank for bank in BANKS if not dofs or bank.dof in dofs]
    known = {bank.dof for bank in BANKS}
    banks += [Bank(dof, laps) for dof in dofs if dof not in known for laps in _LAPS]
    trained_too = [bank for bank in banks if bank.dof <= _TRAINED]
    return (
        *(
            Way(f"{bank}, {of}", BF16 if of == BF16 else "int8", partial(_forward, bank, of),
                ours=True)
            for of in values() for bank in banks
        ),
        *(
            Way(f"{bank}, {BF16}, training", BF16, partial(_training, bank), TRAINING, ours=True)
            for bank in trained_too
        ),
    )  # fmt: skip
