"""convert(init="least_squares"): the nearest bank, against a dense solver."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpg_kernels as rpg

DOUBLE = torch.float64


def every(module: nn.Module, name: str) -> bool:
    return True


def layers() -> nn.Sequential:
    """Shapes that do and do not fill whole blocks."""
    return nn.Sequential(
        nn.Linear(64, 10),
        nn.Conv2d(64, 4, 3),
        nn.Embedding(7, 32),
        nn.Linear(13, 5, bias=False),
        nn.Conv2d(6, 6, 3, groups=6),
    )


def virtual(model: nn.Module) -> dict[str, rpg.VirtualWeight]:
    return {n: m.virtual_weight for n, m in model.named_modules() if hasattr(m, "virtual_weight")}


def generating_matrix(bank: rpg.ParameterBank, weights: list[rpg.VirtualWeight]) -> Tensor:
    """scale · G of several virtual weights, one below the other: dense fp64 [P, D]."""
    columns = []
    twin = copy.deepcopy(bank).double()
    placed = [rpg.VirtualWeight(twin, w.placement) for w in weights]
    with torch.no_grad():
        for i in range(bank.dof):
            twin.weight.zero_().view(-1)[i] = 1
            columns.append(torch.cat([w.unpack().flatten() for w in placed]))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("reflect", ["element", "vector", "none"])
@pytest.mark.parametrize("granularity", [1, 64])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_exact_when_the_bank_is_large_enough(
    granularity: int, reflect: str, dtype: torch.dtype
) -> None:
    model = layers().to(dtype)
    dense = {name: m.weight.detach().clone() for name, m in model.named_modules() if name}
    needed = 64 * 10 + 64 * 36 + 7 * 32 + (5 * 16 + 6 * 16) + 64  # with padding and alignment
    config = rpg.RPGConfig(dof=needed, granularity=granularity, reflect=reflect)
    rpg.convert(model, config, every, init="least_squares")
    rounding = 1e-15 if dtype == DOUBLE else 1e-7
    for name, weight in virtual(model).items():
        torch.testing.assert_close(weight.unpack(), dense[name], rtol=4 * rounding, atol=0)
    assert len(virtual(model)) == 5
    assert max(x.residual for x in rpg.summary(model).layers) < rounding


def test_exact_for_a_whole_network() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
    ).double()  # fmt: skip
    x = torch.randn(2, 1, 8, 8, dtype=DOUBLE)
    wanted = model(x)
    virtual_weights = 64 * 64 * 9 + 64 * 1024
    rpg.convert(model, rpg.RPGConfig(dof=virtual_weights), init="least_squares")
    assert rpg.summary(model).dof == rpg.summary(model).virtual_weights
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "config",
    [
        {"dof": 96, "granularity": 1},
        {"dof": 200, "granularity": 8},
        {"dof": 200, "granularity": 8, "reflect": "element"},
        {"dof": 256, "granularity": 64, "reflect": "none"},
        {"dof": 160, "granularity": 32, "permute": False},
        {"dof": 64, "granularity": 64, "scale": "fan_out"},
        {"dof": 3, "granularity": 64},
    ],
    ids=str,
)
def test_equals_the_dense_solver(config: dict[str, Any]) -> None:
    model = layers().double()
    # Different sizes, so that the layers' scales matter.
    for i, layer in enumerate(model):
        layer.weight.data.mul_(1 + i).add_(0.1 * i)
    dense = {str(i): layer.weight.detach().clone() for i, layer in enumerate(model)}
    rpg.convert(model, rpg.RPGConfig(**config), every, init="least_squares")
    weights = virtual(model)
    g = generating_matrix(model.rpg_bank, list(weights.values()))
    target = torch.cat([dense[name].flatten() for name in weights])
    solution = torch.linalg.lstsq(g, target[:, None], driver="gelsd").solution.flatten()
    used = g.abs().sum(0) > 0
    assert used.any()
    got = model.rpg_bank.weight.detach().flatten()
    torch.testing.assert_close(got[used], solution[used], rtol=1e-9, atol=1e-12)
    for x in rpg.summary(model).layers:
        wanted = dense[x.name]
        missed = (weights[x.name].unpack() - wanted).norm() / wanted.norm()
        assert x.residual == pytest.approx(missed.item(), rel=1e-9)
    # A single layer may lose by the compromise; the whole model cannot do worse than a zero bank.
    assert 0.2 < (g @ got - target).norm() / target.norm() < 1


def test_elements_that_nothing_reads_stay_random() -> None:
    config = rpg.RPGConfig(dof=2000, granularity=8)
    banks = []
    for init in ("random", "least_squares"):
        torch.manual_seed(5)
        model = rpg.convert(nn.Sequential(nn.Linear(16, 30)), config, every, init=init)
        banks.append(model.rpg_bank.weight.detach())
    g = generating_matrix(model.rpg_bank, list(virtual(model).values()))
    used = (g.abs().sum(0) > 0).view_as(banks[0])
    assert used.sum() == 480
    assert torch.equal(banks[0][~used], banks[1][~used])
    assert banks[0][used].ne(banks[1][used]).all()


def test_a_tied_weight_counts_once() -> None:
    def build(tied: bool) -> nn.Module:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False))
        if tied:
            model[2].weight = model[0].weight
        config = rpg.RPGConfig(dof=64, granularity=8, scale="fan_in")
        filter_fn = every if tied else (lambda m, name: name != "2")
        return rpg.convert(model.double(), config, filter_fn, init="least_squares")

    torch.testing.assert_close(build(True).rpg_bank.weight, build(False).rpg_bank.weight)


def test_a_padding_row_has_no_say() -> None:
    def build(value: float) -> nn.Module:
        torch.manual_seed(2)
        table = nn.Embedding(12, 8, padding_idx=4).double()
        table.weight.data[4] = value
        config = rpg.RPGConfig(dof=64, granularity=8, scale="fan_in")
        return rpg.convert(nn.Sequential(table), config, every, init="least_squares")

    zero, nine = build(0.0), build(9.0)
    assert torch.equal(zero.rpg_bank.weight, nine.rpg_bank.weight)
    assert rpg.summary(zero).layers[0].residual == rpg.summary(nine).layers[0].residual


def test_in_parts_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("rpg_kernels.conversion.least_squares")
    banks, residuals = [], []
    for size in (1 << 22, 100):
        monkeypatch.setattr(module, "_PART", size)
        torch.manual_seed(0)
        model = layers()
        rpg.convert(model, rpg.RPGConfig(dof=640, granularity=8), every, init="least_squares")
        banks.append(model.rpg_bank.weight.detach())
        residuals.append([x.residual for x in rpg.summary(model).layers])
    torch.testing.assert_close(banks[0], banks[1])
    assert residuals[0] == pytest.approx(residuals[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype: torch.dtype) -> None:
    model = layers().to(dtype)
    dense = {str(i): layer.weight.detach().double() for i, layer in enumerate(model)}
    twin = copy.deepcopy(model).double()
    config = rpg.RPGConfig(dof=640, granularity=8, scale="fan_in")
    rpg.convert(model, config, every, init="least_squares")
    rpg.convert(twin, config, every, init="least_squares")
    bank = model.rpg_bank.weight
    assert bank.dtype == dtype
    # Accumulated in double and rounded once.
    assert torch.equal(bank.double(), twin.rpg_bank.weight.to(dtype).double())
    for x in rpg.summary(model).layers:
        missed = virtual(model)[x.name].unpack().double() - dense[x.name]
        assert x.residual == pytest.approx((missed.norm() / dense[x.name].norm()).item(), rel=1e-6)


def test_the_residual_is_printed_and_zeros_are_met() -> None:
    model = layers()
    rpg.convert(model, rpg.RPGConfig(dof=64), every, init="least_squares")
    text = str(rpg.summary(model))
    for x in rpg.summary(model).layers:
        assert f"residual {x.residual:.1%}" in text
    model = layers()
    for layer in model:
        layer.weight.data.zero_()
    rpg.convert(model, rpg.RPGConfig(dof=64), every, init="least_squares")
    assert [x.residual for x in rpg.summary(model).layers] == [0.0] * 5
    assert "residual" not in str(rpg.summary(rpg.convert(layers(), rpg.RPGConfig(dof=64), every)))


def test_the_fit_is_a_leaf_that_trains() -> None:
    model = rpg.convert(layers(), rpg.RPGConfig(dof=640), every, init="least_squares")
    bank = model.rpg_bank.weight
    assert bank.is_leaf
    assert bank.requires_grad
    assert bank.grad_fn is None
    model[0](torch.randn(2, 64)).sum().backward()
    assert bank.grad is not None
