"""``save`` and ``load``: a model as one safetensors file, checked before anything changes."""

from rpg_kernels.checkpoint.model_file import load, save

__all__ = ["load", "save"]
