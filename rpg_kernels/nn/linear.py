"""rpg.nn.Linear."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from rpg_kernels import _checks, functional
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.law.geometry import MAX_ROWS
from rpg_kernels.nn._layer import VirtualLayer
from rpg_kernels.nn.part import as_leaf, is_traced


class Linear(VirtualLayer, nn.Linear):  # type: ignore[misc]
    """y = x · Ŵᵀ + bias: torch.nn.Linear with a virtual weight ``[out_features, in_features]``.

    Args:
        in_features, out_features: K and N.
        bias: False for none.
        device, dtype: of the bias and of a private bank; by default the bank's.
        bank: shared parameter bank; None makes a private one with room for every weight.
        scale: the layer's multiplier, or the rule for its standard deviation at initialisation:
            ``"match"`` (torch.nn.Linear's), ``"fan_in"``, ``"fan_out"``.
        virtual_weight: use this one (tied weights) instead of placing a new one.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range.

    Example:
        >>> import torch, rpg_kernels as rpg
        >>> bank = rpg.ParameterBank(dof=1024)
        >>> layer = rpg.nn.Linear(100, 30, bank=bank)
        >>> layer(torch.randn(2, 100)).shape
        torch.Size([2, 30])
    """

    rpg_operator = "linear"
    dense_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bank: ParameterBank | None = None,
        scale: float | str = "match",
        virtual_weight: VirtualWeight | None = None,
    ) -> None:
        nn.Module.__init__(self)
        _checks.integer("in_features", in_features, 1, MAX_ROWS)
        _checks.integer("out_features", out_features, 1, MAX_ROWS)
        self.in_features = in_features
        self.out_features = out_features
        shape = (out_features, in_features)
        self._place(shape, bank, virtual_weight, scale, device, dtype)
        if bias:
            self._make_bias(out_features, device, dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        if self._buffers["weight"] is not None:
            self._refuse_buffer()
        if is_traced(input):
            return cast(Tensor, as_leaf(self, input))
        return functional.linear(input, self.virtual_weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes, bias, number of the layer and scale."""
        p = self.virtual_weight.placement
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, layer={p.layer}, scale={self.virtual_weight.scale:.4g}"
        )
