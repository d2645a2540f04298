"""Models whose bank is read by windows: convert and its laps, summary, copies, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.law.placement import Placement


def every(module: nn.Module, name: str) -> bool:
    return True


def stack(depth: int = 4, width: int = 64, **options: Any) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=False, **options) for _ in range(depth)))


def convert(model: nn.Module, dof: int = 1024, **fields: Any) -> nn.Module:
    """With 128 slots of 8 unless dof says otherwise."""
    fields = {"granularity": 8, "window": 64, **fields}
    return rpg.convert(model, rpg.RPGConfig(dof=dof, **fields), filter_fn=every)


def generator(model: nn.Module) -> rpg.Generator:
    bank = model.rpg_bank
    assert isinstance(bank, rpg.ParameterBank)
    assert isinstance(bank.generator, rpg.Generator)
    return bank.generator


class Net(nn.Module):
    """Tied tables, convolutions of other blocks, a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24)
        self.head = nn.Linear(24, 50)
        self.head.weight = self.table.weight
        self.mix = nn.Linear(24, 40)
        self.conv = nn.Conv2d(3, 16, 3)
        self.deep = nn.Conv2d(16, 16, 3, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.table(x)).view(-1, 3, 4, 10)
        y = self.deep(self.conv(nn.functional.pad(y, (1, 1, 1, 1))))
        return self.head(y.flatten()[: 24 * 4].view(4, 24))


INPUT = torch.arange(12) * 4


@pytest.mark.parametrize(
    ("depth", "dof", "laps"),
    [
        (1, 1024, 4),  # 4096 weights
        (16, 1024, 4),  # no more by default, though 64 would do
        (1, 1032, 2),
        (3, 4096, 2),
        (1, 4096, 1),
        (1, 8192, 1),  # a bank larger than the model
        (1, 2050, 2),  # rounded down to 2048
        (1, 2056, 1),
        (3, 520, 4),
    ],
)
def test_laps_that_convert_chooses(depth: int, dof: int, laps: int) -> None:
    model = convert(stack(depth), dof)
    assert generator(model).laps == laps
    assert generator(model).law == 2
    assert not rpg.summary(model).idle


def test_padding_counts_and_tied_weights_count_once() -> None:
    shapes = {(50, 24), (40, 24), (16, 3, 3, 3), (16, 1, 3, 3)}
    model = convert(Net(), dof=512, granularity=8)
    bank = model.rpg_bank
    assert isinstance(bank, rpg.ParameterBank)
    placements = bank.map.placements
    assert {p.shape for p in placements} == shapes
    end = placements[-1].start + placements[-1].matrix.span
    assert end // 512 == 5
    assert generator(model).laps == 4


def test_laps_that_are_asked_for() -> None:
    for laps in (1, 3, 4):
        assert generator(convert(stack(1), laps=laps)).laps == laps
    assert generator(convert(stack(16), laps=64)).laps == 64


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("laps", "most"), [(5, 4), (64, 4)])
def test_laps_above_the_compression_change_nothing(laps: int, most: int, device: str) -> None:
    model = stack(1, device=device)
    before = dict(model.named_modules())
    state = dict(model.state_dict(keep_vars=True))
    random = torch.get_rng_state()
    match = f"^laps: got {laps}, wanted at most {most}, as 4096 weights are read from 1024 elements"
    with pytest.raises(ValueError, match=match):
        convert(model, laps=laps)
    assert dict(model.named_modules()) == before
    assert all(value is state[name] for name, value in model.state_dict(keep_vars=True).items())
    assert torch.equal(torch.get_rng_state(), random)
    assert generator(convert(model, laps=most)).laps == most


def test_laps_of_a_bank_larger_than_the_model() -> None:
    assert generator(convert(stack(1), 8192, laps=1)).laps == 1
    with pytest.raises(ValueError, match=r"^laps: got 2, wanted at most 1, as 4096 weights"):
        convert(stack(1), 8192, laps=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 256}, "window: got 256, wanted at most the ring's 128 slots"),
        ({"window": 12}, "window: got 12, wanted a power of two .a multiple of 8. from 64"),
        ({"window": 64, "laps": 65}, "laps: got 65, wanted an int from 1 to 64"),
        ({"window": None, "laps": 2}, "laps: got 2, wanted None without a window"),
    ],
)
def test_windows_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        convert(stack(), **fields)


def test_a_bank_made_by_hand_with_too_many_laps_is_flagged() -> None:
    """Its model may grow, so only a summary can tell."""
    bank = rpg.ParameterBank(1024, granularity=8, window=64, laps=8)
    layers = [rpg.nn.Linear(64, 64, bank=bank)]
    model = rpg.attach(nn.Sequential(*layers), bank)
    (warning,) = rpg.summary(model).idle
    assert "laps: got 8, wanted at most 4, as 4096 weights are read from 1024 elements" in warning
    assert f"WARNING: {warning}" in str(rpg.summary(model))
    uses = bank.map.placements[0].law.slot(torch.arange(64)[:, None], torch.arange(8)).unique()
    assert len(uses) == 64  # of 128 slots: the other window is never read
    layers.append(rpg.nn.Linear(64, 64, bank=bank))
    model = rpg.attach(nn.Sequential(*layers), bank)
    assert not rpg.summary(model).idle
    assert "WARNING" not in str(rpg.summary(model))


def test_summary() -> None:
    summary = rpg.summary(convert(stack(3)))
    assert [layer.start for layer in summary.layers] == [0, 4096, 8192]
    assert {layer.window for layer in summary.layers} == {64}
    assert "window=64, laps=4" in str(summary)
    large = str(rpg.summary(convert(stack(1), 8192)))
    assert "the bank is at least as large as the model: each slot is used about once" in large
    assert {layer.window for layer in rpg.summary(convert(stack(1), window=None)).layers} == {None}


@pytest.mark.parametrize("reflect", ["element", "vector", "none"])
@pytest.mark.parametrize("compiled", [True, False])
def test_materialize_and_copies(
    reflect: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "_enabled", False)
    model = convert(Net(), 512, reflect=reflect).double()
    wanted = model(INPUT)
    dense = rpg.materialize(model)
    torch.testing.assert_close(dense(INPUT), wanted, rtol=1e-9, atol=1e-9)
    assert not [m for m in dense.modules() if isinstance(m, rpg.ParameterBank)]
    twin = copy.deepcopy(model)
    assert torch.equal(twin(INPUT), wanted)
    wanted.sum().backward()
    bank = model.get_parameter("rpg_bank.weight")
    assert bank.grad is not None
    assert bank.grad.abs().sum() > 0
    assert twin.get_parameter("rpg_bank.weight").grad is None


def test_least_squares_meets_a_model_that_the_bank_can_give() -> None:
    first = convert(stack(4), 2048)
    dense = rpg.materialize(first)
    before = [m.weight.detach().clone() for m in dense if isinstance(m, nn.Linear)]
    config = rpg.RPGConfig(2048, granularity=8, window=64)
    again = rpg.convert(dense, config, filter_fn=every, init="least_squares")
    for layer, weight in zip(again, before, strict=False):
        torch.testing.assert_close(layer.virtual_weight.unpack(), weight, rtol=1e-5, atol=1e-7)


def test_a_model_on_meta() -> None:
    model = convert(stack(3, device="meta"), 4096)
    assert generator(model).laps == 2
    assert model(torch.empty(2, 64, device="meta")).is_meta
    rpg.initialize(model)
    alive = convert(stack(3), 4096)
    assert rpg.summary(model).layers == rpg.summary(alive).layers
    alive.load_state_dict(model.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(model(x), alive(x))


def test_state_dicts_and_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model, other = convert(Net(), 512), convert(Net(), 512)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(INPUT), model(INPUT))
    rpg.save(model, path)
    with torch.device("meta"):
        far = Net()
    for target in (convert(Net(), 512), convert(far, 512)):
        assert torch.equal(rpg.load(target, path)(INPUT), model(INPUT))
    for fields, message in (
        ({"laps": 2}, "laps: got 4, wanted 2"),
        ({"window": None}, "law: got 2, wanted 1"),
        ({"dof": 1024, "window": 128, "laps": 1}, "window: got 64, wanted 128; laps: got 4"),
    ):
        wrong = convert(Net(), **{"dof": 512, **fields})
        before = wrong.get_parameter("rpg_bank.weight").detach().clone()
        with pytest.raises(ValueError, match=message):
            rpg.load(wrong, path)
        with pytest.raises(RuntimeError, match=message):
            wrong.load_state_dict(model.state_dict())
        assert torch.equal(wrong.get_parameter("rpg_bank.weight"), before)
    rpg.save(convert(Net(), 512, window=None), path)
    with pytest.raises(ValueError, match="law: got 1, wanted 2"):
        rpg.load(model, path)


def test_a_model_that_grows_past_two_to_the_31_positions() -> None:
    """A table of 2^33 rows in bands, then a layer after it."""
    bank = rpg.ParameterBank(1024, granularity=8, window=64, laps=16)
    table = rpg.nn.Embedding(2**33, 24, bank=bank)
    after = rpg.nn.Linear(24, 8, bank=bank)
    rows = torch.tensor([0, 2**29 - 1, 2**29, 2**33 - 1])
    got = table(rows)
    for row, values in zip(rows.tolist(), got, strict=True):
        assert torch.equal(values, table.virtual_weight.narrow(0, row, 1).unpack()[0])
    assert after.virtual_weight.placement.start == 2**33 * 24
    after(got).sum().backward()
    assert bank.weight.grad is not None


def test_a_map_keeps_windows_through_text() -> None:
    model = convert(Net(), 512)
    bank = model.rpg_bank
    assert isinstance(bank, rpg.ParameterBank)
    again = type(bank.map).from_tensor(bank.map.to_tensor())
    assert again == bank.map
    assert [p.law for p in again.placements] == [p.law for p in bank.map.placements]
    assert isinstance(again.placements[0], Placement)
