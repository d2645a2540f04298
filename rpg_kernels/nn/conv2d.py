"""rpg.nn.Conv2d."""

from __future__ import annotations

import torch
from torch import nn

from rpg_kernels import functional
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.convolutions import Pair
from rpg_kernels.nn._convolution import Convolution


class Conv2d(Convolution, nn.Conv2d):  # type: ignore[misc]
    """torch.nn.Conv2d with a virtual weight ``[out, in/groups, kh, kw]``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
        padding_mode, device, dtype: as torch.nn.Conv2d; device and dtype are those of the bias
            and of a private bank, by default the bank's.
        bank: shared parameter bank; None makes a private one with room for every weight.
        scale: the layer's multiplier, or the rule for its standard deviation at initialisation:
            ``"match"`` (torch.nn.Conv2d's), ``"fan_in"``, ``"fan_out"`` (the paper's).
        virtual_weight: use this one (tied weights) instead of placing a new one. Where a new one
            is placed on a bank with laps, its units have one tap if the convolution is strided.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range.

    Example:
        >>> import torch, rpg_kernels as rpg
        >>> layer = rpg.nn.Conv2d(16, 32, 3, padding=1, bank=rpg.ParameterBank(dof=1024))
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    dense_type = nn.Conv2d
    function = functional.conv2d
    axes = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bank: ParameterBank | None = None,
        scale: float | str = "match",
        virtual_weight: VirtualWeight | None = None,
    ) -> None:
        how = (stride, padding, dilation, groups, padding_mode)
        shape = self._set_up(in_channels, out_channels, kernel_size, *how)
        self._fill(shape, bias, device, dtype, bank, scale, virtual_weight)
