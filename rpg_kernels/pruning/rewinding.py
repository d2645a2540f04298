"""rewind: a model's values as they once were, with what has been pruned since."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from rpg_kernels import _checks
from rpg_kernels.bank.bank_map import DIGITS
from rpg_kernels.bank.buffers import same_memory
from rpg_kernels.pruning.magnitude import pruned_parameters

Module = TypeVar("Module", bound=nn.Module)
_SHOWN = 5  # names in an error


def rewind(model: Module, state: Mapping[str, Any]) -> Module:
    """Set all values back to an earlier state of the model; what is pruned stays pruned. In place.

    With ``prune`` it is iterative magnitude pruning with rewinding: train a little, keep the state,
    train to the end, and then as often as wanted prune, rewind and train again. Optimiser and
    learning rate start anew, as in the first round.

    Args:
        model: a model with banks, or a dense one.
        state: a copy of its state dict, ``copy.deepcopy(model.state_dict())``, from before or after
            any pruning. Masks in it are left aside.

    Returns:
        The model.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: other names or shapes than the model's, or the model's own tensors, which have
            trained on. Nothing has changed then.
        RuntimeError: values of another map, as of ``load_state_dict``.

    Example:
        >>> import copy, torch, rpg_kernels as rpg
        >>> layer = rpg.nn.Linear(64, 64)
        >>> early = copy.deepcopy(layer.state_dict())
        >>> _ = torch.nn.init.normal_(layer.rpg_bank.weight)  # some training
        >>> bank = rewind(rpg.prune(layer, 0.5), early).rpg_bank
        >>> bool((bank() == early["rpg_bank.weight"] * bank.weight_mask).all())
        True

    Source: Frankle et al. (ICML 2020), "Linear Mode Connectivity and the Lottery Ticket
    Hypothesis".
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, wanted an nn.Module")
    if not isinstance(state, Mapping):
        raise TypeError(f"state: got a {type(state).__name__}, wanted a state dict")
    now, given = model.state_dict(), OrderedDict(state)
    # What torch, and layers that hold a bank, know of a state dict beside its tensors.
    given._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]
    masks = set()
    for path, _, name in pruned_parameters(model):
        key = f"{path}.{name}" if path else name
        if key in given:
            given[f"{key}_orig"] = given.pop(key)
        given[f"{key}_mask"] = now[f"{key}_mask"]
        masks.add(f"{key}_mask")
    _fits(given, {name: value for name, value in now.items() if name not in masks}, masks)
    model.load_state_dict(given)
    return model


def _fits(given: Mapping[str, Any], now: Mapping[str, Any], masks: set[str]) -> None:
    """Refuse before anything is copied what torch would refuse afterwards, or not at all."""
    names = given.keys() - masks
    for those, what in ((now.keys() - names, "no"), (names - now.keys(), "also")):
        if those:
            more = f" and {len(those) - _SHOWN} more" if len(those) > _SHOWN else ""
            got = f"{what} {', '.join(sorted(those)[:_SHOWN])}{more}"
            raise _checks.fail("state", got, "the names of the model's own state dict")
    for name, value in now.items():
        theirs = given[name]
        if not isinstance(value, Tensor):  # some module's extra state
            continue
        if not isinstance(theirs, Tensor):
            raise TypeError(f"state: got a {type(theirs).__name__} as {name}, wanted a tensor")
        # How long the map of a bank is is for the bank to judge.
        if theirs.shape != value.shape and not name.endswith(DIGITS):
            got = f"{name} of shape {list(theirs.shape)}"
            raise _checks.fail("state", got, f"shape {list(value.shape)}")
        if same_memory(theirs, value):
            wanted = "a copy of an earlier one: copy.deepcopy(model.state_dict())"
            raise _checks.fail("state", f"the model's own tensor as {name}", wanted)
