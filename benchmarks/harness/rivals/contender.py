"""What a way to run a layer is, and the problem that all ways are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

FORWARD, TRAINING = "forward", "training"
# What the numbers are that are stored of a weight, of ours the elements of the bank. A structured
# weight is a product of factors and has fewer numbers.
KINDS = ("fp32", "bf16", "int8", "int4", "structured")
# The most that a result may err, relative to the norm of the exact one: rounding to that kind makes
# 1e-7, 3e-3, 1.2e-2 and 1e-1 of normal values; what is wrong makes about 1.
ALLOWED = {"fp32": 1e-4, "bf16": 2e-2, "int8": 6e-2, "int4": 2e-1, "structured": 2e-2}
GROUP = 128  # neighbours in a row that share a scale of four bits
_CHECKED_ROWS, _PIECE = 16, 1024  # of a batch; of a weight, at once in float64


@dataclass(frozen=True)
class Layers:
    """What a way makes of a problem: layers of one shape that are ready to run.

    Args:
        call: runs a layer at a batch: y ``[batch, N]`` of layer ``i`` (of training also dx), a
            tensor or an array.
        count: layers that there are, at least two, each with weights of its own, or all on one
            bank.
        nbytes: of the weights and scales of a layer, or of the bank.
        parameters: numbers that are trained or stored for the layer, or the bank's.
        lead: layers that run before times count: with one, the second is timed as it follows the
            first. On a bank as many as read all of it.
        exact: y ``[rows, N]`` in float64 of the rows that are checked; None takes the problem's.
        check: another judge: the error of layer 0 at a batch.
    """

    call: Callable[[int, int], Any]
    count: int
    nbytes: int
    parameters: int
    lead: int = 1
    exact: Tensor | None = None
    check: Callable[[int], float] | None = None


@dataclass(frozen=True)
class Way:
    """A way to run a linear layer.

    Args:
        name: for tables, unique among all families.
        kind: one of ``KINDS``.
        make: the layers, of a problem; raises where it cannot run here.
        what: ``"forward"`` or ``"training"``, which is a forward and all gradients.
        ours: reads a bank.
    """

    name: str
    kind: str
    make: Callable[[Problem], Layers]
    what: str = FORWARD
    ours: bool = False


class Problem:
    """A weight ``[N, K]`` of normal values, and inputs; the same in every process.

    Args:
        shape: N and K.
        batches: rows of x that will be asked for.
        threads: that a way may use.
        copies: layers that are timed in a turn.
        seed: of all values.
    """

    def __init__(
        self, shape: tuple[int, int], batches: Sequence[int], threads: int, copies: int, seed: int
    ) -> None:
        self.shape, self.threads, self.copies, self.seed = shape, threads, copies, seed
        rows, columns = shape
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        whole = torch.randn(max(batches), columns, generator=generator).bfloat16()
        # The same values in both dtypes, so that rounding x is no way's error but its own.
        self.x = {batch: whole[:batch].float() for batch in batches}
        self.x_bf16 = {batch: whole[:batch].clone() for batch in batches}
        self.checked = {
            batch: torch.linspace(0, batch - 1, _CHECKED_ROWS).long().unique() for batch in batches
        }
        self._rows = torch.cat(list(self.checked.values())).unique()
        self._whole = whole

    def layers(self, make: Callable[[], Any]) -> list[Any]:
        """As many of something as a rival's layers are: one that leads, and those that count."""
        return [make() for _ in range(1 + self.copies)]

    @cached_property
    def exact(self) -> Tensor:
        """y ``[rows, N]`` of this weight in float64, of every row that any batch checks."""
        return self.product(self.weight)

    def product(self, weight: Tensor) -> Tensor:
        """The same of another weight ``[N, K]``."""
        x = self._whole[self._rows].double()
        pieces = (x @ piece.double().t() for piece in weight.split(_PIECE))
        return torch.cat(list(pieces), 1)

    def error(self, y: object, batch: int, exact: Tensor | None = None) -> float:
        """Of some rows of y, relative to the norm of what they should be; inf if not finite."""
        got = torch.as_tensor(y)
        if got.shape != (batch, self.shape[0]) or not bool(got.isfinite().all()):
            return math.inf
        rows = self.checked[batch]
        wanted = (self.exact if exact is None else exact)[torch.searchsorted(self._rows, rows)]
        return relative(got[rows].double(), wanted)

    @cached_property
    def int8(self) -> tuple[Tensor, Tensor]:
        """The weight as int8 ``[N, K]`` and a scale ``[N]`` for each row."""
        scale = self.weight.abs().amax(1) / 127
        return torch.round(self.weight / scale[:, None]).to(torch.int8), scale

    @cached_property
    def int4(self) -> tuple[Tensor, Tensor]:
        """Values -8 to 7 as int8 ``[N, K]``, and scales ``[N, K / GROUP]``: a group's extreme
        value is -8, so that it is exact."""
        rows, columns = self.shape
        group = min(GROUP, columns)
        parts = self.weight.view(rows, columns // group, group)
        extreme = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
        scale = extreme / -8
        q = torch.clamp(torch.round(parts / scale), -8, 7).to(torch.int8)
        return q.view(rows, columns), scale.squeeze(-1)

    @property
    def group(self) -> int:
        """Neighbours that share a scale of four bits."""
        return min(GROUP, self.shape[1])

    @cached_property
    def nibbles(self) -> Tensor:
        """The values of ``int4`` from 0 to 15, two in a byte, the first one low: ``[N, K / 2]``."""
        q = (self.int4[0].short() + 8).to(torch.uint8)
        return (q[:, 0::2] | (q[:, 1::2] << 4)).contiguous()


def relative(got: Tensor, wanted: Tensor) -> float:
    """The norm of a difference, relative to that of what was wanted."""
    return float((got - wanted).norm() / wanted.norm())
