"""materialize: back from virtual weights to plain torch.nn."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.conversion.kinds import dense_counterpart
from rpg_kernels.conversion.other_banks import forget_loading
from rpg_kernels.nn import VirtualLayer
from rpg_kernels.nn.part import banks_of

Key = tuple[int, str, int | None]  # bank, placement, row that a lookup masks


def materialize(model: nn.Module) -> nn.Module:
    """A dense copy of a model: the same function of its inputs, no rpg layer, no bank.

    Args:
        model: a model with rpg layers; left as it is.

    Returns:
        A new model whose rpg layers are torch.nn layers with the unpacked weights as parameters.
        Layers that shared one virtual weight share one parameter.

    Raises:
        TypeError: model is not an nn.Module.

    Example:
        >>> import rpg_kernels as rpg
        >>> net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
        >>> dense = materialize(rpg.convert(net, rpg.RPGConfig(dof=128)))
        >>> type(dense[1])
        <class 'torch.nn.modules.linear.Linear'>
        >>> x = torch.randn(2, 16)
        >>> torch.allclose(dense(x), net(x), atol=1e-6)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, wanted an nn.Module")
    # The banks are read, not copied: no layer of the copy keeps one.
    banks = {id(m): m for m in model.modules() if isinstance(m, ParameterBank)}
    model = copy.deepcopy(model, banks)
    parameters: dict[Key, nn.Parameter] = {}
    dense: dict[int, nn.Module] = {}
    for module in list(model.modules()):
        if isinstance(module, VirtualLayer):
            dense[id(module)] = _dense(module, parameters)
    if id(model) in dense:
        return dense[id(model)]
    for parent in list(model.modules()):
        forget_loading(parent)
        for name in banks_of(parent):
            parent.__dict__.pop(name, None)
        for key, child in list(parent._modules.items()):
            if child is not None and id(child) in dense:
                parent._modules[key] = dense[id(child)]
            elif isinstance(child, ParameterBank):
                del parent._modules[key]
    return model


def _dense(layer: VirtualLayer, parameters: dict[Key, nn.Parameter]) -> nn.Module:
    vw = layer.virtual_weight
    padding_idx = getattr(layer, "padding_idx", None)
    key = (id(vw.bank), vw.spec, padding_idx)
    if key not in parameters:
        with torch.no_grad():
            weight = vw.unpack()
            if padding_idx is not None:
                weight[padding_idx] = 0
            trains = vw.requires_grad if vw.bank.stored is None else not vw.is_frozen()
            parameters[key] = nn.Parameter(weight, requires_grad=trains)
    return dense_counterpart(layer, parameters[key])
