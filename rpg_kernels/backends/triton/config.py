"""How large the tiles of the Triton kernels are: one heuristic, nothing is tuned at run time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters of one kernel. Printable.

    Args:
        block_m, block_n, block_k: of the batch, the rows and the columns of the virtual matrix.
        warps: per program.
        stages: of the software pipeline.
        group: row tiles of the batch that neighbouring programs share a weight tile for.
        splits: parts of the batch that a bank gradient sums in programs of their own.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    splits: int = 1


def _power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two from low to high that is at least size, or high."""
    return min(high, max(low, 1 << max(0, size - 1).bit_length()))


# op -> largest tiles of (batch, rows, columns): for 16 bits where products read shared memory, for
# 16 bits elsewhere, for fp32, whose products without tf32 run on the plain units, and for 16 bits
# where registers are crowded.
_TILES = {
    "linear": ((128, 256, 64), (128, 128, 64), (64, 64, 32), (64, 128, 64)),
    "linear_input_grad": ((128, 64, 256), (128, 64, 128), (64, 32, 64), (64, 64, 128)),
    "linear_bank_grad": ((64, 256, 128), (32, 128, 128), (32, 64, 64), (32, 64, 128)),
    "conv2d": ((128, 256, 64), (128, 128, 64), (64, 64, 32), (64, 128, 64)),
    "conv2d_input_grad": ((128, 64, 256), (128, 64, 128), (64, 32, 64), (64, 64, 128)),
    "conv2d_bank_grad": ((64, 256, 128), (32, 128, 128), (32, 64, 64), (32, 64, 128)),
}
# The dimension that a product sums over: its tile is a step, and not made smaller to fill the GPU.
_SUMMED = {"": 2, "input_grad": 1, "bank_grad": 0}


@lru_cache(maxsize=4096)
def _choose(
    op: str, m: int, n: int, k: int, block: int, low: bool, target: Gpu, times: int, crowded: bool
) -> Config:
    summed, sizes = _SUMMED[op.partition("_")[2]], (m, n, k)
    kind = 2 if not low else 3 if crowded else 0 if target.shared else 1
    largest = _TILES[op][kind]
    tile = [_power_of_two(size, 16, high) for size, high in zip(sizes, largest, strict=True)]
    if block < 8:  # every element finds its own entry, which takes registers
        tile[2] = min(tile[2], 32)
        if crowded and summed == 2:
            tile[1] = min(tile[1], 64)
    kept, splits = [i for i in range(3) if i != summed], 1

    def few() -> bool:
        tiles = times * math.prod(-(-sizes[i] // tile[i]) for i in kept)
        return 8 * tiles < 7 * target.processors

    # A bank gradient whose batch is long is cut along it instead, at 8 bytes of atomics per weight
    # and part: less than its operands as long as a part is several steps.
    most = sizes[0] // (8 * tile[0]) if summed == 0 else 1
    if most > 1 and few():
        tiles = times * math.prod(-(-sizes[i] // tile[i]) for i in kept)
        splits = min(most, -(-target.processors // tiles))
        times *= splits
    # Rows or columns of the weight first; then the batch, which is halved down to 64 only.
    for i, floor in ((2, 128), (1, 128), (0, 64), (2, 64), (1, 64), (2, 32), (1, 32)):
        while i in kept and tile[i] > floor and few():
            tile[i] //= 2
    area = math.prod(tile[i] for i in kept)
    stages = 3 if summed == 0 else 5  # two of five are for entries
    # fp32 tiles are small, but sums and signs in fp32 take as many registers; so does what crowds
    # them in 16 bits.
    large = 64 * 32 if crowded or block < 8 else 128 * 128
    warps = 8 if area >= large or not low else 4
    return Config(tile[0], tile[1], tile[2], warps, stages, splits=splits)


@dataclass(frozen=True)
class Gpu:
    """What tile sizes depend on.

    Args:
        shared: tensor cores take both operands from shared memory (wgmma, tcgen05), not from
            registers (mma.sync).
        processors: streaming multiprocessors.
    """

    shared: bool = True
    processors: int = 132


@lru_cache(maxsize=64)
def gpu(device: torch.device) -> Gpu:
    """The GPU that a device is; on a CPU, where kernels are interpreted, an H200's."""
    if device.type != "cuda":
        return Gpu()
    p = torch.cuda.get_device_properties(device)
    return Gpu(p.major in (9, 10), p.multi_processor_count)


def _without_product(m: int, n: int, block: int) -> Config:
    """Tiles of 2048 weights, whose columns lie in one block from 8 elements on."""
    block_k = min(block, 64) if block >= 8 else 32
    rows = 2048 // block_k
    return Config(_power_of_two(m, 1, rows), _power_of_two(n, 1, rows), block_k, 4, 1)


def products_read_shared(device: torch.device) -> bool:
    """See Gpu."""
    return gpu(device).shared


_times, _rows = Fraction(1), Fraction(1)


@contextlib.contextmanager
def as_if(times: Fraction, rows: Fraction = _rows) -> Iterator[None]:
    """While a call has a part of a batch ``times`` as large, and of a weight with ``rows`` times as
    many rows, choose what would be chosen for all of them."""
    global _times, _rows
    before = _times, _rows
    _times, _rows = times, rows
    try:
        yield
    finally:
        _times, _rows = before


def whole(m: int) -> int:
    """The size of a batch that a configuration is chosen for."""
    return m if _times == 1 else math.ceil(m * _times)


def whole_weight(n: int) -> int:
    """The number of a weight's rows, or of its elements, that a configuration is chosen for."""
    return n if _rows == 1 else math.ceil(n * _rows)


def choose(
    op: str,
    m: int,
    n: int,
    k: int,
    block: int,
    dtype: torch.dtype,
    target: Gpu | bool = True,
    times: int = 1,
    crowded: bool = False,
) -> Config:
    """The configuration of a call by its sizes.

    Tiles are the largest that registers and shared memory hold, since each weight is made once
    per tile of the batch; halved while they are fewer than the GPU's processors.

    Args:
        op: operator name.
        m, n, k: batch, rows and columns of the product; of a convolution pixels, rows of a
            group, and columns of a run (geometry.VirtualMatrix).
        block: elements per block of the layer.
        dtype: that the product is computed in.
        target: the GPU.
        times: products of these sizes side by side, of groups and of taps.
        crowded: the sums of the largest tiles would not fit registers, beside an address and a
            mask for each element, where operands are not read 16 bytes at a time, or beside the
            law in line.

    Example:
        >>> choose("linear", 4096, 4096, 4096, 64, torch.float16)
        Config(block_m=128, block_n=256, block_k=64, warps=8, stages=5, group=8, splits=1)
        >>> choose("linear", 16, 4096, 4096, 64, torch.float16)
        Config(block_m=16, block_n=32, block_k=64, warps=4, stages=5, group=8, splits=1)
    """
    m, n = whole(m), whole_weight(n)
    if op in ("embedding", "embedding_bank_grad", "unpack", "pack"):
        return _without_product(m, n, block)
    if isinstance(target, bool):
        target = Gpu(target)
    return _choose(op, m, n, k, block, dtype.itemsize == 2, target, times, crowded)


def dot_precision(dtype: torch.dtype, convolution: bool = False) -> str:
    """Triton's input_precision: TF32 only where torch's own switch allows it.

    torch has two, torch.backends.cuda.matmul and torch.backends.cudnn.conv; the latter allows it
    by default.
    """
    cudnn: Any = torch.backends.cudnn
    switch = cudnn.conv if convolution else torch.backends.cuda.matmul
    return "tf32" if dtype == torch.float32 and switch.fp32_precision == "tf32" else "ieee"
