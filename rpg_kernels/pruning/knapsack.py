"""Which bundles to remove under a budget of FLOPs: those of the least importance for each FLOP.

The paper prunes channels by the knapsack method of Aflalo et al., "Knapsack pruning with inner
distillation" (2020): keep the bundles of the greatest sum of importance that the budget has room
for, where a bundle costs what the whole network would save without it. Bundles are many and small
beside the budget, so that taking them in the order of importance for each FLOP is about as good as
the exact answer. That order is fixed once, by what each bundle costs in the whole network. What
remains of the FLOPs is counted anew after each removal, since products are those of out-channels
with in-channels, and both become fewer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rpg_kernels.pruning.channel_graph import ChannelGraph
from rpg_kernels.pruning.cutting import is_depthwise

Kind = tuple[tuple[str, int, int], ...]  # layer, its out-channels, its in-channels in one bundle


class CannotBeMetError(ValueError):
    """Not even the smallest network fits the budget."""

    def __init__(self, least: float) -> None:
        super().__init__(least)
        self.least = least


@dataclass
class _Layer:
    flops_of_pair: float
    out: int
    into: int
    depthwise: bool

    def flops(self, out: int, into: int) -> float:
        return self.flops_of_pair * (out if self.depthwise else out * into)


def savings(graph: ChannelGraph, bundles: Iterable[int]) -> dict[int, float]:
    """By bundle: the FLOPs that the whole network would save without it."""
    layers = _layers(graph)
    return {
        bundle: _saved(layers, kind, 1)
        for kind, of_kind in _kinds(graph, bundles).items()
        for bundle in of_kind
    }


def to_remove(
    graph: ChannelGraph, importance: Mapping[int, float], total: float, budget: float, multiple: int
) -> set[int]:
    """The bundles to be removed.

    Args:
        graph: of the network.
        importance: by bundle; bundles that are not in it stay.
        total: FLOPs of the whole network, with what no layer of the graph makes.
        budget: FLOPs that remain at most.
        multiple: bundles of one kind that remain are so many or a multiple of it; of each kind, at
            least one such group remains.

    Raises:
        CannotBeMetError: the budget is below what is then left.
    """
    layers = _layers(graph)
    groups: list[tuple[float, Kind, list[int]]] = []
    for kind, bundles in _kinds(graph, importance).items():
        cost = _saved(layers, kind, 1)
        ordered = sorted(bundles, key=lambda bundle: (importance[bundle], bundle))
        for group in _groups(ordered, multiple) if cost else ():
            worth = sum(importance[bundle] for bundle in group) / (cost * len(group))
            groups.append((worth, kind, group))
    gone: set[int] = set()
    for _, kind, group in sorted(groups):
        if total <= budget:
            break
        total -= _saved(layers, kind, len(group))
        for name, out, into in kind:
            layers[name].out -= out * len(group)
            layers[name].into -= into * len(group)
        gone.update(group)
    if total > budget:
        raise CannotBeMetError(total)
    return gone


def _layers(graph: ChannelGraph) -> dict[str, _Layer]:
    return {
        name: _Layer(use.flops_of_pair, len(use.out), len(use.into), is_depthwise(use.layer))
        for name, use in graph.uses.items()
    }


def _saved(layers: Mapping[str, _Layer], kind: Kind, bundles: int) -> float:
    saved = 0.0
    for name, out, into in kind:
        layer = layers[name]
        fewer = layer.flops(layer.out - out * bundles, layer.into - into * bundles)
        saved += layer.flops(layer.out, layer.into) - fewer
    return saved


def _kinds(graph: ChannelGraph, bundles: Iterable[int]) -> dict[Kind, list[int]]:
    """Bundles that have the same numbers of channels in the same layers."""
    members: dict[int, Counter[tuple[str, int]]] = defaultdict(Counter)
    for name, use in graph.uses.items():
        for side, numbers in enumerate((use.out, use.into)):
            for number in numbers:
                members[graph.bundle(number)][name, side] += 1
    kinds: dict[Kind, list[int]] = defaultdict(list)
    for bundle in bundles:
        of = members[bundle]
        names = dict.fromkeys(name for name, _ in of)
        kinds[tuple((name, of[name, 0], of[name, 1]) for name in names)].append(bundle)
    return kinds


def _groups(bundles: list[int], multiple: int) -> list[list[int]]:
    """The least important first; of what is left over at the end, ``multiple`` always stay."""
    first = len(bundles) % multiple
    groups = [bundles[:first]] if first else []
    groups += [bundles[i : i + multiple] for i in range(first, len(bundles), multiple)]
    return groups[:-1]
