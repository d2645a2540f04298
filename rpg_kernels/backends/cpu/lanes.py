"""Families of compiled kernels that take rows of the batch as lanes of vectors, and their steps."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch

from rpg_kernels import native, settings
from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.cpu.selection import of_part
from rpg_kernels.law.placement import Placement, parse

PRODUCTS = ("linear", "linear_input_grad", "linear_bank_grad", "linear_grads")


@dataclass(frozen=True)
class Lanes:
    """How a call goes through its batch, and the memory that it takes.

    Args:
        lanes: rows of the batch at a time.
        threads: that share it.
        workspace: bytes in all.
        scratch: of them, what the scratch limit counts: all but copies of activations.
        pairs: products are of pairs of bfloat16.
    """

    lanes: int
    threads: int
    workspace: int
    scratch: int
    pairs: bool = False


class Family(ABC):
    """Kernels for a forward and for gradients that are called alike.

    Attributes:
        name: of the forward in the native module; gradients are ``<name>_grads``.
    """

    name = ""

    @abstractmethod
    def unsupported(self, op: str, placement: str) -> str:
        """Why a product with a weight cannot run here, or ""."""

    @abstractmethod
    def lanes(self, op: str, p: Placement, batch: int) -> list[int]:
        """From the most to the least rows of the batch at a time."""

    @abstractmethod
    def suits(self, op: str, dtype: torch.dtype, batch: int, placement: str) -> bool:
        """Whether a call is faster here than with other compiled kernels."""

    @abstractmethod
    def faster(
        self,
        op: str,
        dtype: torch.dtype,
        batch: int,
        placement: str,
        bank_dtype: torch.dtype | None = None,
    ) -> bool:
        """Whether a call is faster here than in the reference."""

    @abstractmethod
    def multiplications(self, op: str, placement: str, stored: StoredValues | None = None) -> int:
        """For one row of the batch, without the padding of blocks and of vectors.

        Args:
            op, placement: of the call.
            stored: the bank, where its values are stored in fewer bytes.
        """

    @abstractmethod
    def what(self, placement: str) -> str:
        """What these kernels do with a weight."""

    def pairs(
        self, op: str, dtype: torch.dtype, bank_dtype: torch.dtype, batch: int, placement: str
    ) -> bool:
        """Whether a call multiplies pairs of bfloat16, if they fit the scratch limit."""
        return False

    def products(self, pairs: bool) -> int:
        """How a call multiplies, as the compiled kernels take it: whether in pairs."""
        return pairs

    def steps(self, op: str, placement: str, batch: int, pairs: bool = False) -> Lanes | None:
        """The most lanes that the scratch limit allows; None where none do."""
        limit = settings.scratch_bytes("cpu")
        choices = _choices(self, op, placement, batch, native.threads(), pairs)
        return next((step for step in choices if step.scratch <= limit), None)

    def smallest(self, op: str, placement: str, batch: int) -> int:
        """Scratch in bytes of the smallest steps."""
        return min(s.scratch for s in _choices(self, op, placement, batch, native.threads()))

    def check(self, op: str, placement: str, batch: int, pairs: bool = False) -> Lanes:
        """The steps of a call.

        Raises:
            RuntimeError: the weight cannot be read here, or the scratch limit is too small.
        """
        reason = self.unsupported(op, placement)
        if reason:
            raise RuntimeError(f"backend: got 'cpu' for {op}, which cannot run: {reason}")
        step = self.steps(op, placement, batch, pairs)
        if step is None:
            raise RuntimeError(
                f"scratch_limit: got {settings.scratch_bytes('cpu')} bytes, wanted at least "
                f"{self.smallest(op, placement, batch)} for the cpu back end of a virtual weight "
                f"{list(parse(placement).selected_shape)}"
            )
        return step


@lru_cache(maxsize=4096)
def _choices(
    family: Family, op: str, placement: str, batch: int, threads: int, pairs: bool = False
) -> tuple[Lanes, ...]:
    """From the most lanes to the least, with pairs before without, then with fewer threads."""
    p, batch = parse(placement), max(batch, 1)  # of an empty batch, what one row takes
    law = native.layer_law(p.law)
    out = []
    while True:
        of_lanes = family.lanes(op, p, batch)
        for paired, lanes in itertools.product((True, False) if pairs else (False,), of_lanes):
            size: tuple[int, ...] = (batch, p.shape[1], threads, lanes)
            name = f"{family.name}_workspace"
            if op != "linear":
                size += (op != "linear_bank_grad", op != "linear_input_grad")
                name = f"{family.name}_grads_workspace"
            products = family.products(paired)
            total, activations = getattr(law, name)(*size, products, *of_part(placement))
            out.append(Lanes(lanes, threads, total, total - activations, paired))
        if threads == 1:
            return tuple(out)
        threads = -(-threads // 2)
