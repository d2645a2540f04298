"""torch's own functions, called with a virtual weight: those that need no Ŵ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg_kernels import settings
from rpg_kernels.bank.tensor_like import FUSED, TensorLike, TransposedWeight
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.functional import (
    conv1d,
    conv2d,
    conv_transpose1d,
    conv_transpose2d,
    embedding,
    linear,
)

_op = torch.ops.rpg_kernels


def _fused_linear(input: object, weight: object, bias: Tensor | None = None) -> Any:
    x = input
    if not isinstance(x, Tensor) or isinstance(bias, TensorLike):
        return NotImplemented
    if isinstance(weight, TransposedWeight):
        y = _fused_matmul(x, weight.base)
        return y if bias is None or y is NotImplemented else y + bias
    return linear(x, weight, bias) if isinstance(weight, VirtualWeight) else NotImplemented


def _fused_matmul(input: object, other: object, *, out: object = None) -> Any:
    """Where one factor is a virtual matrix or its transpose, and the other an ordinary tensor."""
    a, b = input, other
    if out is not None:
        return NotImplemented
    if isinstance(a, TensorLike) and isinstance(b, Tensor) and a.ndim == 2 and b.dim() > 0:
        if b.dim() == 1:
            return _fused_matmul(b, a.t())
        return _fused_matmul(b.mT, a.t()).mT
    if isinstance(b, TransposedWeight):
        return _fused_linear(a, b.base)
    if not isinstance(a, Tensor) or not isinstance(b, VirtualWeight) or b.ndim != 2:
        return NotImplemented
    kind = a.device.type
    if torch.is_autocast_enabled(kind) and a.dtype.is_floating_point:
        a = a.to(torch.get_autocast_dtype(kind))
    bank, table = b.operands()
    y: Tensor = _op.linear_input_grad(a, bank, table, b.spec, settings.forced_backend())
    return y


def _fused_mm(input: object, mat2: object, *, out: object = None) -> Any:
    return _fused_matmul(input, mat2, out=out)


def _fused_rmatmul(b: object, a: object) -> object:
    return _fused_matmul(a, b)


def _fused_convolution(function: Callable[..., Tensor], axes: int) -> Callable[..., object]:
    """A convolution whose geometry is written in numbers, or in as many as it has axes."""

    def fused(
        input: object, weight: object, bias: Tensor | None = None, *rest: Any, **named: Any
    ) -> object:
        x, geometry = input, (*rest, *named.values())
        plain = all(isinstance(value, int | str) or len(value) == axes for value in geometry)
        if not isinstance(x, Tensor) or not isinstance(weight, VirtualWeight) or not plain:
            return NotImplemented
        return function(x, weight, bias, *rest, **named)

    return fused


def _fused_embedding(
    input: object,
    weight: object,
    padding_idx: int | None = None,
    *rest: object,
    **options: object,
) -> object:
    indices = input
    plain = not any(rest) and not any(v for k, v in options.items() if k != "norm_type")
    if not isinstance(indices, Tensor) or not isinstance(weight, VirtualWeight) or not plain:
        return NotImplemented
    return embedding(indices, weight, padding_idx)


FUSED.update(
    {
        F.linear: _fused_linear,
        F.conv1d: _fused_convolution(conv1d, 1),
        F.conv2d: _fused_convolution(conv2d, 2),
        F.conv_transpose1d: _fused_convolution(conv_transpose1d, 1),
        F.conv_transpose2d: _fused_convolution(conv_transpose2d, 2),
        F.embedding: _fused_embedding,
        Tensor.__rmatmul__: _fused_rmatmul,
        torch.mm: _fused_mm,
        Tensor.mm: _fused_mm,
        **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _fused_matmul),
    }
)
