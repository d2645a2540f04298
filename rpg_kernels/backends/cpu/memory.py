"""Memory that the compiled CPU kernels work in."""

from __future__ import annotations

import torch

_ALIGNMENT = 64  # bytes: a cache line


def workspace(size: int) -> torch.Tensor:
    """uint8 ``[at least size]`` on the CPU, aligned as the kernels want it."""
    memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device="cpu")
    return memory[-memory.data_ptr() % _ALIGNMENT :]
