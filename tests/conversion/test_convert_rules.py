"""convert: which layers it shares, why not the others, and how the shared ones are scaled."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import rpg_kernels as rpg

CONFIG = rpg.RPGConfig(dof=256, granularity=8)


def every(module: nn.Module, name: str) -> bool:
    return True


def chain(*middle: nn.Module) -> nn.Sequential:
    """Layers between a stem "0" and a classifier."""
    return nn.Sequential(nn.Linear(8, 8), *middle, nn.Linear(8, 8), nn.Linear(8, 3))


class ConvNet(nn.Module):
    """A stem, hidden layers of each kind that can be shared, norms, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU())
        self.embed = nn.Embedding(12, 32)
        self.mix = nn.Linear(32, 32)
        self.scale = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.body(self.norm(self.stem(x)).relu()).mean((2, 3))
        return self.head(self.scale(self.mix(x + self.embed(labels))))


def test_default_rule_skips_stem_classifier_norms_and_biases() -> None:
    model = ConvNet()
    kept = {name: p for name, p in model.named_parameters() if "mix.w" not in name}
    rpg.convert(model, CONFIG)
    record = rpg.summary(model)
    assert [x.name for x in record.layers] == ["body.0", "embed", "mix"]
    assert [x.kind for x in record.layers] == ["conv2d", "embedding", "linear"]
    assert record.skipped == {
        "norm": "BatchNorm2d has no virtual counterpart and keeps its own parameters",
        "body.1": "GroupNorm has no virtual counterpart and keeps its own parameters",
        "scale": "LayerNorm has no virtual counterpart and keeps its own parameters",
        "stem": "first layer (stem), kept by the default rule",
        "head": "last layer (classifier), kept by the default rule",
    }
    after = dict(model.named_parameters())
    gone = {"body.0.weight", "embed.weight"}
    assert set(after) == set(kept) - gone | {"rpg_bank.weight"}
    for name in set(kept) - gone:
        assert after[name] is kept[name], f"{name} must stay the parameter it was"


def test_filter_sees_every_able_layer_by_name_and_decides() -> None:
    asked = []

    def only_linear(module: nn.Module, name: str) -> bool:
        asked.append((name, type(module)))
        return isinstance(module, nn.Linear)

    model = rpg.convert(ConvNet(), CONFIG, only_linear)
    assert asked == [
        ("stem", nn.Conv2d),
        ("body.0", nn.Conv2d),
        ("embed", nn.Embedding),
        ("mix", nn.Linear),
        ("head", nn.Linear),
    ]
    record = rpg.summary(model)
    assert [x.name for x in record.layers] == ["mix", "head"]
    for name in ("stem", "body.0", "embed"):
        assert record.skipped[name] == "filter_fn returned False"


def test_stem_and_classifier_are_the_models_own_also_when_they_could_not_be_shared() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    model[0].register_forward_hook(lambda *args: None)
    model[3].requires_grad_(False)
    rpg.convert(model, CONFIG)
    assert [x.name for x in rpg.summary(model).layers] == ["1", "2"]
    assert set(rpg.summary(model).skipped) == {"0", "3"}


class OwnLinear(nn.Linear):
    """A subclass may use its weight in its own way."""


def frozen() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight.requires_grad_(False)
    return layer


def hooked(register: str) -> nn.Module:
    layer = nn.Linear(8, 8)
    getattr(layer, register)(lambda *args, **kwargs: None)
    return layer


def patched() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def extended(kind: str) -> nn.Module:
    layer = nn.Linear(8, 8)
    if kind == "parameter":
        layer.gain = nn.Parameter(torch.ones(8))
    elif kind == "buffer":
        layer.register_buffer("mask", torch.ones(8))
    else:
        layer.adapter = nn.Tanh()
    return layer


def with_tensor_bias() -> nn.Module:
    layer = nn.Linear(8, 8)
    del layer.bias
    layer.bias = torch.zeros(8)
    return layer


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def halved() -> nn.Module:
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


UNABLE = {
    "subclass": (lambda: OwnLinear(8, 8), "OwnLinear is a subclass of Linear"),
    "frozen": (frozen, "frozen"),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), ""),
    "weight_norm_no_bias": (lambda: parametrizations.weight_norm(nn.Linear(8, 8, bias=False)), ""),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), ""),
    "own_parametrization": (halved, ""),
    "forward_hook": (lambda: hooked("register_forward_hook"), "hooks"),
    "forward_pre_hook": (lambda: hooked("register_forward_pre_hook"), "hooks"),
    "backward_hook": (lambda: hooked("register_full_backward_hook"), "hooks"),
    "backward_pre_hook": (lambda: hooked("register_full_backward_pre_hook"), "hooks"),
    "state_dict_hook": (lambda: hooked("register_state_dict_post_hook"), "hooks"),
    "state_dict_pre_hook": (lambda: hooked("register_state_dict_pre_hook"), "hooks"),
    "load_pre_hook": (lambda: hooked("register_load_state_dict_pre_hook"), "hooks"),
    "load_post_hook": (lambda: hooked("register_load_state_dict_post_hook"), "hooks"),
    "own_forward": (patched, "forward"),
    "own_parameter": (lambda: extended("parameter"), "gain"),
    "own_buffer": (lambda: extended("buffer"), "mask"),
    "own_module": (lambda: extended("module"), "adapter"),
    "tensor_bias": (with_tensor_bias, "bias"),
    "weight_norm_conv1d": (
        lambda: parametrizations.weight_norm(nn.Conv1d(8, 8, 3)),
        "ParametrizedConv1d is a subclass of Conv1d",
    ),
    "old_weight_norm": (
        lambda: torch.nn.utils.weight_norm(nn.ConvTranspose2d(8, 8, 3)),
        "not a plain parameter",
    ),
    "conv3d": (lambda: nn.Conv3d(8, 8, 3), "Conv3d has no virtual counterpart"),
    "transposed": (lambda: nn.ConvTranspose3d(8, 8, 3), "ConvTranspose3d has no virtual"),
    "lazy_conv1d": (lambda: nn.LazyConv1d(8, 3), "LazyConv1d is a subclass of Conv1d"),
    "bilinear": (lambda: nn.Bilinear(8, 8, 8), "Bilinear has no virtual counterpart"),
    "lstm": (lambda: nn.LSTM(8, 8), "LSTM has no virtual counterpart"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "MultiheadAttention has no virtual"),
    "embedding_bag": (lambda: nn.EmbeddingBag(8, 8), "EmbeddingBag has no virtual counterpart"),
    "complex": (lambda: nn.Linear(8, 8, dtype=torch.complex64), "complex64"),
    "lazy": (lambda: nn.LazyLinear(8), "LazyLinear is a subclass of Linear"),
    "max_norm": (lambda: nn.Embedding(8, 8, max_norm=1.0), "max_norm"),
    "sparse": (lambda: nn.Embedding(8, 8, sparse=True), "sparse"),
    "by_frequency": (lambda: nn.Embedding(8, 8, scale_grad_by_freq=True), "scale_grad_by_freq"),
}


@pytest.mark.parametrize("case", UNABLE)
@pytest.mark.filterwarnings("ignore:'?torch.nn.utils.weight_norm")
def test_layers_that_cannot_be_shared_stay_and_say_why(case: str) -> None:
    make, reason = UNABLE[case]
    layer = make()
    model = chain(layer)
    for filter_fn in (None, every):
        fresh = chain(layer)
        rpg.convert(fresh, CONFIG, filter_fn)
        assert fresh[1] is layer
        assert not any(isinstance(m, rpg.nn.VirtualLayer) for m in layer.modules())
        skipped = rpg.summary(fresh).skipped
        assert "1" in skipped
        assert reason in skipped["1"]
    assert model[1] is layer


def test_attention_keeps_its_output_projection_and_works() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.feed = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.feed(self.attention(x, x, x, need_weights=False)[0])

    block = Block()
    projection = block.attention.out_proj
    rpg.convert(block, CONFIG, every)
    assert block.attention.out_proj is projection
    assert "subclass of Linear" in rpg.summary(block).skipped["attention.out_proj"]
    x = torch.randn(2, 5, 8)
    wanted = rpg.materialize(block)(x)
    torch.testing.assert_close(block(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(block.eval()(x), wanted)


@pytest.mark.parametrize("rule", ["match", "fan_in", "fan_out"])
@pytest.mark.parametrize("on_meta", [False, True])
def test_standard_deviation_of_every_unpacked_layer(rule: str, on_meta: bool) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(96, 160),
            nn.Conv2d(32, 48, 3),
            nn.Conv2d(64, 64, (3, 1), groups=2),
            nn.Embedding(100, 64, padding_idx=0),
        )

    if on_meta:
        with torch.device("meta"):
            model = build()
    else:
        model = build()
    shapes = [tuple(m.weight.shape) for m in model]
    config = rpg.RPGConfig(dof=50_000, granularity=16, init_std=0.3, scale=rule)
    rpg.convert(model, config, every)
    if on_meta:
        rpg.initialize(model)
    for shape, layer, record in zip(shapes, model, rpg.summary(model).layers, strict=False):
        kernel = math.prod(shape[2:])
        std = {
            "match": 1 / math.sqrt(3 * shape[1] * kernel),
            "fan_in": math.sqrt(2 / (shape[1] * kernel)),
            "fan_out": math.sqrt(2 / (shape[0] * kernel)),
        }[rule]
        if isinstance(layer, rpg.nn.Embedding):
            std = 1.0
        weight = layer.virtual_weight
        assert weight.scale == pytest.approx(std / 0.3, rel=0.02)
        assert record.std == pytest.approx(std, rel=0.02)
        assert weight.unpack().std().item() == pytest.approx(std, rel=0.05)
        assert abs(weight.unpack().mean().item()) < 0.05 * std


@pytest.mark.parametrize(
    ("rule", "linear", "conv"),
    [
        ("match", 1 / math.sqrt(3 * 64), 1 / math.sqrt(3 * 16 * 9)),
        ("fan_in", math.sqrt(2 / 64), math.sqrt(2 / (16 * 9))),
        ("fan_out", math.sqrt(2 / 32), math.sqrt(2 / (24 * 9))),
    ],
)
def test_standard_deviation_of_layers_made_by_hand(rule: str, linear: float, conv: float) -> None:
    bank = rpg.ParameterBank(dof=100_000, granularity=1, init_std=0.7)
    layers: list[tuple[rpg.nn.VirtualLayer, float]] = [
        (rpg.nn.Linear(64, 32, bank=bank, scale=rule), linear),
        (rpg.nn.Conv2d(32, 24, 3, groups=2, bank=bank, scale=rule), conv),
        (rpg.nn.Embedding(50, 40, bank=bank, scale=rule), 1.0),
    ]
    for layer, std in layers:
        assert layer.virtual_weight.scale == pytest.approx(std / 0.7)
        assert layer.virtual_weight.unpack().std().item() == pytest.approx(std, rel=0.05)
    assert rpg.nn.Linear(8, 8, bank=bank, scale=-2.5).virtual_weight.scale == -2.5


@pytest.mark.parametrize(
    "init",
    [
        lambda w: nn.init.normal_(w, std=0.3),
        lambda w: nn.init.normal_(w, std=0.02),
        lambda w: nn.init.uniform_(w, -0.7, 0.7),
        nn.init.orthogonal_,
        nn.init.xavier_uniform_,
        nn.init.kaiming_normal_,
        lambda w: nn.init.normal_(w, mean=0.5, std=0.1),
    ],
)
def test_match_follows_the_weights_that_the_model_has(init: Any) -> None:
    model = nn.Sequential(nn.Linear(128, 96), nn.Conv2d(24, 32, 3), nn.Embedding(80, 64))
    for layer in model:
        init(layer.weight.data)
    wanted = [layer.weight.square().mean().sqrt().item() for layer in model]
    rpg.convert(model, rpg.RPGConfig(dof=30_000, granularity=1), every)
    for layer, rms in zip(model, wanted, strict=False):
        got = layer.virtual_weight.unpack().square().mean().sqrt().item()
        assert got == pytest.approx(rms, rel=0.05)


def test_match_of_zeros_is_torchs_default() -> None:
    model = nn.Sequential(nn.Linear(48, 8), nn.Embedding(9, 8))
    for layer in model:
        layer.weight.data.zero_()
    rpg.convert(model, CONFIG, every)
    assert [x.std for x in rpg.summary(model).layers] == pytest.approx([1 / 12, 1.0])


def test_scales_do_not_depend_on_the_random_numbers_that_convert_saw() -> None:
    def build(torch_seed: int, device: str = "cpu") -> nn.Module:
        torch.manual_seed(torch_seed)
        with torch.device(device):
            model = nn.Sequential(nn.Linear(20, 30), nn.Conv2d(3, 8, 3), nn.Embedding(30, 8))
        return rpg.convert(model, CONFIG, every)

    records = [rpg.summary(build(*how)).layers for how in ((0,), (1,), (2,), (3, "meta"))]
    scales = [[x.scale for x in record] for record in records]
    assert scales[0] == scales[1] == scales[2] == scales[3]


def test_norms_biases_and_modes_keep_their_values() -> None:
    model = ConvNet()
    model.body.eval()
    model.mix.bias.requires_grad_(False)
    model.mix.bias.data.fill_(0.25)
    model.norm.running_mean.fill_(3)
    rpg.convert(model, CONFIG)
    assert [model.training, model.body.training, model.body[0].training] == [True, False, False]
    assert model.mix.training
    assert not model.mix.bias.requires_grad
    assert model.mix.bias.eq(0.25).all()
    assert model.norm.running_mean.eq(3).all()
    model.eval()
    assert not model.mix.training


def test_a_weight_of_zeros_stays_dense() -> None:
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    nn.init.zeros_(net[1].weight)
    rpg.convert(net, rpg.RPGConfig(dof=128))
    skipped = rpg.summary(net).skipped
    assert "starts as zeros" in skipped["1"]
    assert isinstance(net[2], rpg.nn.Linear)
    assert isinstance(net[3], rpg.nn.Linear)


HELD = {
    "list": lambda layer: [layer],
    "tuple": lambda layer: (nn.ReLU(), layer),
    "dict": lambda layer: {"a": layer},
    "attribute": lambda layer: layer,
    "pairs": lambda layer: [("a", layer)],
    "key": lambda layer: {layer: 1},
    "frozenset": lambda layer: frozenset([layer]),
    "method": lambda layer: layer.forward,
    "partial": lambda layer: functools.partial(layer),
    "closure": lambda layer: lambda x: layer(x),
}


@pytest.mark.parametrize("kind", HELD)
def test_a_layer_that_a_plain_attribute_holds_too_stays_dense(kind: str) -> None:
    """Replaced among the children alone, it would go on computing with weights of its own."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.second = nn.Linear(16, 16)
            self.__dict__["steps"] = HELD[kind](self.first)

    model = Network()
    with pytest.warns(UserWarning, match="steps"):
        rpg.convert(model, rpg.RPGConfig(dof=64, granularity=8), lambda m, name: True)
    assert type(model.first) is nn.Linear
    assert isinstance(model.second, rpg.nn.Linear)
    assert "steps" in rpg.summary(model).skipped["first"]
