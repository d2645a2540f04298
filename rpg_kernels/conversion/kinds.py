"""The kinds of dense layers that have a virtual counterpart, and what travels between the two."""

from __future__ import annotations

import types
from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.nn import (
    Conv1d,
    Conv2d,
    ConvTranspose1d,
    ConvTranspose2d,
    Embedding,
    Linear,
    VirtualLayer,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
SHARED_TYPES = (nn.Linear, *CONVOLUTIONS, nn.Embedding)
_KINDS: dict[type, type[VirtualLayer]] = {
    kind.dense_type: kind
    for kind in (Linear, Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d, Embedding)
}
_GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
# Each holds functions that run, or may be asked for, when the layer does something.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# Methods that compute: one that was patched on a layer does something that we do not know.
COMPUTING = ("forward", "_conv_forward", "_call_impl", "_slow_forward", "_compiled_call_impl")
# What computes, on a virtual layer, computes with it: it does not go on to the dense one.
_HOOKED = (*COMPUTING, "_old_forward", "_hf_hook")
_OWN = {"virtual_weight", "alone"}  # of virtual layers


def kind_of(module: nn.Module) -> type[VirtualLayer] | None:
    """The virtual counterpart of a module's type; None for subclasses and everything else.

    ``transformers.pytorch_utils.Conv1D`` (GPT-2's linear layer, which keeps its weight
    transposed) is known by its name, since transformers need not be there.

    Example:
        >>> kind_of(nn.Linear(2, 2)).__name__, kind_of(nn.Conv3d(2, 2, 1))
        ('Linear', None)
    """
    return Linear if _is_transposed(module) else _KINDS.get(type(module))


def _is_transposed(module: nn.Module) -> bool:
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def weight_of(module: nn.Module) -> Tensor:
    """A dense layer's weight in the shape that the virtual one has: torch's, of a Conv1D turned."""
    weight = cast(Tensor, module.weight)
    return weight.t() if _is_transposed(module) else weight


def counterpart(module: nn.Module, weight: VirtualWeight) -> VirtualLayer:
    """The virtual layer with a dense layer's geometry, bias, attributes and training mode."""
    layer: VirtualLayer
    if isinstance(module, nn.Embedding):
        layer = Embedding(
            module.num_embeddings,
            module.embedding_dim,
            padding_idx=module.padding_idx,
            virtual_weight=weight,
        )
    elif isinstance(module, CONVOLUTIONS):
        kind: Any = kind_of(module)
        layer = kind(**_geometry(module), bias=False, virtual_weight=weight)
    else:
        rows, columns = weight.shape
        layer = Linear(columns, rows, bias=False, virtual_weight=weight)
    layer.bias = cast(nn.Parameter | None, getattr(module, "bias", None))
    carry(module, layer)
    return layer.train(module.training)


def dense_counterpart(layer: VirtualLayer, weight: nn.Parameter) -> nn.Module:
    """The torch.nn layer with a virtual layer's geometry, bias, hooks, attributes and mode."""
    module: nn.Module
    if isinstance(layer, Linear):
        module = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    elif isinstance(layer, Embedding):
        module = nn.Embedding(
            layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta"
        )
    else:
        kind: Any = layer.dense_type
        module = kind(**_geometry(layer), bias=False, device="meta")
    module.weight = weight
    if layer.bias is not None:
        module.bias = layer.bias
    for hooks in HOOKS:
        setattr(module, hooks, getattr(layer, hooks))
    carry(layer, module)
    return module.train(layer.training)


def _geometry(layer: nn.Module) -> dict[str, Any]:
    """The arguments that a convolution was made with, but for those of its weight and bias."""
    names = (*_GEOMETRY, "output_padding") if layer.transposed else _GEOMETRY
    return {name: getattr(layer, name) for name in names}


def carry(old: nn.Module, new: nn.Module) -> None:
    """Give a layer's replacement the plain attributes that somebody has put on the layer.

    A method that was put there stays one, of the new layer.
    """
    for name, value in attributes(old).items():
        if isinstance(value, types.MethodType) and value.__self__ is old:
            value = types.MethodType(value.__func__, new)
        new.__dict__[name] = new if value is old else value


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a layer has beyond what every layer of its type has."""
    kind: Any = type(module)
    usual = _usual(kind) | {"weight", "bias"}
    if isinstance(module, VirtualLayer):
        usual |= {*_OWN, *_HOOKED}
    return {name: value for name, value in vars(module).items() if name not in usual}


@cache
def _usual(kind: Any) -> frozenset[str]:
    """What every layer of a type has; made when first asked for, as meta tensors import a lot."""
    base: Any = next((t for t in SHARED_TYPES if issubclass(kind, t)), None)
    if base in CONVOLUTIONS:
        return frozenset(vars(base(1, 1, 1, device="meta")))
    if base is not None:
        return frozenset(vars(base(1, 1, device="meta")))
    return frozenset(vars(nn.Module()))
