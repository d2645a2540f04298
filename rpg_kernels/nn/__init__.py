"""Layers whose weight is virtual; otherwise torch.nn's."""

from rpg_kernels.nn._layer import VirtualLayer
from rpg_kernels.nn.conv1d import Conv1d
from rpg_kernels.nn.conv2d import Conv2d
from rpg_kernels.nn.conv_transpose1d import ConvTranspose1d
from rpg_kernels.nn.conv_transpose2d import ConvTranspose2d
from rpg_kernels.nn.embedding import Embedding
from rpg_kernels.nn.linear import Linear

__all__ = [
    "Conv1d",
    "Conv2d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "Embedding",
    "Linear",
    "VirtualLayer",
]
