"""``save`` and ``load``: a model as one safetensors file, checked before anything changes."""

from rpg_kernels.checkpoint.loading import load
from rpg_kernels.checkpoint.saving import save

__all__ = ["load", "save"]
