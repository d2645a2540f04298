"""Models whose bank has laps: convert, strided layers, summary, copies, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import brute_force as brute
import pytest
import torch
from torch import Tensor, nn

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.law.explicit import explicit_map
from rpg_kernels.law.placement import Placement
from rpg_kernels.models.resnet import ResNet


def every(module: nn.Module, name: str) -> bool:
    return True


def stack(depth: int = 4, width: int = 64, bias: bool = False, **options: Any) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=bias, **options) for _ in range(depth)))


def convert(model: nn.Module, dof: int = 1024, **fields: Any) -> nn.Module:
    """With 128 slots of 8 unless dof says otherwise."""
    fields = {"granularity": 8, "laps": 2, **fields}
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


def test_laps_are_never_chosen() -> None:
    assert (generator(convert(stack(16), laps=None)).law, generator(convert(stack())).law) == (1, 3)
    for laps, depth in ((1, 1), (3, 1), (4, 1), (64, 16)):
        made = generator(convert(stack(depth), laps=laps))
        assert (made.law, made.laps, made.window) == (3, laps, None)
    assert generator(convert(stack(), window=64)).window == 64
    with pytest.raises(TypeError):
        rpg.RPGConfig(1024, law=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("laps", range(1, 10))
def test_padding_counts_and_tied_weights_count_once(laps: int) -> None:
    """Rows are padded to octets, and layers start where an octet is read first."""
    shapes = [(50, 24), (40, 24), (16, 3, 3, 3), (16, 1, 3, 3)]
    end = 0
    for shape in shapes:
        block, blocks, _ = brute.row_layout(shape, 8)
        step = 8 * block * laps
        end = -(-end // step) * step + -(-shape[0] // 8) * 8 * blocks * block
    most = end // 512
    assert 5 <= most <= 8
    if laps > most:
        with pytest.raises(ValueError, match=f"^laps: got {laps}, wanted at most {most}, as {end}"):
            convert(Net(), dof=512, laps=laps)
        return
    bank = convert(Net(), dof=512, laps=laps).rpg_bank
    assert isinstance(bank, rpg.ParameterBank)
    last = bank.map.placements[-1]
    assert {p.shape for p in bank.map.placements} == set(shapes)
    assert last.start + last.span == end


@pytest.mark.parametrize(
    ("stride", "taps"), [(1, 3), ((1, 1), 3), (2, 1), ((1, 2), 1), ((2, 1), 1)]
)
def test_strided_convolutions_have_units_of_one_tap(stride: Any, taps: int) -> None:
    """Of a converted model, and of a layer that places its own weight."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3, stride), nn.Conv2d(16, 8, 3), nn.Linear(8, 8))
    convert(model, laps=4, dof=512)
    weights = [layer.virtual_weight for layer in model]  # type: ignore[union-attr]
    assert [w.placement.taps for w in weights] == [taps, 3, 1]
    bank = rpg.ParameterBank(512, granularity=8, laps=4)
    layer = rpg.nn.Conv2d(8, 16, 3, stride, bank=bank)
    assert layer.virtual_weight.placement == weights[0].placement.__class__(
        bank.generator, 0, 0, (16, 8, 3, 3), layer.virtual_weight.scale, taps=taps
    )
    x = torch.randn(2, 8, 9, 9)
    dense = layer.virtual_weight.unpack()
    wanted = nn.functional.conv2d(x, dense, layer.bias, stride)
    torch.testing.assert_close(layer(x), wanted)
    for bank in (rpg.ParameterBank(512, granularity=8), None):
        layer = rpg.nn.Conv2d(8, 16, 3, stride, bank=bank)
        assert layer.virtual_weight.placement.taps is None
    tied = rpg.nn.Conv2d(8, 16, 3, stride, virtual_weight=weights[0])
    assert tied.virtual_weight is weights[0]


@pytest.mark.parametrize("laps", [2, 4])
def test_a_converted_resnet_uses_its_bank_evenly(laps: int) -> None:
    """Padding counted: every element is read as often as there are laps, then the next."""
    torch.manual_seed(0)
    config = rpg.RPGConfig(15_000, granularity=16, laps=laps)
    with torch.device("meta"):
        model = rpg.convert(ResNet([1, 1, 1], num_classes=10, width=16, stem="cifar"), config)
    bank = model.rpg_bank
    assert isinstance(bank, rpg.ParameterBank)
    uses = torch.zeros(bank.slots, 16, dtype=torch.int64)
    end = 0
    for p in bank.map.placements:
        assert (p.matrix.block, p.span) == (16, p.numel)  # no padding within layers
        for use in range(end // 128, p.start // 128):  # of an octet, before the layer
            uses[(use // laps * 8 + torch.arange(8)) % bank.slots] += 1
        index, _ = explicit_map(p)
        uses += index.flatten().bincount(minlength=bank.dof).view(-1, 16)
        end = p.start + p.span
    assert int(uses.sum()) == end
    assert int(uses.max() - uses.min()) <= laps
    strided = [m for m in model.modules() if isinstance(m, rpg.nn.Conv2d) and m.stride != (1, 1)]
    assert strided
    assert all(m.virtual_weight.placement.taps == 1 for m in strided)


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


def test_a_bank_made_by_hand_with_too_many_laps_is_flagged() -> None:
    """Its model may grow, so only a summary can tell."""
    bank = rpg.ParameterBank(1024, granularity=8, laps=8)
    layers = [rpg.nn.Linear(64, 64, bank=bank)]
    model = rpg.attach(nn.Sequential(*layers), bank)
    (warning,) = rpg.summary(model).idle
    assert "laps: got 8, wanted at most 4, as 4096 weights are read from 1024 elements" in warning
    assert f"WARNING: {warning}" in str(rpg.summary(model))
    uses = bank.map.placements[0].law.slot(torch.arange(64)[:, None], torch.arange(8)).unique()
    assert len(uses) == 64  # of 128 slots: the others are never read
    layers.append(rpg.nn.Linear(64, 64, bank=bank))
    model = rpg.attach(nn.Sequential(*layers), bank)
    assert not rpg.summary(model).idle
    assert "WARNING" not in str(rpg.summary(model))


def test_a_bank_of_a_generator_with_too_many_laps_is_flagged() -> None:
    generator = rpg.Generator(128, 8, "vector", window=64, laps=8)
    bank = rpg.ParameterBank.from_generator(generator)
    model = rpg.attach(nn.Sequential(rpg.nn.Linear(64, 64, bank=bank)), bank)
    (warning,) = rpg.summary(model).idle
    assert "laps: got 8, wanted at most 4, as 4096 weights are read from 1024 elements" in warning


def test_summary() -> None:
    summary = rpg.summary(convert(stack(3)))
    assert [layer.start for layer in summary.layers] == [0, 4096, 8192]
    assert [layer.span for layer in summary.layers] == [4096] * 3
    assert {(layer.window, layer.taps) for layer in summary.layers} == {(None, 1)}
    assert "laps=2" in str(summary)
    large = str(rpg.summary(convert(stack(1), 8192, laps=1)))
    assert "the bank is at least as large as the model: each slot is used about once" in large
    whole = rpg.summary(convert(stack(1), laps=None))
    assert {(layer.window, layer.taps) for layer in whole.layers} == {(None, None)}
    padded = rpg.summary(convert(nn.Sequential(nn.Linear(8, 3)), 8, laps=1))
    assert [layer.span for layer in padded.layers] == [64]


@pytest.mark.parametrize("reflect", ["element", "vector", "none"])
@pytest.mark.parametrize("compiled", [True, False])
def test_materialize_and_copies(
    reflect: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "_enabled", False)
    model = convert(Net(), 512, reflect=reflect, laps=3).double()
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
    config = rpg.RPGConfig(2048, granularity=8, laps=2)
    again = rpg.convert(dense, config, filter_fn=every, init="least_squares")
    for layer, weight in zip(again, before, strict=False):
        torch.testing.assert_close(layer.virtual_weight.unpack(), weight, rtol=1e-5, atol=1e-7)


def test_a_model_on_meta() -> None:
    model = convert(stack(3, device="meta"), 4096)
    assert generator(model).law == 3
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
        ({"laps": 3}, "laps: got 2, wanted 3"),
        ({"laps": None}, "law: got 3, wanted 1"),
        ({"window": 8, "laps": 1}, "window: got None, wanted 8; laps: got 2, wanted 1"),
    ):
        wrong = convert(Net(), **{"dof": 512, **fields})
        before = wrong.get_parameter("rpg_bank.weight").detach().clone()
        with pytest.raises(ValueError, match=message):
            rpg.load(wrong, path)
        with pytest.raises(RuntimeError, match=message):
            wrong.load_state_dict(model.state_dict())
        assert torch.equal(wrong.get_parameter("rpg_bank.weight"), before)
    rpg.save(convert(Net(), 512, laps=None), path)
    with pytest.raises(ValueError, match="law: got 1, wanted 3"):
        rpg.load(model, path)


def test_a_model_that_grows_past_two_to_the_31_positions() -> None:
    """A table of 2^33 rows in bands, then a layer after it."""
    bank = rpg.ParameterBank(1024, granularity=8, laps=16)
    table = rpg.nn.Embedding(2**33, 24, bank=bank)
    after = rpg.nn.Linear(24, 8, bank=bank)
    band = table.virtual_weight.placement.law.rows_per_band
    rows = torch.tensor([0, band - 1, band, 2**33 - 1])
    got = table(rows)
    for row, values in zip(rows.tolist(), got, strict=True):
        assert torch.equal(values, table.virtual_weight.narrow(0, row, 1).unpack()[0])
    assert after.virtual_weight.placement.start == 2**33 * 24
    after(got).sum().backward()
    assert bank.weight.grad is not None


def test_a_map_keeps_laps_through_text() -> None:
    model = convert(Net(), 512)
    bank = model.rpg_bank
    assert isinstance(bank, rpg.ParameterBank)
    again = type(bank.map).from_tensor(bank.map.to_tensor())
    assert again == bank.map
    assert [p.law for p in again.placements] == [p.law for p in bank.map.placements]
    assert isinstance(again.placements[0], Placement)
