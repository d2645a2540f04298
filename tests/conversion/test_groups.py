"""Groups: which layers read which bank, how a dof is shared out, and what is refused."""

from __future__ import annotations

import random
import re
from typing import Any

import brute_force as brute
import pytest
import torch
from group_models import GROUPS, Net, converted
from test_convert import Snapshot
from torch import Tensor, nn

import rpg_kernels as rpg
from rpg_kernels.conversion.groups import share_out
from rpg_kernels.models import blocks, resnet34
from rpg_kernels.models.resnet import ResNet, share_blocks


class Random(nn.Module):
    """Convolutions, strided ones among them, and linear layers in a random order of widths."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 3 * 12 * 12)
        channels, convolutions = 3, []
        for _ in range(draw.randint(2, 4)):
            out, kernel = draw.choice([8, 12, 16]), draw.choice([1, 3])
            stride = draw.choice([1, 1, 2])
            convolutions.append(nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2))
            channels = out
        self.convolutions = nn.Sequential(*convolutions)
        linears = []
        for _ in range(draw.randint(2, 4)):
            out = draw.choice([16, 24, 40])
            linears.append(nn.Linear(channels, out))
            channels = out
        self.linears = nn.Sequential(*linears)

    def forward(self, tokens: Tensor) -> Tensor:
        images = self.words(tokens).view(-1, 3, 12, 12)
        return self.linears(self.convolutions(images).tanh().mean((2, 3)))


@pytest.mark.parametrize("seed", range(6))
def test_each_group_is_a_bank_by_hand_with_its_layers_in_order(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = Random(draw).double()
    shapes = {n: m.weight.shape for n, m in model.named_modules() if hasattr(m, "weight")}
    strides = {n: getattr(m, "stride", (1,)) for n, m in model.named_modules()}
    parts: dict[str, list[str]] = {"a": [], "b": [], "c": [], "": []}
    names = list(shapes)
    for i, name in enumerate(draw.sample(names, len(names))):
        parts[["a", "b", "c"][i] if i < 3 else draw.choice(list(parts))].append(name)
    counts = {n: sum(shapes[name].numel() for name in parts[n]) for n in "abc"}
    settings: dict[str, dict[str, Any]] = {
        name: {
            "dof": 8 * draw.randint(1, counts[name] // 16),
            "laps": draw.choice([None, 1, 2]),
            "granularity": draw.choice([1, 4, 8]),
            "reflect": draw.choice(["vector", "element"]),
            "seed": draw.randint(0, 99),
        }
        for name in "abc"
    }
    groups = [
        rpg.Group(n, lambda module, name, n=n: name in parts[n], **settings[n]) for n in "abc"
    ]
    rpg.convert(model, rpg.RPGConfig(scale="fan_in", groups=groups))

    assert [name for name, _ in model.named_children()][:3] == [f"rpg_bank_{n}" for n in "abc"]
    by_hand = {n: rpg.ParameterBank(**settings[n], dtype=torch.float64) for n in "abc"}
    weights = {}
    for n, bank in by_hand.items():
        with torch.no_grad():
            bank.weight.copy_(getattr(model, f"rpg_bank_{n}").weight)
        for name in names:
            if name in parts[n]:
                weight = model.get_submodule(name).weight
                taps = 1 if bank.generator.laps and max(strides[name]) > 1 else None
                weights[name] = bank.place(shapes[name], scale=weight.scale, taps=taps)
                assert torch.equal(weight.unpack(), weights[name].unpack())
                assert torch.equal(brute.unpack(weight, brute.ring(bank)), weight.unpack())
    assert set(weights) == set(names) - set(parts[""])

    tokens = torch.randint(20, (5,))
    dense = rpg.materialize(model)
    model(tokens).square().sum().backward()
    dense(tokens).square().sum().backward()
    for n, bank in by_hand.items():
        grads = [
            brute.pack(weights[name], dense.get_submodule(name).weight.grad) for name in parts[n]
        ]
        torch.testing.assert_close(getattr(model, f"rpg_bank_{n}").weight.grad, sum(grads))
        assert bank.layers == len(grads)


def test_a_pattern_is_of_a_layer_or_of_what_is_around_it() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(12)
            )

    def read(**patterns: str) -> dict[str, list[str]]:
        groups = [rpg.Group(name, pattern, dof=64) for name, pattern in patterns.items()]
        record = rpg.summary(rpg.convert(Deep(), rpg.RPGConfig(groups=groups)))
        return {n: [x.name for x in record.layers if x.bank == f"rpg_bank_{n}"] for n in patterns}

    assert read(one="blocks.1", rest="blocks.1[01]") == {
        "one": ["blocks.1.0", "blocks.1.2"],
        "rest": ["blocks.10.0", "blocks.10.2", "blocks.11.0", "blocks.11.2"],
    }
    assert read(firsts="blocks.*.0")["firsts"] == [f"blocks.{i}.0" for i in range(12)]
    assert len(read(every="blocks")["every"]) == 24


def test_a_layer_is_matched_under_each_of_its_names() -> None:
    net = Net()
    net.alias = net.mid
    rpg.convert(net, rpg.RPGConfig(dof=64, groups=[rpg.Group("x", "alias")]))
    assert net.alias is net.mid
    assert net.mid.rpg_bank is net.rpg_bank_x


def test_tied_layers_of_one_group_read_one_virtual_weight() -> None:
    net = Net()
    net.enc[2].weight = net.enc[0].weight
    rpg.convert(net, rpg.RPGConfig(dof=256, groups=GROUPS))
    assert net.enc[0].weight is net.enc[2].weight
    assert net.rpg_bank_enc.layers == 1


def test_what_a_group_says_replaces_the_config() -> None:
    config = rpg.RPGConfig(
        dof=512, laps=2, granularity=16, seed=3, init_std=0.5, scale="fan_in",
        groups=[
            rpg.Group("plain", "enc"),
            rpg.Group("other", "mid", laps=None, granularity=8, seed=9, init_std=0.25,
                      scale="fan_out", reflect="none", dof=128),
        ],
    )  # fmt: skip
    net = rpg.convert(Net(), config)
    plain, other = net.rpg_bank_plain, net.rpg_bank_other
    assert (plain.dof, plain.generator.laps, plain.granularity) == (512, 2, 16)
    assert (plain.generator.seed, plain.init_std) == (3, 0.5)
    assert (other.dof, other.generator.laps, other.granularity) == (128, None, 8)
    assert (other.generator.seed, other.init_std, other.generator.reflect) == (9, 0.25, "none")
    assert net.mid.weight.scale == pytest.approx((2 / 32) ** 0.5 / 0.25)


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_whole_slots_in_proportion(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 6)
    weights = [draw.randint(1, 10**6) for _ in range(count)]
    slots = [2 ** draw.randint(0, 7) for _ in range(count)]
    dof = draw.randint(sum(slots), 10**5 + sum(slots))
    shares = share_out(dof, weights, slots)
    assert all(
        share % slot == 0 and share >= slot for share, slot in zip(shares, slots, strict=True)
    )
    assert dof - max(slots) < sum(shares) <= dof
    above = [i for i in range(count) if shares[i] > slots[i]]
    rest = dof - sum(slots[i] for i in range(count) if i not in above)
    for i in above:  # those above one slot are within one slot of what their weights say
        exact = rest * weights[i] / sum(weights[k] for k in above)
        assert abs(shares[i] - exact) <= sum(slots)
    with pytest.raises(ValueError, match=f"dof: got {sum(slots) - 1}, wanted at least"):
        share_out(sum(slots) - 1, weights, slots)


def test_groups_with_a_dof_of_their_own_take_none_of_the_configs() -> None:
    net = converted(dof=384, granularity=64, groups=[*GROUPS, rpg.Group("own", "head", dof=64)])
    assert [net.rpg_bank_enc.dof, net.rpg_bank_mid.dof, net.rpg_bank_own.dof] == [256, 128, 64]


def test_least_squares_fits_each_bank() -> None:
    net = Net()
    with torch.no_grad():
        net.mid.weight.fill_(2.0)
        net.enc[0].weight.fill_(-1.0)
        net.enc[2].weight.fill_(-1.0)
    config = rpg.RPGConfig(dof=256, reflect="none", groups=GROUPS)
    rpg.convert(net, config, init="least_squares")
    for layer, value in ((net.mid, 2.0), (net.enc[0], -1.0), (net.enc[2], -1.0)):
        torch.testing.assert_close(layer.weight.unpack(), torch.full((32, 32), value))
    assert [x.residual for x in rpg.summary(net).layers] == pytest.approx([0, 0, 0], abs=1e-6)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"groups": [rpg.Group("x", "encoder")]}, "'x', whose 'encoder' matches no layer"),
    "nothing with a function": ({"groups": [rpg.Group("x", lambda m, n: False)]}, "matches no"),
    "nothing to share": ({"groups": [rpg.Group("x", "frozen")]}, "frozen: its weight is frozen"),
    "overlap": ({"groups": [*GROUPS, rpg.Group("y", "enc.2")]}, "'enc' and 'y', .* layer enc.2"),
    "larger than the group": ({"dof": 4000}, "at most 2048, its virtual weights"),
    "less than a slot": ({"granularity": 64, "dof": 100}, "at least 128, a slot for each"),
    "laps": ({"laps": 8, "dof": 1024}, "group 'enc': laps: got 8, wanted at most 3"),
    "meta": ({"init": "least_squares", "meta": True}, "group 'mid': init: got 'least_squares'"),
    "dtypes": ({"dtype": True}, "group 'enc': model: got layers of several dtypes"),
    "devices": ({"device": True}, "group 'enc': model: got layers of several devices"),
    "ties": ({"tied": True}, "'enc' with layer enc.0 and 'mid' with mid, which are tied"),
    "a filter": ({"filter_fn": lambda m, n: True}, "filter_fn: got a function beside groups"),
    "a name that is taken": ({"taken": True}, "another attribute rpg_bank_mid"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_refused_conversion_changes_nothing(what: str) -> None:
    given, message = BAD[what]
    given = {"dof": 256, "granularity": 8, "groups": GROUPS, **given}
    net = Net()
    net.frozen.requires_grad_(False)
    if given.pop("tied", False):
        net.mid.weight = net.enc[0].weight
    if given.pop("dtype", False):
        net.enc[2].half()
    if given.pop("device", False):
        net.enc[2].to("meta")
    if given.pop("meta", False):
        net.mid.to("meta")
    if given.pop("taken", False):
        net.rpg_bank_mid = None
    how = {key: given.pop(key) for key in ("init", "filter_fn") if key in given}
    real = [n for n, p in net.named_parameters() if not p.is_meta]
    before = Snapshot(net) if len(real) == len(list(net.parameters())) else None
    modules = [(n, id(m)) for n, m in net.named_modules()]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message) as raised:
        rpg.convert(net, rpg.RPGConfig(**given), **how)
    assert "\n" not in str(raised.value)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(n, id(m)) for n, m in net.named_modules()] == modules
    if before is not None:
        before.check()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rpg.RPGConfig(groups=GROUPS), "dof: got None, and group 'enc' has none"),
        (lambda: rpg.RPGConfig(5, groups=[rpg.Group("x", "y", dof=5)]), "every group has a dof"),
        (lambda: rpg.RPGConfig(5, groups=[GROUPS[0], GROUPS[0]]), "two called 'enc'"),
        (lambda: rpg.RPGConfig(5, groups=[5]), "groups: got a int among them"),
        (lambda: rpg.RPGConfig(5, groups="enc"), "groups: got a str, wanted a sequence"),
        (lambda: rpg.RPGConfig(5, groups=[rpg.Group("x", "y", window=8)]), "'x': window: got 8"),
        (lambda: rpg.RPGConfig(5, groups=GROUPS).generator, "each has a generator of its own"),
        (lambda: rpg.Group("a b", "y"), "name: got 'a b', wanted letters"),
        (lambda: rpg.Group("", "y"), "name: got '', wanted letters"),
        (lambda: rpg.Group(5, "y"), r"name: got 5 \(int\), wanted a str"),
        (lambda: rpg.Group("x", ""), "'x': got layers '', wanted a pattern"),
        (lambda: rpg.Group("x", ["y"]), "'x': got layers .*, wanted a pattern"),
        (lambda: rpg.Group("x", "y", lap=2), "'x': got lap, wanted settings among"),
        (lambda: rpg.Group("x", "y", groups=()), "'x': got groups, wanted settings among"),
        (lambda: rpg.Group("x", "y", laps=0), "'x': laps: got 0"),
        (lambda: rpg.Group("x", "y", dof=0), "'x': dof: got 0"),
        (lambda: rpg.Group("x", "y", window=9), "'x': window: got 9"),
        (lambda: rpg.Group("x", "y", granularity=3), "'x': granularity: got 3"),
        (lambda: rpg.Group("x", "y", scale="wide"), "'x': scale: got 'wide'"),
        (lambda: rpg.Group("x", "y", seed=1.5), r"'x': seed: got 1.5 \(float\)"),
    ],
)
def test_what_cannot_be_is_said_at_construction(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_records_are_values() -> None:
    one = rpg.Group("x", "y", laps=2, seed=1)
    assert one == rpg.Group("x", "y", seed=1, laps=2) != rpg.Group("x", "y", laps=2)
    assert hash(one) == hash(rpg.Group("x", "y", seed=1, laps=2))
    assert eval(repr(one), {"Group": rpg.Group}) == one
    config = rpg.RPGConfig(dof=64, groups=[one])
    assert config.groups == (one,)
    assert hash(config) == hash(rpg.RPGConfig(dof=64, groups=(one,)))


def test_a_layer_that_cannot_be_shared_is_named_in_a_warning() -> None:
    net = Net()
    net.enc[2].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=re.escape("not shared, though asked for: enc.2")):
        rpg.convert(net, rpg.RPGConfig(dof=256, groups=GROUPS))
    assert type(net.enc[2]) is nn.Linear


def test_a_bank_for_each_stage_of_a_resnet() -> None:
    with torch.device("meta"):
        model = resnet34(rpg=blocks(1_000_000, laps=2, granularity=32))
    record = rpg.summary(model)
    for layer in record.layers:
        assert layer.bank == f"rpg_bank_{layer.name.split('.')[0]}"
    assert (len(record.layers), len(record.banks), record.virtual_weights) == (35, 4, 21_258_240)
    for i in range(1, 5):
        count = sum(x.virtual_weights for x in record.layers if x.bank.endswith(str(i)))
        share = getattr(model, f"rpg_bank_layer{i}").dof
        assert share == pytest.approx(1_000_000 * count / 21_258_240, abs=32)
    assert set(record.skipped) >= {"conv1", "fc"}


def test_match_is_fan_out_in_groups_of_a_resnet() -> None:
    groups = [rpg.Group("one", "layer1", scale="match"), rpg.Group("two", "layer2", scale="fan_in")]
    with torch.device("meta"):
        model = share_blocks(ResNet((1, 1), 4, width=8), rpg.RPGConfig(dof=512, groups=groups))
    assert model.layer1[0].conv1.weight.scale == pytest.approx(
        (2 / 72) ** 0.5 / model.rpg_bank_one.init_std
    )
    assert model.layer2[0].conv2.weight.scale == pytest.approx(
        (2 / 144) ** 0.5 / model.rpg_bank_two.init_std
    )
    assert rpg.summary(model).layers[2].std == pytest.approx((2 / 72) ** 0.5)


def test_a_bank_may_be_as_large_as_its_group() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    rpg.convert(net, rpg.RPGConfig(granularity=8, groups=[rpg.Group("all", "0", dof=256)]))
    assert net.rpg_bank_all.dof == 256


def test_patterns_are_of_the_plain_model() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(16, 16)), nn.Linear(16, 4))
    net[0] = torch.compile(net[0])
    rpg.convert(net, rpg.RPGConfig(granularity=8, groups=[rpg.Group("all", "0.0", dof=128)]))
    assert net.rpg_bank_all.layers == 1
