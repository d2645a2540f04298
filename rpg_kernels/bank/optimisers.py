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
    """Warn at an optimiser's first step that misses this bank."""
    _unheld.add(bank)


def _before_step(optimiser: Optimizer, args: Any, kwargs: Any) -> None:
    """Optimisers that hold a bank train it; a bank with a gradient that none holds is missed."""
    _say_what_is_stored(optimiser)
    missed = [b for b in list(_unheld) if any(p.requires_grad for p in b.parameters())]
    if not missed:
        return
    given = {id(p) for group in optimiser.param_groups for p in group["params"]}
    for bank in missed:
        values = list(bank.parameters())
        if any(id(p) in given for p in values):
            bank.trained()
            _unheld.discard(bank)
            times = sum(p is values[0] for g in optimiser.param_groups for p in g["params"])
            if times > 1:
                _checks.warn(
                    f"a parameter bank is {times} times in an optimiser's groups and makes as many "
                    "steps at once: every layer's parameters() list it; give the optimiser "
                    "rpg.param_groups(model, lr), or the parameters() of the whole"
                )
        elif any(p.grad is not None for p in values) and bank.first_step_of(optimiser):
            if any(map(_held, values)):
                bank.trained()
                _unheld.discard(bank)
            elif _of_its_model(bank, given) or not _has_gradient(optimiser):
                _unheld.discard(bank)
                _checks.warn(
                    f"the parameter bank of {bank.generator.dof} degrees of freedom has a "
                    "gradient, but no optimiser holds it, so that the virtual weights will not "
                    "change; give the optimiser rpg.param_groups(model, lr) or model.parameters() "
                    "of the converted model"
                )


def _say_what_is_stored(optimiser: Optimizer) -> None:
    """Warn of stored values among what an optimiser is to train: no step changes them."""
    for bank in list(_unheld):
        stored = bank.stored
        if stored is None or not any(
            p is stored for g in optimiser.param_groups for p in g["params"]
        ):
            continue
        _unheld.discard(bank)
        _checks.warn(
            f"the parameter bank of {bank.generator.dof} degrees of freedom is stored as "
            f"{stored.form}, and no step of an optimiser changes it; rpg.dequantize(model) "
            "brings float values back, rpg.quantize(model, ..., training=True) trains with "
            "rounding"
        )


def _has_gradient(optimiser: Optimizer) -> bool:
    """Whether there is anything for this step: of a model's old parameters nothing is."""
    return any(p.grad is not None for group in optimiser.param_groups for p in group["params"])


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
