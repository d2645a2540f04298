"""What of a model a file holds, and under which names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rpg_kernels import _checks
from rpg_kernels._wrappers import plain_name, unwrap
from rpg_kernels.bank.bank_map import DIGITS
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.checkpoint.file_format import METADATA, dtype_code
from rpg_kernels.nn import VirtualLayer

EXTRA_STATE = "_extra_state"  # torch's suffix for what get_extra_state returns


CHANNELS = "rpg_channels"  # key of a file's metadata: what ``kept_channels`` gives


@dataclass(frozen=True)
class Contents:
    """A model's state, by the names that files use."""

    model: nn.Module  # without wrappers
    keys: dict[str, str]  # name -> key of the state dict, without the maps of banks
    tensors: dict[str, Tensor]
    banks: dict[str, ParameterBank]
    bank_keys: dict[str, str]  # name of a bank -> key of its map
    layers: dict[str, list[Any]]  # name of an rpg layer -> bank, number, rows, columns


def contents_of(model: nn.Module) -> Contents:
    """Everything to be saved or loaded.

    Raises:
        TypeError, ValueError: something that a file cannot hold.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, wanted an nn.Module")
    plain = unwrap(model)
    modules = [(plain_name(n), m) for n, m in plain.named_modules(remove_duplicate=False)]
    banks = {name: m for name, m in modules if isinstance(m, ParameterBank)}
    registered = set(banks.values())
    for name, module in plain.named_modules():  # and those that only layers hold
        if isinstance(module, ParameterBank) and module not in registered:
            banks[plain_name(name)] = module
    first_names = {id(bank): name for name, bank in reversed(banks.items())}
    layers: dict[str, list[Any]] = {}
    for name, module in modules:
        if isinstance(module, VirtualLayer):
            weight = module.virtual_weight
            place = weight.placement.layer, *weight.placement.selection_record()
            layers[name] = [first_names[id(weight.bank)], *place]
    contents = Contents(plain, {}, {}, banks, {}, layers)
    maps = {join(name, DIGITS): name for name in banks}
    for key, value in plain.state_dict(keep_vars=True).items():
        name = plain_name(key)
        if name in maps:
            contents.bank_keys[maps[name]] = key
        elif name in contents.keys or name == METADATA:
            raise _checks.fail("model", f"two tensors, or metadata, called {name}", "other names")
        else:
            contents.keys[name], contents.tensors[name] = key, _savable(name, value)
    return contents


def join(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


def _savable(name: str, value: object) -> Tensor:
    """An ordinary tensor, or an error that names it."""
    if not isinstance(value, Tensor):
        module = name.removesuffix(EXTRA_STATE).rstrip(".") or "the model"
        got = f"a {type(value).__name__} in the state dict of {module}"
        raise _checks.fail(name, got, "tensors only; files hold nothing else")
    if is_lazy(value):
        raise _checks.fail(name, "an uninitialised tensor", "values; run a forward first")
    if is_traceable_wrapper_subclass(value):
        wanted = "a plain tensor (for sharded models there is torch.distributed.checkpoint)"
        raise _checks.fail(name, f"a {type(value).__name__}", wanted)
    if value.layout != torch.strided or dtype_code(value.dtype) is None:
        wanted = "a dense tensor of a dtype that safetensors files hold"
        raise _checks.fail(name, f"{value.layout}, {value.dtype}", wanted)
    return value


def ties(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Names grouped by tensor: those in a group are one and the same."""
    groups: dict[object, list[str]] = {}
    for name, t in tensors.items():
        same: object = id(t)
        if not t.is_meta and t.numel():
            where = t.device, t.untyped_storage().data_ptr(), t.storage_offset()
            same = (*where, t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg())
        groups.setdefault(same, []).append(name)
    return list(groups.values())


def some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name or "(the model itself)" for name in names[:5]) + more
