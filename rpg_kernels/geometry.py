"""A weight seen as a virtual matrix [N, K]: its rows cut into blocks of the packing law."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from rpg_kernels import _checks
from rpg_kernels.law import MAX_BAND

MAX_ROWS = 2**62
_VECTOR = 8  # elements; 16 bytes of bf16, the narrowest gather worth aligning taps for


def divisor(length: int, granularity: int) -> int:
    """The largest divisor of the granularity that pads a run of ``length`` by at most 25 %.

    Example:
        >>> divisor(576, 64), divisor(147, 64), divisor(9, 64), divisor(1, 64)
        (64, 32, 2, 1)
    """
    d = granularity
    while 4 * (-(-length // d) * d) > 5 * length:
        d //= 2
    return d


@dataclass(frozen=True)
class VirtualMatrix:
    """How a weight of a given shape is laid out in blocks, K innermost.

    A row of a linear or embedding weight ``[N, K]`` is one run of K elements. A row of a
    convolution ``[out, in/groups, *kernel]`` is its taps one after the other, in-channels
    innermost: one run per tap when in/groups is at least the block (or at least 8, one 16-byte
    vector), otherwise one run of all taps, so that a depthwise 3x3 does not waste its slots.
    Each run is padded to whole blocks; the padding is never read.

    Args:
        shape: torch's weight shape, at least two sizes, all positive.
        granularity: of the bank; the layer uses the largest divisor that pads at most 25 %.

    Raises:
        ValueError: a size is not positive, or a row has more than 2^31 blocks.

    Example:
        >>> VirtualMatrix((128, 64, 3, 3), 64).block, VirtualMatrix((64, 3, 7, 7), 64).block
        (64, 32)
        >>> VirtualMatrix((32, 1, 3, 3), 64)
        VirtualMatrix(shape=(32, 1, 3, 3), granularity=64)
    """

    shape: tuple[int, ...]
    granularity: int

    def __post_init__(self) -> None:
        _checks.granularity(self.granularity)
        if len(self.shape) < 2:
            raise _checks.fail("shape", self.shape, "[rows, columns] or [out, in, *kernel]")
        for size in self.shape:
            _checks.integer("shape", size, 1, MAX_ROWS)
        if self.blocks > MAX_BAND:
            raise _checks.fail("shape", self.shape, f"at most {MAX_BAND} blocks per row")

    @property
    def rows(self) -> int:
        """N."""
        return self.shape[0]

    @property
    def channels(self) -> int:
        """K of a matrix, in/groups of a convolution."""
        return self.shape[1]

    @cached_property
    def taps(self) -> int:
        """Kernel positions; 1 for a matrix."""
        return math.prod(self.shape[2:])

    @cached_property
    def by_tap(self) -> bool:
        """True when each tap is a run of its own, so that no block straddles two taps."""
        of_row = divisor(self.taps * self.channels, self.granularity)
        return self.taps == 1 or self.channels >= min(_VECTOR, of_row)

    @cached_property
    def run(self) -> int:
        """Elements of a run before padding."""
        return self.channels if self.by_tap else self.channels * self.taps

    @cached_property
    def runs(self) -> int:
        """Runs per row."""
        return self.taps if self.by_tap else 1

    @cached_property
    def block(self) -> int:
        """The layer's own granularity: elements per block."""
        return divisor(self.run, self.granularity)

    @cached_property
    def run_blocks(self) -> int:
        """Blocks per run."""
        return -(-self.run // self.block)

    @cached_property
    def blocks(self) -> int:
        """Blocks per row."""
        return self.runs * self.run_blocks

    @cached_property
    def numel(self) -> int:
        """Virtual weights, padding not counted."""
        return math.prod(self.shape)

    @cached_property
    def span(self) -> int:
        """Elements of the ring that the layer takes, padding counted."""
        return self.rows * self.blocks * self.block
