"""Convolutions of images and of sequences, and their adjoints, as calls of the same operators.

A sequence ``[B, C, L]`` is a batch of images of height one, and its kernel ``[k]`` one of
``[1, k]``: views, no copies. A transposed convolution is the operator of the input's gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg_kernels import _checks, settings
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.law.geometry import transposed_output
from rpg_kernels.ops import _library as lib

Pair = int | tuple[int, int]
Size = int | tuple[int, ...]
_op = torch.ops.rpg_kernels


def sizes(argument: str, value: Size, axes: int, low: int = 0) -> tuple[int, ...]:
    """A number of at least ``low`` for each axis, of an int or of a tuple of so many."""
    each = (value,) * axes if isinstance(value, int) else value
    if not isinstance(each, tuple | list) or len(each) != axes:
        wanted = "an int or a pair of ints" if axes == 2 else "an int or a tuple of one int"
        raise _checks.fail(argument, value, wanted)
    for number in each:
        _checks.integer(argument, number, low, _checks.INT32_MAX)
    return tuple(each)


def _of_images(argument: str, value: Size, axes: int, low: int = 0) -> tuple[int, ...]:
    """``sizes`` of two axes; ``low`` is what does nothing to an image of height one."""
    return (low,) * (2 - axes) + sizes(argument, value, axes, low)


def _images(x: Tensor, channels: int, axes: int) -> Tensor:
    """x as ``[B, C, H, W]``: without a batch one image, a sequence of height one."""
    if _checks.tensor("x", x).is_nested:
        wanted = "images of one size: [B, C, H, W], or a call for each image"
        raise _checks.fail("x", f"a nested tensor of layout {x.layout}", wanted)
    fits = x.dim() in (axes + 1, axes + 2)
    if not fits or (not _recorded() and x.shape[-1 - axes] != channels):
        image = f"{channels}, H, W]" if axes == 2 else f"{channels}, L]"
        raise _checks.fail("x", f"shape {list(x.shape)}", f"[B, {image} or [{image}")
    batched = x if x.dim() == axes + 2 else x.unsqueeze(0)
    return batched if axes == 2 else batched.unsqueeze(2)


def _like(x: Tensor, images: Tensor, axes: int) -> Tensor:
    """A result of images in the form of x. To autograd no view: it may be changed in place."""
    if x.dim() == 4:
        return images
    y = images if axes == 2 else images.squeeze(2)
    y = y if x.dim() == axes + 2 else y.squeeze(0)
    if not _recorded():
        y = torch.ops.aten._unsafe_view(images, y.shape)
    return y


def _channels(weight: VirtualWeight, groups: int, axes: int, transposed: bool) -> int:
    """How many channels the columns of a convolution's weight stand for, in all its groups."""
    if len(weight.shape) != axes + 2:
        first, second = ("in", "out") if transposed else ("out", "in")
        wanted = f"a virtual weight [{first}, {second}/groups, {'kh, kw' if axes == 2 else 'k'}]"
        raise _checks.fail("weight", f"shape {list(weight.shape)}", wanted)
    rows, columns, *_ = weight.shape
    _checks.integer("groups", groups, 1, _checks.INT32_MAX)
    if rows % groups:
        which = "in" if transposed else "out"
        raise _checks.fail("groups", groups, f"a divisor of the {rows} {which}-channels")
    return columns * groups


def convolution(
    x: Tensor,
    weight: VirtualWeight,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    axes: int,
) -> Tensor:
    """``functional.conv2d`` of two axes, ``conv1d`` of one."""
    channels = _channels(weight, groups, axes, transposed=False)
    bank, table = weight.operands()
    images = _images(x, channels, axes)
    strides = _of_images("stride", stride, axes, 1)
    dilations = _of_images("dilation", dilation, axes, 1)
    if isinstance(padding, str):
        _checks.choice("padding", padding, ("same", "valid"))
        pads: tuple[int, ...] = (0, 0)
        if padding == "same":
            if strides != (1, 1):
                raise _checks.fail("stride", strides[-axes:], "1 with padding='same'")
            kernel = (1,) * (2 - axes) + weight.shape[2:]
            images, pads = _pad_same(images, kernel, dilations)
    else:
        pads = _of_images("padding", padding, axes)
    how = (weight.image_spec, strides, pads, dilations, groups, settings.forced_backend())
    y: Tensor = _op.conv2d(images, bank, table, bias, *how)
    return _like(x, y, axes)


def transposed(
    x: Tensor,
    weight: VirtualWeight,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    dilation: Size,
    groups: int,
    axes: int,
) -> Tensor:
    """``functional.conv_transpose2d`` of two axes, ``conv_transpose1d`` of one."""
    channels = _channels(weight, groups, axes, transposed=True)
    bank, table = weight.operands()
    images = _images(x, weight.shape[0], axes)
    strides = _of_images("stride", stride, axes, 1)
    pads = _of_images("padding", padding, axes)
    more = _of_images("output_padding", output_padding, axes)
    dilations = _of_images("dilation", dilation, axes, 1)
    if any(m >= max(s, d) for m, s, d in zip(more, strides, dilations, strict=True)):
        raise _checks.fail("output_padding", output_padding, "less than the stride or the dilation")
    kernel = (1,) * (2 - axes) + weight.shape[2:]
    tracing = _recorded()
    # A recorded call keeps the sizes that it was recorded with, of which torch warns.
    batch, _, *before = [int(s) for s in images.shape] if tracing else images.shape
    size = transposed_output(before, kernel, strides, pads, more, dilations)
    if 0 in before or min(size) < 1:
        wanted = f"at least one pixel, and more than padding takes away (result: {size[-axes:]})"
        raise _checks.fail("x", f"shape {list(x.shape)}", wanted)
    kind = x.device.type
    if kind in lib.AUTOCAST and torch.is_autocast_enabled(kind):
        dtype = lib.autocast_dtype(bank, kind)
        images, bias = lib.cast(images, dtype), lib.cast(bias, dtype)
    if not tracing:
        lib.check_operand("x", images, bank)
        lib.check_bias(bias, images, bank, channels)
    # Whole strides of output padding: the convolution would have made rows and columns of them.
    beyond = [m // s for m, s in zip(more, strides, strict=True)]
    if any(beyond):
        images = F.pad(images, (0, beyond[1], 0, beyond[0]))
    how = (weight.image_spec, strides, pads, dilations, groups, settings.forced_backend())
    y: Tensor = _op.conv2d_input_grad(images, bank, table, [batch, channels, *size], *how)
    if bias is not None:
        y = y + bias.to(y.dtype).view(-1, 1, 1)
    return _like(x, y, axes)


def _recorded() -> bool:
    """Whether ``torch.jit.trace`` looks on, to which sizes are tensors."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _pad_same(
    x: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, int]]:
    """As torch: the symmetric part is left to the convolution, an odd one is padded behind."""
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    odd = [t % 2 for t in total]
    if any(odd):
        x = F.pad(x, (0, odd[1], 0, odd[0]))
    return x, (total[0] // 2, total[1] // 2)
