"""Tiles that config.choose can give: no product too small to compile, no registers spilled.

What dispatch can choose is enumerated in triton_every.py. Here a fixed part of it is compiled, with
the most crowded of every kernel; all of it, in half an hour or more, by

    TRITON_EVERY=1 python -m pytest tests/backends/triton/cases/aot_every.py
"""

from __future__ import annotations

import itertools
import os
import random

import pytest
import torch
import triton_aot as aot
import triton_every as every
import triton_launches as launches
import triton_step as step

from rpg_kernels.backends.triton.config import _TILES, choose

PRODUCTS = (*every.MATRICES, *every.CONVOLUTIONS)
DRAWN = 8  # for each architecture, beside the most crowded
FEW_BYTES = 64


def allowed(one: launches.Specialisation) -> int:
    """Bytes of stack that a kernel may use, where more than none cannot be helped.

    With the law in line, or an entry for 8 elements and fewer, a weight takes several registers
    while it is found, and the compiler sometimes keeps a few numbers too many. A smaller tile
    would find each weight more often, which costs more than some loads of 4 bytes.
    """
    c = launches.constants(one)
    return FEW_BYTES if c.get("SOURCE") == "law" or c.get("G", 64) <= 8 else 0


@pytest.fixture(scope="module")
def found() -> dict[int, dict[launches.Specialisation, str]]:
    return {architecture: every.specialisations(architecture) for architecture in every.GPUS}


def test_products_are_large_enough_to_compile(
    found: dict[int, dict[launches.Specialisation, str]],
) -> None:
    """Triton's compiler refuses less than 16 where a product sums; its interpreter does not."""
    kernels = set()
    for architecture in every.GPUS:
        for one, call in found[architecture].items():
            if one.kernel in PRODUCTS:
                c = launches.constants(one)
                assert min(c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"]) >= 16, call
                kernels.add(one.kernel)
    assert kernels == set(PRODUCTS)


@pytest.mark.parametrize("op", list(_TILES))
def test_every_size_gets_tiles_of_16_and_more(op: str) -> None:
    sizes = (1, 2, 15, 16, 17, 33, 64, 100, 1000, 100_000)
    for m, n, k in itertools.product(sizes, repeat=3):
        for block, dtype, target, times, crowded in itertools.product(
            (1, 4, 8, 128), (torch.float16, torch.float32), every.GPUS.values(), (1, 9), (0, 1)
        ):
            c = choose(op, m, n, k, block, dtype, target, times, bool(crowded))
            assert min(c.block_m, c.block_n, c.block_k) >= 16, (op, m, n, k, block, dtype)
            assert c.warps in (4, 8)


def test_nothing_spills(found: dict[int, dict[launches.Specialisation, str]]) -> None:
    spilled, rng = [], random.Random(0)
    for architecture, all_of_it in found.items():
        some = list(all_of_it)
        if not os.environ.get("TRITON_EVERY", ""):
            crowded = [
                max((s for s in some if s.kernel == name), key=every.pressure) for name in PRODUCTS
            ]
            some = [*crowded, *rng.sample(some, DRAWN)]
        for one in some:
            stack = launches.usage(one, architecture).stack
            if stack > allowed(one):
                spilled.append(f"sm_{architecture}: {stack} bytes, {one}, {all_of_it[one]}")
    assert not spilled, "\n".join(spilled)


def test_a_step_of_resnet18_compiles_few_kernels() -> None:
    """Layers differ in arguments, and only tiles, signs and dtypes make another kernel."""
    calls = step.calls(*step.resnet())
    assert len(calls) == 3 * 19
    found = {architecture: step.kernels(calls, architecture) for architecture in every.GPUS}
    assert {architecture: len(some) for architecture, some in found.items()} == {80: 11, 90: 17}
    assert step.kernels_on_trial(calls, 90) == found[90]  # nothing is compiled in vain
    for one in found[90]:
        done = launches.compile_for(one, 90)
        c = aot.Compiled(done.asm["ptx"], done.asm["cubin"], done.metadata.shared, one.warps)
        assert c.spills == 0, one
        assert not c.serialised, one
