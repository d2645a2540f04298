"""rpg.nn.ConvTranspose2d."""

from __future__ import annotations

import torch
from torch import nn

from rpg_kernels import functional
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.convolutions import Pair
from rpg_kernels.nn._convolution import TransposedConvolution


class ConvTranspose2d(TransposedConvolution, nn.ConvTranspose2d):  # type: ignore[misc]
    """torch.nn.ConvTranspose2d with a virtual weight ``[in, out/groups, kh, kw]``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
        dilation, padding_mode, device, dtype: as torch.nn.ConvTranspose2d, which pads with zeros
            only; device and dtype are those of the bias and of a private bank, by default the
            bank's.
        bank: shared parameter bank; None makes a private one with room for every weight.
        scale: the layer's multiplier, or the rule for its standard deviation at initialisation:
            ``"match"`` (torch.nn.ConvTranspose2d's), ``"fan_in"``, ``"fan_out"``. Fans are those of
            torch: in is what the weight has second, out what it has first.
        virtual_weight: use this one (tied weights) instead of placing a new one.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range.

    Example:
        >>> import torch, rpg_kernels as rpg
        >>> bank = rpg.ParameterBank(dof=1024)
        >>> layer = rpg.nn.ConvTranspose2d(32, 16, 3, stride=2, padding=1, bank=bank)
        >>> x = torch.randn(2, 32, 8, 8)
        >>> layer.weight.shape, layer(x).shape, layer(x, output_size=(16, 16)).shape
        (torch.Size([32, 16, 3, 3]), torch.Size([2, 16, 15, 15]), torch.Size([2, 16, 16, 16]))
    """

    dense_type = nn.ConvTranspose2d
    function = functional.conv_transpose2d
    axes = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        output_padding: Pair = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Pair = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bank: ParameterBank | None = None,
        scale: float | str = "match",
        virtual_weight: VirtualWeight | None = None,
    ) -> None:
        how = (stride, padding, dilation, groups, padding_mode, output_padding)
        shape = self._set_up(in_channels, out_channels, kernel_size, *how)
        self._fill(shape, bias, device, dtype, bank, scale, virtual_weight)
