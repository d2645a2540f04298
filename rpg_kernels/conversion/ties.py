"""Parameters on one memory: layers that are tied are shared together, or not at all."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from rpg_kernels.conversion.select import Selection


def tie_key(tensor: Tensor) -> Hashable:
    """Equal for tensors that are one: the same object, or the same elements in the same order.

    Example:
        >>> first = nn.Linear(2, 3).weight
        >>> tie_key(first) == tie_key(nn.Parameter(first.data)), tie_key(first) == tie_key(first.T)
        (True, False)
    """
    storage = _storage(tensor)
    if storage is None:
        return id(tensor)
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def keep_ties_together(model: nn.Module, found: Selection) -> Iterator[str]:
    """A memory used elsewhere too is shared only if all of its users are, in one shape.

    Yields the names that are taken out of ``found.shared``, with a reason in ``found.skipped``.
    """
    users: dict[Hashable, list[tuple[str, nn.Parameter]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            entry = f"{name}.{key}" if name else key, parameter
            users.setdefault(_storage(parameter) or id(parameter), []).append(entry)
    before = list(found.shared)
    for name in before:
        weight = cast(nn.Parameter, found.shared[name].weight)
        for key, other in users[_storage(weight) or id(weight)]:
            reason = _apart(weight, key, other, found)
            if reason:
                del found.shared[name]
                found.skipped[name] = reason
                break
    # Taking one out may leave another that is tied to it.
    while lost := [n for n in found.shared if _tied_to_skipped(n, before, users, found)]:
        for name in lost:
            del found.shared[name]
    _skip_padded_ties(found)
    yield from (name for name in before if name not in found.shared)


def _apart(weight: nn.Parameter, key: str, other: nn.Parameter, found: Selection) -> str:
    """Why a weight cannot be shared beside another parameter of its storage; "" when it can."""
    layer, _, attribute = key.rpartition(".")
    if tie_key(other) == tie_key(weight):
        if attribute == "weight" and layer in found.shared:
            return ""
        return f"its weight is tied to {key}, which is not shared"
    if _overlap(weight, other):
        return f"its weight lies on the memory of {key} in another shape"
    return ""


def _tied_to_skipped(
    name: str,
    before: list[str],
    users: dict[Hashable, list[tuple[str, nn.Parameter]]],
    found: Selection,
) -> bool:
    weight = cast(nn.Parameter, found.shared[name].weight)
    for key, other in users[_storage(weight) or id(weight)]:
        layer = key.rpartition(".")[0]
        if tie_key(other) == tie_key(weight) and layer in before and layer not in found.shared:
            found.skipped[name] = f"its weight is tied to {key}, which is not shared"
            return True
    return False


def _skip_padded_ties(found: Selection) -> None:
    tied: dict[Hashable, list[str]] = {}
    for name, module in found.shared.items():
        tied.setdefault(tie_key(cast(Tensor, module.weight)), []).append(name)
    for group in tied.values():
        padded = [n for n in group if getattr(found.shared[n], "padding_idx", None) is not None]
        if len(group) > 1 and padded:
            for name in group:
                del found.shared[name]
                found.skipped[name] = (
                    f"its weight is tied to {', '.join(n for n in group if n != name)} and has a "
                    "padding row, which a virtual weight can only mask in the lookup"
                )


def _storage(tensor: Tensor) -> int | None:
    """Which memory a tensor lies on; None for those without one."""
    if is_lazy(tensor):
        return None
    try:
        cdata: int = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # wrappers
        return None
    return cdata


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether the spans of two tensors of one storage meet; some views are like combs, few are."""
    spans = []
    for t in (first, second):
        if t.numel() == 0:
            return False
        low = t.storage_offset() * t.element_size()
        last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        spans.append((low, low + (last + 1) * t.element_size()))
    (a, b), (c, d) = spans
    return a < d and c < b
