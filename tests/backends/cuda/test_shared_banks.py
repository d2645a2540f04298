"""Wavefronts of the CUDA kernels' accesses to shared memory, by addresses of real runs."""

from __future__ import annotations

import pytest
import torch
from small_batches import HAS_SIMT, needs_simt

from rpg_kernels import native

pytestmark = needs_simt

if HAS_SIMT:
    from tools.reports import cuda_report as report
    from tools.reports import shared_banks as banks


def lanes(offsets: list[int], size: int) -> dict[int, tuple[int, int]]:
    return dict(enumerate((offset, size) for offset in offsets))


def test_the_model_of_shared_memory() -> None:
    row = [4 * i for i in range(32)]
    assert banks.count(lanes(row, 4)).ratio == 1
    assert banks.count(lanes([0] * 32, 4)).ratio == 1  # one word for all
    assert banks.count(lanes([128 * i for i in range(32)], 4)).ratio == 32
    assert banks.count(lanes([8 * i for i in range(32)], 4)).ratio == 2
    assert banks.count(lanes([16 * i for i in range(32)], 16)).wavefronts == 4
    assert banks.count(lanes([32 * i for i in range(32)], 16)).wavefronts == 8
    assert banks.count(lanes([8 * i for i in range(32)], 8)).wavefronts == 2
    assert banks.count(lanes([2 * i for i in range(32)], 2)).ratio == 1


# What has conflicts, and how many wavefronts at most; everything else has none.
CONFLICTS = {("linear_input_grad", 1, 64): {"P: write": 1.7}}


@pytest.mark.parametrize(
    ("kernel", "batch", "dtype", "granularity"),
    [
        ("linear", 1, torch.bfloat16, 64),
        ("linear", 8, torch.bfloat16, 64),
        ("linear", 16, torch.bfloat16, 32),
        ("linear", 8, torch.float32, 32),
        ("linear_input_grad", 1, torch.bfloat16, 64),
        ("linear_input_grad", 8, torch.bfloat16, 64),
        ("linear_bank_grad", 16, torch.bfloat16, 64),
    ],
)
def test_accesses_have_no_conflicts_but_the_known_ones(
    kernel: str, batch: int, dtype: torch.dtype, granularity: int
) -> None:
    counts = banks.recorded(kernel, batch, dtype, granularity=granularity)
    known = CONFLICTS.get((kernel, batch, granularity), {})
    assert len(counts) >= 3
    for name, count in counts.items():
        assert count.ratio <= known.get(name, 1.0), name
    row = report.bank_row(kernel, batch, dtype, granularity)
    page = report.PAGE.read_text("utf-8")
    assert row in page, "run python -m tools.reports.cuda_report"


def test_nothing_is_recorded_unless_asked_for() -> None:
    simt = native._load()[0].simt
    assert simt.accesses_of(lambda: None) == []
    with pytest.raises(ZeroDivisionError):
        simt.accesses_of(lambda: 1 / 0)
    assert simt.accesses_of(lambda: None) == []
