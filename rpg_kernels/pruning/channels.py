"""prune_channels: a network with fewer channels, under a budget of FLOPs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rpg_kernels import _checks
from rpg_kernels._wrappers import unwrap_to_change
from rpg_kernels.pruning.cutting import Cut, cut

if TYPE_CHECKING:
    from rpg_kernels.pruning.channel_graph import ChannelGraph
    from rpg_kernels.pruning.importance import Losses


@dataclass(frozen=True)
class ChannelPruning:
    """What ``rpg.prune_channels`` did. Printable.

    Args:
        flops_before, flops_after: of a forward of the example, as torch counts them.
        channels: by name of a layer that lost some: out-channels before and after.
        fixed: by name of a layer whose out-channels all had to stay: why.
    """

    flops_before: int
    flops_after: int
    channels: dict[str, tuple[int, int]]
    fixed: dict[str, str]

    def __str__(self) -> str:
        share = self.flops_after / self.flops_before
        lines = [f"{self.flops_before:,} FLOPs before, {self.flops_after:,} after ({share:.1%})"]
        lines += [f"{name}: {a} of {b} channels" for name, (b, a) in self.channels.items()]
        lines += [f"{name}: all channels stay, as they meet {w}" for name, w in self.fixed.items()]
        return "\n".join(lines)


def prune_channels(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    flops: float,
    importance: Losses | None = None,
    multiple: int = 1,
) -> ChannelPruning:
    """Remove output channels of a network's layers until a forward takes at most so many FLOPs.

    Channels of convolutions, transposed ones and linear layers, dense or read from a bank, go with
    all that reads them: norms after them, and the in-channels of the next layers. A layer that
    reads a bank keeps its place in it: each weight that is left is read where the whole layer reads
    it, so that the bank, its map and other layers stay as they are. Channels that a sum binds, as
    the residual ones of a ResNet, are removed together. Those that meet the model's output, or an
    operation that torch.fx traces but pruning does not know, stay.

    Which ones: those of the least importance for each FLOP, by the knapsack rule (see
    ``rpg_kernels.pruning.knapsack``). Parameters of layers that are cut are new, so make the
    optimiser afterwards; train on, as accuracy falls at first.

    Args:
        model: changed in place. It is traced in eval mode, and its mode is kept.
        example_input: what the model is called with; its FLOPs are counted with it.
        flops: the budget: a float from 0 to 1 is a share of what the model takes, an int the FLOPs
            themselves.
        importance: ``importance(model)`` gives the loss of some batches, one after the other, such
            as ``lambda net: (cross_entropy(net(x), y) for x, y in batches)``; importance is then
            first-order Taylor. None goes by the magnitude of filters, which asks for no data.
        multiple: a layer's channels remain in multiples of it, where they were a multiple; kernels
            like 8, 16 or 32.

    Returns:
        FLOPs before and after, the layers that were cut, and those that could not be.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: torch.fx cannot trace the model; it has no channels that can be removed; the
            budget is not above zero or cannot be met; the losses are not finite. The model is
            unchanged.

    Example:
        >>> import rpg_kernels as rpg
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        ...                     nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 10))
        >>> net = rpg.convert(net, rpg.RPGConfig(dof=1024))
        >>> made = rpg.prune_channels(net, torch.randn(2, 3, 8, 8), flops=0.5)
        >>> made.flops_after <= made.flops_before / 2
        True
        >>> net[5].in_features == 16 * net[3].out_channels
        True
        >>> net(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 10])

    Source: Wang et al. (WACV 2023), coarse-grained pruning; Aflalo et al. (2020), the knapsack;
    Molchanov et al. (CVPR 2019), importance.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, wanted an nn.Module")
    example = example_input if isinstance(example_input, tuple) else (example_input,)
    if not any(isinstance(one, Tensor) for one in example):
        got = type(example_input).__name__
        raise TypeError(f"example_input: got a {got}, wanted a tensor, or a tuple with tensors")
    if importance is not None and not callable(importance):
        got = type(importance).__name__
        raise TypeError(f"importance: got a {got}, wanted a function of the model, or None")
    _checks.integer("multiple", multiple, 1, _checks.INT32_MAX)
    _check_flops(flops)
    # Imported here, as few programs prune.
    from rpg_kernels.pruning.tracing import channel_graph

    model = unwrap_to_change(model)
    with _evaluated(model):
        graph = channel_graph(model, example)
        before = _counted(model, example)
        gone = _bundles(model, graph, before, flops, importance, multiple)
        cuts = _cuts(graph, gone)
        for name, what in cuts.items():
            cut(graph.uses[name].layer, what)
        after = _counted(model, example)
    channels = {
        name: (len(graph.uses[name].out), len(what.out))
        for name, what in cuts.items()
        if len(what.out) < len(graph.uses[name].out)
    }
    return ChannelPruning(before, after, channels, _fixed(graph))


def _check_flops(flops: object) -> None:
    if isinstance(flops, bool) or not isinstance(flops, int | float):
        raise TypeError(f"flops: got a {type(flops).__name__}, wanted a float or an int")
    if isinstance(flops, float) and not 0 < flops <= 1:
        raise _checks.fail("flops", flops, "a share above 0 and at most 1, or an int of FLOPs")
    if flops <= 0:
        raise _checks.fail("flops", flops, "at least 1: a network without any channel is none")


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """In eval mode, each module back in its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _counted(model: nn.Module, example: Sequence[Any]) -> int:
    # Imported here, as it brings in triton where that is installed.
    counting: Any = importlib.import_module("torch.utils.flop_counter")
    with torch.no_grad(), counting.FlopCounterMode(display=False) as counter:
        model(*example)
    return int(counter.get_total_flops())


def _bundles(
    model: nn.Module,
    graph: ChannelGraph,
    before: int,
    flops: float,
    importance: Losses | None,
    multiple: int,
) -> set[int]:
    """The bundles to be removed."""
    from rpg_kernels.pruning import importance as importances
    from rpg_kernels.pruning import knapsack

    fixed = graph.fixed_bundles()
    free = {graph.bundle(number) for use in graph.uses.values() for number in use.out} - set(fixed)
    if not free:
        why = next(iter(fixed.values()), "it has no layers")
        got = f"a model none of whose channels can be removed ({why})"
        raise _checks.fail("model", got, "one with channels that other layers of it read")
    if importance is None:
        scores = importances.magnitude(graph, knapsack.savings(graph, sorted(free)))
    else:
        scores = importances.taylor(model, graph, importance)
    budget = flops * before if isinstance(flops, float) else flops
    wanted = {bundle: scores.get(bundle, 0.0) for bundle in sorted(free)}
    try:
        return knapsack.to_remove(graph, wanted, before, budget, multiple)
    except knapsack.CannotBeMetError as error:
        least = f"at least {int(error.least)} of {before} FLOPs, which are left with the fewest"
        why = "; ".join(f"{name} meets {what}" for name, what in _fixed(graph).items())
        wanted_text = f"{least} channels" + (f" ({why[:300]})" if why else "")
        raise _checks.fail("flops", flops, wanted_text) from error


def _cuts(graph: ChannelGraph, gone: set[int]) -> dict[str, Cut]:
    """Of each layer that changes, what remains."""
    cuts = {}
    for name, use in graph.uses.items():
        out, into = (
            tuple(i for i, number in enumerate(numbers) if graph.bundle(number) not in gone)
            for numbers in (use.out, use.into)
        )
        if len(out) < len(use.out) or len(into) < len(use.into):
            cuts[name] = Cut(out, into)
    return cuts


def _fixed(graph: ChannelGraph) -> dict[str, str]:
    """Layers all of whose out-channels are fixed, and what the first of them meets."""
    fixed = graph.fixed_bundles()
    found = {}
    for name, use in graph.uses.items():
        bundles = [graph.bundle(number) for number in use.out]
        if all(bundle in fixed for bundle in bundles):
            found[name] = fixed[bundles[0]]
    return found
