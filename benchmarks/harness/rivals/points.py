"""What suite ``rivals`` measures: two layers of Llama 3 at some batches, and a decoder."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness import cases
from benchmarks.harness.cases import Layer
from benchmarks.harness.rivals.contender import FORWARD, TRAINING
from rpg_kernels import _checks

DECODER = "decoder"
BATCHES = {FORWARD: (1, 4, 16, 32, 128, 512), TRAINING: (256, 1024, 4096)}
_NAMES = ("llama-3-8b.gate_proj", "llama-3-8b.q_proj")  # 14336 x 4096, 4096 x 4096
_SMALL, _MANY, _FEW = 2**25, 4, 2  # weights of a layer; copies of a small and of a larger one


@dataclass(frozen=True)
class Point:
    """Everything that is timed in turn: a layer at one batch.

    Args:
        layer: shape of the weight, and where it occurs.
        what: ``"forward"`` or ``"training"``.
        batch: rows of x.
    """

    layer: Layer
    what: str
    batch: int

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        rows, columns = self.layer.weight
        return rows, columns

    @property
    def copies(self) -> int:
        """Layers that are timed in a turn: of small ones more."""
        return _MANY if self.layer.virtual_weights < _SMALL else _FEW

    def __str__(self) -> str:
        return f"{self.layer.names[0]} {self.what} batch {self.batch}"


def points() -> list[Point]:
    """The whole suite, but for the decoder."""
    layers = {name: layer for layer in cases.LAYERS for name in layer.names}
    return [
        Point(layers[name], what, batch)
        for what, batches in BATCHES.items()
        for name in _NAMES
        for batch in batches
    ]


def choose(patterns: Sequence[str] = (), batches: Sequence[int] = ()) -> tuple[list[Point], bool]:
    """The suite, or the part of it that is asked for, and whether the decoder is in it.

    Args:
        patterns: shell patterns for ``model.layer``, ``forward``, ``training`` or ``decoder``,
            or beginnings; none leaves everything.
        batches: to keep; none keeps all.

    Raises:
        ValueError: nothing is left; the message has what there is.

    Example:
        >>> found, decoder = choose(["llama-3-8b.q_proj"], [512])
        >>> [str(point) for point in found], decoder
        (['llama-3-8b.q_proj forward batch 512'], False)
    """

    def named(*names: str) -> bool:
        wanted = [f"{pattern}*" for pattern in patterns or [""]]
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in wanted)

    found = [
        point
        for point in points()
        if named(*point.layer.names, point.what) and point.batch in (batches or [point.batch])
    ]
    decoder = named(DECODER) and not batches
    if not found and not decoder:
        got = " ".join(map(str, (*patterns, *batches)))
        there = ", ".join((*_NAMES, *BATCHES, DECODER))
        raise _checks.fail("case", repr(got), f"something of suite rivals: {there}")
    return found, decoder
