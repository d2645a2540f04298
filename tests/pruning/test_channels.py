"""prune_channels: what is left computes what the whole network does without those channels."""

from __future__ import annotations

import copy
from typing import Any

import brute_force as brute
import prunable
import pytest
import torch
from prunable import NETWORKS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import rpg_kernels as rpg

F64 = torch.float64


def shared(name: str, seed: int = 0, laps: int | None = None) -> tuple[nn.Module, Tensor]:
    """A network whose layers read a bank."""
    net, x = prunable.network(name, seed)
    config = rpg.RPGConfig(dof=256, granularity=16, laps=laps, init_std=1.0)
    return rpg.convert(net, config, filter_fn=lambda module, name: True), x


def losses(net: nn.Module) -> list[Tensor]:
    """Of two batches, for Taylor."""
    shape = next(shape for kind, shape in NETWORKS.values() if isinstance(net, kind))
    made = []
    for seed in (1, 2):
        x = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
        made.append(net(x).square().sum())
    return made


def flops(net: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        net(x)
    return int(counter.get_total_flops())


def gone(record: Any, size: int) -> list[int]:
    runs = record["chosen"] if isinstance(record, dict) else record
    kept = {
        number
        for offset, length in zip(runs[::2], runs[1::2], strict=True)
        for number in range(offset, offset + length)
    }
    return [number for number in range(size) if number not in kept]


def without(whole: nn.Module, kept: dict[str, list[Any]]) -> nn.Module:
    """The whole dense network, its layers deaf to the in-channels that are gone."""
    whole = copy.deepcopy(whole)
    for name, (_, into) in kept.items():
        layer: Any = whole.get_submodule(name)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) or getattr(layer, "groups", 1) > 1:
            continue
        dim = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
        with torch.no_grad():
            for channel in gone(into, layer.weight.shape[dim]):
                layer.weight.select(dim, channel).zero_()
    return whole


@pytest.mark.parametrize("kind", ["dense", "bank", "laps"])
@pytest.mark.parametrize("share", [0.35, 0.7])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("taylor", [False, True])
def test_is_the_whole_network_without_the_channels(
    name: str, share: float, kind: str, taylor: bool
) -> None:
    net, x = (
        prunable.network(name)
        if kind == "dense"
        else shared(name, laps=2 if kind == "laps" else None)
    )
    whole = rpg.materialize(net)
    before = flops(net, x)
    made = rpg.prune_channels(net, x, share, losses if taylor else None)
    kept = rpg.kept_channels(net)
    brute.assert_exact(net(x).detach(), without(whole, kept)(x).detach())
    assert (made.flops_before, made.flops_after) == (before, flops(net, x))
    assert made.flops_after <= share * before
    assert made.channels
    for layer, (old, new) in made.channels.items():
        module: Any = net.get_submodule(layer)
        out = getattr(module, "out_channels", None) or getattr(module, "out_features", None)
        out = module.num_features if out is None else out
        assert (out, old) == (new, new + len(gone(kept[layer][0], old)))
    dense = rpg.materialize(net)
    brute.assert_exact(dense(x).detach(), net(x).detach())
    assert flops(dense, x) == made.flops_after


def test_residual_channels_go_together() -> None:
    net, x = shared("residual")
    rpg.prune_channels(net, x, 0.4)
    kept = rpg.kept_channels(net)
    bound = [kept[name][0] for name in ("stem", "norm", "b")]
    assert bound == [kept[name][1] for name in ("a", "short", "c")]
    assert kept["short"][0] == kept["c"][0] == kept["fc"][1]
    assert kept["a"][0] == kept["a_norm"][0] == kept["b"][1]
    assert kept["fc"][0] == [0, 5]


def test_layers_that_are_cut_read_the_bank_where_they_did() -> None:
    net, x = shared("residual")
    bank = net.rpg_bank.weight
    before, whole = bank.detach().clone(), net.b.virtual_weight
    unpacked = whole.unpack()
    rpg.prune_channels(net, x, 0.5)
    part = net.b.virtual_weight
    assert part.whole() is whole
    rows, columns = (brute.selected_along(part.placement, dim) for dim in (0, 1))
    assert torch.equal(part.unpack(), unpacked[rows][:, columns])
    assert net.rpg_bank.weight is bank
    assert torch.equal(bank, before)
    net(x).sum().backward()
    assert bank.grad is not None
    assert rpg.summary(net).dof == 256


def test_twice_is_composed() -> None:
    net, x = shared("residual")
    whole = rpg.materialize(net)
    rpg.prune_channels(net, x, 0.7)
    rpg.prune_channels(net, x, 0.6)
    brute.assert_exact(net(x).detach(), without(whole, rpg.kept_channels(net))(x).detach())


@pytest.mark.parametrize("multiple", [1, 2, 4, 5])
def test_channels_remain_in_multiples(multiple: int) -> None:
    net, x = prunable.network("residual")
    made = rpg.prune_channels(net, x, 0.6, multiple=multiple)
    for old, new in made.channels.values():
        assert new % multiple == 0 or new == old


def test_a_budget_in_flops() -> None:
    net, x = prunable.network("joined")
    budget = flops(net, x) // 3
    assert rpg.prune_channels(net, x, budget).flops_after <= budget


def test_all_flops_change_nothing() -> None:
    net, x = prunable.network("joined")
    made = rpg.prune_channels(net, (x,), 1.0)
    assert (made.flops_before, made.channels) == (made.flops_after, {})
    assert rpg.kept_channels(net) == {}


def test_parameters_keep_dtype_layout_and_gradient_and_the_mode_stays() -> None:
    net, x = prunable.network("residual")
    net.to(memory_format=torch.channels_last)
    net.train()
    net.a.eval()
    net.c.weight.requires_grad_(False)
    rpg.prune_channels(net, x, 0.5)
    assert net.training
    assert not net.a.training
    assert not net.c.weight.requires_grad
    assert net.b.weight.requires_grad
    assert net.b.weight.is_contiguous(memory_format=torch.channels_last)
    assert net.norm.running_mean.dtype == F64
    assert all(p.grad is None for p in net.parameters())


def test_taylor_is_weight_times_gradient() -> None:
    """With the gates of norms as γ·dγ + β·dβ, and of filters without one as w·dw + b·db."""
    from rpg_kernels.pruning import importance
    from rpg_kernels.pruning.tracing import channel_graph

    net, x = prunable.network("residual")
    graph = channel_graph(net, (x,))
    got = importance.taylor(net, graph, losses)
    wanted = dict.fromkeys(got, 0.0)
    for loss in losses(net):
        net.zero_grad()
        loss.backward()
        change = dict.fromkeys(got, 0.0)
        for name in ("norm", "a_norm", "b", "short", "c", "fc"):
            layer: Any = net.get_submodule(name)
            terms = (layer.weight * layer.weight.grad).flatten(1 if layer.weight.dim() > 1 else 0)
            of = terms.sum(1) if terms.dim() > 1 else terms
            of = of + layer.bias * layer.bias.grad
            for number, value in zip(graph.uses[name].out, of.tolist(), strict=True):
                change[graph.bundle(number)] += value
        for bundle, value in change.items():
            wanted[bundle] += value**2
    assert got.keys() == wanted.keys()
    for bundle, value in wanted.items():
        assert got[bundle] == pytest.approx(value, rel=1e-5, abs=1e-9)


def test_the_least_important_go_first() -> None:
    net, x = prunable.network("joined")
    with torch.no_grad():
        net.hidden.weight[[2, 7]] *= 1e-6
        net.both.weight[[0, 3]] *= 1e-6
    rpg.prune_channels(net, x, 0.6)
    kept = rpg.kept_channels(net)
    assert {0, 3} <= set(gone(kept["both"][0], 7))
    assert {2, 7} <= set(gone(kept["hidden"][0], 11))


def test_works_in_training_and_under_compile() -> None:
    net, x = shared("residual")
    rpg.prune_channels(net, x, 0.5)
    net.train()
    twin = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = net(x).square().sum().item()
    F.mse_loss(net(x), torch.zeros(2, 5, dtype=F64)).backward()
    optimizer.step()
    assert net(x).square().sum().item() != before
    assert rpg.kept_channels(twin) == rpg.kept_channels(net)
    assert twin.b.virtual_weight.bank is twin.rpg_bank
    assert twin(x).square().sum().item() == before
    twin.eval()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    brute.assert_exact(compiled(x).detach(), twin(x).detach())
