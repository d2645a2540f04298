"""One layer with some of its channels: what stays, how the layer is changed, and back again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.law import selection as selections
from rpg_kernels.law.selection import Selection
from rpg_kernels.nn import Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d, Linear, VirtualLayer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1d, Conv2d)
TRANSPOSED = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    ConvTranspose1d,
    ConvTranspose2d,
)
LINEAR = (nn.Linear, Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, *LINEAR, *NORMS)
KEPT = "kept_channels"  # attribute of a layer that was cut: selections of out- and in-channels

Kept = tuple[Selection, Selection]


@dataclass(frozen=True)
class Cut:
    """What remains of a layer: ascending numbers among the channels that it has.

    Args:
        out: out-channels, or the channels of a norm.
        into: in-channels; those of a norm or of a depthwise convolution are its out-channels.
    """

    out: tuple[int, ...]
    into: tuple[int, ...]


def has_channels(module: nn.Module | None) -> bool:
    """Whether a module is a layer whose channels can be cut: of these types, not of others below.

    timm's BatchNormAct2d, a norm and then an activation, is known by its name, since timm need not
    be there.
    """
    kind = type(module)
    return kind in LAYERS or (kind.__module__, kind.__name__) == (
        "timm.layers.norm_act",
        "BatchNormAct2d",
    )


def channels_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer of ``LAYERS``."""
    has: Any = layer
    if isinstance(layer, NORMS):
        return has.num_features, has.num_features
    if isinstance(layer, LINEAR):
        return has.out_features, has.in_features
    return has.out_channels, has.in_channels


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each out-channel is made of the in-channel of its number, and of no other."""
    has: Any = layer
    if type(layer) not in CONVOLUTIONS:
        return False
    return bool(has.groups == has.in_channels == has.out_channels and has.groups > 1)


def kept_of(layer: nn.Module) -> Kept | None:
    """Which channels of the uncut layer a layer has, where it was cut."""
    kept: Kept | None = getattr(layer, KEPT, None)
    return kept


def cut(layer: nn.Module, what: Cut) -> None:
    """Leave a layer these channels. Parameters are new ones, of the same values, dtype and layout;
    a virtual weight is a part of the one that it was."""
    kept = kept_of(layer) or tuple((0, size) for size in channels_of(layer))
    depthwise, has = is_depthwise(layer), cast(Any, layer)
    if isinstance(layer, NORMS):
        has.num_features = len(what.out)
        for name in ("weight", "bias", "running_mean", "running_var"):
            _take(layer, name, what.out)
    else:
        rows, columns = (
            (what.into, what.out) if isinstance(layer, TRANSPOSED) else (what.out, what.into)
        )
        _cut_weight(layer, rows, None if depthwise else columns)
        _take(layer, "bias", what.out)
        if isinstance(layer, LINEAR):
            has.out_features, has.in_features = len(what.out), len(what.into)
        else:
            has.out_channels, has.in_channels = len(what.out), len(what.into)
            has.groups = len(what.out) if depthwise else has.groups
    both = zip(kept, (what.out, what.into), strict=True)
    now = tuple(selections.composed(before, indices) for before, indices in both)
    setattr(layer, KEPT, now)


def _cut_weight(layer: nn.Module, rows: Sequence[int], columns: Sequence[int] | None) -> None:
    if not isinstance(layer, VirtualLayer):
        _take(layer, "weight", rows, columns)
        return
    old: VirtualWeight = layer.virtual_weight
    part = old.select(0, rows)
    part = part if columns is None else part.select(1, columns)
    part.frozen, part.name = old.frozen, old.name
    layer.virtual_weight = part


def _take(
    layer: nn.Module, name: str, rows: Sequence[int], columns: Sequence[int] | None = None
) -> None:
    """Cut a parameter or buffer, where there is one."""
    old = getattr(layer, name)
    if not isinstance(old, Tensor):
        return
    with torch.no_grad():
        new = old.index_select(0, torch.tensor(rows, device=old.device))
        if columns is not None:
            new = new.index_select(1, torch.tensor(columns, device=old.device))
        if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
            new = new.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(layer, name, new)


class Undo:
    """What layers were before they were cut."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._before = [
            (layer, dict(vars(layer)), dict(layer._parameters), dict(layer._buffers))
            for layer in layers
        ]

    def __call__(self) -> None:
        """Make them so again."""
        for layer, attributes, parameters, buffers in self._before:
            layer.__dict__.clear()
            layer.__dict__.update(attributes)
            layer._parameters.clear()
            layer._parameters.update(parameters)
            layer._buffers.clear()
            layer._buffers.update(buffers)
