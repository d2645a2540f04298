"""Who owns the bank: registering it with a model, initialising, and grouping for an optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rpg_kernels import _checks
from rpg_kernels._wrappers import unwrap
from rpg_kernels.bank.config import check_group_name
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.conversion.other_banks import watch_loading
from rpg_kernels.nn import VirtualLayer
from rpg_kernels.nn.part import BANK_NAME, bank_name, banks_of


def attach(model: nn.Module, bank: ParameterBank, group: str | None = None) -> nn.Module:
    """Register a shared bank with a model that was built by hand: ``model.rpg_bank``.

    A model with several banks has them as ``model.rpg_bank_<group>``, in the order of the calls.

    Layers hold their bank without registering it: in ``parameters()`` and ``state_dict()`` it has
    the name of the first layer that reads it. In an nn.Sequential that layer registers it.

    Args:
        model: the model whose layers read the bank.
        bank: the bank.
        group: what the layers that read it are called, letters, digits and underscores; None for
            the model's only bank.

    Returns:
        The model; unchanged when it owns the bank already.

    Raises:
        TypeError: bank is not a ParameterBank, or group not a str.
        ValueError: the model has something else under this name; the bank is registered already
            and of another group; a character that a group's name cannot have.

    Example:
        >>> import rpg_kernels as rpg
        >>> bank = rpg.ParameterBank(dof=1024)
        >>> net = nn.Sequential(rpg.nn.Linear(64, 64, bank=bank), rpg.nn.Linear(64, 64, bank=bank))
        >>> attach(net, bank).rpg_bank is bank
        True
    """
    _module(model)
    if group is not None:
        check_group_name("group", group)
    if not isinstance(bank, ParameterBank):
        raise TypeError(f"bank: got a {type(bank).__name__}, wanted a ParameterBank")
    plain = unwrap(model)
    if any(module is bank for parent in plain.modules() for module in parent._modules.values()):
        if group not in (None, bank.group):
            raise _checks.fail("group", repr(group), f"{bank.group!r}, as the bank is registered")
        return model
    name = bank_name(group or "")
    if getattr(plain, name, bank) is not bank:
        raise _checks.fail("model", f"a model with another {name}", "none, or the same bank")
    bank.group = group or ""
    register(plain, bank)
    return model


def register(model: nn.Module, bank: ParameterBank) -> None:
    """Make the bank the first child of the model, so that ``children()[:-1]`` drops the last layer.

    It comes after banks that are there already, under the name of its group. The children of an
    nn.Sequential (list, dictionary) are its steps, and counted: there the first layer that reads
    the bank registers it as ``rpg_bank``, and its name on the model is a plain attribute's.
    """
    name = bank_name(bank.group)
    if not isinstance(model, VirtualLayer):  # which looks at state dicts itself
        watch_loading(model)
    readers = [
        m for m in model.modules() if isinstance(m, VirtualLayer) and m.virtual_weight.bank is bank
    ]
    if isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict) and readers:
        setattr(readers[0], BANK_NAME, bank)
        model.__dict__[name] = bank
        return
    first = {key: child for key, child in model._modules.items() if key in banks_of(model)}
    others = dict(model._modules)
    model._modules.clear()
    model._modules.update({**first, name: bank, **others})


def initialize(model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Bring a model from ``meta`` to a device and draw its parameters. In place.

    Memory is allocated for the bank and for what is not shared, never for virtual weights. Every
    module with parameters or buffers of its own must have ``reset_parameters``, as torch's do.

    Args:
        model: a model on meta, usually after ``convert``.
        device: where to.

    Returns:
        The model.

    Raises:
        ValueError: some tensor is not on meta, or a module cannot initialise itself; the model is
            then unchanged.

    Example:
        >>> import rpg_kernels as rpg
        >>> with torch.device("meta"):
        ...     net = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(4)))
        >>> net = rpg.convert(net, rpg.RPGConfig(dof=65536), filter_fn=lambda m, name: True)
        >>> initialize(net)(torch.randn(1, 4096)).shape
        torch.Size([1, 4096])
    """
    _module(model)
    unable, alive = [], []
    for name, module in model.named_modules():
        if isinstance(module, ParameterBank):
            data = {"table": module.table, "mask": module._buffers.get("weight_mask")}
            unable += [
                f"{name} (its {key} is data; load it with load_state_dict)"
                for key, tensor in data.items()
                if tensor is not None
            ]
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        alive += [name for tensor in own if tensor.device.type != "meta"]
        if own and _reset_of(module) is None:
            unable.append(f"{name} ({type(module).__name__})")
    if alive:
        raise _checks.fail("model", f"tensors in {sorted(set(alive))}", "every tensor on meta")
    if unable:
        wanted = "modules with reset_parameters, or values loaded by load_state_dict instead"
        raise _checks.fail("model", ", ".join(unable), wanted)
    ties = _ties(model)
    model.to_empty(device=device)
    for names in ties:  # to_empty gives each name a tensor of its own
        first = model.get_parameter(names[0])
        for name in names[1:]:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, first)
    # Children first, as Module.apply; banks last, since some parents reset every tensor they hold.
    model.apply(lambda module: None if isinstance(module, ParameterBank) else _reset(module))
    for module in model.modules():
        if isinstance(module, ParameterBank):
            module.reset_parameters()
    return model


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    bank_lr: float | Mapping[str, float] | None = None,
    bank_weight_decay: float | Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Optimiser groups: the banks, the other weights, and norms and biases without decay.

    Of a model with groups each bank is an optimiser group of its own.

    A bank element's gradient is the sum over all its uses (virtual weights / dof of them), while
    its decay acts once. With the paper's ``init_std`` the dense network's learning rate and decay
    are the place to start, for SGD as for Adam: the layers' scales carry the fan. Clip the norm
    of the bank's gradient apart from the others', or not at all.

    Args:
        model: a model with rpg layers.
        lr, weight_decay: of everything but the banks; weight_decay not of norms and biases.
        bank_lr, bank_weight_decay: of the banks; None for the same values. A mapping gives the
            values of groups by their names; None for those that it leaves out.

    Returns:
        A list of groups with keys ``params``, ``lr``, ``weight_decay`` and ``name`` ("bank", of the
        bank of a group "bank <group>", "weights", "no_decay"), without empty ones.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: a mapping names a group that the model lacks.

    Example:
        >>> import rpg_kernels as rpg
        >>> net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
        >>> groups = param_groups(rpg.convert(net, rpg.RPGConfig(dof=128)), lr=0.1)
        >>> [(g["name"], len(g["params"])) for g in groups]
        [('bank', 1), ('weights', 2), ('no_decay', 3)]
    """
    _module(model)
    # Not m.weight, which pruning and parametrisations compute from the parameter.
    banks: dict[str, dict[int, nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, ParameterBank):
            banks.setdefault(module.group, {}).update({id(p): p for p in module.parameters()})
    for name, value in (("bank_lr", bank_lr), ("bank_weight_decay", bank_weight_decay)):
        unknown = [] if not isinstance(value, Mapping) else [g for g in value if g not in banks]
        if unknown:
            got = f"a value for {', '.join(map(repr, unknown))}"
            wanted = f"groups of the model ({', '.join(filter(None, banks)) or 'it has none'})"
            raise _checks.fail(name, got, wanted)
    ids = {key for bank in banks.values() for key in bank}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups: list[dict[str, Any]] = [
        {
            "name": f"bank {group}" if group else "bank",
            "params": list(bank.values()),
            "lr": _of_group(bank_lr, group, lr),
            "weight_decay": _of_group(bank_weight_decay, group, weight_decay),
        }
        for group, bank in banks.items()
    ]
    groups += [
        {
            "name": "weights",
            "params": [p for p in others if p.dim() > 1],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "name": "no_decay",
            "params": [p for p in others if p.dim() <= 1],
            "lr": lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def _of_group(value: float | Mapping[str, float] | None, group: str, otherwise: float) -> float:
    given = value.get(group) if isinstance(value, Mapping) else value
    return otherwise if given is None else given


def _ties(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one and the same."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, wanted an nn.Module")


def _reset(module: nn.Module) -> None:
    reset = _reset_of(module)
    if reset is not None:
        reset()


def _reset_of(module: nn.Module) -> Any:
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
