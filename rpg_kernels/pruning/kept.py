"""Which channels a pruned model has: as a record, and from a record to the model again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from rpg_kernels import _checks
from rpg_kernels._wrappers import plain_name, unwrap, unwrap_to_change
from rpg_kernels.law import selection as selections
from rpg_kernels.pruning.cutting import Cut, Undo, channels_of, cut, has_channels, kept_of

Record = dict[str, list[Any]]


def kept_channels(model: nn.Module) -> Record:
    """By name of a layer that was pruned: its out- and in-channels, as numbers of the whole layer.

    Args:
        model: after ``prune_channels``, or another; then the record is empty.

    Returns:
        What ``keep_channels`` takes, and JSON: ``[offset, length]`` of neighbours, or
        ``{"chosen": [offset, length, offset, length, ...]}``.

    Raises:
        TypeError: model is not an nn.Module.

    Example:
        >>> import torch, rpg_kernels as rpg
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> made = rpg.prune_channels(net, torch.ones(1, 4), flops=0.5)
        >>> kept = rpg.kept_channels(net)
        >>> kept["0"][0] == kept["2"][1], kept["2"][0]
        (True, [0, 2])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, wanted an nn.Module")
    found: Record = {}
    for name, module in unwrap(model).named_modules():
        kept = kept_of(module)
        if kept is not None:
            found[plain_name(name)] = [selections.record(selection) for selection in kept]
    return found


def keep_channels(model: nn.Module, kept: Mapping[str, Any]) -> Undo:
    """Prune a model as another one was pruned, such as before that one's state dict is loaded.

    Args:
        model: built as the other one was before it was pruned; changed in place.
        kept: what ``kept_channels`` of the other gave, or its JSON gives.

    Returns:
        A function without arguments that makes the model whole again.

    Raises:
        TypeError, ValueError: the record is of other layers, or the model was pruned before. The
            model is unchanged.

    Example:
        >>> import torch, rpg_kernels as rpg
        >>> def build():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net, other = build(), build()
        >>> made = rpg.prune_channels(net, torch.ones(1, 4), flops=0.5)
        >>> undo = rpg.keep_channels(other, rpg.kept_channels(net))
        >>> other.load_state_dict(net.state_dict())
        <All keys matched successfully>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, wanted an nn.Module")
    model = unwrap_to_change(model)
    if not isinstance(kept, Mapping):
        raise TypeError(f"kept: got a {type(kept).__name__}, wanted what kept_channels gives")
    before = kept_channels(model)
    if before:
        got = f"a model that was pruned before ({next(iter(before))})"
        raise _checks.fail("model", got, "a whole one")
    layers = {plain_name(name): module for name, module in model.named_modules()}
    wanted = [(layers.get(name), _cut_of(name, layers.get(name), kept[name])) for name in kept]
    undo = Undo([layer for layer, _ in wanted if layer is not None])
    for layer, what in wanted:
        assert layer is not None
        cut(layer, what)
    return undo


def _cut_of(name: str, layer: nn.Module | None, record: object) -> Cut:
    if layer is None or not has_channels(layer):
        got = "none of that name" if layer is None else f"a {type(layer).__name__}"
        raise _checks.fail(f"kept: layer {name!r}", got, "a layer that has channels to be pruned")
    if not isinstance(record, list | tuple) or len(record) != 2:
        raise _checks.fail(f"kept: layer {name!r}", repr(record)[:80], "out- and in-channels")
    sizes = zip(record, channels_of(layer), strict=True)
    out, into = (
        tuple(
            selections.indices_of(
                selections.checked(
                    f"kept: layer {name!r}",
                    selections.from_record(f"kept: layer {name!r}", one),
                    size,
                )
            )
        )
        for one, size in sizes
    )
    return Cut(out, into)
