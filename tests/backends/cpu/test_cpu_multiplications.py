"""What the factored CPU kernels are said to multiply, against a count position by position."""

from __future__ import annotations

import random

import brute_force as brute
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.backends.cpu import factored, multiplications
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import Placement

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")

RINGS = [
    (300, (1000, 100)),
    (50, (70, 64, 3, 3)),
    (1000, (700, 128)),
    (700, (17_000, 64)),
    (90, (17_000, 60)),
]


def placement(slots: int, shape: tuple[int, ...]) -> Placement:
    """Behind another layer, in the middle of the ring."""
    start = 64 * 64 * random.Random(str(shape)).randint(0, 9) % (slots * 64)
    return Placement(Generator(slots, 64, "vector", seed=5), 3, start, shape, 1.0)


def elements_of_blocks(p: Placement) -> list[int]:
    """Of each block of a row, the weights that it holds."""
    _, blocks, layout = brute.row_layout(p.shape, p.generator.granularity)
    elements = [0] * blocks
    for block, _ in layout.values():
        elements[block] += 1
    return elements


def by_ring(p: Placement, lanes: int) -> int:
    law, _ = brute.layer_law(p)
    elements, total = elements_of_blocks(p), 0
    height = 65536 // lanes
    for first in range(0, law.rows, height):
        strip = range(first, min(first + height, law.rows))
        for rows in (strip[i : i + 16384] for i in range(0, len(strip), 16384)):
            total += min(len(rows), law.slots) * sum(elements)
    return total


@pytest.mark.parametrize(("slots", "shape"), RINGS, ids=str)
def test_rings(slots: int, shape: tuple[int, ...]) -> None:
    p = placement(slots, shape)
    for lanes in (1, 64):
        assert multiplications.of_row(p.to_json(), lanes) == by_ring(p, lanes), lanes


@needs_native
@pytest.mark.parametrize("batch", [1, 5, 40])
def test_the_counter_says_so(batch: int) -> None:
    """Few rows of x share products forward; all else are dense products of a gathered weight."""
    layer = rpg.nn.Linear(120, 900, bank=rpg.ParameterBank(704 * 64))
    x = torch.randn(batch, 120, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=rpg.flops.shared_products()) as counter:
        layer(x).sum().backward()
    got = {str(op).rpartition(".")[2]: n for op, n in counter.get_flop_counts()["Global"].items()}
    p, of_row, dense = layer.virtual_weight.placement, 120 * 900, 120 * 900
    if batch <= factored.FEW:
        step = factored.steps("linear", batch, p.to_json())
        assert step is not None
        of_row = by_ring(p, step.batch_tile * step.tiles)
        assert of_row < dense
    assert got == {"linear": 2 * batch * of_row, "linear_grads": 4 * batch * dense}


@needs_native
def test_convolutions_count_pixels() -> None:
    bank = rpg.ParameterBank(128 * 64)
    layer = rpg.nn.Conv2d(64, 512, 3, padding=1, stride=2, bank=bank)
    x = torch.randn(2, 64, 7, 9)
    assert rpg.explain(layer, x).backend == "cpu"
    p = layer.virtual_weight.placement
    with torch.no_grad():
        for mapping, of_pixel in (
            (rpg.flops.shared_products(), by_ring(p, 16)),
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
