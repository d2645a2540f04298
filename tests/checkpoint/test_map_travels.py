"""The map goes wherever the values go, and is looked at whatever they are called there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rpg_kernels as rpg

State = dict[str, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.body = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.first(x)))


def build(torch_seed: int = 0, scale: float = 1.0, **changes: Any) -> Net:
    torch.manual_seed(torch_seed)
    net = rpg.convert(Net(), rpg.RPGConfig(**{"dof": 512, "granularity": 16, **changes}))
    for layer in (net.body[0], net.body[2]):
        layer.weight.rescale(scale)
    return net


def run_of_training(count: int, dtype: torch.dtype = torch.float32) -> list[State]:
    net = build(scale=0.7)
    states = []
    for _ in range(count):
        with torch.no_grad():
            net.rpg_bank.weight.add_(torch.randn_like(net.rpg_bank.weight))
        states.append({k: v.clone().to(dtype) for k, v in net.state_dict().items()})
    return states


def sum_and_divide(states: list[State]) -> State:
    return {k: torch.true_divide(sum(s[k] for s in states), len(states)) for k in states[0]}


def running_sum(states: list[State]) -> State:
    total = copy.deepcopy(states[0])
    for state in states[1:]:
        for key in total:
            total[key] += state[key]
    return {k: v / len(states) for k, v in total.items()}


def moving_average(states: list[State]) -> State:
    average = copy.deepcopy(states[0])
    for state in states[1:]:
        for key in average:
            average[key] = 0.7 * average[key] + 0.3 * state[key]
    return average


def federated(states: list[State]) -> State:
    """Weighted by the clients' data, in numpy, sent as lists."""
    shares = np.random.default_rng(0).dirichlet([1] * len(states))
    lists = [{k: v.numpy().tolist() for k, v in s.items()} for s in states]
    return {
        k: torch.tensor(sum(w * np.array(s[k]) for w, s in zip(shares, lists, strict=True)))
        for k in states[0]
    }


def in_steps(states: list[State]) -> State:
    average = copy.deepcopy(states[0])
    for n, state in enumerate(states[1:], 2):
        average = {k: v + (state[k] - v) / n for k, v in average.items()}
    return average


AVERAGES = [sum_and_divide, running_sum, moving_average, federated, in_steps]


@pytest.mark.parametrize("average", AVERAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("count", [2, 3, 10, 50])
def test_averages_of_state_dicts_load(average: Callable[[list[State]], State], count: int) -> None:
    states = run_of_training(count)
    net = build(9, scale=3.0)
    mean = average(states)
    net.load_state_dict(mean)
    torch.testing.assert_close(net.rpg_bank.weight, mean["rpg_bank.weight"].float())
    assert net.body[0].weight.scale == 0.7
    other = build(seed=1)
    with pytest.raises(RuntimeError, match="seed: got 0, wanted 1"):
        other.load_state_dict(mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("average", [sum_and_divide, moving_average, in_steps])
def test_averages_in_sixteen_bits_load(average: Any, dtype: torch.dtype) -> None:
    net = build(9, scale=3.0)
    net.load_state_dict(average(run_of_training(8, dtype)))
    assert net.body[0].weight.scale == 0.7


def test_a_sum_that_nobody_divided_says_what_to_take() -> None:
    states = run_of_training(3)
    total = {k: states[0][k] + states[1][k] + states[2][k] for k in states[0]}
    net = build()
    with pytest.raises(RuntimeError, match=r"rpg_bank: .*take map_digits from one of them"):
        net.load_state_dict(total)
    net.load_state_dict({**total, "rpg_bank.map_digits": states[0]["rpg_bank.map_digits"]})
    assert torch.equal(net.rpg_bank.weight, total["rpg_bank.weight"])


@pytest.mark.parametrize(("off", "readable"), [(0.2, True), (0.3, False), (-0.2, True)])
def test_how_far_a_digit_may_be_off(off: float, readable: bool) -> None:
    state = build().state_dict()
    state["rpg_bank.map_digits"] = state["rpg_bank.map_digits"].float() + off
    if readable:
        build(3).load_state_dict(state)
    else:
        with pytest.raises(RuntimeError, match="cannot be read"):
            build(3).load_state_dict(state)


def test_a_map_without_values_concerns_nobody() -> None:
    digits = {"rpg_bank.map_digits": build(seed=3).state_dict()["rpg_bank.map_digits"]}
    net = build(scale=0.7)
    net.load_state_dict(digits, strict=False)
    net.load_state_dict({**digits, "head.bias": torch.zeros(10)}, strict=False)
    assert net.body[0].weight.scale == 0.7


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_models(use_buffers: bool) -> None:
    net = build()
    ema = get_ema_multi_avg_fn(0.9)
    averages = (
        AveragedModel(net, use_buffers=use_buffers),
        AveragedModel(net, multi_avg_fn=ema, use_buffers=use_buffers),
    )
    for average in averages:
        for _ in range(5):
            with torch.no_grad():
                net.rpg_bank.weight.mul_(1.5)
            average.update_parameters(net)
        x = torch.randn(2, 16)
        wanted = average(x)
        again = build(4)
        again.load_state_dict(average.module.state_dict())
        assert torch.equal(again(x), wanted)


# Whatever the parameter is called.


def pruned(bank: nn.Module) -> None:
    prune.l1_unstructured(bank, "weight", amount=0.5)


def normed(bank: nn.Module) -> None:
    weight_norm(bank)


def parametrised(bank: nn.Module) -> None:
    parametrizations.weight_norm(bank)


class Rounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quantize = FakeQuantize(quant_min=0, quant_max=255)

    def forward(self, w: Tensor) -> Tensor:
        return self.quantize(w)


def fake_quantised(bank: nn.Module) -> None:
    parametrize.register_parametrization(bank, "weight", Rounded())


RENAMED = [pruned, normed, parametrised, fake_quantised]


@pytest.mark.parametrize("rename", RENAMED, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*deprecated")
def test_a_renamed_parameter_trains_and_is_checked(rename: Callable[[nn.Module], None]) -> None:
    net = build(scale=0.7)
    rename(net.rpg_bank)
    x = torch.randn(4, 16)
    groups = rpg.param_groups(net, lr=0.1)
    assert all(p.is_leaf for g in groups for p in g["params"])
    optimiser = torch.optim.SGD(groups)
    outputs = []
    for _ in range(3):
        optimiser.zero_grad()
        y = net(x)
        outputs.append(y.detach())
        y.square().sum().backward()
        leaf = next(p for p in net.rpg_bank.parameters())
        assert leaf.grad is not None
        optimiser.step()
    assert not torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(rpg.materialize(net)(x), net(x))
    if rename is pruned:
        assert net.body[0].weight.unpack().eq(0).float().mean() > 0.3
    twin = build(3, scale=3.0)
    rename(twin.rpg_bank)
    twin.load_state_dict(net.state_dict())
    assert twin.body[0].weight.scale == 0.7
    torch.testing.assert_close(twin.eval()(x), net.eval()(x))
    for change, message in (({"seed": 1}, "seed"), ({"reflect": "none"}, "reflect")):
        other = build(**change)
        rename(other.rpg_bank)
        before = [p.detach().clone() for p in other.rpg_bank.parameters(recurse=False)]
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=f"rpg_bank: .*{message}: got"):
                other.load_state_dict(net.state_dict(), strict=strict)
        now = other.rpg_bank.parameters(recurse=False)
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


# Tools that set tensors one by one, past load_state_dict.


def set_one_by_one(net: nn.Module, state: State) -> None:
    for key, value in state.items():
        path, _, name = key.rpartition(".")
        module = net.get_submodule(path)
        if name in module._buffers:
            module._buffers[name] = value.clone()
        else:
            module._parameters[name] = nn.Parameter(value.clone())


def test_values_that_arrive_one_by_one_are_checked_before_they_are_used() -> None:
    net, x = build(scale=0.7), torch.randn(2, 16)
    twin = build(5, scale=3.0)
    set_one_by_one(twin, net.state_dict())
    assert torch.equal(twin(x), net(x))
    assert twin.state_dict()["rpg_bank.map_digits"].equal(net.state_dict()["rpg_bank.map_digits"])
    other = build(seed=1)
    set_one_by_one(other, net.state_dict())
    for use in (lambda: other(x), lambda: other.state_dict(), lambda: other.body[0].weight.unpack(),
                lambda: other.rpg_bank.place((3, 4)), lambda: other.double()):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"values in it were replaced: .*seed: got 0, wanted 1"
        ):
            use()


def test_values_that_are_copied_in_place_are_checked_too() -> None:
    net, x = build(scale=0.7), torch.randn(2, 16)
    twin, other = build(5, scale=3.0), build(seed=1)
    for model in (twin, other):
        own = model.state_dict()
        for key, value in net.state_dict().items():
            own[key].copy_(value)
    assert torch.equal(twin(x), net(x))
    with pytest.raises(ValueError, match="seed: got 0, wanted 1"):
        other(x)


def test_buffers_are_up_to_date_at_once() -> None:
    net = build()
    nn.init.normal_(net.body[0].weight, std=0.9)
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    twin = build(4)
    twin.load_state_dict(state)
    assert twin.body[0].weight.scale == net.body[0].weight.scale


def test_a_functional_call_cannot_lend_other_scales() -> None:
    net, other, x = build(), build(1, scale=3.0), torch.randn(2, 16)
    wanted = net(x)
    with pytest.raises(ValueError, match=r"scales of layers that differ.*in a functional call"):
        torch.func.functional_call(net, other.state_dict(), (x,))
    assert torch.equal(net(x), wanted)
    called = torch.func.functional_call(net, build(1).state_dict(), (x,))
    assert torch.equal(called, build(1)(x))


def test_a_part_of_a_renamed_bank_is_restored() -> None:
    net, x = build(), torch.randn(2, 32)
    parametrizations.weight_norm(net.rpg_bank)
    state, wanted = copy.deepcopy(net.body.state_dict()), net.body(x)
    with torch.no_grad():
        for p in net.rpg_bank.parameters():
            p.mul_(3)
    net.body.load_state_dict(state)
    torch.testing.assert_close(net.body(x), wanted)


def test_a_refused_map_changes_nothing_that_comes_after_the_bank() -> None:
    net, other = build(), build(7, seed=1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError, match="seed: got 0, wanted 1"):
        other.load_state_dict(net.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_moves_and_casts_keep_the_map(tmp_path: Path) -> None:
    net, x = build(scale=0.7), torch.randn(2, 16)
    wanted = net(x)
    net.double().half().float().to("cpu")
    torch.testing.assert_close(net(x), wanted, rtol=1e-2, atol=1e-2)
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(net).to(dtype).state_dict()
        assert low["rpg_bank.map_digits"].dtype == dtype
        build(3).load_state_dict(low)
    far = copy.deepcopy(net).to("meta")
    far.to_empty(device="cpu")
    far.load_state_dict(net.state_dict())
    assert torch.equal(far(x), net(x))
    torch.save(net, tmp_path / "whole")
    again = torch.load(tmp_path / "whole", weights_only=False)
    assert torch.equal(again(x), net(x))
    assert again.state_dict().keys() == net.state_dict().keys()


def test_layers_placed_and_scaled_after_a_state_dict_was_taken() -> None:
    bank = rpg.ParameterBank(dof=256)
    first = bank.state_dict()["map_digits"]
    weight = bank.place((8, 8))
    weight.unpack()
    second = bank.state_dict()["map_digits"]
    weight.mul_(2)
    third = bank.state_dict()["map_digits"]
    assert len(first) < len(second) == len(third)
    assert not torch.equal(second, third)
    twin = rpg.ParameterBank(dof=256)
    other = twin.place((8, 8))
    twin.load_state_dict(bank.state_dict())
    assert other.scale == 2.0


# Initialisation after conversion.


@pytest.mark.parametrize("rule", [
    nn.init.xavier_uniform_, nn.init.xavier_normal_, nn.init.kaiming_uniform_,
    nn.init.kaiming_normal_, lambda p: nn.init.kaiming_normal_(p, mode="fan_out"),
])  # fmt: skip
def test_a_rule_over_all_parameters_leaves_the_layers_scales_right(rule: Any) -> None:
    net = rpg.convert(
        nn.Sequential(*(nn.Linear(128, 128) for _ in range(8))), rpg.RPGConfig(dof=8192)
    )
    before = net[3].weight.unpack().std().item()
    net(torch.randn(2, 128))
    for p in net.parameters():
        if p.dim() > 1:
            rule(p)
    with pytest.warns(UserWarning, match=r"drawn anew with standard deviation.*reset_parameters"):
        net(torch.randn(2, 128))
    assert net[3].weight.unpack().std().item() == pytest.approx(before, rel=0.05)
    values = net.rpg_bank.weight.detach().clone()
    net(torch.randn(2, 128)).sum().backward()
    assert torch.equal(net.rpg_bank.weight, values)


@pytest.mark.parametrize("rule", [
    lambda p: nn.init.orthogonal_(p), lambda p: nn.init.xavier_uniform_(p, gain=2**0.5),
    lambda p: nn.init.normal_(p), lambda p: p.mul_(2),
])  # fmt: skip
@pytest.mark.parametrize("dof", [512, 8192])
def test_another_first_change_is_said(rule: Any, dof: int) -> None:
    torch.manual_seed(0)
    net = rpg.convert(
        nn.Sequential(*(nn.Linear(128, 128) for _ in range(4))), rpg.RPGConfig(dof=dof)
    )
    with torch.no_grad():
        rule(net.rpg_bank.weight)
    values = net.rpg_bank.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"changed before anything trained them.*reset_parameters"):
        net(torch.randn(2, 128))
    assert torch.equal(net.rpg_bank.weight, values)


@pytest.mark.parametrize("change", ["trained", "loaded", "scaled", "normal", "least squares"])
def test_values_that_someone_means_are_left_alone(change: str, recwarn: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(128, 128) for _ in range(8)))
    init = "least_squares" if change == "least squares" else "random"
    rpg.convert(net, rpg.RPGConfig(dof=8192), init=init)
    bank = net.rpg_bank
    xavier = (2 / (128 + 64)) ** 0.5
    if change == "trained":
        optimiser = torch.optim.SGD(net.parameters(), lr=1e-9)
        net(torch.randn(2, 128)).sum().backward()
        optimiser.step()
    if change == "loaded":
        net.load_state_dict({**net.state_dict(), "1.rpg_bank.weight": bank.weight + 1})
    with torch.no_grad():
        if change in ("trained", "loaded"):
            bank.weight.copy_(torch.randn(128, 64) * xavier)
        elif change == "scaled":
            bank.weight.mul_(2)
        elif change == "normal":
            bank.weight.normal_()
    values = bank.weight.detach().clone()
    net(torch.randn(2, 128))
    assert torch.equal(bank.weight, values)
    assert not [w for w in recwarn if "drawn anew" in str(w.message)]


def test_moving_averages_and_hand_written_steps_are_left_alone(recwarn: Any) -> None:
    torch.manual_seed(0)
    net = rpg.convert(
        nn.Sequential(*(nn.Linear(128, 128) for _ in range(4))), rpg.RPGConfig(dof=8192)
    )
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    x = torch.randn(2, 128)
    average.update_parameters(net)
    net(x).sum().backward()
    with torch.no_grad():
        for _ in range(60):
            net.rpg_bank.weight.mul_(1.04)
            net(x)
            average.update_parameters(net)
            average(x)
    ratio = average.module.rpg_bank.weight.norm() / net.rpg_bank.weight.norm()
    assert 0.7 < float(ratio.detach()) < 1
    assert not [w for w in recwarn if "drawn anew" in str(w.message)]
