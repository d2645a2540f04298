"""torch.nn.functional's signatures with a VirtualWeight in place of the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rpg_kernels import _checks, ops, settings
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.convolutions import Pair, Size, convolution, transposed

__all__ = [
    "conv1d",
    "conv2d",
    "conv_transpose1d",
    "conv_transpose2d",
    "embedding",
    "linear",
    "pack",
    "unpack",
]

_op = torch.ops.rpg_kernels
assert ops  # importing it registers the operators


def linear(x: Tensor, weight: VirtualWeight, bias: Tensor | None = None) -> Tensor:
    """y = x · Ŵᵀ + bias.

    Args:
        x: ``[..., K]`` in the bank's dtype; bfloat16 or float16 also beside a float32 bank, and
            the product is then computed in x's dtype (autocast casts x for you). A nested tensor
            of the jagged layout may be ragged in any dimension but the last.
        weight: virtual weight ``[N, K]``.
        bias: ``[N]`` or None, in x's or the bank's dtype.

    Returns:
        ``[..., N]`` in x's dtype. Saves x and refers to the bank for the backward, nothing else.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong.
        RuntimeError: the scratch limit or a forced back end does not allow the call.

    Example:
        >>> from rpg_kernels import ParameterBank
        >>> weight = ParameterBank(dof=256, granularity=16).place((30, 20))
        >>> linear(torch.randn(4, 20), weight).shape
        torch.Size([4, 30])
    """
    bank, table = _checked(weight).operands()
    _checks.tensor("x", x)
    if x.is_nested:
        return _jagged("x", x, lambda values: linear(values, weight, bias))
    return _tensor(_op.linear(x, bank, table, bias, weight.spec, settings.forced_backend()))


def conv2d(
    x: Tensor,
    weight: VirtualWeight,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Two-dimensional cross-correlation of x with Ŵ.

    Args:
        x: ``[B, C, H, W]`` or ``[C, H, W]``; dtype as in ``linear``.
        weight: virtual weight ``[out, C/groups, kh, kw]``.
        bias: ``[out]`` or None.
        stride, padding, dilation: an int or a pair; padding also ``"same"`` (stride 1 only) or
            ``"valid"``.
        groups: divides C and out.

    Returns:
        ``[B, out, H', W']`` (or without B) in x's dtype and memory format.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong.
        RuntimeError: the scratch limit or a forced back end does not allow the call.

    Example:
        >>> from rpg_kernels import ParameterBank
        >>> weight = ParameterBank(dof=256, granularity=16).place((8, 3, 3, 3))
        >>> conv2d(torch.randn(2, 3, 9, 9), weight, padding="same").shape
        torch.Size([2, 8, 9, 9])
    """
    return convolution(x, _checked(weight), bias, stride, padding, dilation, groups, 2)


def conv1d(
    x: Tensor,
    weight: VirtualWeight,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """``conv2d`` of sequences, which are images of height one to the operators: views, no copies.

    Args:
        x: ``[B, C, L]`` or ``[C, L]``.
        weight: virtual weight ``[out, C/groups, k]``.
        bias, stride, padding, dilation, groups: as in ``conv2d``, of one axis.

    Returns:
        ``[B, out, L']`` (or without B) in x's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as ``conv2d``.

    Example:
        >>> from rpg_kernels import ParameterBank
        >>> weight = ParameterBank(dof=256, granularity=16).place((8, 3, 5))
        >>> conv1d(torch.randn(2, 3, 9), weight, stride=2).shape
        torch.Size([2, 8, 3])
    """
    return convolution(x, _checked(weight), bias, stride, padding, dilation, groups, 1)


def conv_transpose2d(
    x: Tensor,
    weight: VirtualWeight,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    output_padding: Pair = 0,
    groups: int = 1,
    dilation: Pair = 1,
) -> Tensor:
    """The adjoint of ``conv2d`` by its input: what ``conv2d_input_grad`` computes, and a bias.

    Args:
        x: ``[B, C, H, W]`` or ``[C, H, W]``; dtype as in ``linear``.
        weight: virtual weight ``[C, out/groups, kh, kw]``.
        bias: ``[out]`` or None.
        stride, padding, dilation: of that convolution; an int or a pair.
        output_padding: rows and columns more at the bottom and at the right, below the stride or
            the dilation; an int or a pair.
        groups: divides C and out.

    Returns:
        ``[B, out, H', W']`` (or without B) in x's dtype and memory format, where
        ``H' = (H - 1) * stride - 2 * padding + dilation * (kh - 1) + output_padding + 1``.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong.
        RuntimeError: the scratch limit or a forced back end does not allow the call.

    Example:
        >>> from rpg_kernels import ParameterBank
        >>> weight = ParameterBank(dof=256, granularity=16).place((8, 3, 4, 4))
        >>> conv_transpose2d(torch.randn(2, 8, 7, 7), weight, stride=2, padding=1).shape
        torch.Size([2, 3, 14, 14])
    """
    how = (stride, padding, output_padding, dilation)
    return transposed(x, _checked(weight), bias, *how, groups, 2)


def conv_transpose1d(
    x: Tensor,
    weight: VirtualWeight,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """``conv_transpose2d`` of ``[B, C, L]`` or ``[C, L]`` with a weight ``[C, out/groups, k]``.

    Example:
        >>> from rpg_kernels import ParameterBank
        >>> weight = ParameterBank(dof=256, granularity=16).place((8, 3, 4))
        >>> conv_transpose1d(torch.randn(2, 8, 7), weight, stride=2, padding=1).shape
        torch.Size([2, 3, 14])
    """
    how = (stride, padding, output_padding, dilation)
    return transposed(x, _checked(weight), bias, *how, groups, 1)


def embedding(indices: Tensor, weight: VirtualWeight, padding_idx: int | None = None) -> Tensor:
    """Rows of Ŵ.

    Args:
        indices: int32 or int64, any shape, values from 0 to rows - 1; also a nested tensor of
            the jagged layout.
        weight: virtual weight ``[rows, dim]``.
        padding_idx: a row that reads as zeros and gets no gradient; negative counts from the
            end. (torch keeps such a row in the table and initialises it to zero; a virtual row
            has no storage of its own, so it is masked.)

    Returns:
        ``[*indices.shape, dim]`` in the bank's dtype.

    Raises:
        TypeError, ValueError: an argument's type, shape or device is wrong.
        IndexError: an index, on CPU, is out of range. On CUDA the device asserts, as in torch.

    Example:
        >>> from rpg_kernels import ParameterBank
        >>> weight = ParameterBank(dof=256, granularity=16).place((10, 32))
        >>> embedding(torch.tensor([[1, 2], [9, 0]]), weight).shape
        torch.Size([2, 2, 32])
    """
    bank, table = _checked(weight).operands()
    if _checks.tensor("indices", indices).is_nested:
        return _jagged("indices", indices, lambda values: embedding(values, weight, padding_idx))
    y = _tensor(_op.embedding(bank, table, indices, weight.spec, settings.forced_backend()))
    if padding_idx is None:
        return y
    rows = weight.shape[0]
    _checks.integer("padding_idx", padding_idx, -rows, rows - 1)
    return y.masked_fill((indices == padding_idx % rows).unsqueeze(-1), 0)


def unpack(weight: VirtualWeight) -> Tensor:
    """Ŵ = scale · G · w as a dense tensor, for people and for export.

    Args:
        weight: virtual weight.

    Returns:
        torch's layout, scale included, the bank's dtype. Differentiable: its gradient is pack.

    Example:
        >>> from rpg_kernels import ParameterBank
        >>> unpack(ParameterBank(dof=256, granularity=16).place((10, 32))).shape
        torch.Size([10, 32])
    """
    return _checked(weight).unpack()


def pack(dense: Tensor, weight: VirtualWeight) -> Tensor:
    """The exact adjoint of unpack: scale · Gᵀ · dŴ.

    Args:
        dense: a tensor of the virtual weight's shape, in the bank's dtype (or in bfloat16 or
            float16 beside a float32 bank). Accumulated in float32 (float64 for float64).
        weight: virtual weight.

    Returns:
        ``[slots, granularity]`` in the bank's dtype. Differentiable: its gradient is unpack.

    Raises:
        TypeError, ValueError: the tensor's shape, dtype or device is wrong.

    Example:
        >>> from rpg_kernels import ParameterBank
        >>> weight = ParameterBank(dof=256, granularity=16).place((10, 32))
        >>> pack(torch.ones(10, 32), weight).shape
        torch.Size([16, 16])
    """
    return _checked(weight).pack(dense)


def _jagged(argument: str, nested: Any, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A nested tensor of the function's rows, with the offsets of the one that is given."""
    if nested.layout != torch.jagged:
        got = "a nested tensor of the strided layout"
        wanted = "one made with layout=torch.jagged, or a dense tensor"
        raise _checks.fail(argument, got, wanted)
    ragged = nested._ragged_idx
    if argument == "x" and ragged == nested.dim() - 1:
        got = f"a nested tensor that is ragged in its last dimension, {ragged}"
        raise _checks.fail(argument, got, "a last dimension of one size, the weight's columns")
    values, offsets, lengths = nested.values(), nested.offsets(), nested.lengths()
    return torch.nested.nested_tensor_from_jagged(
        function(values), offsets, lengths, jagged_dim=ragged
    )


def _checked(weight: object) -> VirtualWeight:
    if not isinstance(weight, VirtualWeight):
        raise TypeError(f"weight: got a {type(weight).__name__}, wanted a VirtualWeight")
    return weight


def _tensor(result: object) -> Tensor:
    assert isinstance(result, Tensor)
    return result
