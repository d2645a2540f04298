"""The naive operators against weights written out anew, and every back end against them."""

from __future__ import annotations

import random

import brute_force as brute
import naive_calls as calls
import pytest
import torch
from naive_calls import F64, KERNELS

import rpg_kernels as rpg
from rpg_kernels.backends import registry
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.reference import naive

op = torch.ops.rpg_kernels


def some(seed: int) -> tuple[random.Random, rpg.VirtualWeight, int]:
    """A part of a matrix or of a convolution of some groups, every third time chosen rows and
    columns; every seventh time of a table."""
    rng = random.Random(seed)
    groups, shape = 1, (rng.choice([1, 9, 20]), rng.choice([1, 13, 40]))
    if seed % 2:
        groups = rng.choice([1, 1, 2])
        shape = (groups * rng.randint(1, 3), rng.choice([1, 3, 9, 16]), *rng.choice(KERNELS))
    if seed % 7 == 6:
        entries = torch.Size(shape).numel()
        bank = brute.table_bank(50, entries + 5)
        bank.place((1, 5))
        weight = bank.place(shape, scale=0.7)
    else:
        weight = calls.drawn(rng, shape)
    take = calls.chosen if seed % 3 == 0 else calls.part
    return rng, take(rng, weight) if groups == 1 else weight, groups


@pytest.mark.parametrize("seed", range(42))
def test_the_written_out_weight(seed: int) -> None:
    _, weight, _ = some(seed)
    index, sign = brute.index_and_sign(weight)
    read = naive.weights(weight.placement, weight.bank.table)
    block = weight.placement.matrix.block
    for i, s, (slot, element, signed) in zip(index.flatten(), sign.flatten(), read, strict=True):
        assert 0 <= element < block
        assert (slot * block + element, signed) == (i, s)


@pytest.mark.parametrize("seed", range(12))
def test_products_are_those_of_the_written_out_weight(seed: int) -> None:
    rng, weight, groups = some(seed)
    ring = brute.ring(weight.bank)
    dense = brute.unpack(weight, ring)
    arguments = calls.arguments(weight, rng, F64, groups)
    run = {name: naive.OPERATORS[name](*operands) for name, operands in arguments.items()}
    forward = "linear" if "linear" in run else "conv2d"
    x, bias, geometry = (arguments[forward][i] for i in (0, 3, slice(5, None)))
    x.requires_grad_()
    y = getattr(torch.nn.functional, forward)(x, dense, bias, *geometry)
    dy = arguments[f"{forward}_input_grad"][0]
    dx, dw = torch.autograd.grad(y, (x, ring), dy)
    brute.assert_exact(run["unpack"], dense.detach())
    brute.assert_exact(run["pack"], brute.pack(weight, arguments["pack"][0]))
    brute.assert_exact(run[forward], y.detach())
    brute.assert_exact(run[f"{forward}_input_grad"], dx)
    brute.assert_exact(run[f"{forward}_bank_grad"].flatten(), dw)


@pytest.mark.parametrize("seed", range(28))
def test_the_reference(seed: int) -> None:
    rng, weight, groups = some(seed)
    for name, operands in calls.arguments(weight, rng, F64, groups).items():
        got = getattr(op, name)(*operands, "reference")
        brute.assert_exact(got, naive.OPERATORS[name](*operands), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("laps", [None, 3])
@pytest.mark.parametrize("backend", ["cpu", "simt"])
def test_the_compiled_back_ends(backend: str, laps: int | None, dtype: torch.dtype) -> None:
    if reason := registry.find(backend).unsupported(Call("linear", torch.empty(1))):
        pytest.skip(reason)
    rng = random.Random(str((backend, laps, dtype)))
    weights = [calls.drawn(rng, (70, 64), granularity=32, reflect="vector", laps=laps)]
    if backend == "cpu":
        operators = {"linear", "linear_input_grad", "linear_bank_grad", "conv2d"}
        operators |= {"embedding", "embedding_bank_grad"}
        taps = (2, 2) if laps is None else (1, 1)  # units of one tap, for any stride
        kernel = calls.drawn(rng, (5, 32, *taps), granularity=32, reflect="none", laps=laps)
        weights.append(kernel)
    else:
        operators = {"linear", "linear_input_grad", "unpack", "pack"}
        operators |= set() if laps is None else {"linear_bank_grad"}
    ran = set()
    for weight in weights:
        for name, operands in calls.arguments(weight, rng, dtype).items():
            if name in operators:
                got = getattr(op, name)(*calls.cast(operands, dtype), backend)
                calls.compare(name, operands, got, dtype)
                ran.add(name)
    assert ran == operators
