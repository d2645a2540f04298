"""What the layers of convolutions share: geometry, padding modes, and what repr says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpg_kernels import _checks
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.convolutions import Size, sizes
from rpg_kernels.law.geometry import MAX_ROWS, transposed_output
from rpg_kernels.law.unit import UNIT_LAW
from rpg_kernels.nn._layer import VirtualLayer
from rpg_kernels.nn.part import as_leaf, is_traced

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def taps_with_stride(bank: ParameterBank, stride: Sequence[int]) -> int | None:
    """What ``ParameterBank.place`` is asked for: 1 of strided convolutions, else the bank's choice.

    Taps share products where one pixel is read by both. With a stride that is so only of taps whose
    offsets differ by whole strides, so their units would share little.

    Example:
        >>> bank = ParameterBank(4096, laps=4)
        >>> taps_with_stride(bank, (2, 2)), taps_with_stride(bank, (1, 1))
        (1, None)
    """
    return 1 if bank.generator.law == UNIT_LAW and max(stride) > 1 else None


class ConvolutionLayer(VirtualLayer):
    """Base of convolutions and of transposed ones, with the attributes of torch's layers."""

    axes: ClassVar[int]  # of an image two, of a sequence one
    function: ClassVar[Callable[..., Tensor]]  # of rpg_kernels.functional

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    padding_mode: Any

    def _set_up(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        padding: Size | str,
        dilation: Size,
        groups: int,
        padding_mode: str,
        output_padding: Size | None = None,
    ) -> tuple[int, ...]:
        """Check and keep a geometry, of a transposed one output padding too; the weight's shape."""
        nn.Module.__init__(self)
        axes, transposed = self.axes, output_padding is not None
        _checks.integer("in_channels", in_channels, 1, MAX_ROWS)
        _checks.integer("out_channels", out_channels, 1, MAX_ROWS)
        _checks.integer("groups", groups, 1, MAX_ROWS)
        if in_channels % groups or out_channels % groups:
            wanted = f"a divisor of in_channels {in_channels} and out_channels {out_channels}"
            raise _checks.fail("groups", groups, wanted)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = sizes("kernel_size", kernel_size, axes, 1)
        self.stride = sizes("stride", stride, axes, 1)
        if isinstance(padding, str) and not transposed:
            self.padding = _checks.choice("padding", padding, ("same", "valid"))
            if padding == "same" and max(self.stride) > 1:
                raise _checks.fail("stride", self.stride, "1 with padding='same'")
        else:
            self.padding = sizes("padding", cast(Size, padding), axes)
        self.dilation = sizes("dilation", dilation, axes, 1)
        self.transposed = transposed
        self.output_padding = sizes("output_padding", output_padding or 0, axes)
        self.groups = groups
        modes = ("zeros",) if transposed else _PADDING_MODES
        self.padding_mode = _checks.choice("padding_mode", padding_mode, modes)
        self._reversed_padding_repeated_twice = self._explicit_padding()
        rows, columns = (in_channels, out_channels) if transposed else (out_channels, in_channels)
        return (rows, columns // groups, *self.kernel_size)

    def _fill(
        self,
        shape: tuple[int, ...],
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        bank: ParameterBank | None,
        scale: float | str,
        virtual_weight: VirtualWeight | None,
    ) -> None:
        """Weight and bias."""
        taps = taps_with_stride(bank, self.stride) if isinstance(bank, ParameterBank) else None
        self._place(shape, bank, virtual_weight, scale, device, dtype, taps=taps)
        if bias:
            self._make_bias(self.out_channels, device, dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _explicit_padding(self) -> list[int]:
        """[left, right, top, bottom], for the modes that a convolution does not know."""
        if self.padding == "valid":
            return [0, 0] * self.axes
        sides = []
        for i in reversed(range(self.axes)):
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
        if max(self.output_padding) > 0:
            text += f", output_padding={self.output_padding}"
        if max(self.dilation) > 1:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        where = f"layer={p.layer}, scale={self.virtual_weight.scale:.4g}"
        return f"{text}, bias={self.bias is not None}, {where}"


class Convolution(ConvolutionLayer):
    """A convolution, which pads in torch's modes."""

    rpg_operator = "conv2d"

    def forward(self, input: Tensor) -> Tensor:
        """A batch or one image (sequence) -> the same with out channels and other sizes."""
        if self._buffers["weight"] is not None:
            self._refuse_buffer()
        if is_traced(input):
            return cast(Tensor, as_leaf(self, input))
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._explicit_padding(), mode=self.padding_mode)
            padding = (0,) * self.axes
        how = (self.stride, padding, self.dilation, self.groups)
        return type(self).function(input, self.virtual_weight, self.bias, *how)


class TransposedConvolution(ConvolutionLayer):
    """The adjoint of a convolution by its input."""

    rpg_operator = "conv2d_input_grad"

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """A batch or one image (sequence) -> the same with out channels and other sizes.

        Args:
            input: ``[B, C, H, W]`` or ``[C, H, W]``; of sequences ``[B, C, L]`` or ``[C, L]``.
            output_size: H' and W', or the whole shape; it takes the place of ``output_padding``.
        """
        if self._buffers["weight"] is not None:
            self._refuse_buffer()
        if is_traced(input):
            wanted = () if output_size is None else (output_size,)
            return cast(Tensor, as_leaf(self, input, *wanted))
        more = self.output_padding if output_size is None else self._reaching(input, output_size)
        how = (self.stride, self.padding, more, self.groups, self.dilation)
        return type(self).function(input, self.virtual_weight, self.bias, *how)

    def _reaching(self, x: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """The output padding that leads to a size."""
        axes = self.axes
        wanted = list(output_size)
        if len(wanted) == x.dim():
            wanted = wanted[-axes:]
        if len(wanted) != axes:
            raise _checks.fail(
                "output_size", list(output_size), f"{axes} of x's {x.dim()} sizes, or all of them"
            )
        none = (0,) * axes
        padding = cast(tuple[int, ...], self.padding)
        geometry = (self.kernel_size, self.stride, padding, none, self.dilation)
        least = transposed_output(x.shape[-axes:], *geometry)
        most = [low + step - 1 for low, step in zip(least, self.stride, strict=True)]
        if any(not a <= w <= b for a, w, b in zip(least, wanted, most, strict=True)):
            raise _checks.fail("output_size", wanted, f"sizes from {least} to {most}")
        return tuple(w - low for w, low in zip(wanted, least, strict=True))
