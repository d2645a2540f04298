"""Rows looked up by the compiled CPU kernels: the reference's bits, forward and backward."""

from __future__ import annotations

import random
from typing import Any

import brute_force as brute
import pytest
import torch
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.law.generator import Generator

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")

op = torch.ops.rpg_kernels
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GRANULARITY = (1, 2, 4, 8, 16, 32, 64, 128)
REFLECT = ("none", "vector", "element")
LAWS = (1, 3)


def bank_of(
    law: int, slots: int, granularity: int, reflect: str, laps: int, **given: Any
) -> rpg.ParameterBank:
    if law == 1:
        return rpg.ParameterBank(slots * granularity, granularity, reflect, **given)
    made = {name: given.pop(name) for name in ("permute", "seed") if name in given}
    generator = Generator(slots, granularity, reflect, window=64, laps=laps, law=law, **made)
    return rpg.ParameterBank.from_generator(generator, **given)


def draw(rng: random.Random, granularity: int, law: int) -> VirtualWeight:
    """A weight behind another layer, and mostly a part of it that begins and ends in blocks."""
    bank = bank_of(
        law,
        rng.randint(64, 400),
        granularity,
        rng.choice(REFLECT),
        rng.randint(1, 5),
        permute=rng.random() < 0.8,
        seed=rng.randrange(100),
        init_std=1.0,
        dtype=rng.choice(DTYPES),
    )
    bank.place((rng.randint(1, 200), 64))
    rows, columns = rng.randint(1, 300), rng.randint(1, 3 * granularity)
    weight = bank.place((rows, columns), scale=rng.choice([1.0, -1.0, 0.37]))
    for dim in (0, 1):
        if rng.random() < 0.6:
            start = rng.randrange(weight.shape[dim])
            weight = weight.narrow(dim, start, rng.randint(1, weight.shape[dim] - start))
    return weight


def dy_of(rng: random.Random, shape: tuple[int, ...], bank: Tensor) -> Tensor:
    low = bank.dtype == torch.float32 and rng.random() < 0.3
    return torch.randn(shape).to(torch.bfloat16 if low else bank.dtype)


def both(weight: VirtualWeight, indices: Tensor, dy: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    bank = weight.bank.weight.detach()
    y = op.embedding(bank, None, indices, weight.spec, backend)
    return y, op.embedding_bank_grad(dy, indices, None, weight.spec, bank.dtype, backend)


def same_bits(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert got.is_contiguous()
    assert got.view(torch.uint8).equal(wanted.view(torch.uint8))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("granularity", GRANULARITY)
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_of_the_reference(
    granularity: int, law: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"{granularity} {law}")
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(native, "threads", lambda: threads)
    for _ in range(12):
        weight = draw(rng, granularity, law)
        shape = rng.choice([(), (1,), (rng.randint(2, 700),), (3, rng.randint(1, 90))])
        dtype = rng.choice([torch.int32, torch.int64])
        indices = torch.randint(weight.shape[0], shape, dtype=dtype)
        dy = dy_of(rng, (*shape, weight.shape[1]), weight.bank.weight)
        for got, wanted in zip(
            both(weight, indices, dy, "cpu"), both(weight, indices, dy, "reference"), strict=True
        ):
            same_bits(got, wanted)


@pytest.mark.parametrize("reflect", REFLECT)
def test_against_the_written_out_weight(reflect: str) -> None:
    bank = brute.bank_of(1500, granularity=32, reflect=reflect)
    weight = bank.place((50, 110), scale=0.7).narrow(1, 37, 70)
    indices = torch.randint(50, (90,))
    ring = brute.ring(bank)
    wanted = brute.unpack(weight, ring)[indices]
    dy = torch.randn_like(wanted)
    y, dw = both(weight, indices, dy, "cpu")
    brute.assert_exact(y, wanted, "y")
    (exact,) = torch.autograd.grad(wanted, ring, dy)
    brute.assert_exact(dw, exact.view(dw.shape), "gradient of bank")


def test_rows_far_apart_in_bands() -> None:
    """A weight of more than 2^31 blocks, whose rows lie in several bands."""
    for law in LAWS:
        weight = bank_of(law, 700, 1, "vector", laps=3, init_std=1.0).place((2**21, 4099))
        last = 2**21 - 1
        indices = torch.tensor([last, 0, 2**20, 2**19, 5, last, 523_000, 524_288])
        dy = torch.randn(8, 4099)
        for got, wanted in zip(
            both(weight, indices, dy, "cpu"), both(weight, indices, dy, "reference"), strict=True
        ):
            same_bits(got, wanted)


def test_only_the_rows_that_are_read() -> None:
    """NaN in the bank shows in what reads it; what a cut leaves out is neither read nor written."""
    bank = brute.bank_of(2048, torch.float32, granularity=16)
    weight = bank.place((12, 20))
    index, _ = brute.index_and_sign(weight)
    with torch.no_grad():
        bank.weight.view(-1)[index[4, 17]] = torch.nan
    y = op.embedding(bank.weight.detach(), None, torch.arange(12), weight.spec, "cpu")
    assert torch.equal(y.isnan(), index == index[4, 17])
    whole = torch.full((5, 20), torch.nan)
    p = weight.narrow(1, 3, 14).placement
    columns = p.block_columns
    region = (0, 3, 1, p.matrix.run_blocks, columns.low, columns.count)
    ring = torch.randn(2048).view(-1, p.matrix.block)
    rows = whole.view(-1)[9 : 9 + 3 * 14]
    native.unpack(p.law, ring, rows, p.scale, region, None, (columns.first, columns.length))
    assert not rows.isnan().any()
    assert whole.view(-1)[:9].isnan().all()
    assert whole.view(-1)[9 + 3 * 14 :].isnan().all()


def test_strided_indices_empty_and_out_of_range() -> None:
    weight = brute.bank_of(512, torch.float32, granularity=16).place((20, 33))
    table = weight.unpack().detach()
    indices = torch.randint(20, (6, 8), dtype=torch.int32)
    with rpg.backend("cpu"):
        for odd in (indices.t(), indices[::2, ::3], indices[:1].expand(4, -1), indices[0, ::3]):
            assert torch.equal(rpg.functional.embedding(odd, weight), table[odd.long()])
        y = rpg.functional.embedding(torch.empty(0, 3, dtype=torch.int64), weight)
        assert y.shape == (0, 3, 33)
        y.sum().backward()
        assert weight.bank.weight.grad is not None
        assert not weight.bank.weight.grad.any()
        for bad in (-1, 20, 2**40):
            with pytest.raises(IndexError, match=rf"indices: got {bad}, wanted 0 to 19"):
                rpg.functional.embedding(torch.tensor([3, bad]), weight)
        padded = rpg.functional.embedding(torch.tensor([4, 19]), weight, padding_idx=-1)
        assert torch.equal(padded, torch.stack((table[4], torch.zeros(33))))


def test_expanded_dy_and_a_bank_in_columns() -> None:
    bank = brute.bank_of(512, torch.float32, granularity=16)
    weight = bank.place((20, 33))
    indices = torch.randint(20, (7,))
    one = torch.randn(33)
    got = op.embedding_bank_grad(
        one.expand(7, 33), indices, None, weight.spec, torch.float32, "cpu"
    )
    dense = one.repeat(7, 1)
    same_bits(got, op.embedding_bank_grad(dense, indices, None, weight.spec, one.dtype, "cpu"))
    columns = bank.weight.detach().t().contiguous().t()
    y = op.embedding(columns, None, indices, weight.spec, "cpu")
    same_bits(y, op.embedding(bank.weight.detach(), None, indices, weight.spec, "cpu"))


def test_dispatch() -> None:
    indices = torch.tensor([1, 2])
    layer = rpg.nn.Embedding(100, 48, bank=rpg.ParameterBank(900, 16, "element"))
    explained = rpg.explain(layer, indices)
    assert explained.backend == "cpu"
    assert "rows written where they are wanted" in explained.reason
    with rpg.backend("reference"):
        assert rpg.explain(layer, indices).backend == "reference"
    table = brute.table_bank(20, 77, torch.float32).place((7, 11))
    y = rpg.functional.embedding(indices, table)  # by the reference
    with rpg.backend("cpu"), pytest.raises(RuntimeError, match="not of a table"):
        rpg.functional.embedding(indices, table)
    with rpg.backend("reference"):
        assert torch.equal(rpg.functional.embedding(indices, table), y)
    with rpg.scratch_limit(100):  # there is none
        assert layer(indices).shape == (2, 48)
