"""Which channels of a network hang together: numbers of channels, and what binds and fixes them.

Every out-channel of a layer is given a number. What is bound can only be removed together: it is
one *bundle*. Fixed channels stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from rpg_kernels.pruning.cutting import LINEAR, NORMS, is_depthwise


@dataclass
class Use:
    """A layer as the network calls it.

    Args:
        name, layer: in the model.
        out, into: numbers of its channels; of a norm they are the same ones.
        positions: at which the weight is multiplied, all calls and images together.
        gate: whether importance is measured at its output: not where a norm alone reads it, at
            whose output it is measured then.
    """

    name: str
    layer: nn.Module
    out: tuple[int, ...]
    into: tuple[int, ...]
    positions: int = 0
    gate: bool = True

    @property
    def flops_of_pair(self) -> float:
        """Of an out-channel with one in-channel: two for each multiplication, as torch counts. Of a
        depthwise convolution: of an out-channel."""
        if isinstance(self.layer, NORMS):
            return 0.0
        if isinstance(self.layer, LINEAR):
            return 2.0 * self.positions
        has = cast(Any, self.layer)
        taps = 1
        for size in has.kernel_size:
            taps *= size
        groups = 1 if is_depthwise(self.layer) else has.groups
        return 2.0 * self.positions * taps / groups


@dataclass
class ChannelGraph:
    """The layers of a network and what binds their channels.

    Args:
        uses: by name of the layer.
        fixed: number of a channel that stays -> what it meets.
    """

    uses: dict[str, Use] = field(default_factory=dict)
    fixed: dict[int, str] = field(default_factory=dict)
    _parent: list[int] = field(default_factory=list)

    def new(self, count: int) -> tuple[int, ...]:
        """Numbers that are bound to none."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return tuple(range(first, first + count))

    def bundle(self, number: int) -> int:
        """One number that stands for all that are bound to it."""
        root = number
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[number] != root:
            self._parent[number], number = root, self._parent[number]
        return root

    def bind(self, ones: Iterable[int], others: Iterable[int]) -> None:
        """Pairs of numbers that stay or go together."""
        for one, other in zip(ones, others, strict=True):
            a, b = self.bundle(one), self.bundle(other)
            self._parent[max(a, b)] = min(a, b)

    def fix(self, numbers: Iterable[int] | None, why: str) -> None:
        """Channels that stay."""
        for number in numbers or ():
            self.fixed.setdefault(number, why)

    def fixed_bundles(self) -> dict[int, str]:
        """The same by bundle."""
        return {self.bundle(number): why for number, why in self.fixed.items()}
