"""Which layers of a model are shared, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from rpg_kernels._tensors import DTYPES

SHARED_TYPES = (nn.Linear, nn.Conv2d, nn.Embedding)
Filter = Callable[[nn.Module, str], bool]
_TENSORS = {"weight", "bias"}
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


@dataclass
class Selection:
    """Names of the layers to share, in the model's order, and reasons for the rest."""

    shared: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def select(model: nn.Module, filter_fn: Filter | None) -> Selection:
    """Choose layers by the filter, or by the default rule.

    The default shares hidden layers: every nn.Linear, nn.Conv2d and nn.Embedding but the first
    (stem) and the last (classifier) of the model, and those whose weight starts as zeros; norms
    and biases always stay as they are, as in the paper (section 4). Layers whose parameter is tied
    are shared together or not at all.

    Args:
        model: any model.
        filter_fn: called as ``filter_fn(module, name)`` for every layer that can be shared;
            None for the default rule.
    """
    found = Selection()
    able: dict[str, nn.Module] = {}
    names = []
    for name, module in model.named_modules():
        layer = isinstance(module, SHARED_TYPES)
        if not layer and not any(True for _ in module.parameters(recurse=False)):
            continue
        if layer:
            names.append(name)
        reason = _obstacle(module)
        if reason is None:
            able[name] = module
        else:
            found.skipped[name] = reason
    for name, module in able.items():
        if filter_fn is not None:
            reason = "" if filter_fn(module, name) else "filter_fn returned False"
        elif name == names[-1]:
            reason = "last layer (classifier), kept by the default rule"
        elif name == names[0]:
            reason = "first layer (stem), kept by the default rule"
        elif _all_zero(module):
            reason = (
                "its weight starts as zeros, which a bank cannot give; kept by the default rule"
            )
        else:
            reason = ""
        if reason:
            found.skipped[name] = reason
        else:
            found.shared[name] = module
    _keep_ties_together(model, found)
    return found


def _obstacle(module: nn.Module) -> str | None:
    """Why a module with parameters cannot be shared; None when it can."""
    kind = type(module)
    if kind not in SHARED_TYPES:
        parents = [t.__name__ for t in SHARED_TYPES if isinstance(module, t)]
        if parents:
            return f"{kind.__name__} is a subclass of {parents[0]} and may use its weight itself"
        return f"{kind.__name__} has no virtual counterpart and keeps its own parameters"
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return "its weight is not a plain parameter"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}; a bank holds float64, float32, bfloat16 or float16"
    if weight.numel() == 0:
        return "its weight is empty"
    if not weight.requires_grad:
        return "its weight is frozen (requires_grad=False)"
    if any(getattr(module, hooks, None) for hooks in HOOKS):
        return "it has hooks, which a replacement would lose"
    if "forward" in vars(module):
        return "its forward is patched, which a replacement would lose"
    own = set(module._parameters) - _TENSORS | set(module._buffers) | set(module._modules)
    own |= set(vars(module)) - _attributes(kind) - {"bias"}
    if own:
        return f"it holds {', '.join(sorted(own))}, which a replacement would lose"
    if "bias" in vars(module):
        return "its bias is not a plain parameter"
    if isinstance(module, nn.Embedding):
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                return f"{option} changes or indexes a stored weight"
    return None


@cache
def _attributes(kind: type[nn.Module]) -> set[str]:
    """What every layer of a kind has; made when first asked for, as meta tensors import a lot."""
    if kind is nn.Conv2d:
        return set(vars(nn.Conv2d(1, 1, 1, device="meta")))
    return set(vars(kind(1, 1, device="meta")))


def _all_zero(module: nn.Module) -> bool:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight.device.type != "meta" and not bool(weight.detach().any())


def _keep_ties_together(model: nn.Module, found: Selection) -> None:
    """A parameter used elsewhere too is shared only if all of its layers are, in one shape."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    for name, module in list(found.shared.items()):
        for key in owners[id(module.weight)]:
            layer, _, attribute = key.rpartition(".")
            if attribute != "weight" or layer not in found.shared:
                found.shared.pop(name, None)
                found.skipped[name] = f"its weight is tied to {key}, which is not shared"
                break
    tied: dict[int, list[str]] = {}
    for name, module in found.shared.items():
        tied.setdefault(id(module.weight), []).append(name)
    for group in tied.values():
        padded = [n for n in group if getattr(found.shared[n], "padding_idx", None) is not None]
        if len(group) > 1 and padded:
            for name in group:
                del found.shared[name]
                found.skipped[name] = (
                    f"its weight is tied to {', '.join(n for n in group if n != name)} and has a "
                    "padding row, which a virtual weight can only mask in the lookup"
                )
