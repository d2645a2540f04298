"""What is measured: layers of real models, at their batch sizes, with a bank of some settings.

A case is named ``model.layer/batch``: ``resnet18.layer3.conv3x3/32`` is that convolution of
ResNet-18 for 32 images of 224 x 224, ``llama-3-8b.q_proj/16`` a projection for 16 tokens.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rpg_kernels import _checks
from rpg_kernels.bank.config import ring_of
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.ring import REFLECT

DOFS = (45_000, 2_000_000, 20_000_000)
GRANULARITIES = (1, 16, 64)
BATCHES = {
    "linear": (1, 16, 64, 256, 4096),
    "conv2d": (1, 32, 256),
    "embedding": (1, 16, 64, 256, 4096),
}
# name -> (dtype of x, dtype of bank and dense weight); "amp" is what autocast trains with.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "amp": (torch.bfloat16, torch.float32),
}
PASSES = ("forward", "backward", "full")


@dataclass(frozen=True)
class Layer:
    """One layer of real models.

    Args:
        op: ``"linear"``, ``"conv2d"`` or ``"embedding"``.
        names: ``model.layer``; where models share a shape, all of them, the first is printed.
        weight: torch's shape.
        image: height and width of a convolution's input.
        stride: of a convolution; its padding keeps the size.
    """

    op: str
    names: tuple[str, ...]
    weight: tuple[int, ...]
    image: int = 0
    stride: int = 1

    @property
    def padding(self) -> int:
        return self.weight[-1] // 2 if self.op == "conv2d" else 0

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """Stride, padding, dilation and groups, as the operator takes them."""
        return (self.stride, self.stride), (self.padding, self.padding), (1, 1), 1

    @property
    def virtual_weights(self) -> int:
        return math.prod(self.weight)


@dataclass(frozen=True)
class Case:
    """A layer, a batch, and the bank behind it.

    Args:
        layer: shape of the weight and where it occurs.
        batch: images of a convolution, tokens of a linear layer or an embedding.
        dof: degrees of freedom asked for; the bank rounds down to whole slots.
        granularity: elements of a slot.
        reflect: ``"element"``, ``"vector"`` or ``"none"``.
        dtype: ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"amp"`` for bf16 beside an fp32 bank.
        window: slots of a window of the bank that the law aims at; None for its own choice, and
            with a whole ring.
        laps: times that a unit reads each slot of its window; None reads the whole ring.

    Example:
        >>> case = select(["resnet34.layer4.conv3x3/32"])[0]
        >>> case.name, case.input_shape, case.output_shape
        ('resnet18.layer4.conv3x3/32', (32, 512, 7, 7), (32, 512, 7, 7))
    """

    layer: Layer
    batch: int
    dof: int = 2_000_000
    granularity: int = 64
    reflect: str = "vector"
    dtype: str = "fp32"
    window: int | None = None
    laps: int | None = None

    def __post_init__(self) -> None:
        _checks.integer("batch", self.batch, 1, 2**31)
        _checks.integer("dof", self.dof, 1, 2**40)
        _checks.granularity(self.granularity)
        _checks.choice("reflect", self.reflect, REFLECT)
        _checks.choice("dtype", self.dtype, tuple(DTYPES))
        if self.window is not None or self.laps is not None:
            _ = self.generator  # checks them

    @property
    def generator(self) -> Generator:
        """Of the bank."""
        slots, granularity = ring_of(self.dof, self.granularity)
        return Generator(
            slots=slots,
            granularity=granularity,
            reflect=self.reflect,
            window=self.window,
            laps=self.laps,
        )

    @property
    def name(self) -> str:
        return f"{self.layer.names[0]}/{self.batch}"

    @property
    def setting(self) -> str:
        """Bank and dtype, short: ``2M g64 vector fp32``, with windows ``... fp32 w256x4``."""
        return bank_of(vars(self))

    @property
    def op(self) -> str:
        return self.layer.op

    @property
    def x_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype][0]

    @property
    def bank_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype][1]

    @property
    def input_shape(self) -> tuple[int, ...]:
        if self.op == "embedding":
            return (self.batch,)
        if self.op == "linear":
            return (self.batch, self.layer.weight[1])
        return (self.batch, self.layer.weight[1], self.layer.image, self.layer.image)

    @property
    def output_shape(self) -> tuple[int, ...]:
        if self.op == "embedding":
            return (self.batch, self.layer.weight[1])
        if self.op == "linear":
            return (self.batch, self.layer.weight[0])
        size = -(-self.layer.image // self.layer.stride)
        return (self.batch, self.layer.weight[0], size, size)

    @property
    def input_bytes(self) -> int:
        item = 8 if self.op == "embedding" else self.x_dtype.itemsize
        return math.prod(self.input_shape) * item

    @property
    def output_bytes(self) -> int:
        item = self.bank_dtype if self.op == "embedding" else self.x_dtype
        return math.prod(self.output_shape) * item.itemsize

    @property
    def rows_only(self) -> bool:
        """Whether a call reads only some rows of the weight."""
        return self.op == "embedding"

    @property
    def weight_bytes(self) -> int:
        """Of the dense weight."""
        return self.layer.virtual_weights * self.bank_dtype.itemsize

    @property
    def bank_bytes(self) -> int:
        return self.dof * self.bank_dtype.itemsize

    @property
    def operations(self) -> int:
        """Floating-point operations of one forward; a backward has twice as many."""
        if self.op == "embedding":
            return 0
        outputs = math.prod(self.output_shape) // self.layer.weight[0]
        return 2 * outputs * self.layer.virtual_weights


def short(number: int) -> str:
    """A count as people write it.

    Example:
        >>> short(45_000), short(20_000_000), short(1234)
        ('45K', '20M', '1234')
    """
    for unit, size in (("M", 1_000_000), ("K", 1_000)):
        if number >= size and number % size == 0:
            return f"{number // size}{unit}"
    return str(number)


def bank_of(fields: Mapping[str, Any]) -> str:
    """Bank and dtype, short, of a case's fields or of a row of a result file.

    Example:
        >>> bank_of(vars(select(["vit-b.fc1/16"])[0]) | {"window": 256, "laps": 4})
        '2M g64 vector fp32 w256x4'
    """
    words = f"{short(fields['dof'])} g{fields['granularity']} {fields['reflect']} {fields['dtype']}"
    if fields["window"]:
        return f"{words} w{fields['window']}x{fields['laps']}"
    return f"{words} x{fields['laps']}" if fields["laps"] else words


def _resnet() -> Iterable[Layer]:
    """Block convolutions of ResNet-18 and ResNet-34, whose shapes are the same; images of 224."""
    for stage in (1, 2, 3, 4):
        channels, image = 32 * 2**stage, 112 // 2**stage
        names = [f"resnet{depth}.layer{stage}." for depth in (18, 34)]

        def named(kind: str, names: Sequence[str] = names) -> tuple[str, ...]:
            return tuple(name + kind for name in names)

        yield Layer("conv2d", named("conv3x3"), (channels, channels, 3, 3), image)
        if stage > 1:
            below = channels // 2
            yield Layer("conv2d", named("first3x3"), (channels, below, 3, 3), 2 * image, 2)
            yield Layer("conv2d", named("downsample"), (channels, below, 1, 1), 2 * image, 2)


LAYERS = (
    *_resnet(),
    Layer("linear", ("resnet18.fc", "resnet34.fc"), (1000, 512)),
    Layer("linear", ("vit-b.qkv",), (2304, 768)),
    Layer("linear", ("vit-b.proj", "bert-base.query", "bert-base.key", "bert-base.value",
                     "bert-base.attention_output"), (768, 768)),
    Layer("linear", ("vit-b.fc1", "bert-base.intermediate"), (3072, 768)),
    Layer("linear", ("vit-b.fc2", "bert-base.output"), (768, 3072)),
    Layer("linear", ("vit-l.proj", "bert-large.query"), (1024, 1024)),
    Layer("linear", ("llama-3-8b.q_proj", "llama-3-8b.o_proj"), (4096, 4096)),
    Layer("linear", ("llama-3-8b.k_proj", "llama-3-8b.v_proj", "vit-l.fc2"), (1024, 4096)),
    Layer("linear", ("llama-3-8b.gate_proj", "llama-3-8b.up_proj"), (14336, 4096)),
    Layer("linear", ("llama-3-8b.down_proj",), (4096, 14336)),
    Layer("embedding", ("llama-3-8b.embed_tokens",), (128256, 4096)),
)  # fmt: skip


def select(
    patterns: Sequence[str],
    ops: Sequence[str] = (),
    batches: Sequence[int] = (),
    dofs: Sequence[int] = (),
    granularities: Sequence[int] = (),
    reflects: Sequence[str] = (),
    dtype: str = "fp32",
) -> list[Case]:
    """Every combination of the layers that the patterns name and of the settings given.

    Args:
        patterns: shell patterns for ``model.layer`` or ``model.layer/batch``; the beginning of a
            name does too. None selects every layer.
        ops: operators; none selects every one.
        batches: none takes the pattern's, or all that are usual for the operator.
        dofs, granularities, reflects: none takes the default of ``Case``.
        dtype: of all cases.

    Raises:
        ValueError: a pattern or an operator that names nothing, with the list of what exists; a
            setting out of range.

    Example:
        >>> [case.name for case in select(["vit-b.fc*"], batches=[16])]
        ['vit-b.fc1/16', 'vit-b.fc2/16']
    """
    for op in ops:
        _checks.choice("op", op, tuple(BATCHES))
    found: dict[Case, None] = {}
    for pattern in patterns or [""]:
        matches = list(_matches(pattern))
        if not matches:
            raise _checks.fail("case", repr(pattern), "one of\n" + listing())
        for layer, usual in matches:
            if ops and layer.op not in ops:
                continue
            for setting in itertools.product(
                batches or usual,
                dofs or (Case.dof,),
                granularities or (Case.granularity,),
                reflects or (Case.reflect,),
            ):
                found[Case(layer, *setting, dtype)] = None
    if not found:
        got = f"{' '.join(patterns)} with op {' '.join(ops)}"
        raise _checks.fail("case", repr(got), "one of\n" + listing())
    return list(found)


def _matches(pattern: str) -> Iterable[tuple[Layer, tuple[int, ...]]]:
    """Layers that a pattern names, with the batches that it leaves."""
    name, slash, batch = pattern.partition("/")
    for layer in LAYERS:
        if any(
            fnmatch.fnmatchcase(known, f"{name}{'' if slash else '*'}") for known in layer.names
        ):
            usual = BATCHES[layer.op]
            chosen = tuple(b for b in usual if not slash or fnmatch.fnmatchcase(str(b), batch))
            if chosen:
                yield layer, chosen


def listing() -> str:
    """Every layer with its shape and batches, one a line."""
    lines = []
    for layer in LAYERS:
        batches = ",".join(map(str, BATCHES[layer.op]))
        shape = "x".join(map(str, layer.weight))
        also = f" = {', '.join(layer.names[1:])}" if layer.names[1:] else ""
        lines.append(f"  {layer.op:9} {layer.names[0]}/{{{batches}}} [{shape}]{also}")
    return "\n".join(lines)
