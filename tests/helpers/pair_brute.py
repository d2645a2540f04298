"""What products of pairs define: gradients from sums of dy that are rounded to bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor
from unit_images import Convolution
from unit_layers import Layer

from rpg_kernels.law.placement import Placement


def whole_numbers(layer: Layer | Convolution) -> None:
    """Makes all of a layer whole numbers, so that sums are exact and need more than 8 bits."""
    made = torch.Generator().manual_seed(1)
    for tensor, most in ((layer.x, 4), (layer.bank, 4), (layer.dy, 255)):
        numbers = torch.randint(-most, most + 1, tensor.shape, generator=made)
        tensor.copy_(numbers.to(tensor.dtype))


def grads(p: Placement, bank: Tensor, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """dx ``[C, places]`` and dw ``[slots, block]`` in float64, by the sums of each unit.

    Args:
        p: of a weight of one band, whose units read no slot in two laps of the ring.
        bank: as it is stored.
        dy: ``[taps, N, places]``, of rows and pixels as each tap of the weight meets them.
        x: ``[C, places]``.
    """
    law, m = p.law, p.matrix
    n, b = torch.arange(m.rows)[:, None], torch.arange(m.blocks)
    slot, sign = law.slot(n, b), 1.0 - 2.0 * law.negative(n, b)[..., 0].double()
    column, group, _, _ = law.number(*torch.broadcast_tensors(n, b), 0)  # type: ignore[attr-defined]
    groups = law.groups(0)  # type: ignore[attr-defined]
    uses, place = ((column * groups + group) * law.slots + slot).unique(return_inverse=True)
    sums = torch.zeros(len(uses), x.shape[1], dtype=torch.float64)
    for block in range(m.blocks):
        seen = dy[block // m.run_blocks].double() * sign[:, block, None]
        sums.index_add_(0, place[:, block], seen)
    sums = sums.to(torch.bfloat16).double()
    slot, channel = uses % law.slots, uses // law.slots // groups % m.run_blocks
    padded = torch.zeros(m.run_blocks * m.block, x.shape[1], dtype=torch.float64)
    padded[: len(x)] = x.double()
    x = padded.view(m.run_blocks, m.block, -1)
    read = bank.double().view(-1, m.block)
    dx = torch.zeros_like(x)
    dx.index_add_(0, channel, torch.einsum("uq,ue->ueq", sums, read[slot]))
    dw = torch.zeros_like(read)
    dw.index_add_(0, slot, torch.einsum("uq,ueq->ue", sums, x[channel]))
    return dx.flatten(0, 1) * p.scale, dw.view(bank.shape) * p.scale


def linear_grads(layer: Layer) -> tuple[Tensor, Tensor]:
    """dx and dw of a linear layer."""
    dx, dw = grads(layer.p, layer.bank, layer.dy.T[None], layer.x.T)
    return dx[: layer.x.shape[1]].T, dw


def conv2d_grads(layer: Convolution) -> tuple[Tensor, Tensor]:
    """dx and dw of a convolution: a tap meets dy where its pixel of x is."""
    (batch, channels, height, width), out = layer.x.shape, layer.dy.shape
    seen = []
    for tap in torch.cartesian_prod(*(torch.arange(k) for k in layer.p.shape[2:])).tolist():
        met = torch.zeros(out[1], batch, height, width, dtype=torch.float64)
        for i in range(out[2]):
            for j in range(out[3]):
                row, column = (
                    o * step + t * far - pad
                    for o, t, step, pad, far in zip((i, j), tap, *layer.how, strict=True)
                )
                if 0 <= row < height and 0 <= column < width:
                    met[:, :, row, column] = layer.dy[:, :, i, j].T.double()
        seen.append(met.flatten(1))
    dx, dw = grads(layer.p, layer.bank, torch.stack(seen), layer.x.transpose(0, 1).flatten(1))
    return dx[:channels].view(channels, batch, height, width).transpose(0, 1), dw
