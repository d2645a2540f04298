"""rpg.nn.Conv2d."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpg_kernels import _checks, functional
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.functional import Pair, pair
from rpg_kernels.law.geometry import MAX_ROWS
from rpg_kernels.law.unit import UNIT_LAW
from rpg_kernels.nn._layer import VirtualLayer
from rpg_kernels.nn.part import as_leaf, is_traced

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def taps_with_stride(bank: ParameterBank, stride: tuple[int, int]) -> int | None:
    """What ``ParameterBank.place`` is asked for: 1 of strided convolutions, else the bank's choice.

    Taps share products where one pixel is read by both. With a stride that is so only of taps whose
    offsets differ by whole strides, so their units would share little.

    Example:
        >>> bank = ParameterBank(4096, laps=4)
        >>> taps_with_stride(bank, (2, 2)), taps_with_stride(bank, (1, 1))
        (1, None)
    """
    return 1 if bank.generator.law == UNIT_LAW and stride != (1, 1) else None


class Conv2d(VirtualLayer, nn.Conv2d):  # type: ignore[misc]
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

    rpg_operator = "conv2d"
    dense_type = nn.Conv2d

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
        nn.Module.__init__(self)
        _checks.integer("in_channels", in_channels, 1, MAX_ROWS)
        _checks.integer("out_channels", out_channels, 1, MAX_ROWS)
        _checks.integer("groups", groups, 1, MAX_ROWS)
        if in_channels % groups or out_channels % groups:
            wanted = f"a divisor of in_channels {in_channels} and out_channels {out_channels}"
            raise _checks.fail("groups", groups, wanted)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair("kernel_size", kernel_size, 1)
        self.stride = pair("stride", stride, 1)
        self.padding = padding if isinstance(padding, str) else pair("padding", padding)
        self.dilation = pair("dilation", dilation, 1)
        self.groups = groups
        self.padding_mode = cast(Any, _checks.choice("padding_mode", padding_mode, PADDING_MODES))
        if isinstance(self.padding, str):
            _checks.choice("padding", self.padding, ("same", "valid"))
            if self.padding == "same" and self.stride != (1, 1):
                raise _checks.fail("stride", self.stride, "1 with padding='same'")
        self.transposed, self.output_padding = False, (0, 0)
        self._reversed_padding_repeated_twice = self._explicit_padding()
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        taps = taps_with_stride(bank, self.stride) if isinstance(bank, ParameterBank) else None
        self._place(shape, bank, virtual_weight, scale, device, dtype, taps=taps)
        if bias:
            self._make_bias(out_channels, device, dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """``[B, C, H, W]`` or ``[C, H, W]`` -> the same with out channels and H', W'."""
        if self._buffers["weight"] is not None:
            self._refuse_buffer()
        if is_traced(input):
            return cast(Tensor, as_leaf(self, input))
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._explicit_padding(), mode=self.padding_mode)
            padding = (0, 0)
        stride, dilation = cast(Any, self.stride), cast(Any, self.dilation)
        return functional.conv2d(
            input, self.virtual_weight, self.bias, stride, cast(Any, padding), dilation, self.groups
        )

    def _explicit_padding(self) -> list[int]:
        """[left, right, top, bottom], for the modes that a convolution does not know."""
        if self.padding == "valid":
            return [0, 0, 0, 0]
        sides = []
        for i in (1, 0):
            if isinstance(self.padding, str):
                total = self.dilation[i] * (self.kernel_size[i] - 1)
                sides += [total // 2, total - total // 2]
            else:
                sides += [self.padding[i], self.padding[i]]
        return sides

    def extra_repr(self) -> str:
        """Geometry, bias, number of the layer and scale."""
        p = self.virtual_weight.placement
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding!r}"
        )
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        where = f"layer={p.layer}, scale={self.virtual_weight.scale:.4g}"
        return f"{text}, bias={self.bias is not None}, {where}"
