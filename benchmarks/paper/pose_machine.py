"""A convolutional pose machine: heat maps of joints, refined by a sub-network again and again.

Everything after the stem works on 8x8 places. A place holds 2x2 neighbours of each heat map as
channels, so that maps are 16x16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.paper.skeleton import JOINTS, SIDE

CELLS = 16  # of a heat map, along each side
CELL = SIDE / CELLS  # pixels
MAPS = len(JOINTS)
_STACKED = 4 * MAPS  # heat maps as channels of 8x8 places
_DEVIATION = 0.7  # of a true heat map's bell, cells


def _block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution, its norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(True)
    )


class SubNetwork(nn.Module):
    """What is repeated: from features and heat maps to a correction of the heat maps.

    Args:
        features: channels of the features.
        width: channels between its convolutions.
        depth: convolutions between the first and the last.

    Shape:
        ``[B, features + 56, 8, 8] -> [B, 56, 8, 8]``.
    """

    def __init__(self, features: int, width: int, depth: int) -> None:
        super().__init__()
        blocks = [_block(features + _STACKED, width)]
        blocks += [_block(width, width) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Conv2d(width, _STACKED, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(_STACKED)
        nn.init.constant_(self.norm.weight, 0.1)  # corrections begin small

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.last(self.blocks(x)))
        return out


class PoseMachine(nn.Module):
    """A dense stem, a first guess, and stages that refine it.

    Args:
        stages: sub-networks in the order of their use, in an nn.Sequential, which is not
            called as a whole.
        features: channels of the features, as the sub-networks take them.

    Shape:
        ``[B, 3, 64, 64] -> [1 + stages, B, 14, 16, 16]``: the heat maps after the first guess and
        after every stage, as logarithms that are not normalised.

    Example:
        >>> machine = PoseMachine(nn.Sequential(SubNetwork(16, 8, 1)), features=16)
        >>> machine(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 2, 14, 16, 16])
    """

    def __init__(self, stages: nn.Sequential, features: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _block(3, 24, 2), _block(24, 48, 2), _block(48, features, 2), _block(features, features)
        )
        self.guess = nn.Conv2d(features, _STACKED, 1)
        self.stages = stages

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.stem(pixels)
        maps = self.guess(features).float()  # so that a sum of corrections keeps its digits
        every = [maps]
        for stage in self.stages:
            maps = maps + stage(torch.cat([features, maps.to(features.dtype)], 1))
            every.append(maps)
        return torch.stack([F.pixel_shuffle(one, 2) for one in every])


def heat_maps(joints: Tensor) -> Tensor:
    """How likely each cell is to hold a joint, in truth: ``[B, 14, 2] -> [B, 14, 16, 16]``.

    Bells about joints in pixels; every map's sum is 1.

    Example:
        >>> maps = heat_maps(torch.full((1, 14, 2), 18.0))
        >>> maps.shape, divmod(int(maps[0, 0].argmax()), 16)
        (torch.Size([1, 14, 16, 16]), (4, 4))
    """
    centres = (torch.arange(CELLS) + 0.5) * CELL
    off = (centres - joints[..., None]) / (CELL * _DEVIATION)
    bell = (-0.5 * off * off).softmax(-1)  # [B, 14, 2, 16]
    return bell[:, :, 1, :, None] * bell[:, :, 0, None, :]


def loss_of(maps: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of heat maps and the truth: the mean of the joints, the sum of the stages.

    Args:
        maps: as the machine gives them, ``[stages, B, 14, 16, 16]``.
        truth: ``[B, 14, 16, 16]``.

    Example:
        >>> truth = heat_maps(torch.full((1, 14, 2), 18.0))
        >>> round(float(loss_of(torch.zeros(2, 1, 14, 16, 16), truth)), 3)  # 2 log(256)
        11.09
    """
    surprise = -(maps.flatten(3).log_softmax(3) * truth.flatten(2)).sum(3)
    total: Tensor = surprise.mean((1, 2)).sum()
    return total


def found(maps: Tensor) -> Tensor:
    """Joints of heat maps, in pixels: ``[B, 14, 16, 16] -> [B, 14, 2]``.

    The mean place of the likeliest cell and those around it, by how likely they are.

    Example:
        >>> joints = torch.full((1, 14, 2), 20.0)
        >>> float((found(heat_maps(joints).log()) - joints).abs().max()) < 1
        True
    """
    top = maps.flatten(2).argmax(2)
    rows, columns = top // CELLS, top % CELLS
    cells = torch.arange(CELLS)
    near = ((cells - rows[..., None]).abs() <= 1)[..., :, None]
    near = near & ((cells - columns[..., None]).abs() <= 1)[..., None, :]
    likely = maps.flatten(2).softmax(2).view(maps.shape) * near
    total = likely.sum((2, 3))
    centres = (cells + 0.5) * CELL
    x = (likely.sum(2) * centres).sum(2) / total
    y = (likely.sum(3) * centres).sum(2) / total
    return torch.stack([x, y], 2)
