"""The networks that the demo compares, all one architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from examples.demo.published import share_as_published
from rpg_kernels.bank.config import RPGConfig
from rpg_kernels.models.resnet import ResNet, is_block_convolution, share_blocks


@dataclass(frozen=True)
class Architecture:
    """A :class:`ResNet`; its block convolutions are the virtual weights."""

    depths: tuple[int, ...]
    width: int
    dofs: tuple[int, ...]  # the demo's degrees of freedom, smallest first
    stem: str = "cifar"


ARCHITECTURES = {
    "small": Architecture((1, 1, 1), 64, (4_096, 32_768, 262_144)),
    "resnet18": Architecture((2, 2, 2, 2), 64, (45_000, 280_000, 2_000_000)),
}


@dataclass(frozen=True)
class Network:
    """One row of the demo's table.

    ``dof`` is the size of the bank; dense networks have none. ``laps`` is as in ``RPGConfig``.
    """

    label: str
    kind: Literal["dense", "published", "rpg"]
    width: int
    dof: int | None = None
    laps: int | None = None


def plan(
    architecture: Architecture,
    channels: int,
    classes: int,
    config: RPGConfig,
    dofs: Sequence[int],
    laps: Sequence[int | None] = (None,),
) -> list[Network]:
    """The networks to train: dense, narrowed, as published, and ours at each DoF.

    Ours has as many laps as it is given, one number for all or one for each DoF, at most as many as
    its compression allows. The narrowed and the published network stand beside ours at the smallest
    DoF. The narrowed one is the widest whose trainable parameters, all of them, do not exceed ours;
    having fewer norms and a smaller classifier, it may have more block weights than we have degrees
    of freedom.

    Raises:
        ValueError: ``dofs`` is empty or not positive; another number of ``laps``.
    """
    if not dofs or any(dof < 1 for dof in dofs):
        raise ValueError(f"dof: got {list(dofs)}, wanted one or more positive numbers")
    weights = block_weights(architecture, architecture.width, channels, classes)
    if len(laps) not in (1, len(dofs)):
        raise ValueError(f"laps: got {len(laps)} of them, wanted 1, or {len(dofs)} as of dof")
    wanted = dict(zip(dofs, list(laps) * (1 if len(laps) > 1 else len(dofs)), strict=True))
    ours = [_ours(architecture, dof, wanted[dof], weights) for dof in sorted(wanted)]
    with torch.device("meta"):
        budget = trainable(build(ours[0], architecture, channels, classes, config))
        narrow = max(
            width
            for width in range(1, architecture.width + 1)
            if width == 1 or trainable(_resnet(architecture, width, channels, classes)) <= budget
        )
    return [
        Network("dense", "dense", architecture.width),
        Network("dense, narrowed", "dense", narrow),
        Network("as published", "published", architecture.width, ours[0].dof),
        *ours,
    ]


def build(
    network: Network, architecture: Architecture, channels: int, classes: int, config: RPGConfig
) -> ResNet:
    """A fresh network on the default device; its values come from torch's global generator.

    Args:
        network: which one.
        architecture: depths; the width is the network's.
        channels, classes: of the images.
        config: granularity, reflect and seed of ours; DoF and laps are the network's.
    """
    model = _resnet(architecture, network.width, channels, classes)
    if network.kind == "published":
        share_as_published(model, _dof(network), is_block_convolution)
    elif network.kind == "rpg":
        share_blocks(model, dataclasses.replace(config, dof=_dof(network), laps=network.laps))
    return model


def block_weights(architecture: Architecture, width: int, channels: int, classes: int) -> int:
    """Weights of all block convolutions: what a dense network has and a shared one imitates."""
    with torch.device("meta"):
        model = _resnet(architecture, width, channels, classes)
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and is_block_convolution(module, name)
    )


def degrees_of_freedom(model: nn.Module, block_weights: int) -> int:
    """Trainable numbers behind the block convolutions: a bank's size, or all their weights."""
    parameters = dict(model.named_parameters())
    for name in ("rpg_bank.weight", "ring.w"):
        if name in parameters:
            return parameters[name].numel()
    return block_weights


def trainable(model: nn.Module) -> int:
    """All trainable numbers: bank or block weights, stem, norms and classifier."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _ours(architecture: Architecture, dof: int, laps: int | None, weights: int) -> Network:
    if laps is not None:
        laps = max(1, min(laps, weights // dof))
    label = "rpg-kernels, whole ring" if laps is None else f"rpg-kernels, {laps} laps"
    return Network(label, "rpg", architecture.width, dof, laps)


def _resnet(architecture: Architecture, width: int, channels: int, classes: int) -> ResNet:
    return ResNet(architecture.depths, classes, architecture.stem, width, channels)


def _dof(network: Network) -> int:
    if network.dof is None:
        raise ValueError(f"dof: got None for {network.label!r}, wanted the size of its bank")
    return network.dof
