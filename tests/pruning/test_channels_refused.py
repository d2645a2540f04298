"""prune_channels: what it refuses, leaving the model as it is, and channels that it must leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import prunable
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import rpg_kernels as rpg


def state(net: nn.Module) -> dict[str, Any]:
    return {
        **{name: tensor.clone() for name, tensor in net.state_dict().items()},
        "modes": [module.training for module in net.modules()],
        "text": str(net),
    }


def assert_unchanged(net: nn.Module, before: dict[str, Any]) -> None:
    after = state(net)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = (
            torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        )
        assert same, name
    assert rpg.kept_channels(net) == {}


def nan(net: nn.Module) -> list[Tensor]:
    return [net(torch.ones(1, 3, 8, 8, dtype=torch.float64)).sum() * float("nan")]


WRONG: list[tuple[str, dict[str, Any], type[Exception]]] = [
    ("flops", {"flops": 0}, ValueError),
    ("flops", {"flops": 0.0}, ValueError),
    ("flops", {"flops": -3}, ValueError),
    ("flops", {"flops": 1.5}, ValueError),
    ("flops", {"flops": float("nan")}, ValueError),
    ("flops", {"flops": True}, TypeError),
    ("flops", {"flops": "half"}, TypeError),
    ("flops", {"flops": 1}, ValueError),
    ("flops", {"flops": 1e-6}, ValueError),
    ("flops", {"flops": 0.1, "multiple": 12}, ValueError),
    ("multiple", {"multiple": 0}, ValueError),
    ("multiple", {"multiple": 1.5}, TypeError),
    ("example_input", {"example_input": [1, 2]}, TypeError),
    ("model", {"example_input": torch.ones(1, 4, 8, 8)}, ValueError),
    ("importance", {"importance": 3}, TypeError),
    ("importance", {"importance": lambda net: []}, ValueError),
    ("importance", {"importance": nan}, ValueError),
    ("importance", {"importance": lambda net: [torch.ones(())]}, ValueError),
    ("importance", {"importance": lambda net: [3.0]}, TypeError),
]


@pytest.mark.parametrize(("argument", "given", "error"), WRONG)
def test_wrong_arguments(argument: str, given: dict[str, Any], error: type[Exception]) -> None:
    net, x = prunable.network("residual")
    net.train()
    net.a.eval()
    before = state(net)
    with pytest.raises(error, match=argument):
        rpg.prune_channels(net, **{"example_input": x, "flops": 0.5, **given})
    assert_unchanged(net, before)


def test_what_the_least_network_takes_is_said_and_is_so() -> None:
    net, x = prunable.network("residual")
    with pytest.raises(ValueError, match="at least") as error:
        rpg.prune_channels(net, x, 1)
    least = int(str(error.value).partition("at least ")[2].split()[0])
    with pytest.raises(ValueError, match="flops"):
        rpg.prune_channels(net, x, least - 1)
    made = rpg.prune_channels(net, x, least)
    assert made.flops_after == least
    assert {new for _, new in made.channels.values()} == {1}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


class Auxiliary(nn.Module):
    """A head that is there while training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) + self.head(x) if self.training else self.b(x)


@pytest.mark.parametrize("net", [Branches(), Auxiliary(), nn.Linear(4, 6)])
def test_models_that_cannot_be_pruned(net: nn.Module) -> None:
    before = state(net)
    with pytest.raises(ValueError, match="model"):
        rpg.prune_channels(net, torch.ones(2, 4), 0.5)
    assert_unchanged(net, before)


def test_no_model() -> None:
    with pytest.raises(TypeError, match="model"):
        rpg.prune_channels(3, torch.ones(2), 0.5)  # type: ignore[arg-type]


class Fixed(nn.Module):
    """Two convolutions with something between them, and one more that can be pruned."""

    def __init__(self, between: Callable[[Tensor], Tensor], first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1) if first is None else first
        self.between = between
        self.second, self.third = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(self.between(self.first(x)))))


def hooked() -> nn.Module:
    layer = nn.Conv2d(3, 8, 1)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "softmax over channels": lambda: Fixed(lambda x: x.softmax(1)),
    "channel shuffle": lambda: Fixed(lambda x: F.channel_shuffle(x, 2)),
    "group norm": lambda: Fixed(nn.GroupNorm(2, 8)),
    "a tensor of its own": lambda: Fixed(lambda x: x + torch.ones(8, 1, 1)),
    "the number of channels": lambda: Fixed(lambda x: x * x.size(1)),
    "the number of channels of its shape": lambda: Fixed(lambda x: x * x.shape[1]),
    "its shape handed on": lambda: Fixed(lambda x: x + x.new_ones(x.shape)),
    "slices": lambda: Fixed(lambda x: torch.cat([x[:, :4], x[:, 4:]], 1)),
    "a mean over channels": lambda: Fixed(lambda x: x - x.mean(1, keepdim=True)),
    "a transposition": lambda: Fixed(lambda x: x.transpose(1, 2).relu().transpose(1, 2)),
    "hooks": lambda: Fixed(nn.Identity(), hooked()),
    "weight norm": lambda: Fixed(nn.Identity(), parametrizations.weight_norm(nn.Conv2d(3, 8, 1))),
    "groups": lambda: Fixed(nn.Conv2d(8, 8, 1, groups=4)),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_is_not_known_keeps_its_channels(what: str) -> None:
    torch.manual_seed(0)
    net, x = UNKNOWN[what]().eval(), torch.randn(2, 3, 4, 4)
    first, weight = net.first.weight.detach().clone(), net.second.weight.detach().clone()
    made = rpg.prune_channels(net, x, 0.75)
    assert torch.equal(net.first.weight, first)
    assert set(made.channels) == {"second"}
    assert net.second.in_channels == 8
    rows = rpg.kept_channels(net)["second"][0]
    rows = rows["chosen"] if isinstance(rows, dict) else rows
    kept = [n for a, b in zip(rows[::2], rows[1::2], strict=True) for n in range(a, a + b)]
    assert torch.equal(net.second.weight, weight[kept])
    assert net(x).shape == (2, 2, 4, 4)
    if type(net.first) is nn.Conv2d:  # another type is an operation that pruning does not know
        assert "first" in made.fixed
        assert "first" in str(made)


def test_layers_that_share_a_parameter_stay() -> None:
    net = nn.Sequential(
        nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
    )
    net[2].weight = net[0].weight
    rpg.prune_channels(net, torch.randn(2, 6), 0.9)
    assert net[2].weight is net[0].weight
    assert net[0].out_features == net[2].out_features == 6
    assert net[3].out_features < 6


def test_layers_that_share_a_virtual_weight_may_lose_other_channels() -> None:
    bank = rpg.ParameterBank(256, granularity=8)
    first = rpg.nn.Linear(8, 8, bank=bank)
    second = rpg.nn.Linear(8, 8, virtual_weight=first.virtual_weight)
    net = nn.Sequential(nn.Linear(3, 8), first, nn.ReLU(), second, nn.Linear(8, 2))
    whole = first.virtual_weight.unpack()
    rpg.prune_channels(rpg.attach(net, bank), torch.randn(2, 3), 0.4)
    kept = rpg.kept_channels(net)
    for name in ("1", "3"):
        rows, columns = (
            [n for a, b in zip(runs[::2], runs[1::2], strict=True) for n in range(a, a + b)]
            for runs in (r["chosen"] if isinstance(r, dict) else r for r in kept[name])
        )
        assert torch.equal(net[int(name)].weight.unpack(), whole[rows][:, columns])


def test_a_layer_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.again, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.again(self.again(self.into(x)).relu()).relu())

    net, x = Twice(), torch.randn(2, 3)
    made = rpg.prune_channels(net, x, 0.5)
    kept = rpg.kept_channels(net)
    assert kept["again"][0] == kept["again"][1] == kept["into"][0] == kept["out"][1]
    assert made.flops_after <= made.flops_before / 2
    assert net(x).shape == (2, 2)
