"""VirtualMatrix: how a weight is cut into blocks."""

from __future__ import annotations

import itertools
import math
import random

import brute_force as brute
import pytest

from rpg_kernels.law.geometry import VirtualMatrix, divisor

GRANULARITIES = (1, 2, 4, 8, 16, 32, 64, 128)
SHAPES = [*brute.MATRICES, *brute.KERNELS, (8, 20), (3, 7, 3), (2, 6, 2, 2, 2)]

# Worked out by hand from the rule: the largest divisor that pads at most a quarter, taps apart
# where in/groups is at least the block or at least 8.
BY_HAND = {
    # shape, granularity: (block, blocks per row, runs per row)
    ((10, 576), 64): (64, 9, 1),
    ((10, 100), 64): (16, 7, 1),  # 128 is 28 % more than 100, in 64s or 32s; 112 is 12 %
    ((1000, 512), 128): (128, 4, 1),
    ((5, 33), 32): (8, 5, 1),  # 64 is too much, 48 too, 40 is 21 %
    ((128, 64, 3, 3), 64): (64, 9, 9),
    ((128, 128, 3, 3), 64): (64, 18, 9),
    ((64, 3, 7, 7), 64): (32, 5, 1),  # 147 -> 192 is 31 %, 160 is 9 %
    ((32, 1, 3, 3), 64): (2, 5, 1),  # 9 -> 12 is 33 %, 10 is 11 %
    ((32, 1, 3, 3), 1): (1, 9, 9),
    ((4, 52, 3, 3), 64): (64, 9, 9),  # 52 -> 64 is 23 %
    ((4, 20, 3, 3), 64): (8, 27, 9),  # 20 -> 32 is 60 %, 24 is 20 %
    ((4, 12, 3, 3), 64): (4, 27, 9),  # at least 8 channels: by tap; 12 -> 16 is 33 %
    ((4, 5, 3, 3), 64): (16, 3, 1),  # 45 -> 64 is 42 %, 48 is 7 %
    ((4, 7, 3, 3), 64): (64, 1, 1),  # 63 -> 64
    ((4, 4, 3, 3), 4): (4, 9, 9),  # in/groups is the block: no block straddles a tap
    ((6, 16, 1, 1), 64): (16, 1, 1),
    ((7, 1), 128): (1, 1, 1),
}


@pytest.mark.parametrize(("case", "wanted"), BY_HAND.items(), ids=str)
def test_layouts_worked_out_by_hand(
    case: tuple[tuple[int, ...], int], wanted: tuple[int, int, int]
) -> None:
    matrix = VirtualMatrix(*case)
    assert (matrix.block, matrix.blocks, matrix.runs) == wanted


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_divisor_is_the_largest_that_pads_at_most_a_quarter(granularity: int) -> None:
    for length in [*range(1, 300), 511, 513, 4095, 14336]:
        assert divisor(length, granularity) == brute.largest_block(length, granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_row_layout_written_out(shape: tuple[int, ...], granularity: int) -> None:
    matrix = VirtualMatrix(shape, granularity)
    block, blocks, layout = brute.row_layout(shape, granularity)
    assert (matrix.block, matrix.blocks) == (block, blocks)
    assert matrix.rows == shape[0]
    assert matrix.numel == math.prod(shape)
    assert matrix.span == shape[0] * blocks * block
    places = set(layout.values())
    assert len(places) == len(layout) == math.prod(shape[1:])
    assert all(b < blocks and element < block for b, element in places)


def random_shapes(count: int) -> list[tuple[int, ...]]:
    rng = random.Random(7)
    return [
        (rng.randrange(1, 20), rng.randrange(1, 140), *rng.choice([(), (1, 1), (3, 3), (2, 5)]))
        for _ in range(count)
    ]


def test_padding_is_at_most_a_quarter_of_a_layer() -> None:
    for shape, granularity in itertools.product(random_shapes(60), GRANULARITIES):
        matrix = VirtualMatrix(shape, granularity)
        assert granularity % matrix.block == 0
        assert matrix.numel <= matrix.span <= 1.25 * matrix.numel
        if granularity > 1 and matrix.run % granularity == 0:
            assert matrix.block == granularity


def test_no_block_straddles_a_tap_when_the_channels_fill_one() -> None:
    for shape, granularity in itertools.product(random_shapes(60), GRANULARITIES):
        _, _, layout = brute.row_layout(shape, granularity)
        matrix = VirtualMatrix(shape, granularity)
        taps_of_block: dict[int, set[int]] = {}
        for (_, tap), (b, _) in layout.items():
            taps_of_block.setdefault(b, set()).add(tap)
        straddles = any(len(taps) > 1 for taps in taps_of_block.values())
        of_row = brute.largest_block(math.prod(shape[1:]), granularity)
        assert matrix.by_tap == (math.prod(shape[2:]) == 1 or shape[1] >= min(8, of_row))
        if matrix.by_tap:
            assert not straddles


def test_zero_length_padding_and_large_shapes_need_no_memory() -> None:
    matrix = VirtualMatrix((2**40, 4096), 64)
    assert matrix.span == 2**52
    assert VirtualMatrix((3, 2**31 * 128), 128).blocks == 2**31


@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (5, 0), (5, 5, 0, 3), (-1, 5)])
def test_shapes_that_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape: got .*, wanted"):
        VirtualMatrix(shape, 16)


@pytest.mark.parametrize("size", [True, 2.0, "3", None])
def test_sizes_that_are_not_ints(size: object) -> None:
    with pytest.raises(TypeError, match=r"shape: got .*, wanted an int"):
        VirtualMatrix((4, size), 16)  # type: ignore[arg-type]


def test_a_row_of_too_many_blocks() -> None:
    with pytest.raises(ValueError, match=r"shape: got .*, wanted at most 2147483648 blocks"):
        VirtualMatrix((1, 2**31 + 1), 1)
