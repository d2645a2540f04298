"""Layers whose weight is virtual; otherwise torch.nn's."""

from rpg_kernels.nn._layer import VirtualLayer
from rpg_kernels.nn.conv2d import Conv2d
from rpg_kernels.nn.embedding import Embedding
from rpg_kernels.nn.linear import Linear

__all__ = ["Conv2d", "Embedding", "Linear", "VirtualLayer"]
