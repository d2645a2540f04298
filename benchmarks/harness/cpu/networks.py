"""What suite ``networks`` measures: convolutions, and whole networks in training and inference."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.cpu.grid import FORWARD, TRAINING, Bank
from examples.demo.published import share_as_published
from rpg_kernels import ParameterBank, RPGConfig, _checks, convert
from rpg_kernels.models import Decoder, DecoderConfig, resnet18, resnet34
from rpg_kernels.models.resnet import is_block_convolution
from rpg_kernels.nn import Conv2d

GRANULARITY = 64
INFERENCE = "inference"
WHATS = (FORWARD, TRAINING, INFERENCE)
IMAGES, TOKENS = "images", "tokens"
CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A network, or a single convolution.

    Args:
        name: of it.
        make: gives it dense, with fresh values.
        sample: shape of one sample; ``()`` for a token.
        share: makes it read a bank; ``published`` is the same as the paper's code does it.
        unit: what a second is counted in.
        per_sample: so many units.
        package: that it comes from, which may not be installed.
    """

    name: str
    make: Callable[[], nn.Module]
    sample: tuple[int, ...]
    share: Callable[[nn.Module, Bank], nn.Module]
    published: Callable[[nn.Module, int], nn.Module] | None = None
    unit: str = IMAGES
    per_sample: int = 1
    package: str = ""

    @property
    def is_layer(self) -> bool:
        return self.name.startswith("conv")

    def missing(self) -> str:
        """Why it cannot be measured here, or ""."""
        if not self.package:
            return ""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        try:
            importlib.import_module(self.package)
        except Exception as error:  # whatever the package, or one that it needs, does at its import
            return f"{self.package} cannot be imported: {error}"
        return ""

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Random samples, and the classes or tokens that they are trained on."""
        if self.unit == TOKENS:
            tokens = torch.randint(_DECODER.vocabulary, (size, self.per_sample))
            return tokens, tokens.flatten()
        return torch.randn(size, *self.sample), torch.randint(CLASSES, (size,))


@dataclass(frozen=True)
class Point:
    """What is timed in turn: a case on some banks and the dense ones beside it, at one batch."""

    case: Case
    dtype: str
    batch: int
    what: str
    banks: tuple[Bank, ...]

    def __str__(self) -> str:
        return f"{self.case.name} {self.dtype} batch {self.batch} {self.what}"


def config(bank: Bank) -> RPGConfig:
    """How a network reads a bank."""
    return RPGConfig(dof=bank.dof, granularity=GRANULARITY, laps=bank.laps)


def _share(chosen: Callable[[nn.Module, str], bool]) -> Callable[[nn.Module, Bank], nn.Module]:
    return lambda model, bank: convert(model, config(bank), filter_fn=chosen)


def _resnet(name: str, build: Callable[..., nn.Module], stem: str, side: int) -> Case:
    def share(model: nn.Module, bank: Bank) -> nn.Module:
        kind = dataclasses.replace(config(bank), scale="fan_out")
        return convert(model, kind, filter_fn=is_block_convolution)

    return Case(
        f"{name}-{stem}",
        lambda: build(CLASSES, stem),
        (3, side, side),
        share,
        lambda model, dof: share_as_published(model, dof, is_block_convolution),
    )


def _conv(channels: int, side: int, kernel: int = 3, stride: int = 1, growth: int = 1) -> Case:
    """A convolution of ResNet-18 with ``growth`` times as many channels behind it."""
    shape = (channels, channels * growth, kernel)
    options: dict[str, Any] = {"stride": stride, "padding": kernel // 2, "bias": False}

    def share(model: nn.Module, bank: Bank) -> nn.Module:
        memory = ParameterBank(bank.dof, GRANULARITY, laps=bank.laps)
        return Conv2d(*shape, **options, bank=memory)

    return Case(
        conv_name(channels, side, kernel, stride, growth),
        lambda: nn.Conv2d(*shape, **options),
        (channels, side, side),
        share,
    )


def conv_name(channels: int, side: int, kernel: int = 3, stride: int = 1, growth: int = 1) -> str:
    """
    Example:
        >>> conv_name(64, 32), conv_name(256, 8, 1, 2, 2)
        ('conv3x3 64->64 32x32', 'conv1x1 256->512 8x8 /2')
    """
    name = f"conv{kernel}x{kernel} {channels}->{channels * growth} {side}x{side}"
    return name + (f" /{stride}" if stride > 1 else "")


def _vit() -> nn.Module:
    import timm

    made: nn.Module = timm.create_model("vit_small_patch16_224", num_classes=CLASSES)
    return made


def _is_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear)


def _is_in_block(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.startswith("blocks")


_DECODER = DecoderConfig(layers=4)
_CIFAR, _IMAGENET = ("cifar", 32), ("imagenet", 224)
_RESNET18 = _resnet("resnet18", resnet18, *_CIFAR)
_RESNET34 = _resnet("resnet34", resnet34, *_CIFAR)
_LARGE = _resnet("resnet18", resnet18, *_IMAGENET)
_VIT = Case("vit-s", _vit, (3, 224, 224), _share(_is_in_block), package="timm")
_TEXT = Case(
    "decoder-4", lambda: Decoder(_DECODER), (), _share(_is_linear), unit=TOKENS, per_sample=512
)
_STAGES = tuple(_conv(64 << i, 32 >> i) for i in range(4))
_OTHERS = (_conv(64, 32, stride=2, growth=2), _conv(256, 16, 1), _conv(256, 8, 1, 2, 2))

FOUR, NINE, SIXTEEN, RING = (
    Bank(2_000_000, 4),
    Bank(700_000, 9),
    Bank(2_000_000, 16),
    Bank(2_000_000),
)


def points() -> Iterator[Point]:
    """The whole suite: fp32 first, as bf16 is the longer where dense products are emulated."""
    for dtype in ("fp32", "bf16"):
        yield Point(_RESNET18, dtype, 32, TRAINING, (FOUR, NINE, RING))
        for case in _STAGES:
            for what in (TRAINING, FORWARD):
                yield Point(case, dtype, 32, what, (FOUR, NINE))
        for case in _OTHERS:
            yield Point(case, dtype, 32, TRAINING, (FOUR,))
        yield Point(_TEXT, dtype, 1, TRAINING, (FOUR, SIXTEEN))
    for dtype in ("fp32", "bf16"):
        yield Point(_RESNET18, dtype, 128, TRAINING, (FOUR, NINE))
        for batch in (1, 128):
            yield Point(_RESNET18, dtype, batch, INFERENCE, (FOUR, NINE))
        for case in _STAGES:
            yield Point(case, dtype, 1, FORWARD, (FOUR, NINE))
            yield Point(case, dtype, 128, TRAINING, (FOUR, NINE))
        yield Point(_RESNET34, dtype, 32, TRAINING, (FOUR, Bank(2_000_000, 9)))
        yield Point(_LARGE, dtype, 16, TRAINING, (FOUR, NINE))
        yield Point(_VIT, dtype, 8, TRAINING, (FOUR,))


def choose(
    patterns: Sequence[str] = (), batches: Sequence[int] = (), dtypes: Sequence[str] = ()
) -> list[Point]:
    """The suite, or the part of it that is asked for.

    Args:
        patterns: shell patterns for names of cases, or beginnings; none leaves every case.
        batches, dtypes: to keep; none keeps all.

    Raises:
        ValueError: nothing is left; the message has the cases that there are.

    Example:
        >>> [str(point) for point in choose(["resnet34"], dtypes=["fp32"])]
        ['resnet34-cifar fp32 batch 32 training']
    """
    found = [
        point
        for point in points()
        if any(fnmatch.fnmatchcase(point.case.name, f"{pattern}*") for pattern in patterns or [""])
        and point.batch in (batches or [point.batch])
        and point.dtype in (dtypes or [point.dtype])
    ]
    if not found:
        got = " ".join(map(str, (*patterns, *batches, *dtypes)))
        names = ", ".join(dict.fromkeys(point.case.name for point in points()))
        raise _checks.fail("case", repr(got), f"something of suite networks: {names}")
    return found
