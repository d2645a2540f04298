"""attach, param_groups and initialize: who owns the bank, trains it and brings it to life."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpg_kernels as rpg

CONFIG = rpg.RPGConfig(dof=256, granularity=8)


def every(module: nn.Module, name: str) -> bool:
    return True


def hand_built() -> tuple[nn.Module, rpg.ParameterBank]:
    bank = rpg.ParameterBank(dof=64, granularity=8)
    model = nn.Sequential(
        nn.Linear(8, 16), rpg.nn.Linear(16, 16, bank=bank), nn.LayerNorm(16),
        rpg.nn.Linear(16, 4, bank=bank),
    )  # fmt: skip
    return model, bank


def test_attach_makes_the_bank_part_of_the_model() -> None:
    model, bank = hand_built()
    assert rpg.attach(model, bank) is model
    assert rpg.attach(model, bank) is model, "a second time is allowed"
    assert model.rpg_bank is bank
    assert [k for k in model.state_dict() if "bank" in k] == [
        "1.rpg_bank.weight", "1.rpg_bank.map_digits",
    ]  # fmt: skip
    assert [name for name, _ in model.named_modules() if "bank" in name] == ["1.rpg_bank"]
    assert sum(p is bank.weight for p in model.parameters()) == 1
    model.double()
    assert model(torch.randn(2, 8, dtype=torch.float64)).dtype == torch.float64


def test_attach_refuses_another_bank_and_other_things() -> None:
    model, bank = hand_built()
    rpg.attach(model, bank)
    with pytest.raises(ValueError, match="model: got a model with another rpg_bank"):
        rpg.attach(model, rpg.ParameterBank(dof=64, granularity=8))
    assert model.rpg_bank is bank
    with pytest.raises(TypeError, match="bank: got a Linear, wanted a ParameterBank"):
        rpg.attach(model, nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bank: got a Parameter"):
        rpg.attach(model, bank.weight)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model: got an? int, wanted an nn\.Module"):
        rpg.attach(3, bank)  # type: ignore[arg-type]


def test_attach_of_a_bank_the_model_has_already() -> None:
    model, bank = hand_built()
    model.ring = bank
    rpg.attach(model, bank)
    assert [key for key, value in model.state_dict().items() if value.shape == (8, 8)] in (
        ["ring.weight"], ["rpg_bank.weight"],
    )  # fmt: skip


class Mixed(nn.Module):
    """All the kinds of parameters that groups tell apart; a module used twice; a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False))
        self.twice = self.body
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.words = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.words.weight


def test_groups_hold_every_parameter_exactly_once() -> None:
    model = rpg.convert(Mixed(), CONFIG)
    groups = rpg.param_groups(model, lr=0.1, weight_decay=0.01, bank_lr=0.02)
    assert [g["name"] for g in groups] == ["bank", "weights", "no_decay"]
    found = [id(p) for g in groups for p in g["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters()}
    bank, weights, rest = groups
    assert [id(p) for p in bank["params"]] == [id(model.rpg_bank.weight)]
    assert {p.dim() for p in weights["params"]} == {2, 4}
    assert {p.dim() for p in rest["params"]} == {0, 1}
    assert [g["lr"] for g in groups] == [0.02, 0.1, 0.1]
    assert [g["weight_decay"] for g in groups] == [0.01, 0.01, 0.0]
    optimiser = torch.optim.AdamW(groups)
    assert [g["lr"] for g in optimiser.param_groups] == [0.02, 0.1, 0.1]


def test_group_defaults_and_private_banks() -> None:
    model = nn.Sequential(rpg.nn.Linear(4, 4, bias=False), rpg.nn.Linear(4, 4, bias=False))
    groups = rpg.param_groups(model, lr=0.3)
    assert [(g["name"], len(g["params"])) for g in groups] == [("bank", 2)]
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (0.3, 0.0)
    groups = rpg.param_groups(model, lr=0.3, bank_lr=0.0, bank_weight_decay=0.5)
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (0.0, 0.5)
    dense = rpg.param_groups(nn.Linear(4, 4), lr=0.1, weight_decay=0.2)
    assert [g["name"] for g in dense] == ["weights", "no_decay"]


def test_groups_know_a_bank_that_only_layers_hold() -> None:
    model, bank = hand_built()
    for net in (model, rpg.attach(model, bank)):
        groups = rpg.param_groups(net, lr=0.1)
        assert [p is bank.weight for p in groups[0]["params"]] == [True]
    with pytest.raises(TypeError, match=r"model: got an? int, wanted an nn\.Module"):
        rpg.param_groups(3, lr=0.1)  # type: ignore[arg-type]


def test_a_step_moves_every_group() -> None:
    model = rpg.convert(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), CONFIG)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD(rpg.param_groups(model, lr=0.1), momentum=0.9)
    model(torch.randn(4, 8)).square().sum().backward()
    optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before)


class Unready(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.hidden = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.position = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(self.first(x))


def test_initialize_names_what_it_cannot_initialise_and_changes_nothing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Unready())
    rpg.convert(model, CONFIG)
    ids = [id(p) for p in model.parameters()]
    with pytest.raises(ValueError, match=r"model: got 0 \(Unready\), wanted modules with reset"):
        rpg.initialize(model)
    assert [id(p) for p in model.parameters()] == ids
    assert all(p.is_meta for p in model.parameters())


def test_initialize_refuses_a_model_that_is_alive() -> None:
    model = rpg.convert(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), CONFIG)
    model[0].to("meta")
    before = model.rpg_bank.weight.detach().clone()
    with pytest.raises(ValueError, match=r"model: got tensors in .*'1\.rpg_bank'"):
        rpg.initialize(model)
    assert model[0].weight.is_meta
    assert torch.equal(model.rpg_bank.weight, before)
    with pytest.raises(TypeError, match=r"model: got an? int, wanted an nn\.Module"):
        rpg.initialize(3)  # type: ignore[arg-type]


def test_initialize_draws_everything_and_runs() -> None:
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * 36, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip
    rpg.convert(model, rpg.RPGConfig(dof=16_384))
    assert rpg.initialize(model) is model
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    assert model.rpg_bank.weight.std().item() == pytest.approx(model.rpg_bank.init_std, rel=0.03)
    assert model[7].virtual_weight.unpack().std().item() == pytest.approx(
        1 / math.sqrt(3 * 64 * 36), rel=0.03
    )
    assert model[7].bias.abs().max() <= 1 / 48
    assert model[1].running_var.eq(1).all()
    y = model(torch.randn(2, 3, 6, 6))
    assert y.isfinite().all()
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.words(x)))


@pytest.mark.parametrize("filter_fn", [None, every])
def test_ties_survive_meta(filter_fn: Any) -> None:
    with torch.device("meta"):
        model = Tied()
    rpg.initialize(rpg.convert(model, CONFIG, filter_fn))
    if filter_fn is None:
        assert model.head.weight is model.words.weight
    else:
        assert model.head.virtual_weight is model.words.virtual_weight
    assert model(torch.tensor([1, 2])).isfinite().all()


def test_a_model_too_large_to_exist_converts_initialises_and_runs_in_part() -> None:
    width = 65_536
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(40)))
    rpg.convert(model, rpg.RPGConfig(dof=1 << 20), every)
    record = rpg.summary(model)
    assert record.virtual_weights == 40 * width * width  # 687 GB in fp32
    assert record.layers[39].laps == pytest.approx(4096)
    rpg.initialize(model)
    state = model.state_dict()
    assert state.pop("0.rpg_bank.map_digits").numel() < 40 * 200
    assert sum(t.numel() for t in state.values()) == (1 << 20) + 40 * width
    x = torch.randn(2, width)
    weight = model[39].virtual_weight.narrow(0, 65_500, 36)
    y = rpg.functional.linear(x, weight)
    assert y.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.2)
    y.sum().backward()
    assert model.rpg_bank.weight.grad.isfinite().all()


def test_tables_beyond_memory_are_looked_up() -> None:
    rows = 1 << 33
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(rows, 512), nn.Linear(512, 512), nn.Linear(512, 3))
    rpg.convert(model, rpg.RPGConfig(dof=1 << 20), every)
    assert rpg.summary(model).virtual_weights > 4e12
    rpg.initialize(model)
    indices = torch.tensor([0, 1, (1 << 31) + 1, rows - 1])
    vectors = model[0](indices)
    assert vectors.std().item() == pytest.approx(1, rel=0.1)
    assert vectors.unique(dim=0).shape[0] == 4
    part = model[0].virtual_weight.narrow(0, rows - 3, 3).unpack()
    assert torch.equal(part[2], vectors[3])
    model(indices).sum().backward()
    assert model.rpg_bank.weight.grad.isfinite().all()
    with pytest.raises(IndexError, match="indices: got"):
        model[0](torch.tensor([rows]))


def test_a_large_model_runs_end_to_end_from_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(6)))
    rpg.convert(model, rpg.RPGConfig(dof=32_768))
    rpg.initialize(model)
    y = model(torch.randn(2, 1024))
    y.square().mean().backward()
    assert y.isfinite().all()
    assert model.rpg_bank.weight.grad.ne(0).all()


def test_initialize_refuses_a_table_which_no_reset_can_restore() -> None:
    table = torch.tensor([0, 3, -(2**31) + 1, 2], dtype=torch.int32)
    bank = rpg.ParameterBank.from_table(torch.randn(4), table)
    weight = bank.place((2, 2))
    layer = rpg.nn.Linear(2, 2, bias=False, virtual_weight=weight)
    net = rpg.attach(nn.Sequential(layer), bank).to("meta")
    with pytest.raises(ValueError, match=r"model: got 0.rpg_bank.*table is data"):
        rpg.initialize(net)
    assert bank.weight.device.type == "meta"


def test_initialize_resets_children_before_their_parents() -> None:
    with torch.device("meta"):
        net = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "head": nn.Linear(32, 32)})
    rpg.initialize(net)
    assert torch.equal(net["attention"].out_proj.bias, torch.zeros(32))
    with torch.device("meta"):
        transformer = nn.Transformer(32, 4, 1, 1, 64)
    rpg.convert(transformer, rpg.RPGConfig(dof=4096))
    rpg.initialize(transformer)
    std = float(transformer.rpg_bank.weight.detach().std())
    assert abs(std / transformer.rpg_bank.init_std - 1) < 0.1  # its parent resets all tensors
