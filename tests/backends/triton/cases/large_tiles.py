"""The tiles of large layers, on layers that have a few of them: every operator, laws 1 and 3."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
import triton_layers as layers
from triton_process import INTERPRETED, poisoned

import rpg_kernels as rpg
from rpg_kernels.backends.triton.config import as_if
from rpg_kernels.law.generator import Generator

pytestmark = pytest.mark.skipif(INTERPRETED, reason="takes the interpreter two minutes")

# Laps of law 3, of which law 1 has none. Signs of blocks, folded where there is scratch for it;
# none; signs of elements, with the law in line.
KINDS = (
    (torch.float16, None, 16, "vector", 1 << 24),
    (torch.float32, 4, 32, "none", 1 << 24),
    (torch.bfloat16, 4, 64, "element", 0),
)
every_kind = pytest.mark.parametrize(("dtype", "laps", "g", "reflect", "limit"), KINDS, ids=str)


@pytest.fixture(autouse=True)
def large() -> Iterator[None]:
    """Configurations as for a batch and a weight of 64 times as many rows."""
    with as_if(Fraction(64), Fraction(64)), poisoned():
        yield


def layer(
    shape: tuple[int, ...], dtype: torch.dtype, laps: int | None, g: int, reflect: str
) -> layers.Layer:
    return layers.layer(Generator(1500 // g, g, reflect, laps=laps), shape, dtype)


@every_kind
def test_linear(dtype: torch.dtype, laps: int | None, g: int, reflect: str, limit: int) -> None:
    one = layer((270, 72), dtype, laps, g, reflect)
    layers.check_linear(one, limit, ordered=False, config=None, m=140)


@every_kind
def test_conv2d(dtype: torch.dtype, laps: int | None, g: int, reflect: str, limit: int) -> None:
    layers.check_conv2d(layer((140, 48, 2, 2), dtype, laps, g, reflect), 1, limit, (13, 11))


@every_kind
def test_lookup_and_unpack(
    dtype: torch.dtype, laps: int | None, g: int, reflect: str, limit: int
) -> None:
    one = layer((50, 136), dtype, laps, g, reflect)
    with rpg.scratch_limit(limit):
        layers.check_embedding(one)
        layers.check_unpack_and_pack(one)
