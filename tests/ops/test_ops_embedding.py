"""embedding and its bank gradient against rows written out entry by entry."""

from __future__ import annotations

import random

import brute_force as brute
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels.functional import embedding

op = torch.ops.rpg_kernels
REFLECT = ("element", "vector", "none")
F64 = torch.float64


def random_weight(seed: int) -> rpg.VirtualWeight:
    """Rows of random number, length, place and map; every third weight a part of a larger one."""
    rng = random.Random(seed)
    granularity = rng.choice([1, 2, 8, 32, 64, 128])
    bank = brute.bank_of(
        rng.randrange(granularity, 1500),
        granularity=granularity,
        reflect=REFLECT[seed % 3],
        permute=seed % 5 != 0,
        seed=seed,
    )
    bank.place((1, rng.randrange(1, 200)))
    rows, columns = rng.randrange(4, 60), rng.choice([3, 16, 37, 64, 130])
    weight = bank.place((rows, columns), scale=rng.uniform(0.2, 2))
    if seed % 3 == 0:
        weight = weight.narrow(0, 2, rows - 2).narrow(1, 1, columns - 2)
    return weight


def compare(
    weight: rpg.VirtualWeight,
    indices: Tensor,
    padding_idx: int | None = None,
    dy: Tensor | None = None,
) -> None:
    """Output and bank gradient in float64."""
    ring = brute.ring(weight.bank)
    dense = brute.unpack(weight, ring)
    if padding_idx is not None:  # torch would keep zeros in this row
        keep = torch.ones(weight.shape[0], 1, dtype=F64)
        keep[padding_idx] = 0
        dense = dense * keep
    wanted = F.embedding(indices, dense)
    y = embedding(indices, weight, padding_idx)
    brute.assert_exact(y, wanted, "y")
    dy = torch.randn_like(wanted) if dy is None else dy
    (grad,) = torch.autograd.grad(y, weight.bank.weight, dy)
    (exact,) = torch.autograd.grad(wanted, ring, dy)
    brute.assert_exact(grad, exact.view(grad.shape), "gradient of bank")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("seed", range(12))
def test_output_and_gradient(seed: int, dtype: torch.dtype) -> None:
    weight = random_weight(seed)
    size = [(), (1,), (9,), (2, 3, 4), (0,), (3, 0)][seed % 6]
    compare(weight, torch.randint(weight.shape[0], size, dtype=dtype))


def test_repeated_indices_add_up() -> None:
    weight = random_weight(1)
    rows = weight.shape[0]
    compare(weight, torch.tensor([2, 2, 0, 2, rows - 1, 0, 2]))
    compare(weight, torch.full((300,), 3))


def test_every_row_is_the_unpacked_weight() -> None:
    for seed in range(6):
        weight = random_weight(seed)
        y = embedding(torch.arange(weight.shape[0]), weight)
        assert torch.equal(y, weight.unpack())


@pytest.mark.parametrize("padding_idx", [0, 3, -1, -4])
def test_padding_row_reads_as_zeros_and_gets_no_gradient(padding_idx: int) -> None:
    weight = brute.bank_of(300, granularity=16).place((4, 30), scale=0.5)
    indices = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 0]])
    compare(weight, indices, padding_idx)
    row = padding_idx % 4
    y = embedding(indices, weight, padding_idx)
    assert y[indices == row].eq(0).all()
    only = torch.full((5,), row)
    (grad,) = torch.autograd.grad(embedding(only, weight, padding_idx).sum(), weight.bank.weight)
    assert grad.eq(0).all()


def test_padding_row_hides_a_nan() -> None:
    bank = brute.bank_of(640, granularity=16)
    weight = bank.place((4, 32))
    with torch.no_grad():
        bank.weight.fill_(torch.nan)
    y = embedding(torch.tensor([1, 2]), weight, padding_idx=1)
    assert y[0].eq(0).all()
    assert y[1].isnan().all()


def test_tables() -> None:
    bank = brute.table_bank(50, entries=150)
    bank.place((1, 5))
    weight = bank.place((11, 13), scale=0.7)
    for part in (weight, weight.narrow(0, 2, 6).narrow(1, 3, 7)):
        compare(part, torch.randint(part.shape[0], (8,)))


def test_non_contiguous_indices_expanded_dy_and_non_contiguous_bank() -> None:
    bank = brute.bank_of(512, granularity=16)
    bank.weight = torch.nn.Parameter(bank.weight.detach().t().contiguous().t())
    weight = bank.place((20, 33))
    indices = torch.randint(20, (6, 8))
    for odd in (indices.t(), indices[::2, ::3], indices[:1].expand(4, -1)):
        dy = torch.ones((), dtype=F64).expand(*odd.shape, 33)
        compare(weight, odd, dy=dy)
        compare(weight, odd, dy=torch.randn(33, *odd.shape, dtype=F64).movedim(0, -1))


@pytest.mark.parametrize("reflect", REFLECT)
@pytest.mark.parametrize("dtype", [torch.float32, *brute.LOW])
def test_accuracy(dtype: torch.dtype, reflect: str) -> None:
    bank = brute.bank_of(1000, dtype, granularity=32, reflect=reflect)
    weight = bank.place((40, 90), scale=0.3)
    indices = torch.randint(40, (200,))
    ring = brute.ring(bank)
    exact = F.embedding(indices, brute.unpack(weight, ring))
    dy = torch.randn(200, 90).to(dtype)
    (exact_grad,) = torch.autograd.grad(exact, ring, dy.double())
    low = brute.unpack(weight, ring).detach().to(dtype).requires_grad_()
    torchs = F.embedding(indices, low)
    (dw,) = torch.autograd.grad(torchs, low, dy)
    for limit in (9_000, 1 << 22):
        with rpg.scratch_limit(limit):
            y = embedding(indices, weight)
            (grad,) = torch.autograd.grad(y, bank.weight, dy)
        assert y.dtype == grad.dtype == dtype
        brute.assert_accurate(y, exact, torchs, "y")
        packed = brute.pack(weight, dw).to(dtype)
        brute.assert_accurate(grad, exact_grad.view(grad.shape), packed, "gradient of bank")


@pytest.mark.parametrize("reflect", REFLECT)
def test_every_scratch_limit_gives_the_same(reflect: str) -> None:
    weight = brute.bank_of(700, granularity=16, reflect=reflect).place((9, 930), scale=0.9)
    weight = weight.narrow(1, 3, 920)
    indices = torch.randint(9, (6,))
    wanted = brute.unpack(weight, brute.ring(weight.bank).detach())[indices]
    dy = torch.randn_like(wanted)
    needed = [
        brute.scratch_limits(
            lambda: op.embedding(weight.bank.weight, None, indices, weight.spec, "reference")
        ),
        brute.scratch_limits(
            lambda: op.embedding_bank_grad(dy, indices, None, weight.spec, F64, "reference")
        ),
    ]
    for limit in map(max, zip(*needed, strict=True)):
        with rpg.scratch_limit(limit), rpg.backend("reference"):
            assert torch.equal(embedding(indices, weight), wanted)
            compare(weight, indices, dy=dy)


def test_nan_reaches_what_reads_it_and_nothing_else() -> None:
    bank = brute.bank_of(1024, granularity=16)
    weight = bank.place((12, 20))
    index, _ = brute.index_and_sign(weight)
    unread = sorted(set(range(bank.dof)) - set(index.flatten().tolist()))
    with torch.no_grad():
        bank.weight.view(-1)[unread] = torch.nan
        bank.weight.view(-1)[index[4, 17]] = torch.nan
    y = embedding(torch.arange(12), weight)
    assert torch.equal(y.isnan(), index == index[4, 17])


@pytest.mark.parametrize("bad", [-1, 12, 10**6])
def test_index_out_of_range(bad: int) -> None:
    weight = brute.bank_of(256, granularity=16).place((14, 20)).narrow(0, 1, 12)
    with pytest.raises(IndexError, match=rf"indices: got {bad}, wanted 0 to 11"):
        embedding(torch.tensor([3, bad, 4]), weight)
    grad = torch.zeros(1, 20, dtype=F64)
    with pytest.raises(IndexError, match=rf"indices: got {bad}, wanted 0 to 11"):
        op.embedding_bank_grad(grad, torch.tensor([bad]), None, weight.spec, F64, "")


@pytest.mark.parametrize("reflect", REFLECT)
def test_first_and_second_derivatives(reflect: str) -> None:
    weight = brute.bank_of(16, granularity=4, reflect=reflect).place((5, 6), scale=1.3)
    indices = torch.tensor([[0, 4], [4, 2]])
    bank = weight.bank.weight.detach().clone().requires_grad_()
    dy = torch.randn(2, 2, 6, dtype=F64, requires_grad=True)

    def forward(bank: Tensor) -> Tensor:
        return op.embedding(bank, None, indices, weight.spec, "")  # type: ignore[no-any-return]

    def bank_grad(dy: Tensor) -> Tensor:
        grad = op.embedding_bank_grad(dy, indices, None, weight.spec, F64, "")
        return grad  # type: ignore[no-any-return]

    for function, argument in ((forward, bank), (bank_grad, dy)):
        assert torch.autograd.gradcheck(function, argument)
        assert torch.autograd.gradgradcheck(function, argument, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    for bank in (brute.bank_of(64, dtype, granularity=4), brute.table_bank(20, 77, dtype)):
        weight = bank.place((7, 11), scale=0.5).narrow(0, 1, 5).narrow(1, 2, 8)
        values = bank.weight.detach().clone().requires_grad_()
        dy = torch.randn(3, 2, 8).to(dtype).requires_grad_()
        for indices in (torch.randint(5, (3, 2)), torch.randint(5, (3, 2), dtype=torch.int32)):
            arguments = (values, bank.table, indices, weight.spec, "")
            torch.library.opcheck(op.embedding.default, arguments)
            arguments = (dy, indices, bank.table, weight.spec, dtype, "")
            torch.library.opcheck(op.embedding_bank_grad.default, arguments)


def test_saves_indices_only() -> None:
    weight = random_weight(1)
    indices = torch.randint(weight.shape[0], (6,))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        embedding(indices, weight)
    assert [t.data_ptr() for t in saved] == [indices.data_ptr()]


def test_autocast_and_inference_mode() -> None:
    bank = brute.bank_of(256, torch.float32, granularity=16)
    weight = bank.place((9, 20))
    indices = torch.randint(9, (4,))
    with torch.autocast("cpu", torch.bfloat16):  # as torch's: autocast does not touch a lookup
        y = embedding(indices, weight)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert bank.weight.grad is not None
    assert bank.weight.grad.dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(embedding(indices, weight), y)


def test_frozen_bank_needs_no_gradient() -> None:
    weight = random_weight(1)
    weight.bank.weight.requires_grad_(False)
    assert not embedding(torch.tensor([0]), weight).requires_grad
