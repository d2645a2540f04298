"""Calls of every operator, and what is kept of their verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import brute_force as brute
import torch

from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.proving import trial

CPU = torch.device("cpu")


def kept_lines(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("proved-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


# Values of a bank of 640 elements in slots of 16, by the form that they are kept in.
STORED = {
    "int8": lambda: StoredValues(torch.zeros(40, 16).to(torch.int8), torch.ones(40)),
    "float8": lambda: StoredValues(torch.zeros(40, 16).to(torch.float8_e4m3fn), torch.ones(40)),
    "int8 compact": lambda: StoredValues(
        torch.zeros(25, 16).to(torch.int8), torch.ones(25), torch.full((40,), -1).int()
    ),
    "float compact": lambda: StoredValues(torch.zeros(25, 16), None, torch.full((40,), -1).int()),
}
OPERANDS = {
    "linear": lambda w, t: (torch.randn(5, 3, 20), w, t, torch.randn(9)),
    "linear_input_grad": lambda w, t: (torch.randn(15, 9), w, t),
    "linear_bank_grad": lambda w, t: (torch.randn(15, 9), torch.randn(15, 20), t),
    "embedding": lambda w, t: (w, t, torch.tensor([[8, 0], [3, 3]])),
    "embedding_bank_grad": lambda w, t: (torch.randn(2, 2, 20), torch.tensor([[8, 0], [3, 3]]), t),
    "unpack": lambda w, t: (w, t),
    "pack": lambda w, t: (torch.randn(9, 20), t),
}


def calls_of_stored(form: str) -> Iterator[Call]:
    """One of each operator that reads a bank, which is one of STORED."""
    for call in calls():
        at = trial.ROLES[call.op].index("bank") if "bank" in trial.ROLES[call.op] else None
        if at is not None:
            operands: list[Any] = [*call.operands]
            operands[at] = STORED[form]()
            bank = operands[at] if at else None
            yield call._replace(x=operands[0], bank=bank, operands=operands)


def calls(table: bool = False) -> Iterator[Call]:
    """One of each operator."""
    bank = (
        brute.table_bank(50, 500, torch.float32)
        if table
        else brute.bank_of(640, torch.float32, granularity=16)
    )
    w, t = bank.weight.detach(), bank.table if table else None
    matrix, kernel = bank.place((9, 20)).spec, bank.place((6, 4, 3, 2)).spec
    for op, made in OPERANDS.items():
        operands = [*made(w, t), matrix]
        if op.endswith("bank_grad") or op == "pack":
            operands.append(torch.float32)
        yield Call(op, operands[0], matrix, operands=operands)
    x, dy = torch.randn(2, 8, 7, 6), torch.randn(2, 6, 4, 5)
    geometry = ([2, 1], [1, 0], [1, 1], 2)
    for op, operands in (
        ("conv2d", [x, w, t, None, kernel, *geometry]),
        ("conv2d_input_grad", [dy, w, t, [2, 8, 7, 6], kernel, *geometry]),
        ("conv2d_bank_grad", [dy, x, t, kernel, *geometry, torch.float32]),
    ):
        yield Call(op, operands[0], kernel, geometry=geometry, operands=operands)


def of_linear(x: torch.Tensor) -> Call:
    (call,) = [call for call in calls() if call.op == "linear"]
    return call._replace(x=x, operands=[x, *call.operands[1:]])
