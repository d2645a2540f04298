"""Layers that read windows of units from shared memory, by the kernels' own sources on the CPU.

Entries are compared with the second implementation of the law (``unit_brute``), by layers whose
results say which slot each row reads; plans, and what short layers do not reach.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import brute_force as brute
import pytest
import small_batches as small
import torch
import unit_brute
from small_batches import GATHERED, WINDOW, made

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.backends.cuda import launch, rules
from rpg_kernels.law.ring import LayerLaw
from rpg_kernels.law.unit import UnitLaw

pytestmark = small.needs_simt

op = torch.ops.rpg_kernels
BOTH = rules.PRODUCTS[:2]
GOLDEN: dict[str, Any] = {
    f"law {number}, {name}": entry
    for number in (1, 3)
    for name, entry in json.loads(
        (Path(__file__).parents[2] / "golden" / f"law{number}.json").read_text("utf-8")
    )["entries"].items()
    if "points" in entry
}


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


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(name: str) -> None:
    """Convolutions and bands too, which no product here reads."""
    entry = GOLDEN[name]
    law: LayerLaw = (UnitLaw if "laps" in entry["config"] else LayerLaw)(**entry["config"])
    words = 1 if law.reflect == "vector" else law.words
    sign_words = entry.get("sign words", [None] * len(entry["slots"]))  # without signs: none
    for (row, block), slot, wanted in zip(entry["points"], entry["slots"], sign_words, strict=True):
        n, b = torch.tensor([row]), torch.tensor([block])
        slots, signs = torch.tensor([-1]), torch.full((1, words), -1)
        addresses = (t.data_ptr() for t in (n, b))
        native.module().simt.law(
            native.layer_law(law),
            row // law.rows_per_band,
            *addresses,
            1,
            slots.data_ptr(),
            signs.data_ptr(),
            0,
        )
        assert slots.item() == slot
        assert wanted is None or signs[0].tolist() == wanted


# (rows, blocks, slots, window, laps, layer before): exact units, units that share octets, rows that
# are no multiple of 8, groups of two sizes, a ring of any size, groups that are cut into tiles.
LAYERS = [
    (256, 3, 64, 64, 4, 0),
    (600, 4, 704, 64, 4, 100),
    (301, 5, 107, 16, 8, 3),
    (1100, 2, 301, 64, 5, 40),
    (2100, 2, 511, 128, 16, 8),
]


def place(
    rows: int, blocks: int, slots: int, window: int, laps: int, before: int, permute: bool
) -> tuple[rpg.VirtualWeight, torch.Tensor, torch.Tensor]:
    """A layer of blocks of 32, and by the second implementation each block's slot and sign."""
    bank = brute.unit_bank(
        32 * slots, granularity=32, permute=permute, window=window, laps=laps, seed=9
    )
    if before:
        bank.place((before, 64))
    weight = bank.place((rows, 32 * blocks))
    law = weight.placement.law
    assert isinstance(law, UnitLaw)
    slot, sign = torch.full((rows, blocks), -1), torch.ones(rows, blocks)
    for n, b, read in unit_brute.walk(law):
        if n < rows:
            slot[n, b] = read
            sign[n, b] = -1 if unit_brute.negative(law, n, b, 0) else 1
    assert (slot >= 0).all()
    return weight, slot, sign


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_rows_read_what_the_law_says(
    layer: tuple[int, ...], permute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bank whose slot s holds s + 1 in its first element, and x that asks for one column."""
    monkeypatch.setattr(rules, "SIMT", rules.Gpu("simt", 2, 227 * 1024))
    weight, slot, sign = place(*layer, permute)
    slots, blocks = layer[2], layer[1]
    values = torch.zeros(slots, 32)
    values[:, 0] = torch.arange(1.0, slots + 1)
    assert plan_of(weight, blocks, 227, dtype=torch.float32).fill == WINDOW
    x = torch.zeros(blocks, 32 * blocks)
    x[range(blocks), range(0, 32 * blocks, 32)] = 1
    for order in (0, 3):
        monkeypatch.setattr(launch, "simt_order", order)
        y = op.linear(x, values, None, None, weight.spec, "simt")
        assert y.T.equal(sign * (slot + 1))


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_go_where_the_law_says(
    layer: tuple[int, ...], permute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole numbers, whose sums are exact in any order; dw by the inverse of the law."""
    weight, slot, sign = place(*layer, permute)
    rows, blocks, slots = layer[0], layer[1], layer[2]
    torch.manual_seed(0)
    dy, x = torch.randint(-8, 9, (3, rows)).float(), torch.zeros(3, 32 * blocks)
    x[:, ::32] = torch.randint(-8, 9, (3, blocks)).float()
    of_weights = sign * (dy.T @ x[:, ::32])
    dw = torch.zeros(slots).index_add_(0, slot.flatten(), of_weights.flatten())
    values = torch.zeros(slots, 32)
    values[:, 0] = torch.randint(-8, 9, (slots,)).float()
    dx = dy @ (sign * values[slot, 0])
    dense = torch.zeros(rows, 32 * blocks)
    dense[:, ::32] = dy.T @ x[:, ::32]
    for sms, order in ((1, 0), (40, 1), (2, 5)):
        monkeypatch.setattr(rules, "SIMT", rules.Gpu("simt", sms, 227 * 1024))
        monkeypatch.setattr(launch, "simt_order", order)
        got = op.linear_bank_grad(dy, x, None, weight.spec, torch.float32, "simt")
        assert got[:, 0].equal(dw)
        assert got[:, 1:].count_nonzero() == 0
        assert op.pack(dense, None, weight.spec, torch.float32, "simt").equal(got)
        got = op.linear_input_grad(dy, values, None, weight.spec, "simt")
        assert got[:, ::32].equal(dx)
        low = op.linear_input_grad(dy.bfloat16(), values.bfloat16(), None, weight.spec, "simt")
        assert low[:, ::32].equal(dx.bfloat16())


def test_windows_take_two_stages_or_less_of_the_batch_before_they_are_gathered() -> None:
    bank = brute.unit_bank(1 << 20, granularity=64, laps=4, device="meta")
    whole = bank.place((2048, 1024))
    cut = bank.place((1160, 1024))  # 145 octets, whose windows begin and end inside of octets
    for weight, batch, kib, stages, step in (
        (whole, 16, 227, 3, 16),
        (whole, 16, 99, 2, 16),
        (whole, 64, 227, 3, 32),
        (cut, 1, 227, 3, 1),
        (cut, 64, 227, 3, 32),
        (cut, 32, 163, 2, 32),
    ):
        plan = plan_of(weight, batch, kib)
        assert (plan.fill, plan.stages, plan.batch_tile) == (WINDOW, stages, step)
        assert plan.shared_bytes <= kib * 1024
    assert plan_of(whole, 1, 64).fill == GATHERED


def test_a_window_that_does_not_fit_is_left_to_others_and_explained() -> None:
    bank = brute.unit_bank(1 << 20, granularity=64, window=512, laps=4, dtype=torch.bfloat16)
    weight = bank.place((4096, 128))
    assert plan_of(weight, 8, 227).fill == WINDOW
    assert plan_of(weight, 8, 99).fill == GATHERED
    given = ("linear", weight.spec, torch.bfloat16, 8)
    small_gpu = rules.Gpu("simt", 84, 99 * 1024)
    reason = rules.why_slower(*given, small_gpu, bank.weight)
    assert "windows of 4 laps do not fit the 101376 bytes of shared memory" in reason
    assert rules.why_slower(*given, replace(small_gpu, shared_bytes=227 * 1024), bank.weight) == ""
    weight = brute.unit_bank(1 << 16, granularity=64, window=64, laps=1).place((4096, 128))
    reason = rules.why_slower(*("linear", weight.spec, *given[2:]), small_gpu, None)
    assert "hold no fewer blocks than a tile has rows" in reason


def test_columns_are_shared_so_that_processors_have_as_many() -> None:
    bank = brute.unit_bank(1 << 20, granularity=64, laps=4, device="meta")
    for rows, batch in ((4096, 1), (14336, 1), (67 * 1024, 1), (1024, 1), (14336, 64)):
        plan = plan_of(bank.place((rows, 4096)), batch, 227)
        blocks = plan.tiles * plan.splits * plan.batch_tiles
        columns = math.ceil(blocks / 132) * math.ceil(64 / plan.splits)
        assert columns <= 1.25 * plan.tiles * plan.batch_tiles * 64 / 132 + 2


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize(
    ("granularity", "rows", "dtype"),
    [
        (64, 1024, torch.bfloat16),
        (64, 1024, torch.float16),
        (32, 1024, torch.float32),
        (32, 1000, torch.bfloat16),  # of 125 octets: no whole window
    ],
)
def test_two_stages_and_three_give_the_same_bits(
    granularity: int,
    rows: int,
    dtype: torch.dtype,
    batch: int,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank = brute.unit_bank(8 * 256 * granularity, granularity=granularity, laps=4, seed=3)
    weight = bank.place((rows, 230), scale=0.5)
    torch.manual_seed(0)
    x, dy = torch.randn(batch, 230).to(dtype), torch.randn(batch, rows).to(dtype)
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
def test_x_at_any_address_gives_the_same_bits_in_every_order(
    batch: int, reflect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "SIMT", rules.Gpu("simt", 2, 227 * 1024))
    bank = brute.unit_bank(700 * 64, reflect=reflect, laps=4, seed=5)
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


def test_smaller_tiles_before_gathering() -> None:
    bank = brute.unit_bank(1 << 20, granularity=64, laps=4, device="meta")
    weight = bank.place((14336, 4096))
    for batch in (2, 8, 32):
        plan = plan_of(weight, batch, 99, "linear_input_grad")
        assert (plan.fill, plan.rows, plan.stages, plan.batch_tile) == (WINDOW, 512, 2, 8)
        assert (plan.parts, plan.tiles) == (2, 28)


@pytest.mark.parametrize("kib", [64, 227])
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("order", [0, 1, 5])
def test_a_block_of_threads_that_has_many_columns(
    order: int, batch: int, name: str, kib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What columns read is remembered for 32 of them, found 16 at a time."""
    monkeypatch.setattr(launch, "simt_order", order)
    monkeypatch.setattr(rules, "SIMT", rules.Gpu("simt", 1, kib * 1024))
    for columns in (19, 66):
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
    """The last octet of rows is one row: what its padding reads alone is in a window too."""
    monkeypatch.setattr(rules, "SIMT", rules.Gpu("simt", 4, 227 * 1024))

    def uses(rows: int) -> torch.Tensor:
        p = replace(problem.weight.placement, shape=(rows, 28), rows=None, columns=None)
        p = replace(p, generator=replace(p.generator, reflect="none"))
        ones = torch.ones(rows, 28)
        return op.pack(ones, None, p.to_json(), torch.float32, "reference")

    for seed in range(100):
        problem = made(
            (121, 28),
            "simt",
            granularity=32,
            slots=1100,
            window=(64, 3),  # 16 uses: the last octet of the window has one
            before=0,
            dtype=dtype,
            batch=batch,
            seed=seed,
        )
        read = uses(121)
        if ((read == 0) & (uses(128) > 0)).any():
            break
    assert ((read == 0) & (uses(128) > 0)).any()
    exact = problem.exact()
    problem.bank[read == 0] = float("inf")
    for name in BOTH:
        assert problem.fill(name) == WINDOW
        small.close(problem.run(name), exact[name], dtype, dtype)
