"""Random banks in fewer bytes, and what they stand for."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from rpg_kernels._stored import StoredValues

INT8 = ("int8", "int8, compacted", "int8, one slot", "int8, nothing")
FORMS = (*INT8, "compacted", "one slot", "nothing")


def stored(slots: int, granularity: int, form: str, dtype: torch.dtype, seed: int) -> StoredValues:
    """Random values; a place is a number, in whatever order.

    Args:
        slots, granularity: of the bank.
        form: one of ``FORMS``.
        dtype: that the values stand for.
        seed: of everything.
    """
    made = torch.Generator().manual_seed(seed)
    keep = random.Random(seed).choice([0.1, 0.5, 0.9, 1.0])
    places, rows = None, slots
    if form != "int8":
        present = torch.rand(slots, generator=made) < (0 if "nothing" in form else keep)
        if "one" in form:
            present = torch.arange(slots) == seed % slots
        rows = int(present.sum())
        places = torch.full((slots,), -1, dtype=torch.int32)
        places[present] = torch.randperm(rows, generator=made).int()
    if form not in INT8:
        return StoredValues(
            torch.randn(rows, granularity, generator=made).to(dtype), None, places, dtype
        )
    codes = torch.randint(-127, 128, (rows, granularity), generator=made).to(torch.int8)
    return StoredValues(codes, torch.rand(rows, generator=made) / 64, places, dtype)


def exact(values: StoredValues) -> Tensor:
    """float64 ``[slots, granularity]``, before anything is rounded."""
    rows = values.codes.double()
    if values.scales is not None:
        rows = rows * values.scales.double()[:, None]
    if values.places is None:
        return rows
    out = torch.zeros(values.shape, dtype=torch.float64)
    present = values.places >= 0
    out[present] = rows[values.places[present].long()]
    return out
