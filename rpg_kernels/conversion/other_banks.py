"""A state dict of a model with other banks is refused before anything of it is copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rpg_kernels.bank.bank_map import DIGITS, BankMap
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.nn import VirtualLayer


def watch_loading(model: nn.Module) -> None:
    """Have a model that registers banks look at every state dict before it is loaded."""
    if not any(map(_is_ours, model._load_state_dict_pre_hooks.values())):
        model.register_load_state_dict_pre_hook(refuse)


def forget_loading(model: nn.Module) -> None:
    """Undo ``watch_loading``, in a copy without banks."""
    hooks = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
        del hooks[key]


def _is_ours(hook: object) -> bool:
    return getattr(hook, "hook", None) is refuse  # torch wraps it


# A function of this module, so that copies and pickles of the model keep it.
def refuse(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Before loading: a RuntimeError for the values of another map, or a bank or group too many.

    The state dict of a model whose layers are in other groups has other banks under the model, or
    under these names banks with other maps. torch would find that out bank by bank, and of a bank
    that is not there only once everything else is copied. Whether the call is strict torch does not
    say; without any maps a state dict is not looked at.

    Raises:
        RuntimeError: nothing was copied.
    """
    mine = {
        f"{name}.{key}" if name else key: child
        for name, parent in model.named_modules(remove_duplicate=False)  # a part may stand twice
        for key, child in parent._modules.items()
        if isinstance(child, ParameterBank)
    }
    if not mine:  # all of its layers have become dense
        return
    # Which step of a sequence registers a bank may differ, and what it holds deeper is its own.
    lacking = [bank for name, bank in mine.items() if f"{prefix}{name}.{DIGITS}" not in state_dict]
    container = isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    converted = False
    for key, digits in state_dict.items():
        if not key.startswith(prefix) or not key.endswith(f".{DIGITS}"):
            continue
        name = key[len(prefix) : -len(DIGITS) - 1]
        if name in mine:
            bank, converted = mine[name], True
            values = any(k.startswith(f"{prefix}{name}.") and k != key for k in state_dict)
            if values and (difference := _difference(digits, bank)):
                raise _error(
                    f"{prefix}{name}: got values of another generating matrix or layers "
                    f"({difference})"
                )
        elif container or "." not in name:
            # Another step registers one of mine, unless mine is there as well.
            same = [bank for bank in lacking if container and not _difference(digits, bank)]
            if not same:
                raise _error(
                    f"{prefix}{name}: got a bank that the model lacks, wanted {', '.join(mine)}; "
                    "convert the model as the saved one was, with the same groups"
                )
            lacking.remove(same[0])
    # torch's metadata, if it is there, has what the maps do not say: which layer reads which bank.
    metadata = getattr(state_dict, "_metadata", None) or {}
    for name, module in model.named_modules():
        theirs = metadata.get(f"{prefix}{name}")
        if converted and theirs is not None and isinstance(module, VirtualLayer):
            module.check_reads(f"{prefix}{name}.", theirs, dense=True)


def _error(reason: str) -> RuntimeError:
    return RuntimeError(f"Error(s) in loading a state dict: {reason}")


def _difference(digits: object, bank: ParameterBank) -> str:
    """How a map of a state dict differs from a bank's; "" too where it cannot be read.

    The bank itself says what is wrong with one that cannot be read, when its turn comes.
    """
    mine = bank._buffers[DIGITS]
    if isinstance(digits, Tensor) and digits is mine:
        return ""
    try:
        return BankMap.from_tensor(digits).difference(bank.map)
    except ValueError:
        return ""
