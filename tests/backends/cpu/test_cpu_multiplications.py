"""What the factored CPU kernels are said to multiply, against a count position by position."""

from __future__ import annotations

import math
import random
from functools import lru_cache

import brute_force as brute
import pytest
import torch
import window_brute
from torch.utils.flop_counter import FlopCounterMode

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.backends.cpu import factored, multiplications
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import Placement
from rpg_kernels.law.window import WindowLaw

BUFFER = 4096  # positions of a window that are tabulated at once
needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")

# (slots, window, laps) and the weight. Cells of 4096 blocks and less, and two of more.
WEIGHTS = [
    ((1024, 256, 4), (4096, 128)),
    ((1024, 256, 4), (300, 200)),
    ((704, 256, 4), (700, 320)),
    ((300, 64, 1), (129, 250)),
    ((300, 64, 3), (500, 64, 3, 3)),
    ((704, 128, 16), (1000, 110)),
    ((1121, 256, 16), (4500, 60)),
    ((1121, 512, 2), (97, 64)),
    ((704, 64, 7), (70, 3, 5, 5)),
    ((1121, 512, 16), (4096 + 300, 192)),
    ((1121, 256, 40), (900, 64 * 12)),
]
RINGS = [
    (300, (1000, 100)),
    (50, (70, 64, 3, 3)),
    (1000, (700, 128)),
    (700, (17_000, 64)),
    (90, (17_000, 60)),
]


def placement(slots: int, shape: tuple[int, ...], **windows: int) -> Placement:
    """Behind another layer, in the middle of a window."""
    law = 2 if windows else 1
    generator = Generator(slots * 64, 64, "vector", seed=5, law=law, **windows)
    start = 64 * 64 * random.Random(str(shape)).randint(0, 9)
    return Placement(generator, 3, start if windows else start % (slots * 64), shape, 1.0)


def elements_of_blocks(p: Placement) -> list[int]:
    """Of each block of a row, the weights that it holds."""
    _, blocks, layout = brute.row_layout(p.shape, p.generator.granularity)
    elements = [0] * blocks
    for block, _ in layout.values():
        elements[block] += 1
    return elements


def first_columns(law: WindowLaw, threads: int) -> set[tuple[int, int]]:
    """(first row of a strip, block) where a thread begins."""
    strips = [(rows.start, len(rows)) for rows in window_brute.strips(law.rows)]
    begins = set()
    for part in range(threads):
        wanted = law.rows * law.blocks * part // threads
        for row, height in strips:
            if wanted < height * law.blocks:
                begins.add((row, wanted // height))
                break
            wanted -= height * law.blocks
    return begins


@lru_cache(maxsize=2)
def cells(p: Placement) -> dict[tuple[int, int], int]:
    """(row, block) -> the cell that it reads."""
    law, _ = brute.layer_law(p)
    return {
        (row, block): window_brute.address(law, row, block) // (law.window * law.laps)
        for row in range(law.rows)
        for block in range(law.blocks)
    }


def by_windows(p: Placement, threads: int) -> int:
    """Positions one after the other; where a piece of a column ends, its products are counted."""
    law, _ = brute.layer_law(p)
    elements, total = elements_of_blocks(p), 0
    begins = first_columns(law, threads)

    for rows in window_brute.strips(law.rows):
        unit, buffered = None, 0
        for block in range(law.blocks):
            piece = 0
            if (rows.start, block) in begins:
                buffered = 0
            for row in rows:
                cell = cells(p)[row, block]
                if cell != unit or buffered == BUFFER:
                    total += min(piece, law.window) * elements[block]
                    unit, buffered, piece = cell, 0, 0
                piece += 1
                buffered += 1
            total += min(piece, law.window) * elements[block]
    return total


def by_ring(p: Placement, lanes: int) -> int:
    law, _ = brute.layer_law(p)
    elements, total = elements_of_blocks(p), 0
    height = 65536 // lanes
    for first in range(0, law.rows, height):
        strip = range(first, min(first + height, law.rows))
        for rows in (strip[i : i + 16384] for i in range(0, len(strip), 16384)):
            total += min(len(rows), law.slots) * sum(elements)
    return total


@pytest.mark.parametrize(("windows", "shape"), WEIGHTS, ids=str)
def test_windows(windows: tuple[int, int, int], shape: tuple[int, ...]) -> None:
    slots, window, laps = windows
    p = placement(slots, shape, window=window, laps=laps)
    for threads in (1, 3):
        got = multiplications.of_row(p.to_json(), 16, threads)
        assert got == by_windows(p, threads), threads
        assert got <= math.prod(shape)


@pytest.mark.parametrize(("slots", "shape"), RINGS, ids=str)
def test_rings(slots: int, shape: tuple[int, ...]) -> None:
    p = placement(slots, shape)
    for lanes in (1, 64):
        assert multiplications.of_row(p.to_json(), lanes, 2) == by_ring(p, lanes), lanes


def test_pairs_of_slot_and_column_of_whole_units() -> None:
    """Where units are whole columns, each slot and column that is read has one product."""
    p = placement(1024, (4096, 192), window=256, laps=16)
    p = Placement(p.generator, 3, 0, p.shape, 1.0)
    law, _ = brute.layer_law(p)
    slots = law.slot(torch.arange(law.rows)[:, None], torch.arange(law.blocks))
    pairs = sum(len(slots[:, block].unique()) for block in range(law.blocks))
    assert multiplications.of_row(p.to_json(), 16, 1) == 64 * pairs == 64 * 256 * 3


@needs_native
@pytest.mark.parametrize("batch", [1, 5, 40])
@pytest.mark.parametrize("window", [None, (256, 4)])
def test_the_counter_says_so(window: tuple[int, int] | None, batch: int) -> None:
    """Few rows of x share products forward; all else are dense products of a gathered weight."""
    window_and_laps = {"window": window[0], "laps": window[1]} if window else {}
    bank = brute.window_bank(704 * 64, 64, "vector", **window_and_laps)
    layer = rpg.nn.Linear(120, 900, bank=bank)
    x = torch.randn(batch, 120, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=rpg.flops.shared_products()) as counter:
        layer(x).sum().backward()
    got = {str(op).rpartition(".")[2]: n for op, n in counter.get_flop_counts()["Global"].items()}
    p, of_row, dense = layer.virtual_weight.placement, 120 * 900, 120 * 900
    if batch <= factored.FEW:
        step = factored.steps("linear", batch, p.to_json())
        assert step is not None
        lanes = step.batch_tile * step.tiles
        of_row = by_windows(p, step.threads) if window else by_ring(p, lanes)
        assert of_row < dense
    assert got == {"linear": 2 * batch * of_row, "linear_grads": 4 * batch * dense}


@needs_native
def test_convolutions_count_pixels() -> None:
    bank = brute.window_bank(704 * 64, 64, "vector", window=128, laps=4)
    layer = rpg.nn.Conv2d(64, 512, 3, padding=1, stride=2, bank=bank)
    x = torch.randn(2, 64, 7, 9)
    assert rpg.explain(layer, x).backend == "cpu"
    p = layer.virtual_weight.placement
    with torch.no_grad():
        for mapping, of_pixel in (
            (rpg.flops.shared_products(), by_windows(p, 1)),
            (None, 512 * 64 * 9),
        ):
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                pixels = layer(x)[:, 0].numel()
            assert counter.get_total_flops() == 2 * pixels * of_pixel
    with (
        rpg.backend("reference"),
        FlopCounterMode(display=False, custom_mapping=rpg.flops.shared_products()) as counter,
    ):
        layer(x)
    assert counter.get_total_flops() == 2 * pixels * 512 * 64 * 9
