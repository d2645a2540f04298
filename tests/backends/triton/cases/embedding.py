"""embedding and its bank gradient: unpack's bits, and sums within the accuracy criterion."""

from __future__ import annotations

import random
from collections.abc import Iterator
from unittest import mock

import brute_force as brute
import pytest
import torch
from torch import Tensor
from triton_process import DEVICE, INTERPRETED

import rpg_kernels as rpg
from rpg_kernels.backends.reference import embedding as reference
from rpg_kernels.backends.reference import unpack as unpacked
from rpg_kernels.backends.triton import embedding as kernels
from rpg_kernels.backends.triton.config import Config
from rpg_kernels.law.placement import Placement

# The law without rounds, where a test is not about the law: the interpreter takes long over them.
PLAIN = {"granularity": 16, "permute": False}
REFLECT = ("element", "vector", "none")
GRANULARITY = (1, 2, 4, 8, 16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16) if INTERPRETED else brute.ALL[1:]
SIZES = ((), (1,), (9,), (2, 3, 4), (0,), (3, 0), (40,))


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Results begin as NaN."""
    new_empty = Tensor.new_empty

    def new(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        out: Tensor = new_empty(self, *args, **kwargs)  # type: ignore[arg-type]
        return out.fill_(torch.nan) if out.is_floating_point() else out

    with mock.patch.object(Tensor, "new_empty", new):
        yield


def check(
    weight: rpg.VirtualWeight,
    indices: Tensor,
    dy: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Both operators, against the unpacked weight and against float64."""
    bank, table, spec = weight.bank.weight.detach(), weight.bank.table, weight.spec
    on = None if table is None else table.to(DEVICE)
    where = indices.to(DEVICE)
    y = kernels.embedding(bank.to(DEVICE), on, where, spec, config).cpu()
    assert y.shape == (*indices.shape, weight.shape[1])
    assert torch.equal(y, unpacked.unpack(bank, table, spec)[indices.long()])

    dy = torch.randn(y.shape).to(bank.dtype) if dy is None else dy
    placed = dy.to(DEVICE)
    assert placed.stride() == dy.stride()
    got = kernels.embedding_bank_grad(placed, where, on, spec, bank.dtype, config)
    assert got.dtype == bank.dtype
    dense = torch.zeros(weight.shape, dtype=torch.float64)
    dense.index_add_(0, indices.reshape(-1).long(), dy.reshape(-1, weight.shape[1]).double())
    torchs = brute.pack(weight, dense.to(bank.dtype)).to(bank.dtype)
    brute.assert_accurate(got.cpu(), brute.pack(weight, dense), torchs, "gradient of bank")


@pytest.mark.parametrize("seed", range(12 if INTERPRETED else 24))
def test_random(seed: int) -> None:
    rng = random.Random(seed)
    g, dtype = GRANULARITY[seed % 8], DTYPES[seed % 5 % len(DTYPES)]
    bank = brute.bank_of(
        rng.randrange(g, 3000), dtype, granularity=g, reflect=REFLECT[seed % 3],
        permute=seed % 7 != 0, seed=seed,
    )  # fmt: skip
    bank.place((1, rng.randrange(1, 300)))
    rows, columns = rng.randrange(4, 60), rng.choice([1, 3, 16, 37, 64, 130, 200])
    weight = bank.place((rows, columns), scale=rng.uniform(0.2, 2))
    if seed % 3 == 0 and columns > 3:
        first = rng.randrange(1, columns - 1)
        weight = weight.narrow(0, 2, rows - 2).narrow(1, first, rng.randint(1, columns - first))
    kind = rng.choice([torch.int32, torch.int64])
    check(weight, torch.randint(weight.shape[0], SIZES[seed % 7], dtype=kind))


@pytest.mark.parametrize(("g", "reflect"), [(4, "element"), (32, "vector"), (128, "element")])
def test_tiles_of_every_size(g: int, reflect: str) -> None:
    bank = brute.bank_of(1500, torch.float16, granularity=g, reflect=reflect, permute=False)
    weight = bank.place((6, 128), scale=0.37).narrow(1, 3, 70)
    assert weight.placement.matrix.block == g
    indices = torch.randint(6, (5,))
    for lookups, columns in ((1, 16), (2, 32), (16, 64)):
        check(weight, indices, None, Config(lookups, 1, columns, 4, 1))


def test_tables() -> None:
    bank = brute.table_bank(50, entries=13 * 70 + 5, dtype=torch.float32)
    bank.place((1, 5))
    weight = bank.place((13, 70), scale=0.7)
    for part in (weight, weight.narrow(1, 3, 50).narrow(0, 2, 8)):
        check(part, torch.randint(part.shape[0], (20,)))


def test_repeated_indices_add_up() -> None:
    weight = brute.bank_of(700, torch.float32, **PLAIN).place((9, 50), scale=0.6)
    check(weight, torch.tensor([2, 2, 0, 2, 8, 0, 2]))
    check(weight, torch.full((100,), 3))


def test_strides() -> None:
    bank = brute.bank_of(512, torch.float32, **PLAIN)
    bank.weight = torch.nn.Parameter(bank.weight.detach().t().contiguous().t())
    weight = bank.place((20, 33))
    indices = torch.randint(20, (6, 4), dtype=torch.int32)
    check(weight, indices.t(), torch.ones(()).expand(4, 6, 33))
    check(weight, indices[::2, ::3], torch.randn(33, 3, 2).movedim(0, -1))
    check(weight, indices[:1].expand(4, -1), torch.randn(4, 4, 1).expand(-1, -1, 33))
    check(weight, indices[:, 1], torch.randn(6, 70)[:, 1:67:2])
    check(weight, indices[::5, 1], torch.randn(33).expand(2, -1))


@pytest.mark.parametrize("g", [8, 64])
def test_law_of_several_bands(g: int) -> None:
    """More than 2^31 positions: a launch per band, and every index in one of them."""
    bank = brute.bank_of(1000, torch.float32, granularity=g, reflect="element")
    whole = Placement(bank.generator, 3, g * 5, (2**31 // 4, 8 * g), 0.5)
    height = whole.law.rows_per_band
    assert height < 2**31 // 4
    p = whole.narrow(0, height - 5, 9).narrow(1, 3, 8 * g - 5)
    values, spec = bank.weight.detach(), p.to_json()
    indices = torch.tensor([8, 0, 4, 5, 5, 3, 7, 1])
    y = kernels.embedding(values.to(DEVICE), None, indices.to(DEVICE), spec)
    assert torch.equal(y.cpu(), reference.embedding(values, None, indices, spec))
    dy = torch.randn(8, 8 * g - 5)
    got = kernels.embedding_bank_grad(
        dy.to(DEVICE), indices.to(DEVICE), None, spec, torch.float32
    ).cpu()
    wanted = reference.embedding_bank_grad(dy.double(), indices, None, spec, torch.float64)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_row_that_does_not_exist_touches_nothing() -> None:
    """What the device's assertion comes too late for."""
    weight = brute.bank_of(640, torch.float32, **PLAIN).place((12, 40)).narrow(0, 2, 8)
    bank = weight.bank.weight.detach().to(DEVICE)
    indices = torch.tensor([-1, 8, 2**40, 3, -(2**40)], device=DEVICE)
    y = kernels.embedding(bank, None, indices, weight.spec)
    wanted = torch.tensor([True, True, True, False, True])
    assert torch.equal(y.isnan().all(1).cpu(), wanted)
    dy = torch.ones(5, 40, device=DEVICE)
    got = kernels.embedding_bank_grad(dy, indices, None, weight.spec, torch.float32)
    one = kernels.embedding_bank_grad(dy[3:4], indices[3:4], None, weight.spec, torch.float32)
    assert torch.equal(got, one)


@pytest.mark.parametrize("reflect", REFLECT)
def test_nan_reaches_what_reads_it_and_nothing_else(reflect: str) -> None:
    bank = brute.bank_of(2048, torch.float16, granularity=16, reflect=reflect)
    weight = bank.place((12, 43))
    index, _ = brute.index_and_sign(weight)
    unread = sorted(set(range(bank.dof)) - set(index.flatten().tolist()))
    with torch.no_grad():
        bank.weight.view(-1)[unread] = torch.nan  # padding and slots that this layer never uses
        bank.weight.view(-1)[index[4, 17]] = torch.nan
    values = bank.weight.detach().to(DEVICE)
    y = kernels.embedding(values, None, torch.arange(12, device=DEVICE), weight.spec)
    assert torch.equal(y.isnan().cpu(), index == index[4, 17])


def test_deterministic_bank_gradient() -> None:
    weight = brute.bank_of(500, torch.float32, **PLAIN).place((9, 60), scale=0.6)
    indices, dy = torch.randint(9, (40,), device=DEVICE), torch.randn(40, 60, device=DEVICE)
    arguments = (dy, indices, None, weight.spec, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first = kernels.embedding_bank_grad(*arguments)
        assert torch.equal(first, kernels.embedding_bank_grad(*arguments))
        assert torch.equal(first, reference.embedding_bank_grad(*arguments))
    finally:
        torch.use_deterministic_algorithms(False)


def test_through_dispatch_and_autograd() -> None:
    bank = brute.bank_of(640, torch.float32, **PLAIN).to(DEVICE)
    layer = rpg.nn.Embedding(12, 50, padding_idx=3, bank=bank).to(DEVICE)
    indices = torch.tensor([[3, 0, 3], [11, 5, 0]], device=DEVICE)
    found = {}
    for name in ("triton", "reference"):
        with rpg.backend(name):
            assert rpg.explain(layer, indices).backend == name
            y = layer(indices)
            first = torch.autograd.grad(y.sin().sum(), bank.weight, create_graph=True)
            second = torch.autograd.grad(first[0].square().sum(), bank.weight)
            found[name] = (y, *first, *second)
    assert torch.equal(found["triton"][0], found["reference"][0])
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not INTERPRETED, reason="on CUDA the device asserts, for good")
def test_index_out_of_range() -> None:
    weight = brute.bank_of(256, torch.float32, granularity=16).place((14, 20)).narrow(0, 1, 12)
    with rpg.backend("triton"):
        for bad in (-1, 12):
            with pytest.raises(IndexError, match=rf"indices: got {bad}, wanted 0 to 11"):
                rpg.functional.embedding(torch.tensor([3, bad]), weight)
