"""torch.fx, torch.export and TorchScript, as they meet virtual layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer, symbolic_trace

import rpg_kernels as rpg

CONFIG = rpg.RPGConfig(dof=256, granularity=8)


class Net(nn.Module):
    """Every kind of layer, and one whose padding happens before its operator."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.words = nn.Embedding(6, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.conv(self.stem(x)).relu().mean((2, 3))
        return self.head(self.mix(x + self.words(labels)))


def build() -> nn.Module:
    torch.manual_seed(0)
    return rpg.convert(Net(), CONFIG)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 5])


def test_virtual_layers_are_leaves_of_a_symbolic_trace() -> None:
    net = build()
    traced = symbolic_trace(net)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["stem", "conv", "words", "mix", "head"]
    assert torch.equal(traced(*inputs()), net(*inputs()))
    assert traced.mix is net.mix
    traced(*inputs()).sum().backward()
    assert net.rpg_bank.weight.grad is not None
    assert any(p is net.rpg_bank.weight for p in traced.parameters())
    twin = symbolic_trace(build())
    with torch.no_grad():
        net.rpg_bank.weight.mul_(2)
    twin.load_state_dict(traced.state_dict())
    assert torch.equal(twin(*inputs()), net(*inputs()))


def test_a_tracer_of_ones_own_and_features_from_the_middle() -> None:
    class Shallow(Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, nn.Sequential) or super().is_leaf_module(m, module_qualified_name)

    net = nn.Sequential(build().mix, nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    graph = Shallow().trace(net)
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["0", "1"]
    graph = symbolic_trace(build()).graph
    mix = next(n for n in graph.nodes if n.target == "mix")
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (mix,)
    module = build()
    features = GraphModule(module, graph)
    features.graph.eliminate_dead_code()
    features.recompile()
    assert features(*inputs()).shape == (2, 8)
    assert torch.equal(module.head(features(*inputs())), module(*inputs()))


def test_export_and_trace() -> None:
    net = build()
    exported = torch.export.export(net, inputs())
    torch.testing.assert_close(exported.module()(*inputs()), net(*inputs()))
    bank = {"rpg_bank.weight": net.rpg_bank.weight}
    for name, value in bank.items():
        assert torch.equal(exported.state_dict[name], value)
    traced = torch.jit.trace(net, inputs())
    torch.testing.assert_close(traced(*inputs()), net(*inputs()))


def test_a_part_is_traced_once_it_is_frozen() -> None:
    part = nn.Sequential(build().mix, nn.ReLU())
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="Cannot insert a Tensor that requires grad"):
        torch.jit.trace(part, x)
    traced = torch.jit.trace(part.requires_grad_(False), x)
    torch.testing.assert_close(traced(x), part(x))
    torch.testing.assert_close(torch.export.export(part, (x,)).module()(x), part(x))


def test_traces_of_sequences_and_of_transposed_layers() -> None:
    """The former take other sizes than they were traced with; of the latter torch warns."""
    layer = rpg.nn.Conv1d(4, 6, 3, padding="same")
    traced, x = torch.jit.trace(layer, torch.randn(2, 4, 9)), torch.randn(3, 4, 14)
    assert torch.equal(traced(x), layer(x))
    up = rpg.nn.ConvTranspose2d(4, 6, 3, stride=2)
    x = torch.randn(2, 4, 5, 5)
    with pytest.warns(torch.jit.TracerWarning, match="might not generalize"):
        traced = torch.jit.trace(up, x)
    assert torch.equal(traced(x), up(x))
    graph = symbolic_trace(Sized(up))
    assert graph(x).shape == (2, 6, 12, 11)
    exported = torch.export.export(Sized(up), (x,))
    assert torch.equal(exported.module()(x), graph(x))


class Sized(nn.Module):
    """A transposed layer that is told the size of its result."""

    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=(12, 11))


@pytest.mark.parametrize("part", ["", "mix", "conv", "words"])
def test_script_refuses_and_names_materialize(part: str) -> None:
    net = build()
    with pytest.raises(
        RuntimeError, match=r"torch\.jit\.script cannot .*rpg\.materialize\(model\)"
    ):
        torch.jit.script(net.get_submodule(part) if part else net)
    dense = torch.jit.script(rpg.materialize(net))
    torch.testing.assert_close(dense(*inputs()), net(*inputs()))


def test_compiled_models_may_read_a_weight() -> None:
    torch.compiler.reset()
    layer = rpg.nn.Linear(8, 8, bank=rpg.ParameterBank(dof=64, granularity=8))

    def run(x: Tensor) -> Tensor:
        if x.dtype != layer.weight.dtype:  # as T5 does
            x = x.to(layer.weight.dtype)
        return layer(x) * layer.weight.shape[0]

    x = torch.randn(2, 8, dtype=torch.float64)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), run(x))
