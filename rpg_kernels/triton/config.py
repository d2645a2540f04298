"""What the Triton back end can run, and how large its tiles are.

One predicate (``unsupported``) and one heuristic (``choose``); nothing is tuned at run time.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

OPERATORS = (
    "linear",
    "linear_input_grad",
    "linear_bank_grad",
    "embedding",
    "embedding_bank_grad",
    "unpack",
    "pack",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET asks for the interpreter, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def unsupported(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why an operator call cannot run here, or "".

    Triton is not imported to answer this.

    Args:
        op: operator name.
        device, dtype: of the call's first tensor.

    Example:
        >>> unsupported("conv2d", torch.device("cuda"), torch.float16)
        'the Triton back end has no kernel for conv2d'
    """
    if op not in OPERATORS:
        return f"the Triton back end has no kernel for {op}"
    if dtype not in _DTYPES:
        return f"the Triton kernels compute in float32, bfloat16 and float16, not in {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        if device.type != "cpu":
            return "TRITON_INTERPRET=1 runs the Triton kernels on CPU tensors only"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes wrongly in bfloat16, without a warning"
        return ""
    if device.type != "cuda" or torch.version.cuda is None:
        return "the Triton kernels need a CUDA device, or TRITON_INTERPRET=1"
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "the Triton kernels need a GPU of compute capability 8.0 or later"
    return ""


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters of one kernel. Printable.

    Args:
        block_m, block_n, block_k: of the batch, the rows and the columns of the virtual matrix.
        warps: per program.
        stages: of the software pipeline.
        group: row tiles of the batch that neighbouring programs share a weight tile for.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8


def _power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two from low to high that is at least size, or high."""
    return min(high, max(low, 1 << max(0, size - 1).bit_length()))


def _columns(block: int, low_precision: bool) -> int:
    """Columns of a tile: a part of one block from 16 elements on, otherwise several blocks."""
    if block < 16:
        return 32
    return min(block, 64 if low_precision else 32)


def _without_product(m: int, n: int, block: int) -> Config:
    """Tiles of 2048 weights, whose columns lie in one block from 8 elements on."""
    block_k = min(block, 64) if block >= 8 else 32
    rows = 2048 // block_k
    return Config(_power_of_two(m, 1, rows), _power_of_two(n, 1, rows), block_k, 4, 1)


def products_read_shared(device: torch.device) -> bool:
    """Whether tensor cores take both operands from shared memory: wgmma, tcgen05, not mma.sync."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def choose(
    op: str, m: int, n: int, k: int, block: int, dtype: torch.dtype, shared: bool = True
) -> Config:
    """The configuration of a call by its sizes.

    Args:
        op: operator name.
        m, n, k: batch, rows and columns of the product.
        block: elements per block of the layer.
        dtype: that the product is computed in.
        shared: see products_read_shared.

    Example:
        >>> choose("linear", 4096, 4096, 4096, 64, torch.float16)
        Config(block_m=128, block_n=128, block_k=64, warps=8, stages=3, group=8)
    """
    if op in ("embedding", "embedding_bank_grad", "unpack", "pack"):
        return _without_product(m, n, block)
    low = dtype.itemsize == 2
    block_k = _columns(block, low)
    largest = 128 if low else 64  # fp32 products without tf32 run on the plain units
    if op == "linear":
        block_m = _power_of_two(m, 16, largest)
        block_n = _power_of_two(n, 16, 64 if block_m < 64 else largest)
    elif op == "linear_input_grad":
        block_m = _power_of_two(m, 16, largest)
        # Longer steps halve what addresses and the loop cost, where registers allow it.
        block_n = _power_of_two(n, 16, (128 if shared and block_m > 64 else 64) if low else 32)
    else:  # the batch is what this product sums over
        block_m = _power_of_two(m, 16, 64 if low else 32)
        block_n = _power_of_two(n, 16, largest)
    warps = 8 if block_m * block_n >= 128 * 128 and op == "linear" else 4
    return Config(block_m, block_n, block_k, warps, 3 if block_m >= 64 else 4)


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's input_precision: TF32 only where torch's own switch allows it."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
