"""The network as published: explicit tables, every weight materialised (paper, section 3).

Each shared layer keeps an int64 index and a float32 sign per weight. The forward gathers its whole
weight from the ring, multiplies it by the signs and the layer's scale, and calls the ordinary
convolution; autograd keeps tables and weight for the backward. It is what rpg-kernels is measured
against, and it shares no code with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Kaiming fan-out of a 3x3 convolution of 512 channels.
RING_FAN_OUT = 512 * 3 * 3


class Ring(nn.Module):
    """The trainable vector ``w`` of all shared layers, of shape ``[dof, 1]``.

    A matrix, so that ``rpg_kernels.param_groups`` decays it as it does a bank.
    """

    def __init__(self, dof: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(dof, 1) * math.sqrt(2 / RING_FAN_OUT))


class PublishedConv2d(nn.Module):
    """A convolution that gathers its weight: ``w[index] * sign * scale``.

    Args:
        like: the convolution to replace; without bias or groups, as in a ResNet's blocks.
        ring: where the weights are.
        index: int64 ``[out, in, kh, kw]``, positions on the ring.
        sign: float32 ``[out, in, kh, kw]``, +1 or -1.

    Shape:
        ``[B, in, H, W] -> [B, out, H', W']``, as :class:`torch.nn.Conv2d`.
    """

    index: Tensor
    sign: Tensor

    def __init__(self, like: nn.Conv2d, ring: Ring, index: Tensor, sign: Tensor) -> None:
        super().__init__()
        # In a tuple, so that the ring is registered once, by the model.
        self._ring = (ring,)
        self.stride, self.padding = like.stride, like.padding
        self.scale = math.sqrt(RING_FAN_OUT / (like.out_channels * math.prod(like.kernel_size)))
        self.register_buffer("index", index)
        self.register_buffer("sign", sign)

    def forward(self, x: Tensor) -> Tensor:
        weight = self._ring[0].w.view(-1)[self.index] * self.sign * self.scale
        return F.conv2d(x, weight, None, self.stride, self.padding)


def share_as_published(
    model: nn.Module, dof: int, filter_fn: Callable[[nn.Module, str], bool]
) -> nn.Module:
    """Replace the convolutions that ``filter_fn(module, name)`` picks, in place; return the model.

    Every ring position is used as often as any other, give or take one: the ring is laid out again
    and again until every weight has a position, and the whole is shuffled. Draws come from torch's
    global generator.

    Raises:
        ValueError: ``dof`` is not positive, or a picked module is not a plain convolution.
    """
    if dof < 1:
        raise ValueError(f"dof: got {dof}, wanted at least 1")
    picked = [(name, module) for name, module in model.named_modules() if filter_fn(module, name)]
    for name, module in picked:
        if type(module) is not nn.Conv2d or module.bias is not None or module.groups != 1:
            raise ValueError(f"{name}: got {module}, wanted a Conv2d without bias and groups")
    convolutions = [(name, module) for name, module in picked if isinstance(module, nn.Conv2d)]
    ring = Ring(dof)
    total = sum(module.weight.numel() for _, module in convolutions)
    # The last lap is incomplete: a random choice of positions, so no stretch of the ring wins.
    laps, rest = divmod(total, dof)
    positions = torch.cat([torch.arange(dof).repeat(laps), torch.randperm(dof)[:rest]])
    positions = positions[torch.randperm(total)]
    start = 0
    for name, module in convolutions:
        count = module.weight.numel()
        index = positions[start : start + count].view(module.weight.shape).clone()
        sign = torch.randint(0, 2, module.weight.shape).mul(2).sub(1).float()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, PublishedConv2d(module, ring, index, sign))
        start += count
    model.add_module("ring", ring)
    return model
