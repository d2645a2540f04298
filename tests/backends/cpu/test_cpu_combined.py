"""Stored banks, chosen rows and columns and odd sizes together, drawn at random: the CPU kernels
against the reference in float64 on the values written out."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from stored_banks import FORMS, stored
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels import native

op = torch.ops.rpg_kernels
# Beside twice or thrice the reference's own error in the same dtype.
LEAST = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")


def part_of(weight: rpg.VirtualWeight, rng: random.Random) -> rpg.VirtualWeight:
    for dim in (0, 1):
        if rng.random() < 0.5:
            size = weight.shape[dim]
            weight = weight.select(dim, sorted(rng.sample(range(size), rng.randint(1, size))))
    return weight


@pytest.mark.parametrize("seed", range(120))
def test_against_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice(list(LEAST))
    form, granularity = rng.choice(("plain", *FORMS)), rng.choice([16, 32, 64, 128])
    bank = rpg.ParameterBank(
        rng.randrange(8, 200) * granularity,
        granularity,
        laps=rng.choice([None, 1, 2, 3, 4, 8, 16]),
        seed=seed,
        dtype=dtype,
    )
    bank.place((rng.randrange(1, 50), rng.choice([16, 32, 100])))
    taps = rng.choice([(1, 1), (3, 3), (2, 3)]) if seed % 2 else ()
    shape = (rng.randrange(1, 140), rng.choice([16, 24, 40, 64, 100, 130]), *taps)
    weight = part_of(bank.place(shape, scale=rng.uniform(0.2, 2)), rng)
    values = (
        bank.weight.detach()
        if form == "plain"
        else stored(bank.slots, granularity, form, dtype, seed)
    )
    dense = values if form == "plain" else values.dense()
    spec, (rows, columns) = weight.spec, weight.shape[:2]
    x_dtype = rng.choice([dtype, torch.bfloat16]) if dtype == torch.float32 else dtype
    torch.set_num_threads(rng.choice([1, 2]))

    calls: list[tuple[Tensor, Callable[[Tensor, Tensor, str], Tensor]]] = []
    if taps:
        stride, padding, dilation = rng.choice([1, 2]), rng.choice([0, 1, 2]), rng.choice([1, 2])
        how = ((stride, stride), (padding, padding), (dilation, dilation), 1)
        x = torch.randn(rng.choice([1, 2, 9]), columns, rng.randrange(6, 14), rng.randrange(6, 14))
        if rng.random() < 0.5:
            x = x.to(memory_format=torch.channels_last)
        calls.append((x, lambda x, w, on: op.conv2d(x, w, None, None, spec, *how, on)))
        out = op.conv2d(x, dense.float(), None, None, spec, *how, "reference")
        size = list(x.shape)
        calls.append(
            (
                torch.randn(out.shape),
                lambda dy, w, on: op.conv2d_input_grad(dy, w, None, size, spec, *how, on),
            )
        )
    else:
        batch = rng.choice([1, 2, 3, 4, 5, 8, 17, 33, 70])
        calls.append(
            (torch.randn(batch, columns), lambda x, w, on: op.linear(x, w, None, None, spec, on))
        )
        calls.append(
            (
                torch.randn(batch, rows),
                lambda dy, w, on: op.linear_input_grad(dy, w, None, spec, on),
            )
        )
    for operand, run in calls:
        operand = operand.to(x_dtype)
        try:
            got = run(operand, values, "cpu")
        except RuntimeError as error:
            if "cannot run" not in str(error):  # as parts of weights of law 1 cannot
                raise
            continue
        exact = run(operand.double(), dense.double(), "reference")
        top = float(exact.abs().max()) + 1e-9
        error = float((got.double() - exact).abs().max()) / top
        others = run(operand, dense, "reference").double()
        allowed = max(3 * float((others - exact).abs().max()) / top, LEAST[x_dtype])
        assert error <= allowed, (form, weight, operand.shape, error, allowed)
