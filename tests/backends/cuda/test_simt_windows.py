"""Layers that read windows from shared memory: their plans, and what short layers do not reach.

The kernels' own sources, run on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import brute_force as brute
import pytest
import small_batches as small
import torch
from small_batches import GATHERED, WINDOW, made

import rpg_kernels as rpg
from rpg_kernels.backends.cuda import launch, rules

pytestmark = small.needs_simt

op = torch.ops.rpg_kernels
BOTH = rules.PRODUCTS[:2]


def plan_of(
    weight: rpg.VirtualWeight,
    batch: int,
    shared_kib: int,
    name: str = "linear",
    dtype: torch.dtype = torch.bfloat16,
    sms: int = 132,
) -> Any:
    gpu = rules.Gpu("simt", sms, shared_kib * 1024)
    with rpg.scratch_limit(1 << 30):
        plan, reason = rules.plan(name, weight.spec, dtype, batch, gpu, 0)
    assert not reason
    return plan


def test_windows_take_two_stages_or_less_of_the_batch_before_they_are_gathered() -> None:
    bank = brute.window_bank(1 << 20, granularity=64, window=256, laps=4, device="meta")
    whole = bank.place((2048, 1024))
    bank.place((64, 64))
    cut = bank.place((2048, 1024))  # begins inside a cell: two windows for each tile
    for weight, batch, kib, stages, step in (
        (whole, 16, 227, 3, 16),
        (whole, 16, 99, 2, 16),
        (whole, 64, 227, 3, 32),
        (cut, 1, 227, 3, 1),
        (cut, 16, 227, 2, 16),
        (cut, 16, 163, 2, 8),
    ):
        plan = plan_of(weight, batch, kib)
        assert (plan.fill, plan.stages, plan.batch_tile) == (WINDOW, stages, step)
        assert plan.shared_bytes <= kib * 1024
    assert plan_of(cut, 1, 99).fill == GATHERED


def test_columns_are_shared_so_that_processors_have_as_many() -> None:
    bank = brute.window_bank(1 << 20, granularity=64, window=256, laps=4, device="meta")
    for rows, batch in ((4096, 1), (14336, 1), (67 * 1024, 1), (1024, 1), (14336, 64)):
        plan = plan_of(bank.place((rows, 4096)), batch, 227)
        blocks = plan.tiles * plan.splits * plan.batch_tiles
        columns = math.ceil(blocks / 132) * math.ceil(64 / plan.splits)
        assert columns <= 1.25 * plan.tiles * plan.batch_tiles * 64 / 132 + 2


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize(
    ("granularity", "before", "dtype"),
    [
        (64, 0, torch.bfloat16),  # three stages: the most common tiles, two: any
        (64, 0, torch.float16),
        (32, 0, torch.float32),
        (32, 64, torch.bfloat16),
    ],
)
def test_two_stages_and_three_give_the_same_bits(
    granularity: int,
    before: int,
    dtype: torch.dtype,
    batch: int,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows of 256 and 4 laps, from a whole cell on and from inside one."""
    bank = brute.window_bank(
        8 * 256 * granularity, granularity=granularity, window=256, laps=4, seed=3
    )
    if before:
        bank.place((before, 64))
    weight = bank.place((1024, 230), scale=0.5)
    torch.manual_seed(0)
    x, dy = torch.randn(batch, 230).to(dtype), torch.randn(batch, 1024).to(dtype)
    problem = small.Problem(weight, bank.weight.detach().to(dtype), x, dy, None, "simt")
    memory: dict[tuple[int, int, int], int] = {}  # KiB for which there are so many stages
    for kib in range(40, 228):
        plan = plan_of(weight, batch, kib, name, dtype, sms=2)
        memory[plan.fill, plan.stages, plan.rows * plan.batch_tile] = kib
    most = max(size for fill, stages, size in memory if (fill, stages) == (WINDOW, 3))
    results = []
    for stages in (2, 3):
        gpu = rules.Gpu("simt", 2, memory[WINDOW, stages, most] * 1024)
        monkeypatch.setattr(rules, "SIMT", gpu)
        results.append(problem.run(name))
        small.close(results[-1], problem.exact()[name], dtype, dtype)
    assert results[0].equal(results[1])


@pytest.mark.parametrize("reflect", ["vector", "none"])
@pytest.mark.parametrize("batch", [1, 8, 16, 40])
def test_the_most_common_tiles_and_others_give_the_same_bits(
    batch: int, reflect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x at an odd address is not for their loop, nor are rows past the tiles."""
    monkeypatch.setattr(rules, "SIMT", rules.Gpu("simt", 2, 227 * 1024))
    bank = brute.window_bank(700 * 64, reflect=reflect, window=256, laps=4, seed=5)
    weight = bank.place((1024 + 90, 192), scale=0.5)
    torch.manual_seed(0)
    x, dy = torch.randn(batch, 192).bfloat16(), torch.randn(batch, 1114).bfloat16()
    ring = bank.weight.detach().bfloat16()
    problem = small.Problem(weight, ring, x, dy, None, "simt")
    assert plan_of(weight, batch, 227).stages == 3
    problem.check()
    first = problem.run("linear")
    problem.x = small.surrounded(x, 1)
    assert problem.run("linear").equal(first)
    for order in (1, 2, 3):
        monkeypatch.setattr(launch, "simt_order", order)
        assert problem.run("linear").equal(first)
        problem.check()


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
    ("rows", "window", "permute", "before"),
    [
        (1024, 64, True, 0),
        (1024, 128, True, 0),
        (1024, 256, False, 0),
        (512, 256, True, 0),
        (1024, 256, True, 256),  # two windows for each tile, no lap cut
        (1024, 256, True, 512),
    ],
)
def test_what_the_loop_of_the_most_common_tiles_is_not_for(
    rows: int,
    window: int,
    permute: bool,
    before: int,
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each differs from such tiles in one thing."""
    monkeypatch.setattr(rules, "SIMT", rules.Gpu("simt", 4, 227 * 1024))
    bank = brute.window_bank(1100 * 64, permute=permute, window=window, laps=4, seed=7)
    if before:
        bank.place((before, 64))
    weight = bank.place((rows, 176), scale=0.5)  # x is aligned
    torch.manual_seed(0)
    x, dy = torch.randn(batch, 176).bfloat16(), torch.randn(batch, rows).bfloat16()
    problem = small.Problem(weight, bank.weight.detach().bfloat16(), x, dy, None, "simt")
    assert problem.fill() == WINDOW
    for name in BOTH:
        small.close(problem.run(name), problem.exact()[name], torch.bfloat16, torch.bfloat16)


def test_smaller_tiles_before_gathering() -> None:
    bank = brute.window_bank(1 << 20, granularity=64, window=256, laps=4, device="meta")
    weight = bank.place((14336, 4096))
    for batch in (2, 8, 32):
        plan = plan_of(weight, batch, 99, "linear_input_grad")
        assert (plan.fill, plan.rows, plan.stages, plan.batch_tile) == (WINDOW, 512, 2, 8)


@pytest.mark.parametrize("kib", [64, 227])
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("order", [0, 1, 5])
def test_a_block_of_threads_that_has_many_columns(
    order: int, batch: int, name: str, kib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What columns read is remembered for 16 and 8 of them, found 8 and 4 at a time."""
    monkeypatch.setattr(launch, "simt_order", order)
    monkeypatch.setattr(rules, "SIMT", rules.Gpu("simt", 1, kib * 1024))
    for columns in (19, 41):
        problem = made(
            (320, 32 * columns - 5),
            "simt",
            granularity=32,
            slots=513,
            window=(64, 4),
            dtype=torch.bfloat16,
            batch=batch,
            before=64,
        )
        assert problem.fill(name) == WINDOW
        small.close(problem.run(name), problem.exact()[name], problem.x.dtype, problem.x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slots", [65, 129, 511])
def test_windows_that_run_over_the_end_of_the_ring(slots: int, dtype: torch.dtype) -> None:
    """NaNs lie behind it."""
    problem = made(
        (256, 640), "simt", granularity=32, slots=slots, window=(64, 4), dtype=dtype, batch=3
    )
    assert problem.fill() == WINDOW
    problem.check()


@pytest.mark.parametrize("batch", [1, 8, 9])
@pytest.mark.parametrize(("window", "before"), [((64, 16), 0), ((64, 12), 64), ((128, 3), 192)])
def test_any_number_of_laps(
    window: tuple[int, int], before: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At batch 1 the input gradient takes 8 laps at a time, at others 4 and then one."""
    monkeypatch.setattr(rules, "SIMT", rules.Gpu("simt", 4, 227 * 1024))
    problem = made(
        (1024, 90),
        "simt",
        granularity=32,
        slots=513,
        window=window,
        dtype=torch.bfloat16,
        batch=batch,
        before=before,
    )
    assert problem.fill() == problem.fill("linear_input_grad") == WINDOW
    problem.check()


@pytest.mark.parametrize("dtype", small.DTYPES)
@pytest.mark.parametrize("batch", [1, 8])
def test_blocks_that_no_row_of_a_tile_reads_may_hold_anything(
    batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "SIMT", rules.Gpu("simt", 4, 227 * 1024))
    problem = made(
        (1024, 60),
        "simt",
        granularity=32,
        slots=1100,
        window=(256, 4),
        before=64,  # so that half a lap of the last window is read
        dtype=dtype,
        batch=batch,
    )
    placement = problem.weight.placement
    ones, unsigned = torch.ones(placement.shape), replace(placement.generator, reflect="none")
    spec = replace(placement, generator=unsigned).to_json()
    read = op.pack(ones, None, spec, torch.float32, "reference")
    assert (read == 0).any()
    exact = problem.exact()
    problem.bank[read == 0] = float("inf")
    for name in BOTH:
        assert problem.fill(name) == WINDOW
        small.close(problem.run(name), exact[name], dtype, dtype)
