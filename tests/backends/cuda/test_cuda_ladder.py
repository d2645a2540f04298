"""The steps of docs/ladder.md compute the same layer, as the SIMT shim runs them."""

from __future__ import annotations

import brute_force as brute
import pytest
import torch
from small_batches import HAS_SIMT, needs_simt

from rpg_kernels.bank.virtual_weight import VirtualWeight

pytestmark = needs_simt

if HAS_SIMT:
    from tools.reports import cuda_ladder as ladder

# By the fill that the product chooses: slots, window and laps.
BANKS = {
    "gather": (2500, {}),
    "ring": (300, {}),
    "windows": (512, {"window": 64, "laps": 4}),
}


def weight_of(fill: str, rows: int, columns: int, reflect: str) -> VirtualWeight:
    slots, windows = BANKS[fill]
    torch.manual_seed(rows)
    bank = brute.unit_bank(slots * 64, granularity=64, reflect=reflect, seed=5, **windows)
    return bank.place((rows, columns), scale=0.7)


@pytest.mark.parametrize("reflect", ["none", "vector"])
@pytest.mark.parametrize(("rows", "columns"), [(256, 128), (600, 250), (1025, 120)])
@pytest.mark.parametrize("fill", BANKS)
def test_every_step_computes_the_layer(fill: str, rows: int, columns: int, reflect: str) -> None:
    weight = weight_of(fill, rows, columns, reflect)
    x = torch.randn(columns).bfloat16()
    bank = weight.bank.weight.data
    bank.copy_(bank.bfloat16())  # as the kernels round it
    dense = weight.unpack().detach().double()
    wanted = dense @ x.double()
    number = {name: step for step, name in ladder.FILLS.items()}[fill]
    for step in (1, 2, number):
        for order in (0, 1, 7):
            y = ladder.run(step, weight, x, order)
            # One rounding of y to bf16; sums are in fp32.
            bound = 2**-8 * wanted.abs() + 1e-5 * dense.abs() @ x.double().abs()
            assert torch.all((y.double() - wanted).abs() <= bound), step


@pytest.mark.parametrize("fill", ["ring", "windows"])
def test_step_0_computes_the_layer(fill: str) -> None:
    weight = weight_of(fill, 65, 130, "vector")
    x = torch.randn(130).bfloat16()
    wanted = weight.unpack().detach().double() @ x.double()
    torch.testing.assert_close(ladder.run(0, weight, x), wanted)


def test_steps_that_are_none_are_refused() -> None:
    weight = weight_of("ring", 64, 64, "vector")
    x = torch.zeros(64).bfloat16()
    with pytest.raises(ValueError, match="step: wanted 1 or 2"):
        ladder.run(-1, weight, x)
    element = weight_of("ring", 64, 64, "element")
    with pytest.raises(ValueError, match="reflect: wanted none or vector"):
        ladder.run(1, element, x)
