"""What is on a layer: plain attributes travel, what computes is an obstacle, ties are by memory."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rpg_kernels as rpg

CONFIG = rpg.RPGConfig(dof=256, granularity=8)
KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 8),
    "conv1d": lambda: nn.Conv1d(8, 8, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(8, 8, 3, padding=1),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
    "embedding": lambda: nn.Embedding(8, 8),
}


def every(module: nn.Module, name: str) -> bool:
    return True


def around(layer: nn.Module) -> nn.Module:
    net = nn.Module()
    net.layer = layer
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_plain_attributes_travel_there_and_back(kind: str) -> None:
    layer = KINDS[kind]()
    table = {"a": [1]}
    values: dict[str, Any] = {
        "_is_hf_initialized": True, "RESIDUAL_INIT": 1, "qconfig": None, "tag": "q_proj",
        "notes": table, "scale_of_something": torch.ones(3), "in_proj": (1, 2), "lr_scale": 0.5,
        "itself": layer,
    }  # fmt: skip
    for name, value in values.items():
        if name == "itself":  # a child of its own would be registered
            layer.__dict__[name] = value
        else:
            setattr(layer, name, value)
    net = rpg.convert(around(layer), CONFIG, every)
    assert isinstance(net.layer, rpg.nn.VirtualLayer)
    twin = rpg.materialize(net).layer
    for now in (net.layer, copy.deepcopy(net.layer), twin):
        assert now.itself is now
        assert (now._is_hf_initialized, now.RESIDUAL_INIT, now.tag) == (True, 1, "q_proj")
        assert (now.qconfig, now.notes, now.lr_scale) == (None, table, 0.5)
        assert torch.equal(now.scale_of_something, torch.ones(3))
    assert net.layer.notes is table
    assert set(vars(twin)) == set(vars(layer))
    assert set(net.layer.state_dict()) & {"notes", "tag", "itself"} == set()


def test_methods_that_do_not_compute_are_those_of_the_new_layer() -> None:
    layer = nn.Linear(8, 8)

    def describe(self: nn.Module) -> str:
        return f"{type(self).__module__}: {tuple(self.weight.shape)}"

    layer.describe = types.MethodType(describe, layer)
    layer.reset_parameters = lambda: None
    net = rpg.convert(around(layer), CONFIG, every)
    assert net.layer.describe() == "rpg_kernels.nn.linear: (8, 8)"
    assert net.layer.reset_parameters() is None
    assert rpg.materialize(net).layer.describe() == "torch.nn.modules.linear: (8, 8)"


def hooked(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda *args: None)


def pre_hooked(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda *args: None)


def backward_hooked(layer: nn.Module) -> None:
    layer.register_full_backward_hook(lambda *args: None)


def patched(layer: nn.Module) -> None:
    layer.forward = lambda x: x


def patched_inside(layer: nn.Module) -> None:
    layer._call_impl = lambda x: x


def compiled(layer: nn.Module) -> None:
    layer.compile(backend="eager")


def parametrised(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)


def with_parameter(layer: nn.Module) -> None:
    layer.gain = nn.Parameter(torch.ones(1))


def with_buffer(layer: nn.Module) -> None:
    layer.register_buffer("mask", torch.ones(8))


def with_child(layer: nn.Module) -> None:
    layer.norm = nn.LayerNorm(8)


def clashing(layer: nn.Module) -> None:
    layer.virtual_weight = 3


OBSTACLES = {
    hooked: "it has hooks", pre_hooked: "it has hooks", backward_hooked: "it has hooks",
    patched: "its forward is patched", patched_inside: "its _call_impl is patched",
    compiled: "its _compiled_call_impl is patched", parametrised: "is a subclass of Linear",
    with_parameter: "it holds gain", with_buffer: "it holds mask", with_child: "it holds norm",
    clashing: "it holds virtual_weight",
}  # fmt: skip


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("rule", [None, every])
def test_what_would_change_the_arithmetic_is_said(obstacle: Any, rule: Any) -> None:
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    obstacle(net[1])
    before, x = net[1], torch.randn(2, 8)
    wanted = before(x)
    expected = OBSTACLES[obstacle]
    if rule is None and obstacle is parametrised:  # another type, which the rule leaves as it is
        rpg.convert(net, CONFIG, rule)
    else:
        with pytest.warns(
            UserWarning, match=f"not shared, though asked for: 1: .*{expected}"
        ) as said:
            rpg.convert(net, CONFIG, rule)
        assert len(said) == 1
        assert said[0].filename == __file__
    assert net[1] is before
    assert torch.equal(net[1](x), wanted)
    assert expected in rpg.summary(net).skipped["1"]


def test_many_reasons_are_one_warning() -> None:
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(10)))
    for layer in net[1:9]:
        hooked(layer)
    with pytest.warns(
        UserWarning, match=r"1: it has hooks.*; and 3 more, see rpg\.summary"
    ) as said:
        rpg.convert(net, CONFIG, every)
    assert len(said) == 1


# Two parameters on one memory.


class Tied(nn.Module):
    def __init__(self, tie: Callable[[nn.Module], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        tie(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.words(x)).tanh())


def same_parameter(net: Any) -> None:
    net.head.weight = net.words.weight


def parameter_of_parameter(net: Any) -> None:
    net.head.weight = nn.Parameter(net.words.weight)


def parameter_of_data(net: Any) -> None:
    net.head.weight = nn.Parameter(net.words.weight.data)


def by_data(net: Any) -> None:
    net.head.weight.data = net.words.weight.data


def by_argument(net: Any) -> None:
    net.words = nn.Embedding(12, 8, _weight=net.head.weight.data)


def view_of_it(net: Any) -> None:
    net.head.weight = nn.Parameter(net.words.weight.data.view(12, 8))


@pytest.mark.parametrize(
    "tie",
    [same_parameter, parameter_of_parameter, parameter_of_data, by_data, by_argument, view_of_it],
    ids=lambda f: f.__name__,
)
def test_ties_by_memory_are_one_virtual_weight(tie: Any) -> None:
    net = rpg.convert(Tied(tie), CONFIG, every)
    assert net.head.virtual_weight is net.words.virtual_weight
    assert net.rpg_bank.layers == 2
    ids = torch.arange(12)
    torch.testing.assert_close(rpg.materialize(net)(ids), net(ids))
    default = rpg.convert(Tied(tie), CONFIG)
    assert default.head.weight.data_ptr() == default.words.weight.data_ptr()
    assert [x.name for x in rpg.summary(default).layers] == ["body"]


def transposed(net: Any) -> None:
    net.head = nn.Linear(12, 8, bias=False)
    net.head.weight = nn.Parameter(net.words.weight.data.t())


def part_of_it(net: Any) -> None:
    net.head = nn.Linear(8, 5, bias=False)
    net.head.weight = nn.Parameter(net.words.weight.data[3:8])


def one_buffer_in_two_halves(net: Any) -> None:
    flat = torch.randn(2 * 96)
    net.words.weight = nn.Parameter(flat[:96].view(12, 8))
    net.head.weight = nn.Parameter(flat[96:].view(12, 8))


@pytest.mark.parametrize("tie", [transposed, part_of_it], ids=lambda f: f.__name__)
def test_other_views_of_one_memory_are_left_alone_with_a_reason(tie: Any) -> None:
    net = Tied(tie)
    with pytest.warns(UserWarning, match="not shared, though asked for"):
        rpg.convert(net, CONFIG, every)
    assert type(net.head) is nn.Linear
    assert type(net.words) is nn.Embedding
    memory = net.words.weight.untyped_storage().data_ptr()
    assert net.head.weight.untyped_storage().data_ptr() == memory
    reasons = rpg.summary(net).skipped
    assert "on the memory of head.weight in another shape" in reasons["words"]
    assert "on the memory of words.weight in another shape" in reasons["head"]
    assert isinstance(net.body, rpg.nn.Linear)


def test_neighbours_in_one_buffer_are_not_tied() -> None:
    net = rpg.convert(Tied(one_buffer_in_two_halves), CONFIG, every)
    assert net.rpg_bank.layers == 3


def test_a_memory_that_something_else_uses_stays() -> None:
    net = Tied(by_data)
    net.copy = nn.Parameter(net.words.weight.data)
    with pytest.warns(UserWarning, match="not shared"):
        rpg.convert(net, CONFIG, every)
    assert type(net.head) is nn.Linear
    assert type(net.words) is nn.Embedding
    assert net.copy.data_ptr() == net.head.weight.data_ptr() == net.words.weight.data_ptr()


def test_three_ties_are_shared_together_or_not_at_all() -> None:
    net = nn.Module()
    net.a, net.b, net.c = (nn.Linear(8, 8, bias=False) for _ in range(3))
    net.d = nn.Linear(8, 8)
    net.b.weight = nn.Parameter(net.a.weight.data)
    net.c.weight = nn.Parameter(net.a.weight.data)
    with pytest.warns(UserWarning, match="not shared, though asked for: a: its weight is tied"):
        rpg.convert(net, CONFIG, lambda module, name: name != "b")
    assert {type(m) for m in (net.a, net.b, net.c)} == {nn.Linear}
    assert isinstance(net.d, rpg.nn.Linear)
