"""Smaller networks: channels that are removed."""

from rpg_kernels.pruning.channels import ChannelPruning, prune_channels
from rpg_kernels.pruning.kept import keep_channels, kept_channels

__all__ = ["ChannelPruning", "keep_channels", "kept_channels", "prune_channels"]
