"""A launch: workspace, counters and stream, on the device of its operands."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rpg_kernels import native
from rpg_kernels.backends.cuda import counters, rules
from rpg_kernels.law.placement import Placement

# The order in which simt runs threads and CTAs: 0 ascending, 1 descending, others drawn.
simt_order = 0


def ring(bank: Tensor, dtype: torch.dtype) -> Tensor:
    """The bank as kernels read it: of the dtype of x, contiguous, aligned; a copy where it must."""
    if not rules.copied(bank, dtype):
        return bank
    return torch.empty_like(bank, dtype=dtype, memory_format=torch.contiguous_format).copy_(bank)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _stream(device: torch.device) -> int:
    """The current stream; for simt the order of threads."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else simt_order


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def run(
    op: str,
    p: Placement,
    plan: Any,
    batch: int,
    dtype: torch.dtype,
    operands: Sequence[Tensor | None],
) -> None:
    """Launch a product on the current stream of its operands' device.

    Args:
        op: operator name.
        p: the weight.
        plan: of these rows, from ``rules.check``.
        batch: rows of x, all or one of the parts that ``rules.check`` names.
        dtype: of x.
        operands: contiguous, in the kernel's order; None is null. The last is the result.
    """
    result = operands[-1]
    assert result is not None
    device = result.device
    with _on(device):
        workspace = torch.empty(plan.workspace, dtype=torch.float32, device=device)
        arrived = counters.zeros(plan.counters, device)
        try:
            getattr(rules.kernels(rules.gpu(device)), op)(
                native.layer_law(p.law),
                plan,
                native.dtype_code(dtype),
                *map(_address, operands),
                batch,
                p.shape[1],
                p.scale,
                workspace.data_ptr(),
                arrived.data_ptr(),
                _stream(device),
            )
        except BaseException:
            counters.forget(device)
            raise


def move(op: str, p: Placement, source: Tensor, result: Tensor) -> None:
    """Launch unpack or pack: from ``source``, contiguous, to ``result``."""
    device = source.device
    with _on(device):
        getattr(rules.kernels(rules.gpu(device)), op)(
            native.layer_law(p.law),
            native.dtype_code(source.dtype),
            source.data_ptr(),
            result.data_ptr(),
            p.shape[1],
            p.scale,
            _stream(device),
        )
