"""Networks of a row: dense, narrowed, or with block convolutions read from one bank by a map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.maps import MAPS, Entries, Ring
from benchmarks.accuracy.rows import DENSE, Row
from examples.demo.networks import Architecture, block_weights, trainable
from rpg_kernels import ParameterBank
from rpg_kernels.bank.scales import layer_std
from rpg_kernels.models.resnet import ResNet, is_block_convolution

DOF_STEP = 128  # whole slots at any granularity


@dataclass(frozen=True)
class Network:
    """An architecture and the stride of its stem: images of 32x32 reach the blocks as 16x16."""

    architecture: Architecture
    stride: int

    def dense(self, width: int, channels: int, classes: int) -> ResNet:
        model = ResNet(self.architecture.depths, classes, self.architecture.stem, width, channels)
        model.conv1.stride = (self.stride, self.stride)
        return model


NETWORKS = {
    "small": Network(Architecture((1, 1, 1), 64, ()), stride=2),
    "resnet18": Network(Architecture((2, 2, 2, 2), 64, ()), stride=1),
}


@dataclass(frozen=True)
class Built:
    """A model with its sizes: width, degrees of freedom, virtual weights, trainable numbers."""

    model: ResNet
    width: int
    dof: int
    virtual_weights: int
    trainable: int


class TableConv2d(nn.Module):
    """A convolution without bias whose weight is ``bank[index] * sign * scale``.

    For any map. Those of the law give the weights of the package's layers, whose steps take some
    20 % longer here, without tables of 12 bytes per weight.

    Args:
        like: the convolution to replace.
        bank: what is read; not registered here.
        entries: where the weights are.
        scale: the layer's multiplier.

    Shape:
        ``[B, in, H, W] -> [B, out, H', W']``, as :class:`torch.nn.Conv2d`.
    """

    index: Tensor
    factor: Tensor

    def __init__(
        self, like: nn.Conv2d, bank: ParameterBank, entries: Entries, scale: float
    ) -> None:
        super().__init__()
        # In a tuple, so that the model alone registers it.
        self._bank = (bank,)
        self.stride, self.padding = like.stride, like.padding
        # In-channels innermost, so that the weight is channels-last without a copy.
        tables = (entries.index, entries.sign)
        index, sign = (table.permute(0, 2, 3, 1).contiguous() for table in tables)
        self.shape = index.shape
        self.register_buffer("index", index.flatten())
        self.register_buffer("factor", sign.flatten() * scale)

    def weight(self) -> Tensor:
        """In torch's layout, differentiable."""
        read = self._bank[0].weight.view(-1).index_select(0, self.index) * self.factor
        return read.view(self.shape).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), None, self.stride, self.padding)


def build(row: Row, name: str, channels: int, classes: int, seed: int) -> Built:
    """A fresh network of a row on the CPU.

    Stem, norms, classifier and dense weights start as ``seed`` draws them, the same in every row of
    one width; the bank is drawn apart, the same in every row of one size.

    Args:
        row: what to build.
        name: of the architecture, a key of ``NETWORKS``.
        channels, classes: of the images.
        seed: of initial values and of the map.
    """
    network = NETWORKS[name]
    full = network.architecture.width
    total = block_weights(network.architecture, full, channels, classes)
    dof = degrees_of_freedom(row, total)
    width = full
    if row.map == DENSE and row.compression > 1:
        width = _narrowed(network, dof, channels, classes)
    torch.manual_seed(seed)
    model = network.dense(width, channels, classes)
    if row.map == DENSE:
        dof = total = block_weights(network.architecture, width, channels, classes)
    else:
        share(model, Ring(row, dof, seed))
    # torch's own annotations of Module.to leave memory_format out.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Built(model, width, dof, total, trainable(model))


def degrees_of_freedom(row: Row, virtual_weights: int) -> int:
    """Size of the bank: virtual weights over the compression, in whole slots of 128."""
    return max(int(virtual_weights / row.compression) // DOF_STEP, 1) * DOF_STEP


def share(model: ResNet, ring: Ring) -> None:
    """Replace every block convolution by one that reads a new bank, ``model.rpg_bank``."""
    torch.manual_seed(2**32 + ring.seed)
    bank = ParameterBank(ring.dof, granularity=1, init_std=ring.row.init_std)
    start = 0
    convolutions = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and is_block_convolution(module, name)
    ]
    for layer, (name, module) in enumerate(convolutions):
        shape = tuple(module.weight.shape)
        entries = MAPS[ring.row.map](ring, shape, layer, start)
        start = entries.end
        scale = layer_std(ring.row.scale, shape) / ring.row.init_std
        parent, _, child = name.rpartition(".")
        shared = TableConv2d(module, bank, entries, scale)
        setattr(model.get_submodule(parent), child, shared)
    model.add_module("rpg_bank", bank)


def _narrowed(network: Network, dof: int, channels: int, classes: int) -> int:
    """The widest dense network with no more trainable numbers than one that shares ``dof``."""
    full = network.architecture.width
    with torch.device("meta"):
        others = trainable(network.dense(full, channels, classes)) - block_weights(
            network.architecture, full, channels, classes
        )
        return max(
            width
            for width in range(1, full + 1)
            if width == 1 or trainable(network.dense(width, channels, classes)) <= others + dof
        )
