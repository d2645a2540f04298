"""A virtual weight where code expects a tensor: the same results as with Ŵ, or a sentence."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpg_kernels as rpg

DOUBLE = torch.float64


def matrix(rows: int = 12, columns: int = 20, seed: int = 0) -> tuple[rpg.VirtualWeight, Tensor]:
    """A virtual matrix in double precision, and Ŵ as a leaf of its own."""
    torch.manual_seed(seed)
    bank = rpg.ParameterBank(dof=96, granularity=8, dtype=DOUBLE)
    bank.place((5, 7))
    weight = bank.place((rows, columns), scale=0.7)
    return weight, weight.unpack().detach().requires_grad_()


def test_what_code_asks_a_weight_for() -> None:
    weight, dense = matrix()
    for name in ("dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "is_cpu",
                 "is_meta", "layout", "itemsize", "nbytes", "is_leaf", "is_sparse"):  # fmt: skip
        assert getattr(weight, name) == getattr(dense, name), name
    for name in ("dim", "size", "numel", "nelement", "element_size", "is_floating_point",
                 "is_complex", "is_contiguous", "get_device"):  # fmt: skip
        assert getattr(weight, name)() == getattr(dense, name)(), name
    assert weight.size(0) == weight.size(-2) == len(weight) == 12
    assert weight.grad is None
    assert torch.is_floating_point(weight)
    assert torch.overrides.is_tensor_like(weight)
    assert not hasattr(weight, "no_such_attribute_of_tensors")
    weight.anything = 3  # frameworks leave notes on weights
    assert weight.anything == 3
    with pytest.raises(AttributeError, match="shape: a virtual weight's does not change"):
        weight.shape = torch.Size([3])


def x_for(columns: int, *batch: int) -> Tensor:
    return torch.randn(*batch, columns, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))


FUSED: dict[str, Callable[[Any], Tensor]] = {
    "F.linear": lambda w: F.linear(x_for(20, 3), w),
    "F.linear with bias": lambda w: F.linear(x_for(20, 2, 3), w, torch.ones(12, dtype=DOUBLE)),
    "F.linear of the transpose": lambda w: F.linear(x_for(12, 3), w.t()),
    "transpose and bias": lambda w: F.linear(x_for(12, 3), w.T, torch.ones(20, dtype=DOUBLE)),
    "x @ w.T": lambda w: x_for(20, 3) @ w.T,
    "x @ w.mT": lambda w: x_for(20, 2, 3) @ w.mT,
    "x @ w": lambda w: x_for(12, 4, 3) @ w,
    "vector @ w": lambda w: x_for(12) @ w,
    "w @ vector": lambda w: w @ x_for(20),
    "w @ x.t()": lambda w: w @ x_for(20, 6).t(),
    "w @ batched": lambda w: torch.matmul(w, x_for(20, 2, 6).mT),
    "w.T @ x": lambda w: w.transpose(0, 1) @ x_for(12, 6).mT,
    "torch.mm": lambda w: torch.mm(x_for(12, 6), w),
    "x.matmul": lambda w: x_for(20, 6).matmul(w.t().t().t()),
    "F.embedding": lambda w: F.embedding(torch.tensor([[1, 11], [0, 1]]), w),
}
UNPACKED: dict[str, Callable[[Any], Tensor]] = {
    "w * 2": lambda w: w * 2,
    "2 - w": lambda w: 2 - w,
    "w / w": lambda w: w / (w + 3),
    "-w": lambda w: -w,
    "w ** 2": lambda w: w**2,
    "abs": abs,
    "w @ w.T": lambda w: w @ w.T,
    "rows": lambda w: w[2:5],
    "element": lambda w: w[3, 4] * 1,
    "norm": lambda w: w.norm(dim=1),
    "torch.norm": lambda w: torch.linalg.vector_norm(w, dim=0),
    "reshape": lambda w: w.reshape(-1, 4),
    "float": lambda w: w.float().double(),
    "to": lambda w: w.to(torch.float32).double(),
    "clone": lambda w: w.clone(),
    "cat": lambda w: torch.cat([w, w.detach().clone() + 1]),
    "stack of rows": lambda w: torch.stack(list(w)[:2]),
    "einsum": lambda w: torch.einsum("ij,kj->ik", w, x_for(20, 3)),
    "addmm": lambda w: torch.addmm(torch.ones(3, 20, dtype=DOUBLE), x_for(12, 3), w),
    "where": lambda w: torch.where(torch.ones((), dtype=torch.bool), w, 0),
    "F.normalize": lambda w: F.normalize(w, dim=0),
    "F.conv1d": lambda w: F.conv1d(x_for(9, 2, 20), w.unsqueeze(-1)),
    "F.bilinear": lambda w: F.linear(w, x_for(20, 3)),
}


@pytest.mark.parametrize("name", [*FUSED, *UNPACKED])
def test_functions_of_a_weight_equal_those_of_the_tensor(name: str) -> None:
    weight, dense = matrix()
    run = (FUSED | UNPACKED)[name]
    got, wanted = run(weight), run(dense)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    probe = torch.randn(wanted.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    (dense_grad,) = torch.autograd.grad((wanted * probe).sum(), dense)
    (got * probe).sum().backward()
    bank_grad = weight.bank.weight.grad
    torch.testing.assert_close(bank_grad, weight.pack(dense_grad).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_ones_do_not_unpack(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = matrix()
    monkeypatch.setattr(rpg.VirtualWeight, "unpack", None)
    FUSED[name](weight).sum().backward()
    assert weight.bank.weight.grad is not None


@pytest.mark.parametrize("padding", [0, (1, 2), "same"])
def test_convolutions(padding: Any) -> None:
    torch.manual_seed(0)
    bank = rpg.ParameterBank(dof=96, granularity=8, dtype=DOUBLE)
    weight = bank.place((6, 4, 3, 3))
    x, bias = torch.randn(2, 8, 7, 6, dtype=DOUBLE), torch.randn(6, dtype=DOUBLE)
    dense = weight.unpack().detach()
    got = F.conv2d(x, weight, bias, 1, padding, 1, 2)
    torch.testing.assert_close(got, F.conv2d(x, dense, bias, 1, padding, 1, 2))
    torch.testing.assert_close(
        torch.conv2d(x, weight, None, [2, 1], [1], groups=2),
        torch.conv2d(x, dense, None, [2, 1], [1], groups=2),
    )
    y = torch.randn(2, 6, 5, 5, dtype=DOUBLE)
    torch.testing.assert_close(
        F.conv_transpose2d(y, weight, groups=2), F.conv_transpose2d(y, dense, groups=2)
    )


def test_autocast_reaches_every_product() -> None:
    bank = rpg.ParameterBank(dof=96, granularity=8)
    weight = bank.place((12, 20))
    with torch.autocast("cpu", torch.bfloat16):
        for y in (F.linear(torch.randn(3, 20), weight), torch.randn(3, 12) @ weight):
            assert y.dtype == torch.bfloat16


def test_data_and_detach_have_no_gradient() -> None:
    weight, dense = matrix()
    for still in (weight.data, weight.detach()):
        assert not still.requires_grad
        assert torch.equal(still.unpack(), dense)
        assert not (still * 2).requires_grad
        assert not F.linear(x_for(20, 2), still).requires_grad
    assert weight.requires_grad
    assert weight.detach().cpu().numpy().shape == (12, 20)
    weight.requires_grad = False
    assert not F.linear(x_for(20, 2), weight).requires_grad
    assert not weight.narrow(0, 1, 3).unpack().requires_grad
    assert weight.requires_grad_() is weight
    assert weight.narrow(0, 1, 3).unpack().requires_grad


def trunc_normal_(weight: Any, std: float, bound: float) -> Any:
    """As many libraries draw it: the inverse distribution function of uniform values."""
    reach = math.erf(bound / std / math.sqrt(2))
    return (
        weight.uniform_(-reach, reach)
        .erfinv_()
        .mul_(std * math.sqrt(2))
        .add_(0.0)
        .clamp_(min=-bound, max=bound)
    )


STD = {
    "normal_": lambda w: nn.init.normal_(w, std=0.3),
    "uniform_": lambda w: nn.init.uniform_(w, -0.3 * math.sqrt(3), 0.3 * math.sqrt(3)),
    "method": lambda w: w.normal_(0, 0.3),
    "data": lambda w: w.data.normal_(mean=0.0, std=0.3),
    "xavier_uniform_": lambda w: nn.init.xavier_uniform_(w, gain=0.3 * math.sqrt(96 / 2)),
    "xavier_normal_": lambda w: nn.init.xavier_normal_(w, gain=0.3 * math.sqrt(96 / 2)),
    "kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
    "kaiming_normal_": lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    "trunc_normal_": lambda w: nn.init.trunc_normal_(w, std=0.3),
    "timm's trunc_normal_": lambda w: trunc_normal_(w, 0.3, 2.0),
    "timm's, cut off further": lambda w: trunc_normal_(w, 0.3, 6.0),
    "mul_": lambda w: w.mul_(2).div_(4),
    "*=": lambda w: w.__imul__(0.5),
}


@pytest.mark.parametrize("name", STD)
def test_initialisers_set_the_standard_deviation(name: str) -> None:
    torch.manual_seed(0)
    weight = rpg.ParameterBank(dof=48 * 48).place((48, 48), scale=2.0)
    dense = weight.unpack().detach().clone()
    with torch.no_grad():
        STD[name](dense)
        result = STD[name](weight)
    assert result.whole() is weight
    wanted = math.sqrt(float(dense.square().mean()))
    assert math.sqrt(float(weight.unpack().detach().square().mean())) == pytest.approx(
        wanted, rel=0.06
    )
    assert math.copysign(1, weight.scale) == 1


REFUSED: dict[str, Callable[[Any], Any]] = {
    "zeros_": nn.init.zeros_,
    "ones_": nn.init.ones_,
    "constant_": lambda w: nn.init.constant_(w, 0.1),
    "eye_": nn.init.eye_,
    "orthogonal_": nn.init.orthogonal_,
    "sparse_": lambda w: nn.init.sparse_(w, 0.5),
    "shifted": lambda w: w.normal_(1, 0.1),
    "not symmetric": lambda w: w.uniform_(0, 1),
    "copy_": lambda w: w.copy_(torch.zeros(12, 20)),
    "data.copy_": lambda w: w.data.copy_(torch.zeros(12, 20)),
    "data": lambda w: setattr(w, "data", torch.zeros(12, 20)),
    "elements": lambda w: w.__setitem__(0, 1.0),
    "zero_": lambda w: w.zero_(),
    "times a tensor": lambda w: w.mul_(torch.ones(12, 20)),
    "plus": lambda w: w.add_(1.0),
    "+=": lambda w: w.__iadd__(torch.ones(12, 20)),
    "out": lambda w: torch.add(torch.ones(12, 20), 1, out=w),
    "clamp_": lambda w: w.clamp_(-1e-3, 1e-3),
    "transpose": lambda w: w.t().zero_(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_cannot_be_written(name: str) -> None:
    weight, dense = matrix()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"layer number 1 .*bank.*materialize"):
        REFUSED[name](weight)
    if name != "sparse_":  # which draws before it writes zeros
        assert torch.equal(weight.unpack(), dense)


def test_what_belongs_to_a_gradient_is_the_banks() -> None:
    weight, _ = matrix()
    for ask in (lambda: weight.register_hook(print), lambda: weight.retain_grad()):
        with pytest.raises(RuntimeError, match=r"no gradient of its own; the bank's parameter has"):
            ask()


def test_comparisons_are_elementwise_with_numbers_and_tensors() -> None:
    weight, dense = matrix()
    assert torch.equal(weight == 0, dense == 0)
    assert torch.equal(weight != dense, dense != dense)
    assert weight == weight
    assert weight != matrix()[0]
    assert weight in [matrix()[0], weight]
    assert {weight: 1}[weight] == 1


def test_arguments_by_name_and_outputs() -> None:
    weight, dense = matrix()
    x, image = x_for(20, 3), x_for(12, 3)
    out = torch.empty(3, 20, dtype=DOUBLE)
    torch.testing.assert_close(F.linear(input=x, weight=weight), F.linear(x, dense))
    torch.testing.assert_close(torch.matmul(input=image, other=weight), image @ dense)
    torch.testing.assert_close(torch.mm(image, mat2=weight), image @ dense)
    with torch.no_grad():
        torch.testing.assert_close(torch.mm(image, weight, out=out), image @ dense)
    assert np.array_equal(np.asarray(weight), dense.detach().numpy())


def test_what_would_be_lost_is_refused() -> None:
    weight, dense = matrix()
    for write in (
        lambda: setattr(weight, "grad", torch.zeros(12, 20)),
        lambda: torch._foreach_mul_([weight.data], 2.0),
        lambda: weight.narrow(0, 0, 3).mul_(2),
        lambda: weight.clamp_(max=1),
        lambda: weight.div_(2, rounding_mode="floor"),
    ):
        with pytest.raises(RuntimeError, match=r"bank"), torch.no_grad():
            write()
    with pytest.raises(TypeError, match=r"nn\.Parameter: got a virtual weight"):
        nn.Parameter(weight)
    assert torch.equal(weight.unpack(), dense)
    assert weight.grad is None


def test_initialisers_of_a_trained_bank_look_at_its_values() -> None:
    bank = rpg.ParameterBank(dof=48 * 48)
    weight = bank.place((48, 48))
    with torch.no_grad():
        bank.weight.mul_(30)
    bank.trained()
    nn.init.normal_(weight, std=0.3)
    assert float(weight.unpack().detach().std()) == pytest.approx(0.3, rel=0.02)
    with pytest.raises(RuntimeError, match="clamp_"):
        weight.data.clamp_(-2, 2)


def test_a_large_weight_is_unpacked_with_one_warning_per_layer() -> None:
    bank = rpg.ParameterBank(dof=96, granularity=8)
    weight, other = bank.place((12, 20)), bank.place((12, 20))
    other.name = "blocks.3.up"
    dense = torch.ones(12, 20).clone
    limit = rpg.scratch_limit(959, "cpu")
    weight.unpack = other.unpack = dense  # which has a limit of its own
    with limit:
        with pytest.warns(
            UserWarning, match=r"layer 0 \[12, 20\] was unpacked into 960 bytes"
        ) as said:
            weight.sum()
        assert said[0].filename == __file__
        with pytest.warns(UserWarning, match=r"layer blocks\.3\.up"):
            _ = other * 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            weight.sum()
            _ = other.size(), other.dtype, other.T


def test_copies_and_pickles_keep_what_was_set() -> None:
    weight, _ = matrix()
    weight.requires_grad_(False).name = "a"
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert (twin.name, twin.requires_grad, twin.bank is weight.bank) == ("a", False, False)
        assert torch.equal(twin.unpack(), weight.unpack())


def test_to_keeps_what_does_not_change() -> None:
    weight, dense = matrix()
    assert weight.to("cpu") is weight
    assert weight.to(DOUBLE) is weight
    assert weight.contiguous() is weight
    assert torch.equal(weight.to(torch.float32), dense.float())
    assert torch.equal(weight.to(torch.zeros(1)), dense.float())
    assert torch.equal(weight.to(copy=True), dense)
