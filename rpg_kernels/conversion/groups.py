"""Which layers of a model read which bank: all of them one, or each group one of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn

from rpg_kernels import _checks
from rpg_kernels._wrappers import plain_name
from rpg_kernels.bank.config import Group, RPGConfig, ring_of
from rpg_kernels.conversion.kinds import weight_of
from rpg_kernels.conversion.select import Filter, Selection, is_layer, select
from rpg_kernels.conversion.ties import tie_key

_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Share:
    """The layers that read one bank, and what is asked of that bank.

    Args:
        group: its name, or "" for the one bank of a model without groups.
        config: without groups, and with a dof.
        layers: by name, in the model's order.
    """

    group: str
    config: RPGConfig
    layers: dict[str, nn.Module]

    @property
    def prefix(self) -> str:
        """How messages about this bank begin."""
        return f"group {self.group!r}: " if self.group else ""


def shares_of(
    model: nn.Module, config: RPGConfig, filter_fn: Filter | None
) -> tuple[Selection, list[Share]]:
    """Choose the layers to share, and the bank that each of them is to read.

    Args:
        model: dense.
        config: with or without groups.
        filter_fn: that of ``convert``; None with groups.

    Returns:
        All layers that are to be shared, and their banks in the order of the groups.

    Raises:
        ValueError: nothing to share; a group that matches nothing, or a layer that two groups
            match; a bank larger than its group; too small a dof to share out.
    """
    if not config.groups:
        chosen = select(model, filter_fn)
        if not chosen.shared:
            reasons = "; ".join(f"{name}: {why}" for name, why in chosen.skipped.items())
            wanted = "at least one; see filter_fn"
            raise _checks.fail("model", f"no layer to share ({reasons})", wanted)
        return chosen, [Share("", config, chosen.shared)]
    group_of = _members(model, config.groups)
    chosen = select(model, lambda module, name: name in group_of, otherwise="in no group")
    _check_ties(chosen, group_of)
    layers: dict[str, dict[str, nn.Module]] = {group.name: {} for group in config.groups}
    for name, module in chosen.shared.items():
        layers[group_of[name].name][name] = module
    for group in config.groups:
        if not layers[group.name]:
            asked = [name for name, its in group_of.items() if its is group]
            reasons = "; ".join(f"{name}: {chosen.skipped[name]}" for name in asked[:_SHOWN])
            got = f"group {group.name!r}, of whose layers none can be shared ({reasons})"
            raise _checks.fail("groups", got, "groups of layers that can be")
    configs = _configs(config, [_weights(layers[group.name]) for group in config.groups])
    return chosen, [
        Share(group.name, its, layers[group.name])
        for group, its in zip(config.groups, configs, strict=True)
    ]


def _members(model: nn.Module, groups: Sequence[Group]) -> dict[str, Group]:
    """The group of each layer that is in one, by the layer's name."""
    names: dict[int, list[str]] = {}  # a module may stand under several
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    layers = {name: module for name, module in model.named_modules() if is_layer(module)}
    found: dict[str, Group] = {}
    for name, module in layers.items():
        asked = [group for group in groups if _asks_for(group, module, name, names[id(module)])]
        if len(asked) > 1:
            first, second = asked[0].name, asked[1].name
            got = f"{first!r} and {second!r}, which both match layer {name}"
            raise _checks.fail("groups", got, "each layer in one group at most")
        if asked:
            found[name] = asked[0]
    for group in groups:
        if group not in found.values():
            got = f"group {group.name!r}, whose {group.layers!r} matches no layer"
            raise _checks.fail("groups", got, f"layers of the model: {_some(list(layers))}")
    return found


def _asks_for(group: Group, module: nn.Module, name: str, names: Sequence[str]) -> bool:
    pattern = group.layers
    if not isinstance(pattern, str):
        return bool(pattern(module, name))
    return any(fnmatchcase(part, pattern) for each in names for part in _around(plain_name(each)))


def _around(name: str) -> list[str]:
    """A name, and those of the modules around it.

    >>> _around("blocks.1.fc")
    ['blocks', 'blocks.1', 'blocks.1.fc']
    """
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _check_ties(chosen: Selection, group_of: dict[str, Group]) -> None:
    first: dict[object, str] = {}
    for name, module in chosen.shared.items():
        other = first.setdefault(tie_key(cast(Tensor, module.weight)), name)
        if group_of[name] is not group_of[other]:
            one, two = group_of[other].name, group_of[name].name
            got = (
                f"{one!r} with layer {other} and {two!r} with {name}, which are tied to each other"
            )
            raise _checks.fail("groups", got, "tied layers in one group")


def _weights(layers: dict[str, nn.Module]) -> int:
    """Virtual weights of a group; tied ones count once."""
    once = {tie_key(weight): weight.numel() for weight in map(weight_of, layers.values())}
    return sum(once.values())


def _configs(config: RPGConfig, weights: Sequence[int]) -> list[RPGConfig]:
    """What is asked of each group's bank, its dof included."""
    groups = config.groups
    sharing = [i for i, group in enumerate(groups) if group.settings.get("dof") is None]
    given = dict.fromkeys(range(len(groups)), 1)
    if sharing:
        assert config.dof is not None
        slots = [config.of_group(groups[i], 1).granularity for i in sharing]
        given.update(
            zip(sharing, share_out(config.dof, [weights[i] for i in sharing], slots), strict=True)
        )
    configs = [config.of_group(group, given[i]) for i, group in enumerate(groups)]
    for group, its, count in zip(groups, configs, weights, strict=True):
        assert its.dof is not None
        if math.prod(ring_of(its.dof, its.granularity)) > count:
            got = f"{its.dof} for group {group.name!r}"
            raise _checks.fail("dof", got, f"at most {count}, its virtual weights")
    return configs


def share_out(dof: int, weights: Sequence[int], slots: Sequence[int]) -> list[int]:
    """Shares of a dof in proportion to virtual weights: whole slots, together at most dof.

    A group whose share would be less than a slot gets one. What whole slots leave over goes, a slot
    each, to the groups that lost most to rounding.

    Args:
        dof: elements to share out.
        weights: virtual weights of each group, above 0.
        slots: elements of a slot of each group.

    Raises:
        ValueError: dof has fewer elements than a slot for each group.

    Example:
        >>> share_out(1000, [300, 500, 2], [64, 64, 64])
        [320, 576, 64]
    """
    if sum(slots) > dof:
        raise _checks.fail("dof", dof, f"at least {sum(slots)}, a slot for each group")
    small: set[int] = set()
    while True:
        rest = dof - sum(slots[i] for i in small)
        others = [i for i in range(len(slots)) if i not in small]
        total = sum(weights[i] for i in others)
        less = {i for i in others if rest * weights[i] < total * slots[i]}
        if not less:
            break
        small |= less
    shares = list(slots)
    for i in others:
        shares[i] = rest * weights[i] // (total * slots[i]) * slots[i]
    for i in sorted(others, key=lambda i: shares[i] * total - rest * weights[i]):
        if sum(shares) + slots[i] <= dof:
            shares[i] += slots[i]
    return shares


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name or "(the model)" for name in names[:_SHOWN]) + more
