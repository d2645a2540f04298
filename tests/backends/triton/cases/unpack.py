"""unpack and pack: the reference's bits, whatever the tiles."""

from __future__ import annotations

import random
from unittest import mock

import brute_force as brute
import pytest
import torch
from torch import Tensor
from triton_process import DEVICE, INTERPRETED

import rpg_kernels as rpg
from rpg_kernels.backends.reference import unpack as reference
from rpg_kernels.backends.triton import unpack as kernels
from rpg_kernels.backends.triton.config import Config
from rpg_kernels.law.placement import Placement

REFLECT = ("element", "vector", "none")
DTYPES = (torch.float32, torch.float16) if INTERPRETED else brute.ALL[1:]
SHAPES = [*brute.MATRICES, *brute.KERNELS]


def unpacked(weight: rpg.VirtualWeight, config: Config | None = None) -> Tensor:
    """The kernel's result, from an output full of NaN."""
    bank, table = weight.bank.weight.detach().to(DEVICE), weight.bank.table
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        out: Tensor = new_empty(self, *args, **kwargs)  # type: ignore[arg-type]
        return out.fill_(torch.nan) if out.is_floating_point() else out

    with mock.patch.object(Tensor, "new_empty", poisoned):
        table = None if table is None else table.to(DEVICE)
        return kernels.unpack(bank, table, weight.spec, config).cpu()


def expected(weight: rpg.VirtualWeight) -> Tensor:
    bank = weight.bank
    table = None if bank.table is None else bank.table.cpu()
    return reference.unpack(bank.weight.detach().cpu(), table, weight.spec)


def check_pack(weight: rpg.VirtualWeight, dtype: torch.dtype) -> None:
    dense = torch.randn(weight.shape).to(dtype)
    for values in (dense, dense.transpose(0, 1).contiguous().transpose(0, 1)):
        table = None if weight.bank.table is None else weight.bank.table.to(DEVICE)
        got = kernels.pack(values.to(DEVICE), table, weight.spec, dtype).cpu()
        exact = brute.pack(weight, dense)
        torchs = reference.pack(dense, weight.bank.table, weight.spec, dtype)
        assert got.dtype == dtype
        brute.assert_accurate(got, exact, torchs, "pack")


@pytest.mark.parametrize("i", range(len(SHAPES)))
def test_shapes(i: int) -> None:
    rng = random.Random(i)
    dtype = DTYPES[i % len(DTYPES)]
    for g in (rng.choice([1, 2, 4, 8]), rng.choice([16, 32, 64, 128])):
        if INTERPRETED and (g < 16) == (i % 2 == 0):
            continue  # half of them: the interpreter is slow
        bank = brute.bank_of(
            rng.randrange(g, 3000), dtype, granularity=g, reflect=rng.choice(REFLECT),
            permute=i % 5 != 0, seed=i,
        )  # fmt: skip
        bank.place((1, rng.randrange(1, 300)))
        weight = bank.place(SHAPES[i], scale=rng.uniform(0.2, 2))
        rows, columns = weight.shape[:2]
        assert torch.equal(unpacked(weight), expected(weight))
        if rows > 1 and columns > 1:
            weight = weight.narrow(0, 1, rows - 1).narrow(1, 1, columns - 1)
            assert torch.equal(unpacked(weight), expected(weight))
        check_pack(weight, dtype)


def test_tables() -> None:
    bank = brute.table_bank(50, entries=6 * 5 * 9 + 70, dtype=torch.float32)
    for shape in ((7, 10), (6, 5, 3, 3)):
        weight = bank.place(shape, scale=0.7)
        for part in (weight, weight.narrow(1, 1, 3).narrow(0, 2, 4)):
            assert torch.equal(unpacked(part), expected(part))
            check_pack(part, torch.float32)


@pytest.mark.parametrize(("g", "reflect"), [(4, "element"), (32, "vector"), (128, "element")])
def test_tiles_of_every_size_hold_the_same_bits(g: int, reflect: str) -> None:
    bank = brute.bank_of(1500, torch.float16, granularity=g, reflect=reflect)
    weight = bank.place((6, 150), scale=0.37).narrow(1, 3, 140)
    wanted = expected(weight)
    for rows, columns in ((2, 16), (16, 32), (4, 64)):
        if g >= columns or g < 32:
            assert torch.equal(unpacked(weight, Config(16, rows, columns, 4, 1)), wanted)


def test_law_of_several_bands() -> None:
    bank = brute.bank_of(1000, torch.float32, granularity=16, reflect="vector")
    whole = Placement(bank.generator, 3, 80, (2**29, 128), 0.5)
    height = whole.law.rows_per_band
    assert height < 2**29
    spec = whole.narrow(0, height - 5, 9).narrow(1, 3, 100).to_json()
    values = bank.weight.detach()
    got = kernels.unpack(values.to(DEVICE), None, spec).cpu()
    assert torch.equal(got, reference.unpack(values, None, spec))
