"""rpg.nn.ConvTranspose1d."""

from __future__ import annotations

import torch
from torch import nn

from rpg_kernels import functional
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.convolutions import Size
from rpg_kernels.nn._convolution import TransposedConvolution


class ConvTranspose1d(TransposedConvolution, nn.ConvTranspose1d):  # type: ignore[misc]
    """torch.nn.ConvTranspose1d with a virtual weight ``[in, out/groups, k]``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
        dilation, padding_mode, device, dtype: as torch.nn.ConvTranspose1d, which pads with zeros
            only; device and dtype are those of the bias and of a private bank, by default the
            bank's.
        bank, scale, virtual_weight: as of ``rpg.nn.ConvTranspose2d``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range.

    Example:
        >>> import torch, rpg_kernels as rpg
        >>> layer = rpg.nn.ConvTranspose1d(32, 16, 4, stride=2, bank=rpg.ParameterBank(dof=1024))
        >>> layer.weight.shape, layer(torch.randn(2, 32, 8)).shape
        (torch.Size([32, 16, 4]), torch.Size([2, 16, 18]))
    """

    dense_type = nn.ConvTranspose1d
    function = functional.conv_transpose1d
    axes = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
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
