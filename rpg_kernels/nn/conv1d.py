"""rpg.nn.Conv1d."""

from __future__ import annotations

import torch
from torch import nn

from rpg_kernels import functional
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.convolutions import Size
from rpg_kernels.nn._convolution import Convolution


class Conv1d(Convolution, nn.Conv1d):  # type: ignore[misc]
    """torch.nn.Conv1d with a virtual weight ``[out, in/groups, k]``: ``Conv2d`` of height one.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
        padding_mode, device, dtype: as torch.nn.Conv1d; device and dtype are those of the bias
            and of a private bank, by default the bank's.
        bank, scale, virtual_weight: as of ``rpg.nn.Conv2d``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range.

    Example:
        >>> import torch, rpg_kernels as rpg
        >>> layer = rpg.nn.Conv1d(80, 32, 3, stride=2, padding=1, bank=rpg.ParameterBank(dof=1024))
        >>> layer.weight.shape, layer(torch.randn(2, 80, 100)).shape
        (torch.Size([32, 80, 3]), torch.Size([2, 32, 50]))
    """

    dense_type = nn.Conv1d
    function = functional.conv1d
    axes = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
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
