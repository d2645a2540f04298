"""What the CPU suite measures: linear layers of real models, with several banks and batches."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.harness import cases
from benchmarks.harness.cases import Layer
from rpg_kernels import _checks

GRANULARITY = 64
DTYPES = ("bf16", "fp32")
FORWARD, TRAINING = WHATS = ("forward", "training")
BATCHES = (1, 4, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Bank:
    """A bank of granularity 64 with a sign for each slot use.

    Args:
        dof: degrees of freedom.
        laps: times that each of its slots is read close together; None reads the whole ring.

    Example:
        >>> str(Bank(200_000)), str(Bank(20_000_000, 4))
        ('ring, 200K', '4 laps, 20M')
    """

    dof: int
    laps: int | None = None

    def __str__(self) -> str:
        read = "ring" if self.laps is None else f"{self.laps} laps"
        return f"{read}, {cases.short(self.dof)}"


@dataclass(frozen=True)
class Point:
    """What is timed in turn: a layer on some banks and the dense layers beside it, at one batch.

    Args:
        layer: shape of the weight, and where it occurs.
        dtype: of x, weight and banks: ``"bf16"`` or ``"fp32"``.
        batch: rows of x.
        what: ``"forward"``, or ``"training"``, which is the forward and both gradients.
        banks: that ours reads.
    """

    layer: Layer
    dtype: str
    batch: int
    what: str
    banks: tuple[Bank, ...]

    def __str__(self) -> str:
        return f"{self.layer.names[0]} {self.dtype} batch {self.batch} {self.what}"


BANKS = (Bank(2_000_000, 4), Bank(2_000_000, 16), Bank(2_000_000))
_LARGE = Bank(20_000_000, 4)  # whose traffic decides at batch 1 only
_LAYERS = (
    "llama-3-8b.q_proj",
    "llama-3-8b.gate_proj",
    "bert-base.intermediate",
    "bert-base.output",
    "vit-l.proj",
)
_LARGEST = 2**22  # weights of a layer that the largest batch is not too long for


def points(longer: bool = False) -> Iterator[Point]:
    """The whole suite, the headline's dtype first.

    Args:
        longer: with the largest layers at the largest batch.
    """
    for dtype in DTYPES:
        for name in _LAYERS:
            (layer,) = (layer for layer in cases.LAYERS if name in layer.names)
            for batch in BATCHES:
                if longer or batch < BATCHES[-1] or layer.virtual_weights <= _LARGEST:
                    for what in WHATS:
                        banks = (*BANKS, _LARGE) if batch == 1 else BANKS
                        yield Point(layer, dtype, batch, what, banks)


def choose(
    patterns: Sequence[str] = (),
    batches: Sequence[int] = (),
    dofs: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    longer: bool = False,
) -> list[Point]:
    """The suite, or the part of it that is asked for.

    Args:
        patterns: shell patterns for ``model.layer``, or beginnings; none leaves every layer.
        batches, dofs, dtypes: to keep; none keeps all of the suite.
        longer: see ``points``.

    Raises:
        ValueError: nothing is left; the message has the layers that there are.

    Example:
        >>> [str(point) for point in choose(["vit-l"], [16], dtypes=["bf16"])]
        ['vit-l.proj bf16 batch 16 forward', 'vit-l.proj bf16 batch 16 training']
    """
    kept = []
    for point in points(longer):
        named = any(
            fnmatch.fnmatchcase(known, f"{pattern}*")
            for known in point.layer.names
            for pattern in patterns or [""]
        )
        banks = tuple(bank for bank in point.banks if bank.dof in (dofs or [bank.dof]))
        asked = point.batch in (batches or [point.batch]) and point.dtype in (dtypes or DTYPES)
        if named and asked and banks:
            kept.append(Point(point.layer, point.dtype, point.batch, point.what, banks))
    if not kept:
        got = " ".join(map(str, (*patterns, *batches, *dofs, *dtypes)))
        raise _checks.fail("case", repr(got), f"something of suite cpu: {', '.join(_LAYERS)}")
    return kept
