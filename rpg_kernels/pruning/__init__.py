"""Pruning by magnitude, of banks and of dense parameters, and rewinding."""

from rpg_kernels.pruning.magnitude import finish_pruning, prune
from rpg_kernels.pruning.rewinding import rewind

__all__ = ["finish_pruning", "prune", "rewind"]
