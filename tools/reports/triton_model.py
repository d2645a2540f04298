"""Predicted times of the Triton kernels from bytes, instructions and tensor cycles.

A prediction is an upper bound on speed with two assumptions beside it (OVERLAP, CUBLAS), not a
measurement. ``python -m tools.reports.triton_report`` puts the table into docs/kernels.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rpg_kernels.backends.triton.config import Config


@dataclass(frozen=True)
class Device:
    """What a GPU can do per clock of one processor, and its launch and memory floors."""

    processors: int
    clock: float  # Hz
    products: int  # multiply-adds in 16 bits
    issue: int = 128  # lane-instructions
    shared: int = 128  # bytes of shared memory
    cache: float = 42  # bytes from the L2 cache
    memory: float = 4.0e12  # bytes of DRAM per second
    launch: float = 2.5e-6  # seconds


H200 = Device(132, 1.755e9, 2048)
OVERLAP = 0.85  # of the slowest resource's rate, which a pipelined loop is assumed to reach
CUBLAS = 0.75  # of the tensor cores' peak, which cuBLAS and cuDNN are assumed to reach
ENTRY = 90  # lane-instructions for an entry in scratch
UNPACK = 24  # lane-instructions for a weight that is unpacked to memory


@dataclass(frozen=True)
class Product:
    """A product [m, n, k] of a kernel: m and n are its result, k what it sums over."""

    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Step:
    """One pass of a kernel's loop over a tile of m x n, k of the summed dimension.

    Args:
        instructions: lane-instructions of all warps.
        resigned: bytes that pass through registers on the way to shared memory.
    """

    m: int
    n: int
    k: int
    instructions: float
    resigned: int = 0

    def clocks(self, on: Device) -> dict[str, float]:
        """Clocks of one processor that each resource needs."""
        operands = 2 * self.k * (self.m + self.n)
        # An instruction multiplies 64 rows, and reads all of the other operand for them.
        read = 2 * self.k * (self.m + max(1, self.m // 64) * self.n)
        return {
            "tensor": self.m * self.n * self.k / on.products,
            "issue": self.instructions / on.issue,
            "shared": (operands + read + 2 * self.resigned) / on.shared,
            "cache": operands / on.cache,
        }


def loop_time(
    product: Product, step: Step, on: Device = H200, splits: int = 1
) -> tuple[float, str]:
    """(seconds of the loops of all tiles and splits, the resource that bounds them)."""
    clocks = step.clocks(on)
    bound = max(clocks, key=lambda name: clocks[name])
    tiles = math.ceil(product.m / step.m) * math.ceil(product.n / step.n)
    turns = math.ceil(tiles * splits / on.processors) * math.ceil(product.k / step.k / splits)
    return turns * clocks[bound] / OVERLAP / on.clock, bound


def step_of(name: str, c: Config, instructions: float, resigned: bool) -> Step:
    """The step of a kernel by its operator, with rows of the tensor cores' result first."""
    weights = 2 * c.block_n * c.block_k if resigned else 0
    if name.endswith("input_grad"):
        return Step(c.block_m, c.block_k, c.block_n, instructions, weights)
    if name.endswith("bank_grad"):
        return Step(c.block_n, c.block_k, c.block_m, instructions)
    return Step(c.block_m, c.block_n, c.block_k, instructions, weights)


def product_of(name: str, m: int, n: int, channels: int, taps: int = 1) -> Product:
    """The product of an operator on m rows or pixels and a weight [n, channels, taps]."""
    if name.endswith("input_grad"):
        return Product(m, channels, n * taps)
    if name.endswith("bank_grad"):
        return Product(n, channels * taps, m)
    return Product(m, n, channels * taps)


def issued(lane_instructions: float, on: Device = H200) -> float:
    """Seconds in which the whole device issues so many lane-instructions."""
    return lane_instructions / (on.processors * on.issue * on.clock)


def dense(m: int, n: int, k: int, taps: int = 1, on: Device = H200) -> float:
    """Seconds of the vendor's product, its operands read from DRAM, pixels once for all taps."""
    tensor = m * n * k / (on.processors * on.products * on.clock) / CUBLAS
    return max(tensor, 2 * (m * k // taps + n * k + m * n) / on.memory) + on.launch


def fused(
    name: str,
    product: Product,
    step: Step,
    weights: int,
    splits: int = 1,
    g: int = 64,
    on: Device = H200,
) -> tuple[float, str]:
    """(seconds of a call, what bounds it): entries, the loops, and what the bank gradient adds."""
    time, bound = loop_time(product, step, on, splits)
    time += issued(ENTRY * weights / g, on) + 2 * on.launch
    if name.endswith("bank_grad"):
        time += (
            8 * splits * weights / (on.cache * on.processors * on.clock)
        )  # read and written in L2
    return time, bound


def unpacked(m: int, n: int, k: int, limit: int, on: Device = H200) -> float:
    """Seconds of unpacking within ``limit`` bytes of scratch and multiplying by the vendor."""
    parts = math.ceil(2 * n * k / limit)
    rows = math.ceil(n / parts)
    tiles = math.ceil(m / 128) * math.ceil(rows / 256)
    filled = tiles / on.processors / math.ceil(tiles / on.processors)  # the last wave is not full
    product = m * n * k / (on.processors * on.products * on.clock) / CUBLAS
    writing = 2 * n * k / (on.cache * on.processors * on.clock)
    making = max(issued(UNPACK * n * k, on), writing)
    return product / max(filled, 0.5) + making + 2 * parts * on.launch
