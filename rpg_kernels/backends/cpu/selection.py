"""Parts of weights: what the compiled CPU kernels are told of a selection."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rpg_kernels import native
from rpg_kernels.law.placement import Placement, parse
from rpg_kernels.law.selection import indices_of
from rpg_kernels.law.unit import UnitLaw


def is_part(p: Placement) -> bool:
    """Whether a placement selects less than the whole weight."""
    return p.selected_shape != p.shape


@lru_cache(maxsize=4096)
def selection(placement: str) -> Any:
    """The native module's record of the selected rows and columns; None where all are selected.

    Kept between calls, since making it goes over every index.

    Args:
        placement: of the weight, as JSON.
    """
    p = parse(placement)
    if not is_part(p):
        return None
    shape = (p.matrix.rows, p.matrix.channels)
    rows, columns = (
        None if p.selected_shape[dim] == shape[dim] else list(indices_of(p.selected(dim)))
        for dim in (0, 1)
    )
    return native.selection(rows, columns, shape)


def of_part(placement: str) -> tuple[Any, ...]:
    """The last arguments of a kernel's call: the selection, and nothing for a whole weight."""
    selected = selection(placement)
    return () if selected is None else (selected,)


def groups_with_rows(p: Placement) -> Tensor:
    """Numbers of the unit law's groups that have a selected row, int64 ``[groups with rows]``,
    ascending; of weights of one band."""
    law = p.law
    assert isinstance(law, UnitLaw)
    if p.selected_shape[0] == p.shape[0]:
        return torch.arange(law.groups(0))
    rows = torch.tensor(indices_of(p.selected(0)))
    _, group, _, _ = law.number(rows, torch.zeros_like(rows), 0)
    return torch.tensor(sorted(set(group.tolist())))


def elements_of_blocks(p: Placement) -> Tensor:
    """How many selected elements each block of a run has, int64 ``[run blocks]``.

    Where taps share a block all of its elements are: parts of such weights are the reference's.
    """
    m = p.matrix
    if p.selected_shape[1] == p.shape[1]:
        return (m.run - m.block * torch.arange(m.run_blocks)).clamp(max=m.block)
    columns = torch.tensor(indices_of(p.selected(1)))
    return torch.bincount(columns // m.block, minlength=m.run_blocks)
