"""What the CPU suites measure: layers of real models, each with several banks and batches."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.harness import cases
from benchmarks.harness.cases import Layer
from rpg_kernels import _checks

GRANULARITY = 64
DENSE, OURS, REFERENCE = IMPLS = ("dense", "rpg-kernels", "rpg-reference")
DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Bank:
    """A bank of granularity 64 with a sign for each slot use.

    Args:
        dof: degrees of freedom.
        laps: of its units; None reads the whole ring.
        window: slots that the units aim at; None lets the law choose.

    Example:
        >>> str(Bank(200_000)), str(Bank(20_000_000, 4)), str(Bank(2_000_000, 4, 256))
        ('ring, 200K', '4 laps, 20M', 'windows 256 x 4, 2M')
    """

    dof: int
    laps: int | None = None
    window: int | None = None

    def __str__(self) -> str:
        read = "ring" if self.laps is None else f"{self.laps} laps"
        if self.window is not None:
            read = f"windows {self.window} x {self.laps}"
        return f"{read}, {cases.short(self.dof)}"


@dataclass(frozen=True)
class Point:
    """One thing to time: an implementation at a batch, on a bank unless it is dense.

    Args:
        impl: one of ``IMPLS``.
        bank: None of a dense weight.
        batch: rows of x, or images of a convolution.
    """

    impl: str
    bank: Bank | None
    batch: int


@dataclass(frozen=True)
class Group:
    """A layer in one dtype, with everything that is timed in turn with its dense weight.

    Args:
        layer: shape of the weight, and where it occurs.
        dtype: of x, weight and banks: ``"fp32"`` or ``"bf16"``.
        banks: that ours reads.
        batches: rows of x, or images.
        referred: banks on which the reference is timed too.
        referred_batches: at which; it takes as long at any of them.
    """

    layer: Layer
    dtype: str
    banks: tuple[Bank, ...]
    batches: tuple[int, ...]
    referred: tuple[Bank, ...] = ()
    referred_batches: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.layer.names[0]} {self.dtype}"

    def points(self) -> list[Point]:
        """Everything to time, dense first."""
        return [
            *(Point(DENSE, None, batch) for batch in self.batches),
            *(Point(OURS, bank, batch) for bank in self.banks for batch in self.batches),
            *(
                Point(REFERENCE, bank, batch)
                for bank in self.referred
                for batch in self.referred_batches
            ),
        ]


@dataclass(frozen=True)
class Suite:
    """Groups, and how long to measure them.

    Args:
        groups: in this order, from the beginning again for every series.
        series: passes over all groups, so that samples of one figure lie minutes apart.
        seconds: budget for the samples of a group in a series.
    """

    groups: tuple[Group, ...]
    series: int
    seconds: float


_SMALL = Bank(200_000)
_SMALL_LAPS = Bank(200_000, 4)
_QUICK_BANKS = (_SMALL, _SMALL_LAPS, Bank(20_000_000, 4))
_FULL_BANKS = tuple(
    Bank(dof, laps) for laps in (None, 4, 16) for dof in (45_000, 200_000, 2_000_000, 20_000_000)
)
_QUICK_LAYERS = ("llama-3-8b.gate_proj", "llama-3-8b.q_proj", "bert-base.query")
_FULL_LAYERS = (
    *_QUICK_LAYERS,
    "llama-3-8b.down_proj",
    "vit-l.fc2",
    "bert-base.intermediate",
    "resnet18.fc",
)
_QUICK_CONVOLUTIONS = ("resnet18.layer4.conv3x3",)
_FULL_CONVOLUTIONS = (
    *_QUICK_CONVOLUTIONS,
    "resnet18.layer2.conv3x3",
    "resnet18.layer4.downsample",
)


def _groups(names: Iterable[str], **fields: object) -> Iterable[Group]:
    for name in names:
        (layer,) = (layer for layer in cases.LAYERS if name in layer.names)
        for dtype in DTYPES:
            yield Group(layer, dtype, **fields)  # type: ignore[arg-type]


SUITES = {
    "cpu": Suite(
        (
            *_groups(
                _QUICK_LAYERS,
                banks=_QUICK_BANKS,
                batches=(1, 4, 8, 16),
                referred=(_SMALL,),
                referred_batches=(1,),
            ),
            *_groups(_QUICK_CONVOLUTIONS, banks=_QUICK_BANKS[:2], batches=(1,)),
        ),
        series=3,
        seconds=1.0,
    ),
    "cpu-full": Suite(
        (
            *_groups(
                _FULL_LAYERS,
                banks=_FULL_BANKS,
                batches=(1, 2, 4, 8, 16, 32),
                referred=(_SMALL, _SMALL_LAPS),
                referred_batches=(1, 16),
            ),
            *_groups(_FULL_CONVOLUTIONS, banks=_QUICK_BANKS, batches=(1, 8), referred=(_SMALL,),
                     referred_batches=(1, 8)),
        ),
        series=3,
        seconds=4.0,
    ),
}  # fmt: skip


def choose(
    name: str,
    patterns: Sequence[str] = (),
    batches: Sequence[int] = (),
    dofs: Sequence[int] = (),
    dtypes: Sequence[str] = (),
) -> Suite:
    """A suite, or the part of it that is asked for.

    Args:
        name: of the suite.
        patterns: shell patterns for ``model.layer``, or beginnings; none leaves every layer.
        batches, dofs, dtypes: to keep; none keeps all of the suite.

    Raises:
        ValueError: an unknown suite, or nothing is left, with the layers that there are.

    Example:
        >>> [str(group) for group in choose("cpu", ["bert-base"], dtypes=["fp32"]).groups]
        ['vit-b.proj fp32']
    """
    _checks.choice("suite", name, tuple(SUITES))
    suite = SUITES[name]
    groups = []
    for group in suite.groups:
        named = any(
            fnmatch.fnmatchcase(known, f"{pattern}*")
            for known in group.layer.names
            for pattern in patterns or [""]
        )
        if named and group.dtype in (dtypes or DTYPES):
            kept = replace(
                group,
                banks=tuple(b for b in group.banks if b.dof in (dofs or [b.dof])),
                batches=tuple(b for b in group.batches if b in (batches or [b])),
                referred=tuple(b for b in group.referred if b.dof in (dofs or [b.dof])),
                referred_batches=tuple(b for b in group.referred_batches if b in (batches or [b])),
            )
            if kept.banks and kept.batches:
                groups.append(kept)
    if not groups:
        got = " ".join(map(str, (*patterns, *batches, *dofs, *dtypes)))
        names = dict.fromkeys(str(group) for group in suite.groups)
        raise _checks.fail("case", repr(got), f"something of suite {name}: {', '.join(names)}")
    return replace(suite, groups=tuple(groups))
