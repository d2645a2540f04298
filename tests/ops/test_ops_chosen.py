"""Chosen rows and columns of a weight in every operator, against the written-out weight."""

from __future__ import annotations

import json
import random

import brute_force as brute
import naive_calls as calls
import pytest
import torch
from naive_calls import F64
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call

import rpg_kernels as rpg
from rpg_kernels.backends.cuda import rules as cuda
from rpg_kernels.backends.reference import tiles
from rpg_kernels.backends.reference.naive import OPERATORS
from rpg_kernels.backends.triton import rules as triton
from rpg_kernels.functional import conv2d, embedding, linear

op = torch.ops.rpg_kernels


def weight_of(seed: int) -> tuple[random.Random, rpg.VirtualWeight]:
    rng = random.Random(seed)
    shape: tuple[int, ...] = (rng.choice([9, 20, 50]), rng.choice([13, 40, 140]))
    if seed % 2:
        shape = (rng.randint(3, 20), rng.choice([3, 9, 40, 70]), *rng.choice(calls.KERNELS))
    if seed % 5 == 4:
        return rng, calls.chosen(rng, brute.table_bank(50, 15000).place(shape, scale=0.7))
    return rng, calls.chosen(rng, calls.drawn(rng, shape))


@pytest.mark.parametrize("seed", range(30))
def test_is_that_part_of_the_whole(seed: int) -> None:
    _, weight = weight_of(seed)
    whole = weight.whole().unpack()
    rows, columns = (brute.selected_along(weight.placement, dim) for dim in (0, 1))
    assert torch.equal(weight.unpack(), whole[rows][:, columns])
    dense = torch.randn(weight.shape, dtype=F64)
    padded = torch.zeros(weight.whole().shape, dtype=F64)
    padded[rows[:, None], columns] = dense
    brute.assert_exact(weight.pack(dense), brute.pack(weight.whole(), padded))
    assert weight.numel() == dense.numel()
    first = weight.narrow(0, 0, 1)
    assert torch.equal(first.unpack(), whole[rows[:1]][:, columns])


@pytest.mark.parametrize("seed", range(20))
def test_every_operator_in_tiles_of_every_size(seed: int) -> None:
    rng, weight = weight_of(seed)
    given = calls.arguments(weight, rng, F64)
    wanted = {name: OPERATORS[name](*operands) for name, operands in given.items()}
    for limit in (1 << 30, 40_000, 14_000):
        ran = 0
        with rpg.scratch_limit(limit):
            for name, operands in given.items():
                if limit < 1 << 30 and not _fits(weight):
                    continue
                got = getattr(op, name)(*operands, "reference")
                brute.assert_exact(got, wanted[name], name)
                ran += 1
        assert ran or limit == 14_000


def _fits(weight: rpg.VirtualWeight) -> bool:
    """Whether even the operator that needs the most finds room for a tile."""
    return tiles.fitting_size(weight.placement, torch.device("cpu"), 32) is not None


def test_columns_far_apart_are_cut_where_their_neighbours_do_not_fit() -> None:
    weight = brute.bank_of(4096, F64, granularity=8).place((6, 20_000))
    rng = random.Random(1)
    part = weight.select(1, sorted(rng.sample(range(20_000), 300)))
    x = torch.randn(3, 300, dtype=F64)
    whole = x @ part.unpack().t()
    with rpg.scratch_limit(60_000):
        cut = list(tiles.tiles(part.placement, torch.device("cpu"), 16))
        assert len(cut) > 12
        assert sum(tile.placement.numel for tile in cut) == part.numel()
        assert max(tile.placement.hull(1)[1] for tile in cut) * 16 <= 60_000
        brute.assert_exact(linear(x, part), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_summed_once(dtype: torch.dtype) -> None:
    rng = random.Random(5)
    bank = brute.bank_of(700, F64, granularity=8)
    kernels = bank.place((12, 40, 3, 3)).select(0, [0, 2, 3, 11]).select(1, range(0, 40, 3))
    matrix = bank.place((30, 600)).select(1, sorted(rng.sample(range(600), 250)))
    for weight in (matrix, kernels):
        for name, operands in calls.arguments(weight, rng, dtype).items():
            for limit in (1 << 22, 30_000):
                with rpg.scratch_limit(limit):
                    got = getattr(op, name)(*calls.cast(operands, dtype), "reference")
                calls.compare(name, operands, got, dtype)


def test_gradients() -> None:
    bank = brute.bank_of(60, F64, granularity=4, reflect="element")
    matrix = bank.place((9, 12), scale=0.5).select(0, [1, 2, 7]).select(1, [0, 5, 6, 11])
    kernel = bank.place((6, 8, 2, 2)).select(0, [0, 3]).select(1, [1, 4, 7])
    values = bank.weight.detach().clone().requires_grad_()

    reads = _Reads(bank, matrix, kernel)

    def run(values: Tensor, x: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = functional_call(reads, {"bank.weight": values}, (x, image))
        return made

    x = torch.randn(2, 4, dtype=F64, requires_grad=True)
    image = torch.randn(2, 3, 5, 4, dtype=F64, requires_grad=True)
    assert gradcheck(run, (values, x, image))


class _Reads(torch.nn.Module):
    def __init__(self, bank: rpg.ParameterBank, *weights: rpg.VirtualWeight) -> None:
        super().__init__()
        self.bank, self.weights = bank, weights

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        matrix, kernel = self.weights
        rows = torch.tensor([0, 2, 2])
        return linear(x, matrix), conv2d(image, kernel, padding=1), embedding(rows, matrix)


def test_gpu_kernels_say_that_they_do_not_read_them() -> None:
    bank = brute.bank_of(6400, torch.float32, granularity=64)
    spec = bank.place((64, 128)).select(0, [0, 2, 5]).spec
    assert "part" in cuda.unsupported_weight("linear", spec)
    assert "chosen" in triton.unsupported_weight(spec)


def test_json_and_repr() -> None:
    bank = brute.bank_of(640, F64, granularity=16)
    weight = bank.place((9, 12)).select(0, [0, 1, 5])
    back = rpg.VirtualWeight.from_json(bank, weight.to_json())
    assert back.placement == weight.placement
    assert back.whole() is weight.whole()
    assert json.loads(weight.to_json())["rows"] == {"chosen": [0, 2, 5, 1]}
    assert "3 chosen" in repr(weight)
    weight.rescale(2.0)
    assert torch.equal(back.unpack(), weight.whole().unpack()[[0, 1, 5]])
