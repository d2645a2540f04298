"""unpack and pack against an explicit generating matrix."""

from __future__ import annotations

import random

import brute_force as brute
import pytest
import torch
from torch import Tensor

import rpg_kernels as rpg

REFLECT = ("element", "vector", "none")


def weights(bank: rpg.ParameterBank, rng: random.Random, count: int) -> list[rpg.VirtualWeight]:
    shapes = rng.sample(brute.MATRICES + brute.KERNELS, count)
    return [bank.place(shape, scale=rng.uniform(-2, 2)) for shape in shapes]


@pytest.mark.parametrize("granularity", [1, 2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("reflect", REFLECT)
@pytest.mark.parametrize("permute", [True, False])
def test_unpack_is_scale_g_w_and_pack_its_transpose(
    granularity: int, reflect: str, permute: bool
) -> None:
    rng = random.Random(f"{granularity} {reflect} {permute}")
    dof = rng.choice([granularity, 7 * granularity + 1, 499, 1021, 2048])
    bank = brute.bank_of(
        max(dof, granularity),
        granularity=granularity,
        reflect=reflect,
        permute=permute,
        seed=rng.randrange(2**63),
    )
    w = bank.weight.detach().flatten()
    for weight in weights(bank, rng, 5):
        unpacked = weight.unpack().detach()
        dense = torch.randn(weight.shape, dtype=torch.float64)
        packed = weight.pack(dense)
        assert unpacked.shape == weight.shape
        assert unpacked.is_contiguous()
        assert packed.shape == bank.weight.shape
        brute.assert_exact(unpacked, brute.unpack(weight, w), f"unpack {weight}")
        brute.assert_exact(packed, brute.pack(weight, dense), f"pack {weight}")
        inner = (unpacked * dense).sum()
        torch.testing.assert_close(inner, (w * packed.flatten()).sum(), rtol=1e-9, atol=1e-9)


AWKWARD = {
    "prime N, K and DoF": ((31, 37), 1009, 8),
    "one row": ((1, 300), 256, 64),
    "one block": ((1, 64), 640, 64),
    "one weight": ((1, 1), 1, 1),
    "partial last block": ((9, 60), 640, 64),
    "DoF smaller than a slot": ((10, 33), 37, 64),
    "one slot": ((10, 128), 64, 64),
    "layer smaller than a slot": ((2, 3), 640, 128),
    "DoF larger than the model": ((8, 48), 5003, 16),
    "many laps": ((40, 64), 96, 32),
    "depthwise": ((24, 1, 3, 3), 200, 64),
    "stem": ((8, 3, 7, 7), 300, 64),
    "grouped 3x3 of 12 channels": ((4, 12, 3, 3), 523, 64),
}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("reflect", REFLECT)
def test_explicit_matrix_on_awkward_shapes(name: str, reflect: str) -> None:
    shape, dof, granularity = AWKWARD[name]
    bank = brute.bank_of(dof, granularity=granularity, reflect=reflect, seed=3)
    bank.place((1, granularity + 1))  # so that the layer neither is the first nor starts at 0
    weight = bank.place(shape, scale=-0.7)
    matrix = brute.generating_matrix(weight)
    assert matrix.abs().sum(1).eq(1).all()  # one element each, weight plus or minus 1
    w = bank.weight.detach().flatten()
    brute.assert_exact(weight.unpack().detach().flatten(), -0.7 * matrix @ w)
    dense = torch.randn(shape, dtype=torch.float64)
    brute.assert_exact(weight.pack(dense).flatten(), -0.7 * matrix.t() @ dense.flatten())


def test_segment_that_wraps_around_the_end_of_the_ring() -> None:
    bank = brute.bank_of(640, granularity=64, permute=False, reflect="none")
    bank.place((1, 512))
    weight = bank.place((3, 64))
    assert weight.placement.start == 512
    flat = bank.weight.detach().flatten()
    wanted = torch.cat((flat[512:], flat[:64])).view(3, 64)
    assert torch.equal(weight.unpack(), wanted)


@pytest.mark.parametrize("shape", [(7, 13), (4, 3, 3, 2), (5, 8, 1, 1)])
def test_tables(shape: tuple[int, ...]) -> None:
    size = torch.Size(shape).numel()
    bank = brute.table_bank(31, entries=size + 11)
    bank.place((1, 11))
    weight = bank.place(shape, scale=1.7)
    w = bank.weight.detach().flatten()
    dense = torch.randn(shape, dtype=torch.float64)
    for part in (weight, weight.narrow(0, 1, 2).narrow(1, 1, 2)):
        brute.assert_exact(part.unpack().detach(), brute.unpack(part, w))
        grad = dense[: part.shape[0], : part.shape[1]]
        brute.assert_exact(part.pack(grad), brute.pack(part, grad))


@pytest.mark.parametrize("dtype", brute.ALL)
@pytest.mark.parametrize("reflect", REFLECT)
def test_every_dtype_to_one_rounding(dtype: torch.dtype, reflect: str) -> None:
    bank = brute.bank_of(1000, dtype, granularity=32, reflect=reflect)
    weight = bank.place((20, 60), scale=0.3)
    exact = brute.unpack(weight, brute.ring(bank).detach())
    unpacked = weight.unpack().detach()
    assert unpacked.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(unpacked.double(), exact, rtol=eps, atol=0)

    dense = torch.randn(20, 60).to(dtype)
    packed = weight.pack(dense)
    assert packed.dtype == dtype
    accumulate = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    exact = brute.pack(weight, dense)
    torch.testing.assert_close(packed.double(), exact, rtol=2 * eps, atol=16 * accumulate)


@pytest.mark.parametrize("dtype", brute.LOW)
def test_low_precision_gradient_is_packed_into_an_fp32_bank(dtype: torch.dtype) -> None:
    bank = brute.bank_of(512, torch.float32, granularity=32)
    weight = bank.place((20, 64), scale=0.3)
    dense = torch.randn(20, 64).to(dtype)
    packed = weight.pack(dense)
    assert packed.dtype == torch.float32
    torch.testing.assert_close(packed.double(), brute.pack(weight, dense), rtol=1e-6, atol=1e-5)


def test_pack_takes_expanded_and_permuted_tensors_and_leaves_them_alone() -> None:
    weight = brute.bank_of(256, granularity=16, reflect="vector").place((6, 5, 3, 2), scale=0.5)
    tensors: list[Tensor] = [
        torch.ones((), dtype=torch.float64).expand(6, 5, 3, 2),
        torch.randn(6, 3, 2, 5, dtype=torch.float64).permute(0, 3, 1, 2),
        torch.randn(2, 3, 5, 6, dtype=torch.float64).permute(3, 2, 1, 0),
    ]
    for dense in tensors:
        before = dense.clone()
        brute.assert_exact(weight.pack(dense), brute.pack(weight, before))
        assert torch.equal(dense, before)


def test_non_contiguous_bank() -> None:
    bank = brute.bank_of(256, granularity=16)
    weight = bank.place((10, 40))
    contiguous = weight.unpack().detach()
    bank.weight.data = bank.weight.detach().t().contiguous().t()
    assert not bank.weight.is_contiguous()
    assert torch.equal(weight.unpack(), contiguous)


@pytest.mark.parametrize("reflect", REFLECT)
def test_nan_and_infinity_reach_exactly_the_weights_that_read_them(reflect: str) -> None:
    bank = brute.bank_of(512, granularity=16, reflect=reflect)
    weight = bank.place((7, 5, 3, 3), scale=-2.0)
    with torch.no_grad():
        bank.weight[3, 5], bank.weight[20, 0] = torch.nan, torch.inf
    index, sign = brute.index_and_sign(weight)
    unpacked = weight.unpack().detach()
    assert torch.equal(unpacked.isnan(), index == 3 * 16 + 5)
    assert torch.equal(unpacked.isinf(), index == 20 * 16)
    assert torch.equal(unpacked[unpacked.isinf()].sign(), -sign[index == 20 * 16])

    dense = torch.zeros(weight.shape, dtype=torch.float64)
    dense[2, 3, 1, 0] = torch.nan
    touched = weight.pack(dense).flatten().isnan().nonzero().flatten()
    assert touched.tolist() == [int(index[2, 3, 1, 0])]


@pytest.mark.parametrize("reflect", REFLECT)
@pytest.mark.parametrize("shape", [(3, 900), (3, 60, 3, 3), (11, 1, 3, 3), (2, 430, 1, 2)])
def test_every_scratch_limit_gives_the_same(shape: tuple[int, ...], reflect: str) -> None:
    weight = brute.bank_of(700, granularity=16, reflect=reflect).place(shape, scale=0.9)
    part = weight.narrow(1, 0, shape[1]) if shape[1] < 3 else weight.narrow(1, 1, shape[1] - 2)
    dense = torch.randn(part.shape, dtype=torch.float64)
    wanted = brute.unpack(part, brute.ring(weight.bank).detach())
    for limit in brute.scratch_limits(part.unpack):
        with rpg.scratch_limit(limit):
            assert torch.equal(part.unpack(), wanted), limit
    for limit in brute.scratch_limits(lambda: part.pack(dense)):
        with rpg.scratch_limit(limit):
            brute.assert_exact(part.pack(dense), brute.pack(part, dense), f"limit {limit}")


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 2, 2)])
@pytest.mark.parametrize("reflect", REFLECT)
def test_derivatives(shape: tuple[int, ...], reflect: str) -> None:
    weight = brute.bank_of(16, granularity=4, reflect=reflect).place(shape, scale=1.3)
    dense = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    values = bank_values(weight)
    for function, argument in ((unpack_op(weight), values), (weight.pack, dense)):
        assert torch.autograd.gradcheck(function, argument)
        assert torch.autograd.gradgradcheck(function, argument, fast_mode=True)


def bank_values(weight: rpg.VirtualWeight) -> Tensor:
    return weight.bank.weight.detach().clone().requires_grad_()


def unpack_op(weight: rpg.VirtualWeight) -> object:
    return lambda bank: torch.ops.rpg_kernels.unpack(bank, weight.bank.table, weight.spec, "")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 70), (4, 3, 3, 3)])
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    size = torch.Size(shape).numel()
    for bank in (brute.bank_of(256, dtype, granularity=16), brute.table_bank(50, size, dtype)):
        weight = bank.place(shape, scale=0.5)
        values = bank_values(weight)
        dense = torch.randn(shape).to(dtype).requires_grad_()
        torch.library.opcheck(
            torch.ops.rpg_kernels.unpack.default, (values, bank.table, weight.spec, "")
        )
        torch.library.opcheck(
            torch.ops.rpg_kernels.pack.default, (dense, bank.table, weight.spec, dtype, "")
        )


def test_gradients_reach_the_parameter() -> None:
    bank = brute.bank_of(256, granularity=16)
    weight = bank.place((6, 30), scale=2.0)
    upstream = torch.randn(6, 30, dtype=torch.float64)
    (weight.unpack() * upstream).sum().backward()
    assert bank.weight.grad is not None
    brute.assert_exact(bank.weight.grad, brute.pack(weight, upstream))
