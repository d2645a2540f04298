"""Cost of the packing law in Python: how long 65,536 positions of a layer take to evaluate.

python -m pytest benchmarks -k law --benchmark-timer=time.process_time
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rpg_kernels.law.ring import LayerLaw

POSITIONS = 1 << 16
# rows, blocks: the shapes decide how the permutation is computed
SHAPES = {
    "6 rounds": (4096, 64),
    "12 rounds": (997, 13),
    "swap-or-not": (20011, 1),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def law(shape: str, reflect: str = "vector") -> tuple[LayerLaw, torch.Tensor, torch.Tensor]:
    """A layer, and rows and blocks of positions that wrap around in it."""
    rows, blocks = SHAPES[shape]
    position = torch.arange(POSITIONS) % (rows * blocks)
    row = position.div(blocks, rounding_mode="floor")
    layer = LayerLaw(0, 0, rows, blocks, 64, 31250, 0, reflect, permute=True)
    return layer, row, position - row * blocks


@pytest.mark.parametrize("shape", list(SHAPES))
def test_law_slots(benchmark: Callable[..., object], shape: str) -> None:
    layer, row, block = law(shape)
    benchmark(lambda: layer.slot(row, block))


@pytest.mark.parametrize("shape", list(SHAPES))
def test_law_inverse(benchmark: Callable[..., object], shape: str) -> None:
    rows, blocks = SHAPES[shape]
    layer, _, _ = law(shape)
    inverse = layer.permutation(0).inverse
    places = torch.arange(POSITIONS) % (rows * blocks)
    benchmark(lambda: inverse(places))


@pytest.mark.parametrize("reflect", ["vector", "element"])
def test_law_sign_words(benchmark: Callable[..., object], reflect: str) -> None:
    layer, row, block = law("6 rounds", reflect)
    benchmark(lambda: layer.sign_words(row, block))
