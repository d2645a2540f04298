"""ResNet-18 and ResNet-34, dense or with every block convolution read from one parameter bank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Unpack

from torch import Tensor, nn

from rpg_kernels.bank.config import BankSettings, Group, RPGConfig
from rpg_kernels.conversion import convert

STEMS = ("imagenet", "cifar")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``[B, in, H, W] -> [B, out, H/stride, W/stride]``.

    The shortcut is the identity, or a strided 1x1 convolution and a norm where the shape changes.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + shortcut)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Stages of :class:`BasicBlock`; modules are named as torchvision names them.

    Args:
        depths: blocks in each stage; ResNet-18 has (2, 2, 2, 2). Every stage but the first halves
            height and width and doubles the channels.
        num_classes: outputs of the classifier.
        stem: ``"imagenet"`` is a 7x7 convolution of stride 2 and a max-pool (the blocks see H/4);
            ``"cifar"`` is a 3x3 convolution of stride 1 and no max-pool.
        width: channels of the first stage.
        in_channels: channels of the images.

    Shape:
        ``[B, in_channels, H, W] -> [B, num_classes]``.
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 1000,
        stem: str = "imagenet",
        width: int = 64,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if not depths or any(depth < 1 for depth in depths):
            raise ValueError(f"depths: got {tuple(depths)!r}, wanted positive block counts")
        if stem not in STEMS:
            raise ValueError(f"stem: got {stem!r}, wanted one of {', '.join(map(repr, STEMS))}")
        sizes = {"num_classes": num_classes, "width": width, "in_channels": in_channels}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, wanted a positive int")
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, width, 7, 2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, 2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.stages = len(depths)
        channels = width
        for i, depth in enumerate(depths):
            stage = _stage(channels, width << i, depth, stride=1 if i == 0 else 2)
            self.add_module(f"layer{i + 1}", stage)
            channels = width << i
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        kaiming_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def resnet18(
    num_classes: int = 1000, stem: str = "imagenet", rpg: RPGConfig | None = None
) -> ResNet:
    """ResNet-18; with ``rpg`` every block convolution is read from one bank (paper, section 4).

    Args:
        num_classes: outputs of the classifier.
        stem: ``"imagenet"`` or ``"cifar"``, see :class:`ResNet`.
        rpg: describes the bank, or with groups several (:func:`blocks`). The 16 block
            convolutions of 3x3 and the 3 downsampling ones of 1x1 are then shared: 11,157,504
            virtual weights. The stem, the classifier and the norms keep parameters of their own.
            ``scale="match"`` means Kaiming fan-out here, as that is how the dense network starts: a
            layer scale of ``sqrt(4608 / (out·k·k))`` for the default ``init_std``. ``None`` gives
            the dense network.

    Shape:
        ``[B, 3, H, W] -> [B, num_classes]``.

    Raises:
        ValueError: an unknown stem, or a size that is not a positive int.

    Modules and parameters of the dense network have torchvision's names, so that its checkpoints
    load; with ``rpg`` the shared weights are the one key ``rpg_bank.weight``. Nothing is allocated
    under ``torch.device("meta")``; ``rpg_kernels.initialize`` then gives the stem torch's default
    values, and :func:`kaiming_fan_out` those of a model that was built with values.

    >>> import torch
    >>> from rpg_kernels import RPGConfig
    >>> from rpg_kernels.models import resnet18
    >>> with torch.device("meta"):
    ...     model = resnet18(10, stem="cifar", rpg=RPGConfig(dof=2_000_000))
    >>> model(torch.empty(8, 3, 32, 32, device="meta")).shape
    torch.Size([8, 10])
    >>> model.rpg_bank.weight.numel()
    2000000
    """
    return share_blocks(ResNet((2, 2, 2, 2), num_classes, stem), rpg)


def resnet34(
    num_classes: int = 1000, stem: str = "imagenet", rpg: RPGConfig | None = None
) -> ResNet:
    """ResNet-34; with ``rpg`` every block convolution is read from one bank (paper, section 4).

    Arguments, shapes and errors are those of :func:`resnet18`. There are 21,258,240 virtual
    weights in 32 convolutions of 3x3 and 3 of 1x1.

    >>> import torch
    >>> from rpg_kernels import RPGConfig
    >>> from rpg_kernels.models import resnet34
    >>> with torch.device("meta"):
    ...     model = resnet34(rpg=RPGConfig(dof=11_000_000))
    >>> model(torch.empty(2, 3, 224, 224, device="meta")).shape
    torch.Size([2, 1000])
    """
    return share_blocks(ResNet((3, 4, 6, 3), num_classes, stem), rpg)


def blocks(dof: int, **settings: Unpack[BankSettings]) -> RPGConfig:
    """A bank for each stage of a :func:`resnet18` or :func:`resnet34`: "RPG.blk" of the paper.

    Args:
        dof: of the four banks together, in proportion to the virtual weights of the stages.
        settings: other fields of :class:`~rpg_kernels.RPGConfig`, for all of them.

    Returns:
        A config with the groups ``layer1`` to ``layer4``, for the argument ``rpg``.

    >>> import torch
    >>> from rpg_kernels import summary
    >>> from rpg_kernels.models import blocks, resnet34
    >>> with torch.device("meta"):
    ...     model = resnet34(rpg=blocks(dof=11_000_000))
    >>> model.rpg_bank_layer4.dof, summary(model).dof
    (6782272, 11000000)
    """
    stages = (f"layer{i}" for i in range(1, 5))
    return RPGConfig(dof=dof, groups=[Group(stage, stage) for stage in stages], **settings)


def is_block_convolution(module: nn.Module, name: str) -> bool:
    """Whether the paper shares this module of a :class:`ResNet`: any convolution of a stage.

    The signature is that of ``filter_fn`` of :func:`rpg_kernels.convert`.
    """
    return isinstance(module, nn.Conv2d) and name.startswith("layer")


def share_blocks(model: ResNet, rpg: RPGConfig | None) -> ResNet:
    """Share every block convolution of ``model``, or what the groups of ``rpg`` match, in place.

    ``rpg=None`` leaves it dense.
    """
    if rpg is not None:
        # A model on "meta" has no values to match, and fan-out is what they would be.
        groups = []
        for group in rpg.groups:
            settings = group.settings
            if settings.get("scale") == "match":
                settings["scale"] = "fan_out"
            groups.append(Group(group.name, group.layers, **settings))
        scale = "fan_out" if rpg.scale == "match" else rpg.scale
        rpg = dataclasses.replace(rpg, scale=scale, groups=groups)
        convert(model, rpg, filter_fn=None if groups else is_block_convolution)
    return model


def kaiming_fan_out(model: nn.Module) -> None:
    """Set convolutions to Kaiming-normal fan-out, norms to the identity (the paper's start)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def _stage(in_channels: int, out_channels: int, depth: int, stride: int) -> nn.Sequential:
    blocks = [BasicBlock(in_channels, out_channels, stride)]
    blocks += [BasicBlock(out_channels, out_channels) for _ in range(1, depth)]
    return nn.Sequential(*blocks)
