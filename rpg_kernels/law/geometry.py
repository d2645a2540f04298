"""A weight as a virtual matrix of rows, runs and blocks; and what size a convolution gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rpg_kernels import _checks
from rpg_kernels.law.ring import MAX_BAND

MAX_ROWS = 2**62
_VECTOR = 8  # elements: 16 bytes of bf16, below which it does not pay to give each tap blocks


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


def conv_output(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """H', W' of a convolution of an image H, W that the kernel fits into.

    Example:
        >>> conv_output((224, 224), (7, 7), (2, 2), (3, 3), (1, 1))
        [112, 112]
    """
    return [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def transposed_output(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """H', W' of a transposed convolution of an image H, W; below 1 where padding takes it all.

    Example:
        >>> transposed_output((7, 7), (4, 4), (2, 2), (1, 1), (0, 1), (1, 1))
        [14, 15]
    """
    return [
        (s - 1) * t - 2 * p + d * (k - 1) + o + 1
        for s, k, t, p, o, d in zip(
            size, kernel, stride, padding, output_padding, dilation, strict=True
        )
    ]


def _derived() -> Any:
    """A field that the constructor computes."""
    return field(init=False, repr=False, compare=False)


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
    rows: int = _derived()  # N
    channels: int = _derived()  # K of a matrix, in/groups of a convolution
    taps: int = _derived()  # of the convolution's kernel; 1 for a matrix
    by_tap: bool = _derived()  # each tap is a run of its own: no block straddles two taps
    run: int = _derived()  # elements of a run before padding
    runs: int = _derived()  # runs per row
    block: int = _derived()  # the layer's own granularity: elements per block
    run_blocks: int = _derived()  # blocks per run
    blocks: int = _derived()  # blocks per row
    numel: int = _derived()  # virtual weights, padding not counted
    span: int = _derived()  # elements of the ring that the layer takes, padding counted

    def __post_init__(self) -> None:
        _checks.granularity(self.granularity)
        if len(self.shape) < 2:
            raise _checks.fail("shape", self.shape, "[rows, columns] or [out, in, *kernel]")
        for size in self.shape:
            _checks.integer("shape", size, 1, MAX_ROWS)
        rows, channels, taps = self.shape[0], self.shape[1], math.prod(self.shape[2:])
        of_row = divisor(taps * channels, self.granularity)
        by_tap = taps == 1 or channels >= min(_VECTOR, of_row)
        run, runs = (channels, taps) if by_tap else (channels * taps, 1)
        block = divisor(run, self.granularity)
        run_blocks = -(-run // block)
        derived = {
            "rows": rows,
            "channels": channels,
            "taps": taps,
            "by_tap": by_tap,
            "run": run,
            "runs": runs,
            "block": block,
            "run_blocks": run_blocks,
            "blocks": runs * run_blocks,
            "numel": rows * channels * taps,
            "span": rows * runs * run_blocks * block,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        if self.blocks > MAX_BAND:
            raise _checks.fail("shape", self.shape, f"at most {MAX_BAND} blocks per row")
