"""Pruning by magnitude, of banks and of dense parameters, with rewinding; and of channels."""

from rpg_kernels.pruning.channels import ChannelPruning, prune_channels
from rpg_kernels.pruning.kept import keep_channels, kept_channels
from rpg_kernels.pruning.magnitude import finish_pruning, prune
from rpg_kernels.pruning.rewinding import rewind

__all__ = [
    "ChannelPruning",
    "finish_pruning",
    "keep_channels",
    "kept_channels",
    "prune",
    "prune_channels",
    "rewind",
]
