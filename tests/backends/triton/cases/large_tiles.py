"""The tiles of large layers, on layers that have a few of them: every operator, laws 1 and 3."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import brute_force as brute
import pytest
import torch
import triton_layers as layers
from triton_process import INTERPRETED, poisoned

from rpg_kernels.backends.triton.config import as_if
from rpg_kernels.law.generator import Generator

pytestmark = pytest.mark.skipif(INTERPRETED, reason="takes the interpreter two minutes")

DTYPES = brute.ALL[1:]
# Laps of law 3; law 1 has none.
LAPS = (None, 4)


@pytest.fixture(autouse=True)
def large() -> Iterator[None]:
    """Configurations as for a batch and a weight of 64 times as many rows."""
    with as_if(Fraction(64), Fraction(64)), poisoned():
        yield


def generator_of(laps: int | None, dtype: torch.dtype) -> tuple[Generator, int]:
    """(generator, scratch limit): signs of elements made in line, of vectors folded, or none."""
    kind = DTYPES.index(dtype) + (laps is None)
    g, reflect = ((64, "element"), (16, "vector"), (32, "none"))[kind % 3]
    return Generator(1500 // g, g, reflect, laps=laps), 0 if reflect == "element" else 1 << 24


@pytest.mark.parametrize("laps", LAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype: torch.dtype, laps: int | None) -> None:
    generator, limit = generator_of(laps, dtype)
    one = layers.layer(generator, (270, 72), dtype)
    layers.check_linear(one, limit, ordered=False, config=None, m=140)


@pytest.mark.parametrize("laps", LAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv2d(dtype: torch.dtype, laps: int | None) -> None:
    generator, limit = generator_of(laps, dtype)
    one = layers.layer(generator, (140, 48, 2, 2), dtype)
    layers.check_conv2d(one, 1, limit, (13, 11))


@pytest.mark.parametrize("laps", LAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lookup_and_unpack(dtype: torch.dtype, laps: int | None) -> None:
    generator, _ = generator_of(laps, dtype)
    one = layers.layer(generator, (50, 136), dtype)
    layers.check_embedding(one)
    layers.check_unpack_and_pack(one)
