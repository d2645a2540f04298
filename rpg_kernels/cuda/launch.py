"""A launch: workspace, counters and stream, on the device of its operands."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rpg_kernels import native
from rpg_kernels.cuda import config, counters
from rpg_kernels.placement import Placement

# The order in which simt runs threads and blocks: 0 ascending, 1 descending, others drawn.
simt_order = 0


def ring(bank: Tensor, dtype: torch.dtype) -> Tensor:
    """The bank as kernels read it: of the dtype of x, contiguous, aligned; a copy where it must."""
    if not config.copied(bank, dtype):
        return bank
    return torch.empty_like(bank, dtype=dtype, memory_format=torch.contiguous_format).copy_(bank)


def run(
    op: str,
    p: Placement,
    plan: Any,
    batch: int,
    dtype: torch.dtype,
    operands: Sequence[Tensor | None],
) -> None:
    """Launch a kernel on the current stream of its operands' device.

    Args:
        op: operator name.
        p: the weight.
        plan: from ``config.check``.
        batch: rows of x.
        dtype: of x.
        operands: contiguous, in the kernel's order; None is null. The last is the result.
    """
    result = operands[-1]
    assert result is not None
    device = result.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        workspace = torch.empty(plan.workspace, dtype=torch.float32, device=device)
        arrived = counters.zeros(plan.counters, device)
        stream = simt_order
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device).cuda_stream
        getattr(config.kernels(config.gpu(device)), op)(
            native.layer_law(p.law),
            plan,
            native.dtype_code(dtype),
            *(0 if t is None else t.data_ptr() for t in operands),
            batch,
            p.shape[1],
            p.scale,
            workspace.data_ptr(),
            arrived.data_ptr(),
            stream,
        )
