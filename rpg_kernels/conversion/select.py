"""Which layers of a model are shared, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from rpg_kernels._tensors import DTYPES
from rpg_kernels._wrappers import COMPILED
from rpg_kernels.conversion.kinds import COMPUTING, HOOKS, SHARED_TYPES, attributes, kind_of
from rpg_kernels.conversion.reach import plain_attributes, reached
from rpg_kernels.conversion.ties import keep_ties_together

Filter = Callable[[nn.Module, str], bool]
_TENSORS = {"weight", "bias"}
_TAKEN = ("virtual_weight", "alone", "rpg_bank", "rpg_operator", "dense_type")  # ours on a layer


@dataclass
class Selection:
    """Names of the layers to share, in the model's order, and reasons for the rest."""

    shared: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # of the skipped, what the filter wanted


def select(
    model: nn.Module, filter_fn: Filter | None, otherwise: str = "filter_fn returned False"
) -> Selection:
    """Choose layers by the filter, or by the default rule.

    The default shares hidden layers: every nn.Linear, nn.Embedding, convolution and transposed
    convolution of one or two axes, and Conv1D (of transformers) but the first (stem) and the last
    (classifier) of the model, and those whose weight starts as zeros; norms and biases always stay
    as they are, as in the paper (section 4).
    Layers whose parameter is tied are shared together or not at all.

    Args:
        model: any model.
        filter_fn: called as ``filter_fn(module, name)`` for every layer that can be shared;
            None for the default rule.
        otherwise: the reason for those that the filter leaves out.
    """
    found = Selection()
    able: dict[str, nn.Module] = {}
    names = []
    compiled = {id(m._modules.get(COMPILED)) for m in model.modules()}
    held = _held_elsewhere(model)
    for name, module in model.named_modules():
        layer = is_layer(module)
        if not layer and not any(True for _ in module.parameters(recurse=False)):
            continue
        if layer:
            names.append(name)
        reason = obstacle(module)
        if id(module) in compiled:
            reason = reason or "torch.compile was called on it alone and goes on calling it"
        if id(module) in held:
            reason = reason or f"{held[id(module)]} holds it too and would go on calling it"
        if reason is None:
            able[name] = module
            continue
        found.skipped[name] = reason
        if layer and (filter_fn(module, name) if filter_fn else _unexpected(module)):
            found.refused[name] = reason
    for name, module in able.items():
        if filter_fn is not None:
            reason = "" if filter_fn(module, name) else otherwise
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
    for name in keep_ties_together(model, found):
        if filter_fn is not None:
            found.refused[name] = found.skipped[name]
    return found


def _held_elsewhere(model: nn.Module) -> dict[int, str]:
    """Modules by id, and the plain attribute of another module that leads to them."""
    held: dict[int, str] = {}
    for name, module in model.named_modules():
        for key, value in plain_attributes(module):
            where = f"the attribute {key} of {name or 'the model'}"
            found = (m for m in reached(value) if isinstance(m, nn.Module) and m is not module)
            held.update((id(m), where) for m in found)
    return held


def is_layer(module: nn.Module) -> bool:
    """Whether a filter is asked about a module: of a type that has a virtual counterpart."""
    return isinstance(module, SHARED_TYPES) or kind_of(module) is not None


def obstacle(module: nn.Module) -> str | None:
    """Why a module with parameters cannot be shared; None when it can.

    Only what would change the arithmetic: plain attributes travel to the virtual layer.
    """
    kind = type(module)
    if kind_of(module) is None:
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
    extra = attributes(module)
    patched = sorted(set(COMPUTING) & {k for k, v in extra.items() if v is not None})
    if patched:
        return f"its {', '.join(patched)} is patched, which a replacement would lose"
    own = set(module._parameters) - _TENSORS | set(module._buffers) | set(module._modules)
    own |= set(extra) & set(_TAKEN)
    if own:
        return f"it holds {', '.join(sorted(own))}, which a replacement would lose"
    if "bias" in vars(module):
        return "its bias is not a plain parameter"
    if isinstance(module, nn.Embedding):
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                return f"{option} changes or indexes a stored weight"
    return None


def _unexpected(module: nn.Module) -> bool:
    """Whether someone who converts by the default rule would expect such a layer to be shared."""
    return kind_of(module) is not None and getattr(module.weight, "requires_grad", True)


def _all_zero(module: nn.Module) -> bool:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight.device.type != "meta" and not bool(weight.detach().any())
