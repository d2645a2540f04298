"""An operator call, as far as it decides which back end runs it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rpg_kernels._stored import StoredValues
from rpg_kernels.law.geometry import conv_output
from rpg_kernels.law.placement import parse

OPERATORS = {
    "linear": "linear",
    "linear_input_grad": "linear",
    "linear_bank_grad": "linear",
    "conv2d": "conv2d",
    "conv2d_input_grad": "conv2d",
    "conv2d_bank_grad": "conv2d",
    "embedding": "embedding",
    "embedding_bank_grad": "embedding",
    "unpack": "unpack",
    "pack": "unpack",
}  # operator -> file of that name in every back end


class Call(NamedTuple):
    """What of an operator call decides where it runs.

    Args:
        op: operator name.
        x: the operator's first tensor.
        placement: of the weight, as JSON; "" asks about calls of this kind with any weight.
        bank: that the operator reads beside x; None where it reads none, or x is the bank.
        geometry: what follows the placement; of conv2d stride, padding, dilation and groups.
        forced: the back end that was asked for by name, or "".
        operands: all of the operator's, less the back end, where the call is about to be made.

    Example:
        >>> from rpg_kernels.law.generator import Generator
        >>> from rpg_kernels.law.placement import Placement
        >>> spec = Placement(Generator(100, 8, "vector"), 0, 0, (6, 7), 1.0).to_json()
        >>> Call("linear", torch.empty(3, 5, 7, device="meta"), spec).rows
        15
    """

    op: str
    x: Tensor
    placement: str = ""
    bank: Tensor | None = None
    geometry: Sequence[Any] = ()
    forced: str = ""
    operands: Sequence[Any] = ()

    def of_any_weight(self) -> Call:
        """The question whether calls of this kind can run at all."""
        return self._replace(placement="", operands=())

    @property
    def stored(self) -> StoredValues | None:
        """The bank's values, where they are kept in fewer bytes; None where they are as they are
        used, or the call reads none."""
        values = self.x if self.bank is None else self.bank
        return values if isinstance(values, StoredValues) else None

    @property
    def device(self) -> torch.device:
        """Of all tensors of the call."""
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor."""
        return self.x.dtype

    @property
    def rows(self) -> int:
        """Rows of the product: rows of x, or output pixels of all images; 0 where x is empty."""
        x = self.x
        if not x.numel():
            return 0
        if self.op == "conv2d":
            kernel = parse(self.placement).selected_shape[2:]
            return len(x) * math.prod(conv_output(x.shape[2:], kernel, *self.geometry[:3]))
        return x.numel() // x.shape[-3 if self.op.startswith("conv2d") else -1]

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 of anything else."""
        return self.geometry[3] if self.op.startswith("conv2d") else 1

    @property
    def stride(self) -> Sequence[int]:
        """Of a convolution; 1 of anything else."""
        return self.geometry[0] if self.op.startswith("conv2d") else (1, 1)
