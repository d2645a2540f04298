"""Parts of a model: what torch users do with them works, or says at once why it cannot."""

from __future__ import annotations

import copy
import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel

import rpg_kernels as rpg

CONFIG = rpg.RPGConfig(dof=512)


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    gc.collect()  # models of other tests
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Net(nn.Module):
    """Two halves, both shared but for the first and the last layer."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(16, 32),
            nn.ReLU(),
            nn.Linear(32, 32, bias),
            nn.ReLU(),
            nn.Linear(32, 32, bias),
        )
        self.decoder = nn.Sequential(nn.Linear(32, 32, bias), nn.ReLU(), nn.Linear(32, 32, bias))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.encoder(x)))


def build(seed: int = 0, bias: bool = True) -> Net:
    torch.manual_seed(seed)
    return rpg.convert(Net(bias), CONFIG)


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    return rpg.convert(nn.Sequential(*layers), CONFIG)


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def loss_of(net: nn.Module, x: Tensor = X) -> Tensor:
    loss: Tensor = net(x).square().mean()
    return loss


def weights(net: nn.Module) -> list[Tensor]:
    return [
        m.weight.unpack().detach().clone()
        for m in net.modules()
        if isinstance(m, rpg.nn.VirtualLayer)
    ]


def moved(before: list[Tensor], net: nn.Module) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(before, weights(net), strict=True)]


def test_the_bank_is_the_first_child_and_appears_once() -> None:
    net = build()
    assert next(iter(net.named_children())) == ("rpg_bank", net.rpg_bank)
    for remove_duplicate in (True, False):
        names = [
            n for n, m in net.named_modules(remove_duplicate=remove_duplicate) if m is net.rpg_bank
        ]
        assert names == ["rpg_bank"]
        found = [
            n
            for n, p in net.named_parameters(remove_duplicate=remove_duplicate)
            if p is net.rpg_bank.weight
        ]
        assert found == ["rpg_bank.weight"]
    assert [k for k in net.state_dict() if "bank" in k] == [
        "rpg_bank.weight",
        "rpg_bank.map_digits",
    ]


def test_a_part_lists_holds_and_counts_the_bank_as_a_tied_parameter() -> None:
    net = build()
    for part in (net.encoder, net.decoder):
        assert sum(p is net.rpg_bank.weight for p in part.parameters()) == 1
        assert sum(m is net.rpg_bank for m in part.modules()) == 1
        assert sum("rpg_bank.weight" in key for key in part.state_dict()) == 1
    assert [n for n, _ in net.encoder.named_parameters()] == [
        "0.weight", "0.bias", "2.bias", "2.rpg_bank.weight", "4.bias",
    ]  # fmt: skip
    for name, parameter in net.encoder.named_parameters():
        assert net.encoder.get_parameter(name) is parameter
    assert list(net.encoder.state_dict(prefix="a.b."))[3] == "a.b.2.rpg_bank.weight"
    assert sum(p is net.rpg_bank.weight for p in net.parameters()) == 1


def test_registered_after_the_layers_the_bank_still_has_one_name() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            bank = rpg.ParameterBank(dof=128)
            self.first = rpg.nn.Linear(8, 8, bank=bank)
            self.second = rpg.nn.Linear(8, 8, bank=bank)
            self.ring = bank

    net, other = Late(), Late()
    assert [n for n, p in net.named_parameters() if p.dim() > 1] == ["ring.weight"]
    assert [k for k in net.state_dict() if "bias" not in k] == ["ring.weight", "ring.map_digits"]
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.ring.weight, net.ring.weight)
    # A part that is registered twice, by two of its parents.
    both = nn.ModuleList([nn.Sequential(OrderedDict(ring=net.ring)), net])
    assert len([k for k in both.state_dict() if k.endswith("map_digits")]) == 2
    both.load_state_dict(both.state_dict())


def test_the_usual_slices_drop_the_head_and_keep_the_bank() -> None:
    net = sequential()
    assert len(net) == 5
    assert type(net[0]) is type(net[-1]) is nn.Linear
    assert net.rpg_bank is net[2].rpg_bank
    for part in (net[:-1], nn.Sequential(*list(net.children())[:-1]), net[2:4], net[1:3]):
        shape = (3, 16) if part[0].__class__ is nn.Linear else (3, 32)
        assert part(torch.randn(shape)).shape == (3, 32)
        assert sum(p is net.rpg_bank.weight for p in part.parameters()) == 1
        again = copy.deepcopy(part)
        with torch.no_grad():
            for p in again.parameters():
                p.zero_()
        again.load_state_dict(part.state_dict())
        assert torch.equal(again(torch.ones(shape)), part(torch.ones(shape)))


def test_children_of_another_model_make_a_feature_extractor() -> None:
    net = build()
    part = nn.Sequential(*list(net.children())[:-1])
    assert torch.equal(part(X), net.decoder(net.encoder(X)))
    assert sum(p is net.rpg_bank.weight for p in part.parameters()) == 1


@pytest.mark.parametrize("bias", [True, False])
def test_the_state_dict_of_a_part_restores_its_function(bias: bool) -> None:
    net, other = build(0, bias), build(9, bias)
    result = other.encoder.load_state_dict(net.encoder.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other.encoder(X), net.encoder(X))
    layer = copy.deepcopy(net.encoder[2].state_dict())
    build(5, bias).encoder[2].load_state_dict(layer)


@pytest.mark.parametrize("bias", [True, False])
def test_a_part_of_a_state_dict_lacks_the_bank_and_strict_loading_says_so(bias: bool) -> None:
    net, other = build(0, bias), build(9, bias)
    before = weights(other)
    cut = {k[8:]: v for k, v in net.state_dict().items() if k.startswith("encoder.")}
    with pytest.raises(RuntimeError, match=r'Missing key.*"2\.rpg_bank\.weight"'):
        other.encoder.load_state_dict(cut)
    missing, unexpected = other.encoder.load_state_dict(cut, strict=False)
    assert (missing, unexpected) == (["2.rpg_bank.weight", "4.rpg_bank.weight"], [])
    assert not any(moved(before, other))


def test_a_part_of_another_map_is_refused() -> None:
    net = build()
    other = rpg.convert(Net(), rpg.RPGConfig(dof=512, seed=1))
    before = weights(other)
    with pytest.raises(RuntimeError, match=r"2\.rpg_bank: .*seed: got 0, wanted 1"):
        other.encoder.load_state_dict(net.encoder.state_dict())
    assert not any(moved(before, other))


def test_parts_are_saved_loaded_and_made_dense(tmp_path: Any) -> None:
    net, other = build(), build(7)
    rpg.save(net.encoder, tmp_path / "encoder")
    rpg.load(other.encoder, tmp_path / "encoder")
    assert torch.equal(other.encoder(X), net.encoder(X))
    torch.testing.assert_close(rpg.materialize(net.encoder)(X), net.encoder(X))
    assert not any("bank" in k for k in rpg.materialize(net.encoder).state_dict())
    assert len(rpg.summary(net.encoder).layers) == 2
    assert next(g["name"] for g in rpg.param_groups(net.encoder, lr=0.1)) == "bank"


COPIES: dict[str, Callable[[Net], nn.Module]] = {
    "a layer": lambda net: net.encoder[2],
    "a part": lambda net: nn.Sequential(net.encoder[2], net.encoder[3], net.encoder[4]),
    "a block": lambda net: net.decoder,
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_has_a_bank_of_its_own_that_trains_and_saves(name: str) -> None:
    net = build()
    part = COPIES[name](net)
    twin = copy.deepcopy(part)
    x = torch.randn(4, 32)
    assert torch.equal(twin(x), part(x))
    before = weights(net)
    banks = [m for m in twin.modules() if isinstance(m, rpg.ParameterBank)]
    assert len(banks) == 1
    assert banks[0] is not net.rpg_bank
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.1)
    loss_of(twin, x).backward()
    optimiser.step()
    assert not any(moved(before, net))
    assert not torch.equal(twin(x), part(x))
    third = copy.deepcopy(part)
    third.load_state_dict(twin.state_dict())
    assert torch.equal(third(x), twin(x))


def test_moves_of_a_part_move_the_bank() -> None:
    net = build()
    net.encoder.half()
    assert net.rpg_bank.weight.dtype == torch.float16
    assert net.encoder(X.half()).dtype == torch.float16
    with pytest.raises(
        TypeError, match=r"x: got torch\.float32, wanted torch\.float16, as the bank"
    ):
        net.decoder(torch.randn(2, 32))
    net.decoder.float()
    net.encoder.float()
    assert net(X).dtype == torch.float32
    net.encoder.to("meta")
    with pytest.raises(ValueError, match=r"device cpu, wanted device meta, where the bank is"):
        net.decoder(torch.randn(2, 32))


@pytest.mark.parametrize("bias", [True, False])
def test_the_two_idioms_of_freezing(bias: bool) -> None:
    net = build(bias=bias)
    net.encoder.requires_grad_(False)
    before = weights(net)
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    loss_of(net).backward()
    optimiser.step()
    assert not any(moved(before, net)), "the bank is frozen, as any tied parameter would be"
    net = build(bias=bias)
    before = weights(net)
    groups = [{"params": net.encoder.parameters(), "lr": 0.5}, {"params": net.head.parameters()}]
    optimiser = torch.optim.SGD(groups, lr=0.1)
    loss_of(net).backward()
    optimiser.step()
    assert all(moved(before, net))
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        torch.optim.SGD(
            [{"params": net.encoder.parameters()}, {"params": net.decoder.parameters()}]
        )


@pytest.mark.parametrize("bias", [True, False])
def test_freeze_stops_the_gradient_of_a_part_only(bias: bool) -> None:
    net, alone = build(bias=bias), build(bias=bias)
    assert rpg.freeze(net.encoder) is net.encoder
    assert not any(p.requires_grad for n, p in net.encoder.named_parameters() if "bank" not in n)
    loss_of(net).backward()
    # The same with the encoder's output as a constant.
    alone.head(alone.decoder(alone.encoder(X).detach())).square().mean().backward()
    torch.testing.assert_close(net.rpg_bank.weight.grad, alone.rpg_bank.weight.grad)
    assert net.encoder[0].weight.grad is None
    rpg.unfreeze(net)
    net.zero_grad()
    loss_of(net).backward()
    loss_of(whole := build(bias=bias)).backward()
    torch.testing.assert_close(net.rpg_bank.weight.grad, whole.rpg_bank.weight.grad)
    rpg.freeze(net)
    assert not loss_of(net).requires_grad
    with pytest.raises(TypeError, match=r"module: got an? int, wanted an nn\.Module"):
        rpg.freeze(3)  # type: ignore[type-var]


def test_an_optimiser_that_misses_the_bank_is_noticed_at_its_first_step() -> None:
    net = Net()
    early = torch.optim.SGD(net.parameters(), lr=0.1)
    rpg.convert(net, CONFIG)
    loss_of(net).backward()
    with pytest.warns(UserWarning, match=r"512 degrees.*no optimiser holds it.*rpg\.param_groups"):
        early.step()
    early.step()  # said once


def test_optimisers_that_share_the_work_are_not_complained_about() -> None:
    net, other = build(), build()
    first = torch.optim.SGD(net.head.parameters(), lr=0.1)
    second = torch.optim.Adam([net.rpg_bank.weight])
    loss_of(other).backward()  # another model's gradients are not this optimiser's business
    for _ in range(2):
        loss_of(net).backward()
        first.step()
        second.step()


def test_tying_by_assignment() -> None:
    net = build()
    net.decoder[0].weight = net.encoder[2].weight
    assert net.decoder[0].virtual_weight is net.encoder[2].virtual_weight
    assert rpg.summary(net).layers[2].tied_to == "encoder.2"
    torch.testing.assert_close(rpg.materialize(net)(X), net(X))
    with pytest.raises(ValueError, match=r"weight: got a virtual weight \[8, 4\], wanted one of"):
        net.decoder[0].weight = rpg.nn.Linear(4, 8).weight
    for value in (nn.Parameter(torch.zeros(32, 32)), torch.zeros(32, 32), None, 3):
        before = weights(net)
        with pytest.raises(TypeError, match=r"weight: got an? .*materialize"):
            net.decoder[2].weight = value
        assert not any(moved(before, net))
    with pytest.raises(AttributeError, match="weight: a virtual layer's cannot be deleted"):
        del net.decoder[2].weight


def test_a_layer_that_affects_no_other_takes_a_parameter_and_is_dense() -> None:
    net = build()
    value = nn.Parameter(torch.randn(32, 32))
    twin = copy.deepcopy(net.encoder[2])
    twin.weight = value
    alone = rpg.nn.Linear(32, 32)
    alone.weight = value
    for layer in (twin, alone):
        assert type(layer) is nn.Linear
        assert layer.weight is value
        assert sorted(dict(layer.named_parameters())) == ["bias", "weight"]
        x = torch.randn(2, 32)
        assert torch.equal(layer(x), F.linear(x, value, layer.bias))
        copy.deepcopy(layer).load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match="weight: got a parameter"):
        rpg.nn.Linear(32, 32).weight = nn.Parameter(torch.zeros(2, 2))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_norm_is_folded_into_a_convolution(stride: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, stride, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 4, 1),
    )
    rpg.convert(net, rpg.RPGConfig(dof=256)).train()
    net(torch.randn(4, 3, 9, 9) * 3 + 1)
    net.eval()
    fused = fuse_conv_bn_eval(net[1], net[2])
    x = torch.randn(2, 8, 7, 7)
    torch.testing.assert_close(fused(x), net[2](net[1](x)), rtol=1e-4, atol=1e-5)
    assert type(fused) is nn.Conv2d
    assert isinstance(net[1], rpg.nn.Conv2d)


def test_pruning_a_virtual_layer_says_what_to_prune() -> None:
    net = build()
    wanted = net(X)
    with pytest.raises(TypeError, match=r"weight_orig: got a virtual weight.*rpg\.materialize"):
        prune.l1_unstructured(net.encoder[2], "weight", 0.5)
    assert torch.equal(net(X), wanted)
    prune.l1_unstructured(net.rpg_bank, "weight", 0.5)
    assert net.encoder[2].weight.unpack().eq(0).any()


def test_averages_of_a_model_and_its_parts() -> None:
    net = build()
    for part in (net, net.encoder):
        average = AveragedModel(part)
        average.update_parameters(part)
        x = X
        assert torch.equal(average(x), part(x))


def test_data_parallel_says_what_to_use() -> None:
    net = nn.DataParallel(build())
    assert torch.equal(net(X), net.module(X))  # without devices, or on one
    with pytest.raises(RuntimeError, match=r"parameter bank.*DistributedDataParallel"):
        net.module.encoder[2]._replicate_for_data_parallel()


def test_several_banks() -> None:
    net = Net()
    rpg.convert(net.encoder, CONFIG)
    rpg.convert(net.decoder, rpg.RPGConfig(dof=128), filter_fn=lambda m, n: True)
    assert rpg.summary(net).dof == 640
    assert next(len(g["params"]) for g in rpg.param_groups(net, lr=0.1)) == 2
    rpg.freeze(net.decoder)
    loss_of(net).backward()
    assert net.encoder.rpg_bank.weight.grad is not None
    assert net.decoder.rpg_bank.weight.grad is None
    torch.testing.assert_close(rpg.materialize(net)(X), net(X))


# What an attack on all this found.


@pytest.mark.parametrize("private", [True, False])
def test_tying_layers_of_two_banks(private: bool, tmp_path: Any) -> None:
    if private:
        first, second = rpg.nn.Linear(8, 8), rpg.nn.Linear(8, 8)
        second.weight = first.weight
        assert [n for n, _ in second.named_parameters()] == ["bias", "rpg_bank.weight"]
        assert second.half().rpg_bank.weight.dtype == first.rpg_bank.weight.dtype == torch.float16
        rpg.save(second.float(), tmp_path / "a")
        twin = rpg.nn.Linear(8, 8, virtual_weight=rpg.nn.Linear(8, 8).virtual_weight)
        rpg.load(twin, tmp_path / "a")
        assert torch.equal(twin(torch.ones(2, 8)), second(torch.ones(2, 8)))
    else:
        net, other = sequential(), rpg.nn.Linear(32, 32)
        wide = rpg.convert(nn.Sequential(*(nn.Linear(32, 32) for _ in range(5))), CONFIG)
        with pytest.raises(RuntimeError, match="layer 1 registers the bank that other layers read"):
            wide[1].weight = other.weight
        wide[2].weight = other.weight
        net[2].weight = other.weight
        assert sum(p.dim() == 2 for p in net.parameters()) == 3


def test_layers_that_were_exchanged_are_noticed_when_a_state_dict_is_loaded() -> None:
    net, other = build(), build(3)
    net.encoder[2], net.encoder[4] = net.encoder[4], net.encoder[2]
    with pytest.raises(
        RuntimeError, match=r"encoder\.2: got values of a layer that reads its bank"
    ):
        other.load_state_dict(net.state_dict())
    with pytest.raises(RuntimeError, match=r"wanted \[0\]"):
        other.encoder.load_state_dict(net.encoder.state_dict())
    tied = build()
    tied.decoder[0].weight = tied.encoder[2].weight
    with pytest.raises(RuntimeError, match=r"decoder\.0: got values"):
        build().load_state_dict(tied.state_dict())


def test_copies_of_compiled_layers_run_themselves() -> None:
    warnings.simplefilter("ignore")  # torch.compile warns itself
    torch.compiler.reset()
    net = build()
    for layer in (net.encoder[2], net.encoder[4]):
        layer.compile(backend="eager")
    twin, dense = copy.deepcopy(net), rpg.materialize(net)
    wanted = net(X)
    with torch.no_grad():
        for model in (net, dense):
            for p in model.parameters():
                p.zero_()
    torch.testing.assert_close(twin(X), wanted)
    assert not dense(X).any()


def test_frozen_parts_stay_frozen_when_they_are_made_dense() -> None:
    net = rpg.freeze(build().encoder)
    assert not any(p.requires_grad for p in rpg.materialize(net).parameters())
    net = build()
    prune.l1_unstructured(net.rpg_bank, "weight", 0.5)
    assert all(p.requires_grad for p in rpg.materialize(net).parameters())


def test_a_bank_that_is_listed_layer_by_layer_is_noticed() -> None:
    net = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about duplicates
        optimiser = torch.optim.SGD([p for m in net.encoder for p in m.parameters()], lr=0.1)
    loss_of(net).backward()
    with pytest.warns(UserWarning, match=r"a parameter bank is 2 times in an optimiser's groups"):
        optimiser.step()


def test_two_models_with_optimisers_of_their_own() -> None:
    first, second = build(), Net()
    late = torch.optim.SGD(second.parameters(), lr=0.1)
    rpg.convert(second, CONFIG)
    other = torch.optim.SGD(first.parameters(), lr=0.1)
    loss_of(first).backward()
    loss_of(second).backward()
    other.step()
    with pytest.warns(UserWarning, match="no optimiser holds it"):
        late.step()
    dead = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
    useless = torch.optim.SGD(dead.parameters(), lr=0.1)
    rpg.convert(dead, CONFIG, lambda m, n: True)
    loss_of(dead).backward()
    with pytest.warns(UserWarning, match="no optimiser holds it"):
        useless.step()


def test_moves_are_made_once() -> None:
    net = build()
    before = net.rpg_bank.weight.detach().clone()
    net._apply(lambda t: t * 2)
    assert torch.equal(net.rpg_bank.weight, before * 2)
    net.encoder._apply(lambda t: t / 2)
    assert torch.equal(net.rpg_bank.weight, before)
    assert net(X).shape == (5, 10)


def test_parts_are_exported_with_their_bank() -> None:
    net = build()
    exported = torch.export.export(net.encoder, (X,))
    torch.testing.assert_close(exported.module()(X), net.encoder(X))
    assert torch.equal(exported.state_dict["2.rpg_bank.weight"], net.rpg_bank.weight)
    state = dict(net.encoder.named_parameters(remove_duplicate=False))
    assert [n for n in state if "bank" in n] == ["2.rpg_bank.weight"]
    got = torch.func.functional_call(net.encoder, {n: p * 1 for n, p in state.items()}, (X,))
    torch.testing.assert_close(got, net.encoder(X))


def test_a_call_by_the_name_of_torchs_argument() -> None:
    net = build()
    x = torch.randn(2, 32)
    assert torch.equal(net.encoder[2](input=x), net.encoder[2](x))
    table = rpg.nn.Embedding(4, 8)
    assert torch.equal(table(input=torch.tensor([1])), table(torch.tensor([1])))


def test_a_tensor_that_was_put_past_the_attributes_is_refused() -> None:
    net = build()
    net.encoder[2]._buffers["weight"] = torch.zeros(32, 32)
    with pytest.raises(RuntimeError, match=r"a tensor was put into layer encoder\.2"):
        net(X)
    assert net(X).shape == (5, 10)


def test_notes_on_a_weight_travel_and_what_is_one_layer_alone_is_compiled() -> None:
    net = Net()
    net.encoder[2].weight.no_weight_decay = True
    net.decoder[0] = torch.compile(net.decoder[0], backend="eager")
    with pytest.warns(UserWarning, match=r"torch\.compile was called on it alone"):
        rpg.convert(net, CONFIG)
    assert net.encoder[2].weight.no_weight_decay
    warnings.simplefilter("ignore")  # torch.compile warns itself
    torch.testing.assert_close(rpg.materialize(net)(X), net(X))


def test_nothing_changes_when_warnings_are_errors() -> None:
    net = Net()
    net.encoder[2].register_forward_hook(lambda *a: None)
    with pytest.raises(UserWarning, match="not shared"):
        rpg.convert(net, CONFIG)
    assert not any(isinstance(m, rpg.nn.VirtualLayer) for m in net.modules())


def test_what_is_left_of_a_layer_that_became_dense() -> None:
    bank = rpg.ParameterBank(dof=256)
    first, second = (rpg.nn.Linear(8, 8, bank=bank) for _ in range(2))
    with pytest.raises(TypeError, match="that other layers read too"):
        first.weight = nn.Parameter(torch.zeros(8, 8))
    assert second.weight.requires_grad
    alone = copy.deepcopy(first)
    alone.weight = nn.Parameter(torch.zeros(8, 8))
    assert not {"alone", "virtual_weight"} & set(vars(alone))
    net = rpg.freeze(build())
    with pytest.warns(UserWarning, match="was resized"):
        net.encoder[2].weight.data = torch.zeros(40, 32)
    assert not net.encoder[2].weight.requires_grad
    assert type(net.encoder[2]) is nn.Linear
    assert "rpg_bank" not in vars(rpg.materialize(sequential()))


def test_own_tensors_of_a_layer_alone_leave_the_bank_where_it_is() -> None:
    net = build()
    net.encoder[2]._apply(lambda t: t.double(), recurse=False)
    assert net.encoder[2].bias.dtype == torch.float64
    assert net.rpg_bank.weight.dtype == torch.float32


def test_unfreezing_undoes_both_ways_of_freezing() -> None:
    net = build()
    part = net.encoder[2].weight.narrow(0, 1, 3)
    rpg.freeze(net.encoder)
    assert not part.requires_grad
    net.encoder.requires_grad_(False)
    rpg.unfreeze(net.encoder)
    assert part.requires_grad
    assert net.rpg_bank.weight.requires_grad


def test_hooks_on_a_virtual_layer_go_on_to_the_dense_one() -> None:
    net, seen = build(), []
    net.encoder[2].register_forward_hook(lambda *a: seen.append(1))
    rpg.materialize(net)(X)
    assert seen == [1]
