"""Layers of sequences and transposed layers: as torch's, and converted there and back."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

import rpg_kernels as rpg
from rpg_kernels import proof
from rpg_kernels.explanation import reached
from rpg_kernels.ops._library import CHECKS

F64 = torch.float64
CONFIG = rpg.RPGConfig(dof=512, granularity=8)
Kind = type[rpg.nn.VirtualLayer]


def every(module: nn.Module, name: str) -> bool:
    return True


def same(layer: Any, x: Tensor, **how: Any) -> None:
    """The layer is what torch's is with its weight: outputs, gradients, attributes."""
    dense = rpg.materialize(layer)
    assert type(dense) is layer.dense_type
    assert isinstance(layer, layer.dense_type)
    hidden = {"_parameters", "_buffers", "_modules", "_reversed_padding_repeated_twice"}
    assert {k: v for k, v in vars(dense).items() if k not in hidden}.items() <= vars(layer).items()
    xs = [x.clone().requires_grad_() for _ in range(2)]
    got, wanted = layer(xs[0], **how), dense(xs[1], **how)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)
    dy = torch.randn_like(wanted)
    leaves = (layer.rpg_bank.weight, layer.bias), (dense.weight, dense.bias)
    grads = torch.autograd.grad(got, (xs[0], *leaves[0]), dy)
    dx, dw, dbias = torch.autograd.grad(wanted, (xs[1], *leaves[1]), dy)
    wanted_grads = (dx, layer.virtual_weight.pack(dw), dbias)
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-10, atol=1e-11)


def made(kind: Any, *arguments: Any, **how: Any) -> Any:
    return kind(*arguments, bank=rpg.ParameterBank(256, 8, dtype=F64), **how)


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, (1,), "same", "valid"])
@pytest.mark.parametrize("kernel", [3, 4])
def test_padding_modes_of_sequences(kernel: int, padding: Any, mode: str) -> None:
    layer = made(
        rpg.nn.Conv1d, 4, 6, kernel, padding=padding, dilation=2, padding_mode=mode, groups=2
    )
    x = torch.randn(2, 4, 11, dtype=F64)
    same(layer, x)
    same(layer, x[0])


def test_strided_sequences_and_empty_batches() -> None:
    layer = made(rpg.nn.Conv1d, 4, 6, (5,), stride=3, padding=1)
    same(layer, torch.randn(2, 4, 11, dtype=F64))
    assert layer(torch.zeros(0, 4, 11, dtype=F64)).shape == (0, 6, 3)
    assert tuple(layer.weight.shape) == (6, 4, 5)
    assert "6, kernel_size=(5,), stride=(3,), padding=(1,), bias=True" in repr(layer)


@pytest.mark.parametrize("form", ["sizes", "shape", "single", "shape of a single"])
@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 2), "stride": (2, 3), "output_padding": (1, 0), "groups": 2},
        {"kernel_size": 2, "dilation": 3, "output_padding": 2},
    ],
    ids=str,
)
def test_transposed_layers_and_sizes_of_their_results(how: dict[str, Any], form: str) -> None:
    layer = made(rpg.nn.ConvTranspose2d, 4, 6, **how)
    x = torch.randn(2, 4, 5, 6, dtype=F64)
    x = x[0] if "single" in form else x
    same(layer, x)
    least = layer(x, output_size=None).shape[-2:]
    least = [n - more for n, more in zip(least, layer.output_padding, strict=True)]
    for more in range(max(layer.stride)):
        size = [n + min(more, s - 1) for n, s in zip(least, layer.stride, strict=True)]
        leading = [*x.shape[:-3], 6] if "shape" in form else []
        same(layer, x, output_size=leading + size)
    for size, wanted in (
        ([n - 1 for n in least], f"sizes from \\[{least[0]}, {least[1]}\\] to"),
        ([n + s for n, s in zip(least, layer.stride, strict=True)], "sizes from"),
        ([9], "2 of x's . sizes, or all of them"),
    ):
        with pytest.raises(ValueError, match=f"output_size: got .*, wanted {wanted}"):
            layer(x, output_size=size)


def test_transposed_sequences() -> None:
    layer = made(rpg.nn.ConvTranspose1d, 4, 6, 5, stride=3, padding=1, output_padding=2, groups=2)
    x = torch.randn(2, 4, 7, dtype=F64)
    same(layer, x)
    same(layer, x[0], output_size=(22,))
    assert layer(x[:0]).shape == (0, 6, 23)
    assert "output_padding=(2,), groups=2" in repr(layer)


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        (
            rpg.nn.Conv1d,
            {"stride": (1, 2)},
            r"stride: got \(1, 2\), wanted an int or a tuple of one",
        ),
        (rpg.nn.Conv1d, {"padding": "full"}, "padding: got 'full', wanted one of 'same', 'valid'"),
        (rpg.nn.Conv1d, {"padding": "same", "stride": 2}, r"stride: got \(2,\), wanted 1 with"),
        (
            rpg.nn.ConvTranspose1d,
            {"padding_mode": "reflect"},
            "padding_mode: got 'reflect', wanted",
        ),
        (rpg.nn.ConvTranspose2d, {"padding": "same"}, "padding: got same, wanted an int or a pair"),
        (rpg.nn.ConvTranspose2d, {"output_padding": -1}, "output_padding: got -1, wanted an int"),
        (rpg.nn.ConvTranspose2d, {"groups": 4}, "groups: got 4, wanted a divisor of in_channels 8"),
    ],
)
def test_refused_layers_take_no_place(kind: Any, how: dict[str, Any], message: str) -> None:
    bank = rpg.ParameterBank(256)
    with pytest.raises(ValueError, match=message):
        kind(8, 6, 3, bank=bank, **how)
    assert bank.layers == 0


class Decoder(nn.Module):
    """Sound to codes, codes to images; a transposed layer comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 16, 5)
        self.down = nn.Conv1d(16, 32, 4, stride=2, padding=1)
        self.same = nn.Conv1d(32, 32, 3, padding="same", padding_mode="circular", groups=2)
        self.longer = nn.ConvTranspose1d(32, 24, 4, stride=2)
        self.up = nn.ConvTranspose2d(24, 16, 3, stride=2, output_padding=1, bias=False)
        self.wide = nn.ConvTranspose2d(16, 16, (3, 4), stride=(1, 2), padding=1, groups=2)
        self.out = nn.ConvTranspose2d(16, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.down(self.stem(x).relu()).relu())
        x = self.longer(x).relu().unflatten(2, (2, -1))
        x = self.up(x, output_size=(6, 22)).relu()
        return self.out(self.wide(x).relu())


SHARED = ["down", "same", "longer", "up", "wide"]
X = torch.randn(3, 2, 22, generator=torch.Generator().manual_seed(1))


def decoder(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = rpg.RPGConfig(**{"dof": 512, "granularity": 8, **changes})
    return rpg.convert(Decoder(), config)


@pytest.mark.parametrize("laps", [None, 4])
def test_a_decoder_is_shared_trained_saved_and_dense_again(
    laps: int | None, tmp_path: Path
) -> None:
    net = decoder(laps=laps)
    report = rpg.summary(net)
    assert [layer.name for layer in report.layers] == SHARED
    shapes = {layer.name: layer.shape for layer in report.layers}
    assert (shapes["down"], shapes["wide"]) == ((32, 16, 4), (16, 8, 3, 4))
    assert set(report.skipped) == {"stem", "out"}
    assert report.skipped["out"].startswith("last layer")
    taps = {None: [None] * 5, 4: [1, 3, 1, 1, 1]}
    assert [layer.taps for layer in report.layers] == taps[laps]

    dense = rpg.materialize(net)
    assert [type(m) for m in dense.modules()] == [type(m) for m in Decoder().modules()]
    assert repr(dense) == repr(Decoder())
    assert list(dense.state_dict()) == list(Decoder().state_dict())
    torch.testing.assert_close(net(X), dense(X))
    optimizer = torch.optim.SGD(rpg.param_groups(net, lr=0.05))
    losses = []
    for _ in range(3):
        loss = net(X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)

    rpg.save(net, tmp_path / "net.safetensors")
    loaded = rpg.load(decoder(1, laps=laps), tmp_path / "net.safetensors")
    assert torch.equal(loaded(X), net(X))
    other = decoder(2, laps=laps)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(X), net(X))
    assert torch.equal(copy.deepcopy(net)(X), net(X))
    with torch.device("meta"):
        empty = rpg.convert(Decoder(), rpg.RPGConfig(dof=512, granularity=8, laps=laps))
    assert rpg.initialize(empty)(X).isfinite().all()
    assert torch.equal(rpg.load(empty, tmp_path / "net.safetensors")(X), net(X))


def test_the_nearest_bank_is_exact_where_it_is_large_enough() -> None:
    torch.manual_seed(0)
    net = Decoder()
    wanted = net(X)
    rpg.convert(net, rpg.RPGConfig(dof=20_000, granularity=8), init="least_squares")
    assert max(layer.residual for layer in rpg.summary(net).layers) < 1e-6
    torch.testing.assert_close(net(X), wanted)


KINDS: list[tuple[Kind, int]] = [
    (rpg.nn.Conv1d, 1),
    (rpg.nn.ConvTranspose1d, 1),
    (rpg.nn.ConvTranspose2d, 2),
]


@pytest.mark.parametrize(("kind", "axes"), KINDS, ids=lambda k: getattr(k, "__name__", ""))
def test_initial_values_are_spread_as_torchs(kind: Any, axes: int) -> None:
    layer, dense = kind(24, 96, 5, stride=2, groups=2), kind.dense_type(24, 96, 5, 2, groups=2)
    fan = dense.weight[0].numel()
    for values in (dense.weight, layer.weight.unpack()):
        assert float(values.detach().std()) == pytest.approx(1 / math.sqrt(3 * fan), rel=0.05)
    assert 0.8 / math.sqrt(fan) < float(layer.bias.detach().abs().max()) <= 1 / math.sqrt(fan)
    for mode in ("fan_in", "fan_out"):
        net = nn.Sequential(copy.deepcopy(dense))
        nn.init.kaiming_normal_(net[0].weight, mode=mode)
        std = float(net[0].weight.detach().std())
        rpg.convert(net, CONFIG, every)
        rule = rpg.summary(net).layers[0].std
        assert rule == pytest.approx(std, rel=0.05)
        by_rule = kind(24, 96, 5, groups=2, scale=mode, bank=rpg.ParameterBank(256))
        assert by_rule.weight.scale * by_rule.rpg_bank.init_std == pytest.approx(rule)


def test_a_convolution_and_its_adjoint_are_tied() -> None:
    """[32, 16, 3, 3] is a weight of 16 channels to 32, and of a transposed one back."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.Conv2d(16, 32, 3),
        nn.ConvTranspose2d(32, 16, 3),
        nn.Conv2d(16, 3, 1),
    )
    net[2].weight = net[1].weight
    rpg.convert(net, CONFIG)
    assert rpg.summary(net).layers[1].tied_to == "1"
    assert net[2].weight is net[1].weight
    dense = rpg.materialize(net)
    assert dense[1].weight is dense[2].weight
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(dense(x), net(x))
    tied = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"1: its weight is tied to 0.weight, which is not shared"):
        rpg.convert(tied, CONFIG, lambda module, name: name == "1")


@pytest.mark.parametrize(("kind", "axes"), KINDS, ids=lambda k: getattr(k, "__name__", ""))
def test_layers_of_their_own(kind: Any, axes: int) -> None:
    with pytest.raises(
        TypeError, match=f"a single {kind.__name__}, .* build rpg.nn.{kind.__name__}"
    ):
        rpg.convert(kind.dense_type(8, 8, 3), CONFIG)
    layer = kind(8, 8, 3, stride=2).eval()
    x = torch.randn(2, 8, *[6] * axes)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d)[axes - 1](8).eval()
    norm.running_mean.normal_()
    fused = fuse_conv_bn_eval(layer, norm, transpose=layer.transposed)
    assert type(fused) is kind.dense_type
    torch.testing.assert_close(fused(x), norm(layer(x)), rtol=1e-4, atol=1e-5)
    assert rpg.explain(layer, x).op == kind.rpg_operator
    call = reached(layer, x)
    dy = getattr(torch.ops.rpg_kernels, call.op)(*call.operands, "")
    for derivative in proof._backward(call, dy):
        CHECKS[derivative.op](*derivative.operands)
    proved = [said.op for said in rpg.prove(layer, x, progress=False)]
    assert proved == [said.op for said in rpg.prove(layer, batches=[2], progress=False)]
    assert sorted(proved) == ["conv2d", "conv2d_bank_grad", "conv2d_input_grad"]
    layer.weight.normal_(std=0.5)
    assert float(layer.weight.unpack().std()) == pytest.approx(0.5, rel=0.1)
