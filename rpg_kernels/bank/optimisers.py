"""A bank that no optimiser holds: noticed at the first step after it has got a gradient."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rpg_kernels import _checks

if TYPE_CHECKING:
    from rpg_kernels.bank.bank_state import BankState

_unheld: WeakSet[BankState] = WeakSet()  # banks that no optimiser was seen to hold


def watch(bank: BankState) -> None:
    """Look for this bank in the optimisers that make a step."""
    _unheld.add(bank)


def _before_step(optimiser: Optimizer, args: Any, kwargs: Any) -> None:
    """Optimisers that hold a bank train it; a bank with a gradient that none holds is missed."""
    if not _unheld:
        return
    given = {id(p) for group in optimiser.param_groups for p in group["params"]}
    for bank in list(_unheld):
        values = [p for p in bank.parameters() if p.requires_grad]
        if any(id(p) in given for p in values):
            bank.trained()
            _unheld.discard(bank)
        elif any(p.grad is not None for p in values):
            _unheld.discard(bank)  # asked, and said, at most once: what follows is slow
            if _of_its_model(bank, given) and not any(map(_held, values)):
                _checks.warn(
                    f"the parameter bank of {bank.generator.dof} degrees of freedom has a "
                    "gradient, but no optimiser holds it, so that the virtual weights will not "
                    "change; give the optimiser rpg.param_groups(model, lr) or model.parameters() "
                    "of the converted model"
                )


def _of_its_model(bank: BankState, given: set[int]) -> bool:
    """Whether an optimiser holds a parameter of a module that registers the bank, or reads it."""
    modules = (m for m in gc.get_objects() if issubclass(type(m), nn.Module))
    owners = [m for m in modules if _has(vars(m), bank)]
    return any(id(p) in given for module in owners for p in module.parameters())


def _has(attributes: dict[str, Any], bank: BankState) -> bool:
    registered = attributes.get("_modules", {}).values()
    read = getattr(attributes.get("virtual_weight"), "bank", None)
    return read is bank or any(child is bank for child in registered)


def _held(parameter: object) -> bool:
    """Whether some optimiser's group lists a parameter."""
    lists = [r for r in gc.get_referrers(parameter) if isinstance(r, list)]
    return any(
        isinstance(group, dict) and group.get("params") is each
        for each in lists
        for group in gc.get_referrers(each)
    )


register_optimizer_step_pre_hook(_before_step)
