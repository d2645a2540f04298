"""freeze and unfreeze: whether a part of a model trains."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.nn import VirtualLayer

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Stop the gradients of a part of a model: those into its banks, and of its own parameters.

    The rest of the model trains on, the values that it shares with this part included: a part
    stays exactly as it is only when nothing else trains its bank. ``part.requires_grad_(False)``
    is the other way: as with any tied parameter it freezes the bank itself, for every layer.

    Args:
        module: a part of a model, or a whole one.

    Returns:
        The module.

    Raises:
        TypeError: module is not an nn.Module.

    Example:
        >>> import torch, rpg_kernels as rpg
        >>> net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
        >>> net = rpg.convert(net, rpg.RPGConfig(dof=128))
        >>> _ = freeze(net[:3])
        >>> net[1].weight.requires_grad, net[1].bias.requires_grad, net[3].bias.requires_grad
        (False, False, True)
        >>> net.rpg_bank.weight.requires_grad
        True
    """
    return _set(module, False)


def unfreeze(module: Module) -> Module:
    """Undo ``freeze``: all parameters of the part, and the gradients into its banks, are on again.

    The banks too, if ``requires_grad_(False)`` of a part has frozen them.

    Args:
        module: a part of a model, or a whole one.

    Returns:
        The module.

    Raises:
        TypeError: module is not an nn.Module.

    Example:
        >>> import rpg_kernels as rpg
        >>> layer = freeze(rpg.nn.Linear(16, 16))
        >>> unfreeze(layer).weight.requires_grad
        True
    """
    return _set(module, True)


def _set(module: Module, on: bool) -> Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got a {type(module).__name__}, wanted an nn.Module")
    for bank in module.modules() if on else ():
        if isinstance(bank, ParameterBank):
            bank.requires_grad_(True)  # first, since one that is stored refuses
    for each in module.modules():
        if isinstance(each, VirtualLayer):
            each.virtual_weight.requires_grad_(on)
        if not isinstance(each, ParameterBank):
            for parameter in each.parameters(recurse=False):
                parameter.requires_grad_(on)
    return module
