"""What torch's own dense products have of the processor, which the compiled kernels are held to."""

from __future__ import annotations

import platform
from functools import lru_cache

import torch

DOT_GAIN = 2.0  # of dot products: twice as many multiplications as instructions of fp32 have
TILE_GAIN = 16.0  # of products of tiles (AMX)


@lru_cache(maxsize=8)
def dense_gain(dtype: torch.dtype) -> float:
    """How many times as fast as in float32 torch multiplies dense matrices of a dtype, at most.

    By the instructions that oneDNN finds, not by a measurement: 1 where there are none for the
    dtype, and products are converted or emulated; 2 for dot products, 16 for products of tiles.

    Example:
        >>> dense_gain(torch.float32)
        1.0
    """
    if dtype == torch.float32:
        return 1.0
    if _has("_is_amx_fp16_supported" if dtype == torch.float16 else "_is_amx_tile_supported"):
        return TILE_GAIN
    probe = f"_is_mkldnn_{'fp16' if dtype == torch.float16 else 'bf16'}_supported"
    able = getattr(torch.ops.mkldnn, probe, None) if torch.backends.mkldnn.is_available() else None
    if able is None or not able():
        return 1.0
    if platform.machine() not in ("x86_64", "AMD64"):
        return 4.0  # Arm: products of 2 x 4 by 4 x 2
    # oneDNN calls bfloat16 supported wherever AVX-512 can emulate it.
    has_dots = dtype == torch.float16 or _has("_is_avx512_bf16_supported")
    return DOT_GAIN if has_dots else 1.0


def _has(probe: str) -> bool:
    ask = getattr(torch.cpu, probe, None)
    return ask is not None and bool(ask())
