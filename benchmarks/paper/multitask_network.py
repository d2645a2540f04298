"""An encoder and decoder for depth and normals, whose building blocks can be applied again.

The blocks keep their number of channels and their resolution, so that each can be applied to what
it gave. What changes either (stem, downwards, upwards) and the heads are dense in every row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rpg_kernels as rpg
from rpg_kernels import _checks
from rpg_kernels.models.resnet import BasicBlock, kaiming_fan_out

WIDTHS = (32, 64, 128)  # channels at 32x32, 16x16 and 8x8
# Name of a block, and the channels that it keeps. They are few, so that depth is worth something:
# what a pixel of the output can see is 95 pixels wide with one use of each, and 183 with two.
BLOCKS = {
    "fine": WIDTHS[0],
    "middle": WIDTHS[1],
    "coarse": WIDTHS[2],
    "middle_up": WIDTHS[1],
    "fine_up": WIDTHS[0],
}
NORMS = ("separate", "shared")
# Elements of the bank, as the paper reads it: one by one, each with its sign.
GRANULARITY, REFLECT = 1, "element"
# The standard deviation at which the middle blocks' layers start: scales are 0.7 to 1.4, so that
# Adam's steps, which are of one size whatever the gradient, mean the same as in a dense block.
INIT_STD = math.sqrt(2 / (9 * WIDTHS[1]))


class Multitask(nn.Module):
    """Depth and normals of images, at half their height and width.

    Shape:
        ``[B, 3, H, W] -> [B, 1, H/2, W/2], [B, 3, H/2, W/2]``; H and W divide by 8.

    >>> depth, normals = Multitask()(torch.zeros(2, 3, 64, 64))
    >>> depth.shape, normals.shape
    (torch.Size([2, 1, 32, 32]), torch.Size([2, 3, 32, 32]))
    """

    def __init__(self) -> None:
        super().__init__()
        fine, middle, coarse = WIDTHS
        self.stem = _normed(3, fine, stride=2)
        self.down_middle = _normed(fine, middle, stride=2)
        self.down_coarse = _normed(middle, coarse, stride=2)
        self.up_middle = _normed(coarse, middle, size=1)
        self.up_fine = _normed(middle, fine, size=1)
        self.blocks = nn.ModuleDict({name: BasicBlock(c, c) for name, c in BLOCKS.items()})
        self.depth = nn.Conv2d(fine, 1, 3, padding=1)
        self.normals = nn.Conv2d(fine, 3, 3, padding=1)
        kaiming_fan_out(self)
        # Fan-out of one channel would begin far from any truth; so they begin with its mean.
        nn.init.zeros_(self.depth.weight)
        nn.init.zeros_(self.normals.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        block = self.blocks
        fine = block["fine"](self.stem(x))
        middle = block["middle"](self.down_middle(fine))
        x = block["coarse"](self.down_coarse(middle))
        x = block["middle_up"](middle + F.interpolate(self.up_middle(x), scale_factor=2.0))
        x = block["fine_up"](fine + F.interpolate(self.up_fine(x), scale_factor=2.0))
        return self.depth(x), self.normals(x)


def _normed(in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def is_block_convolution(module: nn.Module, name: str) -> bool:
    """Whether a module of a :class:`Multitask` is a convolution of a block."""
    return isinstance(module, nn.Conv2d) and name.startswith("blocks.")


def block_weights() -> int:
    """Weights of the blocks' convolutions, each block counted once."""
    return sum(2 * 9 * channels**2 for channels in BLOCKS.values())


def build(settings: Mapping[str, Any], seed: int) -> Multitask:
    """A fresh network of a row.

    Args:
        settings: ``uses``, how often each block is applied; where that is more than once ``norm``,
            ``"separate"`` or ``"shared"``, and ``remap``, whether all blocks read one bank, as
            large as they are, and each use permutes and reflects it anew.
        seed: of the initial values, which the dense rows have in common, and of the bank's map.

    Raises:
        TypeError, ValueError: a setting is not one of these.
    """
    uses = _checks.integer("uses", settings.get("uses"), 1, 1000)
    again = uses > 1
    norm = _checks.choice("norm", settings.get("norm"), NORMS) if again else "separate"
    remap = _checks.boolean("remap", settings.get("remap")) if again else False
    torch.manual_seed(seed)
    model = Multitask()
    if remap:
        config = rpg.RPGConfig(
            dof=block_weights(),
            granularity=GRANULARITY,
            reflect=REFLECT,
            seed=seed,
            init_std=INIT_STD,
            scale="fan_out",
        )
        rpg.convert(model, config, filter_fn=is_block_convolution)
    if again:
        for name in BLOCKS:
            model.blocks[name] = rpg.reuse(model.blocks[name], uses, norm=norm, remap=remap)
    return model


def sizes(model: Multitask) -> dict[str, int]:
    """``dof``: numbers that the blocks' convolutions are read from. ``virtual_weights``: weights
    that they multiply with, those of every use. ``trainable``: all that is trained, with norms and
    what is dense in every row."""
    stored: dict[int, int] = {}
    applied = 0
    # A layer that several uses share counts in each.
    for _, layer in model.blocks.named_modules(remove_duplicate=False):
        if isinstance(layer, rpg.nn.Conv2d):  # a torch one too
            bank = layer.virtual_weight.bank.weight
            stored[id(bank)] = bank.numel()
            applied += math.prod(layer.virtual_weight.placement.shape)
        elif isinstance(layer, nn.Conv2d):
            stored[id(layer.weight)] = layer.weight.numel()
            applied += layer.weight.numel()
    return {
        "dof": sum(stored.values()),
        "virtual_weights": applied,
        "trainable": sum(p.numel() for p in model.parameters()),
    }
