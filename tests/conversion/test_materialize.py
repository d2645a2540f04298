"""materialize: back to plain torch.nn, the same function, nothing of ours left."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import rpg_kernels as rpg

DOUBLE = torch.float64
CONFIG = rpg.RPGConfig(dof=256, granularity=8)


def every(module: nn.Module, name: str) -> bool:
    return True


class Net(nn.Module):
    """Every kind of layer, one module called twice, one weight tied."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect")
        self.conv = nn.Conv2d(8, 16, (3, 1), stride=2, dilation=(1, 2), groups=4, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.embed = nn.Embedding(9, 16, padding_idx=3)
        self.words = nn.Embedding(12, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 12)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.norm(self.conv(self.stem(x))).mean((2, 3))
        x = self.mix(self.mix(x + self.embed(labels)).tanh() + self.words(labels))
        return self.head(x)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 9, 8, dtype=DOUBLE), torch.tensor([3, 0, 8, 3])


@pytest.mark.parametrize("reflect", ["element", "vector", "none"])
def test_the_same_function_in_fp64(reflect: str) -> None:
    config = rpg.RPGConfig(dof=256, granularity=8, reflect=reflect)
    model = rpg.convert(Net().double(), config, every)
    dense = rpg.materialize(model)
    for training in (False, True):
        x, labels = inputs()
        xs = [x.clone().requires_grad_() for _ in range(2)]
        got = dense.train(training)(xs[0], labels)
        wanted = model.train(training)(xs[1], labels)
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)
        got.square().sum().backward()
        wanted.square().sum().backward()
        torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dense.norm.running_var, model.norm.running_var)
    for name, parameter in dense.named_parameters():
        if "weight" not in name or "norm" in name:
            torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad)


def test_the_result_is_plain_torch() -> None:
    model = rpg.convert(Net(), CONFIG)
    dense = rpg.materialize(model)
    plain = Net()
    assert list(dense.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in dense.modules()] == [type(m) for m in plain.modules()]
    assert {m.__module__.split(".")[0] for m in dense.modules()} <= {"torch", Net.__module__}
    assert repr(dense) == repr(plain)
    plain.load_state_dict(dense.state_dict())
    x, labels = inputs()
    torch.testing.assert_close(plain(x.float(), labels), dense(x.float(), labels))
    assert torch.equal(dense.conv.weight, model.conv.virtual_weight.unpack())
    for layer in (dense.conv, dense.mix):
        assert isinstance(layer.weight, nn.Parameter)
        assert layer.weight.is_contiguous()
        assert layer.weight.requires_grad


def test_ties_and_repeated_modules_are_restored() -> None:
    dense = rpg.materialize(rpg.convert(Net(), CONFIG, every))
    assert dense.head.weight is dense.words.weight
    parts = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    parts.append(parts[1])
    dense = rpg.materialize(rpg.convert(parts, CONFIG, every))
    assert dense[3] is dense[1]
    assert len(list(dense.parameters())) == 6


def test_the_padding_row_of_the_table_is_zero() -> None:
    model = rpg.convert(Net(), CONFIG, every)
    dense = rpg.materialize(model)
    assert dense.embed.padding_idx == 3
    assert dense.embed.weight[3].eq(0).all()
    assert dense.embed.weight[2].ne(0).all()


def test_a_hand_made_tie_with_a_padding_row_keeps_the_function() -> None:
    bank = rpg.ParameterBank(dof=128, granularity=8, dtype=DOUBLE)
    table = rpg.nn.Embedding(10, 8, padding_idx=0, bank=bank)
    head = rpg.nn.Linear(8, 10, bias=False, virtual_weight=table.virtual_weight)
    for order in ((table, head), (head, table)):
        model = nn.ModuleList(order)
        dense = rpg.materialize(model)
        x = torch.randn(3, 8, dtype=DOUBLE)
        for old, new in zip(model, dense, strict=True):
            argument = x if isinstance(old, rpg.nn.Linear) else torch.arange(10)
            torch.testing.assert_close(new(argument), old(argument))


def test_the_original_is_untouched_and_nothing_is_shared_with_it() -> None:
    model = rpg.convert(Net(), CONFIG)
    before = copy.deepcopy(model.state_dict())
    modules = [(name, id(m)) for name, m in model.named_modules()]
    dense = rpg.materialize(model)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.fill_(7)
    assert [(name, id(m)) for name, m in model.named_modules()] == modules
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_every_bank_is_gone_wherever_it_was() -> None:
    bank = rpg.ParameterBank(dof=64, granularity=8)
    model = nn.ModuleDict(
        {
            "converted": rpg.convert(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), CONFIG),
            "private": rpg.nn.Linear(8, 8),
            "attached": rpg.attach(nn.Sequential(rpg.nn.Linear(8, 8, bank=bank)), bank),
            "own": nn.ModuleDict({"ring": bank, "layer": rpg.nn.Embedding(5, 8, bank=bank)}),
        }
    )
    dense = rpg.materialize(model)
    ours = (rpg.ParameterBank, rpg.nn.VirtualLayer)
    assert not [name for name, m in dense.named_modules() if isinstance(m, ours)]
    assert not [key for key in dense.state_dict() if "bank" in key or "ring" in key]
    x = torch.randn(2, 8)
    for key in ("converted", "private", "attached"):
        torch.testing.assert_close(dense[key](x), model[key](x))


def test_a_single_layer_and_a_part_of_a_weight() -> None:
    layer = rpg.nn.Conv2d(4, 6, 3, bank=rpg.ParameterBank(dof=64, granularity=8))
    dense = rpg.materialize(layer)
    assert type(dense) is nn.Conv2d
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(dense(x), layer(x))
    part = layer.virtual_weight.narrow(0, 1, 4).narrow(1, 2, 2)
    dense = rpg.materialize(rpg.nn.Conv2d(2, 4, 3, bias=False, virtual_weight=part))
    assert torch.equal(dense.weight, layer.virtual_weight.unpack()[1:5, 2:4])


def test_dtype_training_mode_frozen_bank_and_meta() -> None:
    model = rpg.convert(Net().bfloat16(), CONFIG)
    model.rpg_bank.requires_grad_(False)
    model.mix.eval()
    dense = rpg.materialize(model)
    assert dense.mix.weight.dtype == torch.bfloat16
    assert not dense.mix.weight.requires_grad
    assert dense.mix.bias.requires_grad
    assert not dense.mix.training
    assert dense.conv.training
    far = rpg.materialize(copy.deepcopy(model).to("meta"))
    assert {p.device.type for p in far.parameters()} == {"meta"}
    assert far.mix.weight.shape == (16, 16)


def test_a_dense_model_is_copied() -> None:
    model = Net()
    dense = rpg.materialize(model)
    assert dense is not model
    for key, value in model.state_dict().items():
        assert torch.equal(dense.state_dict()[key], value)


def test_there_and_back() -> None:
    # Stated scales: those of "match" would follow the weights that the bank happens to give.
    config = rpg.RPGConfig(dof=256, granularity=8, scale="fan_in")
    model = rpg.convert(Net().double(), config)
    again = rpg.convert(rpg.materialize(model), config, init="least_squares")
    # Same seed, same map: a model that lies in the image of G is met exactly.
    assert max(x.residual for x in rpg.summary(again).layers) < 1e-12
    x, labels = inputs()
    torch.testing.assert_close(again.eval()(x, labels), model.eval()(x, labels))


def test_transformer_encoder_layer_in_every_mode() -> None:
    torch.manual_seed(3)
    for options in ({}, {"norm_first": True, "activation": "gelu"}):
        model = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options),
            num_layers=2,
            enable_nested_tensor=not options,
        )
        rpg.convert(model, CONFIG, every)
        assert [x.name for x in rpg.summary(model).layers] == [
            f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)
        ]
        dense = rpg.materialize(model)
        x = torch.randn(3, 5, 16)
        mask = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [2], [4]])
        wanted = dense(x, src_key_padding_mask=mask)[~mask]
        for training in (True, False):
            for grad in (True, False):
                model.train(training)
                with torch.set_grad_enabled(grad):
                    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
                    got = model(x, src_key_padding_mask=mask)[~mask]
                    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_transformer_with_decoder() -> None:
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    rpg.convert(model, CONFIG, every)
    assert len(rpg.summary(model).layers) == 4
    source, target = torch.randn(2, 3, 16), torch.randn(2, 4, 16)
    dense = rpg.materialize(model)
    torch.testing.assert_close(model(source, target), dense(source, target), rtol=1e-4, atol=1e-5)


def test_hooks_of_a_virtual_layer_are_kept() -> None:
    model = rpg.convert(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), CONFIG)
    model[1].register_forward_hook(lambda module, args, output: 2 * output)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    x = torch.randn(2, 8)
    torch.testing.assert_close(rpg.materialize(model)(x), model(x))


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match="model: got a dict"):
        rpg.materialize({})  # type: ignore[arg-type]
