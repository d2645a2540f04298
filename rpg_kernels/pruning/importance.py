"""How much a network would lose with a bundle of channels: first-order Taylor, or magnitude."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rpg_kernels import _checks
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.nn import VirtualLayer
from rpg_kernels.pruning.channel_graph import ChannelGraph, Use
from rpg_kernels.pruning.cutting import LINEAR, NORMS, TRANSPOSED, channels_of

Losses = Callable[[nn.Module], Iterable[Tensor]]


def magnitude(graph: ChannelGraph, flops: Mapping[int, float]) -> dict[int, float]:
    """By bundle: the mean over its filters of the squared norm, as a multiple of the layer's mean,
    times the FLOPs of the bundle.

    Layers differ in scale for reasons that say nothing about their worth, a norm after them most of
    all, so that a filter is compared with its own layer's. Without data nothing tells that a layer
    is worth more than another for each FLOP, so that all lose about the same share.

    Args:
        graph: of the network.
        flops: by bundle, what the whole network would save without it.
    """
    found: dict[int, list[float]] = defaultdict(list)
    for use in graph.uses.values():
        if not isinstance(use.layer, NORMS):
            norms = _squared_norms(use)
            mean = float(norms.mean()) or 1.0
            for number, norm in zip(use.out, norms.tolist(), strict=True):
                found[graph.bundle(number)].append(norm / mean)
    return {
        bundle: sum(norms) / len(norms) * flops[bundle]
        for bundle, norms in found.items()
        if bundle in flops
    }


def _squared_norms(use: Use) -> Tensor:
    layer: Any = use.layer
    with torch.no_grad():
        weight = layer.weight
        if isinstance(layer, VirtualLayer):
            assert isinstance(weight, VirtualWeight)
            weight = weight.unpack()
        dim = 1 if isinstance(layer, TRANSPOSED) else 0
        rows = weight.detach().double().movedim(dim, 0)
        norms: Tensor = rows.reshape(rows.shape[0], -1).square().sum(1)
        if len(norms) != len(use.out):  # a transposed convolution in groups, whose channels stay
            return norms.new_ones(len(use.out))
        return norms


def taylor(model: nn.Module, graph: ChannelGraph, losses: Losses) -> dict[int, float]:
    """By bundle, float: the sum over batches of (the sum over its channels of z · dL/dz)².

    z is a channel's output, of the norm where one comes after the layer. The inner sum, over images
    and positions, is the first-order change of the loss when the channel becomes zero; of a norm's
    channel it is γ·dL/dγ + β·dL/dβ, of a filter w·dL/dw + b·dL/db (Molchanov et al., "Importance
    estimation for neural network pruning", CVPR 2019, whose gates these are).

    Raises:
        TypeError, ValueError: losses gives something else than finite tensors that depend on the
            layers' outputs.
    """
    uses = [use for use in graph.uses.values() if use.gate]
    found: dict[int, float] = defaultdict(float)
    batches = 0
    with torch.enable_grad(), _gates(uses) as gates:
        for loss in losses(model):
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = f"a {type(loss).__name__}"
                raise TypeError(f"importance: got {got} from it, wanted the loss of each batch")
            if not loss.requires_grad or not bool(torch.isfinite(loss)):
                got = f"a loss of {loss.item()}" + ("" if loss.requires_grad else ", no gradient")
                raise _checks.fail("importance", got, "a finite loss with a gradient")
            grads = torch.autograd.grad(loss, gates, allow_unused=True)
            change: dict[int, float] = defaultdict(float)
            for use, grad in zip(uses, grads, strict=True):
                if grad is not None:
                    for number, value in zip(use.out, grad.tolist(), strict=True):
                        change[graph.bundle(number)] += value
            for bundle, value in change.items():
                found[bundle] += value * value
            batches += 1
    if not batches:
        raise _checks.fail("importance", "no batches", "the loss of at least one batch")
    return dict(found)


@contextmanager
def _gates(uses: list[Use]) -> Iterator[list[Tensor]]:
    """A factor of one for each output channel, while the context is open."""
    gates, hooks = [], []

    def multiplied(gate: Tensor, dim: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            shape = [1] * output.dim()
            shape[dim] = -1
            return output * gate.to(output.dtype).view(shape)

        return hook

    for use in uses:
        layer: Any = use.layer
        like = layer.weight if layer.weight is not None else layer.running_mean
        ones = torch.ones(channels_of(layer)[0], device=like.device, requires_grad=True)
        axes = 0 if isinstance(layer, LINEAR) else len(getattr(layer, "kernel_size", ()))
        dim = 1 if isinstance(layer, NORMS) else -1 - axes
        gates.append(ones)
        hooks.append(layer.register_forward_hook(multiplied(ones, dim)))
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()
