"""prune: the smallest elements or slots of a model's banks become zero, by torch's conventions.

A pruned parameter ``weight`` is kept as torch's own pruning keeps it: ``weight_orig`` is trained,
``weight_mask`` says what is left, and a hook multiplies the two whenever the module is called. So
a bank that is pruned here, by torch or by both in turn is one and the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rpg_kernels import _checks
from rpg_kernels.bank.parameter_bank import ParameterBank

ELEMENT, SLOT = "element", "slot"
Parameter = tuple[nn.Module, str]
Target = TypeVar("Target", bound="nn.Module | Iterable[Parameter]")
Module = TypeVar("Module", bound=nn.Module)


def prune(target: Target, amount: int | float, by: str = ELEMENT) -> Target:
    """Make the elements, or slots, of smallest magnitude zero for good. In place.

    All parameters are looked at together: of a model its banks, compared by their values as they
    are, without the scales of the layers that read them. The magnitude of a slot is the root mean
    square of its elements, so that banks of several granularities can be compared.

    What is pruned is chosen once, now. It stays zero in whatever trains afterwards, since it gets
    no gradient and is multiplied by zero; ``finish_pruning`` makes it part of the values. Further
    calls, also of ``torch.nn.utils.prune``, prune further.

    Pruning by element costs a mask, of the parameter's dtype, and makes nothing faster. Slots
    that are wholly zero can leave the bank.

    Args:
        target: a model, whose banks are pruned, or pairs of a module and the name of a parameter,
            as ``torch.nn.utils.prune.global_unstructured`` takes them, for dense networks.
        amount: how many elements or slots, or, as a float, which share of those that are left.
        by: ``"element"`` or ``"slot"``; slots are a bank's.

    Returns:
        The target.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; the model has no
            bank; values are not finite, or all have the same magnitude; nothing would be left at
            all, or of some bank. Nothing has changed then.

    Example:
        >>> import rpg_kernels as rpg
        >>> net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
        >>> net = rpg.convert(net, rpg.RPGConfig(dof=1024, granularity=16))
        >>> bank = prune(net, 0.25, by="slot")[1].rpg_bank
        >>> int(bank.weight_mask.sum()), int(bank.weight.any(1).sum())
        (768, 48)

    Source: Han et al. (2015), magnitude; Wang et al. (WACV 2023), pruning of a bank.
    """
    _checks.choice("by", by, (ELEMENT, SLOT))
    parameters = _parameters(target)
    if by == SLOT:
        for module, name in parameters:
            if not isinstance(module, ParameterBank):
                got = f"{by!r} for {name} of a {type(module).__name__}"
                raise _checks.fail("by", got, f"{ELEMENT!r}; only banks have slots")
    scores, left = zip(*(_scores(*each, by) for each in parameters), strict=True)
    device = scores[0].device
    kept = torch.cat([each.flatten().to(device) for each in left])
    there = torch.cat([each.flatten().to(device) for each in scores])[kept]
    count = _count(amount, len(there), by)
    if count:
        if bool(there.min() == there.max()):
            got = f"values that all have the magnitude {float(there[0]):.3g}"
            raise _checks.fail("target", got, "magnitudes that differ, to choose by")
        gone = there.topk(count, largest=False).indices
        kept[kept.nonzero().flatten()[gone]] = False
    masks = [
        mask.view_as(before).to(before.device)
        for mask, before in zip(kept.split([len(each) for each in left]), left, strict=True)
    ]
    for (module, _), mask in zip(parameters, masks, strict=True):
        if isinstance(module, ParameterBank) and not mask.any():
            got = f"{amount}, which leaves nothing of the bank {module.group}".rstrip()
            raise _checks.fail("amount", got, "one that leaves something of every bank")
    for (module, name), mask in zip(parameters, masks, strict=True):
        shape = _values(module, name)[0].shape
        whole = mask[:, None].expand(shape).contiguous() if by == SLOT else mask.view(shape)
        # In one byte for each element, since torch's hook keeps the mask of every call.
        torch_prune.custom_from_mask(module, name, whole)
    return target


def finish_pruning(model: Module) -> Module:
    """Write what is pruned into the values, and drop masks and hooks. In place.

    It is ``torch.nn.utils.prune.remove`` for every pruned parameter of a model. Parameters keep
    their names and are themselves again, with zeros, in state dicts and files too. Training after
    it changes those zeros.

    Args:
        model: a model with pruned banks or other parameters.

    Returns:
        The model.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: nothing in it is pruned.

    Example:
        >>> import rpg_kernels as rpg
        >>> layer = prune(rpg.nn.Linear(64, 64), 0.5)
        >>> sorted(name for name, _ in finish_pruning(layer).named_parameters())
        ['bias', 'rpg_bank.weight']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, wanted an nn.Module")
    pruned = [(module, name) for _, module, name in pruned_parameters(model)]
    if not pruned:
        raise _checks.fail("model", "a model in which nothing is pruned", "a pruned one")
    for module, name in dict.fromkeys(pruned):
        torch_prune.remove(module, name)
    return model


def pruned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path of the module, module, and name of every pruned parameter, as often as it stands there.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> _ = prune([(net[1], "weight")], 0.5)
        >>> [(path, name) for path, _, name in pruned_parameters(net)]
        [('1', 'weight')]
    """
    for path, module in model.named_modules(remove_duplicate=False):
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, torch_prune.BasePruningMethod):
                yield path, module, hook._tensor_name


def _parameters(target: nn.Module | Iterable[Parameter]) -> list[Parameter]:
    """What to prune, each once."""
    if isinstance(target, nn.Module):
        banks = [module for module in target.modules() if isinstance(module, ParameterBank)]
        if not banks:
            got = f"a {type(target).__name__} without a bank"
            wanted = "a model with banks, or pairs of a module and the name of a parameter"
            raise _checks.fail("target", got, wanted)
        return [(bank, "weight") for bank in banks]
    if not isinstance(target, Iterable) or isinstance(target, str | Tensor):
        raise TypeError(f"target: got a {type(target).__name__}, wanted an nn.Module, or pairs")
    pairs = list(target)
    for pair in pairs:
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and isinstance(pair[0], nn.Module)
            and isinstance(pair[1], str)
        ):
            raise TypeError(f"target: got {pair!r}, wanted pairs (nn.Module, str)")
    if not pairs:
        raise _checks.fail("target", "no pairs", "at least one")
    return list(dict.fromkeys(pairs))


def _values(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """What is trained, and the mask that it has; None where it is not pruned yet.

    Not the attribute ``name`` itself, which torch brings up to date when the module is called.
    """
    hooks = module._forward_pre_hooks.values()
    if any(isinstance(h, torch_prune.BasePruningMethod) and h._tensor_name == name for h in hooks):
        original, mask = module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
        assert original is not None
        return original, mask
    values = module._parameters.get(name)
    if values is None:
        got = f"{name!r} of a {type(module).__name__}"
        raise _checks.fail("target", got, "the name of a parameter, pruned already or not")
    return values, None


def _scores(module: nn.Module, name: str, by: str) -> tuple[Tensor, Tensor]:
    """Magnitudes of elements or slots, and which of them are left: both of one dimension."""
    values, mask = _values(module, name)
    where = f"{name} of a {type(module).__name__}"
    if values.is_meta or is_traceable_wrapper_subclass(values):
        got = f"{where} on meta" if values.is_meta else f"{where} as a {type(values).__name__}"
        raise _checks.fail("target", got, "a plain tensor that has values")
    if not values.numel():
        raise _checks.fail("target", f"{where} without elements", "values to choose from")
    with torch.no_grad():
        # Of 16 bits, too many magnitudes are alike once they are squared.
        magnitude = values.detach().to(torch.promote_types(values.dtype, torch.float32)).abs()
        if not bool(magnitude.isfinite().all()):
            raise _checks.fail("target", f"{where} with NaN or infinities", "finite values")
        left = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
        if by == ELEMENT:
            return magnitude.flatten(), left.flatten()
        masked = (magnitude * left).double()
        return torch.linalg.vector_norm(masked, dim=1) / math.sqrt(masked.shape[1]), left.any(1)


def _count(amount: object, left: int, by: str) -> int:
    """How many of those that are left go, rounded as torch rounds."""
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise TypeError(f"amount: got a {type(amount).__name__}, wanted an int or a float")
    if isinstance(amount, float) and not 0 <= amount < 1:
        raise _checks.fail("amount", amount, f"a share of the {by}s that are left: 0 to below 1")
    count = round(amount * left) if isinstance(amount, float) else amount
    if not 0 <= count < left:
        got = f"{amount}, which is {count} of {left} {by}s that are left"
        raise _checks.fail("amount", got, f"one that leaves at least one {by}")
    return count
