"""One sum for what all layers of a model add to the gradient of their bank.

To autograd the gradient of every layer's bank is a tensor as large as the bank, which it adds to
that of the layer before. So a model of L layers would write and read about 4 · L · D numbers
backward, D being the bank's elements, however few of them a layer reads. Layers therefore read the
bank through one node of the graph (``values``), and backward add to a sum that belongs to this node
and to the call of backward. The node hands it on when all of them have.

It is left to autograd where anything looks on that has to see each gradient: derivatives of
gradients, transforms, modes, tracing and compiling, tensors that are more or less than memory,
anomaly detection; and on GPUs, whose streams autograd keeps in order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef


class _Values(torch.autograd.Function):
    """The bank's values as layers read them.

    Its node holds the weight, how that was made, and ``sums``: one for each call of backward that
    is under way, by its number. One that broke leaves its sum there as long as the graph lives.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sums, ctx.weight, ctx.made_by = {}, weight, weight.grad_fn
        ctx.version = weight._version
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        total: Tensor | None = ctx.sums.pop(torch._C._current_graph_task_id(), None)
        if total is None:
            return grad
        return (total if grad is None else total.add_(grad)).to(ctx.weight.dtype)


# By a weight's id, the values that layers have read last, while a graph holds them: as long as it
# does, their node holds the weight, whose id is therefore no other's. A weight is not referred to
# from here, since torch.utils.swap_tensors wants nobody to do so.
_latest: dict[int, TensorWeakRef] = {}


def values(weight: Tensor) -> Tensor:
    """What layers that read ``weight`` should read: the same tensor for all layers of a graph.

    Args:
        weight: of a bank.

    Returns:
        ``weight`` itself where gradients are left to autograd.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad) or _is_watched(weight):
        return weight
    reference = _latest.get(id(weight))
    known: Tensor | None = None if reference is None else reference()
    if known is None or not _is_of(known, weight):
        for key in [key for key, other in list(_latest.items()) if other() is None]:
            _latest.pop(key, None)
        known = _Values.apply(weight)  # type: ignore[no-untyped-call]
        _latest[id(weight)] = TensorWeakRef(known)
    return known


def _is_of(known: Tensor, weight: Tensor) -> bool:
    node: Any = known.grad_fn
    return (
        node.made_by is weight.grad_fn  # detach_() changes nothing else
        and node.version == weight._version
        and known.data_ptr() == weight.data_ptr()  # .data may have been replaced
        and known.dtype == weight.dtype
    )


def node_of(bank: Tensor) -> Any:
    """The node that an operator's backward adds to, for ``sum_of``; None: there is none.

    Args:
        bank: that the operator reads.
    """
    node = bank.grad_fn
    return node if isinstance(node, _Values._backward_cls) else None


def sum_of(node: Any, *operands: Tensor | None) -> Tensor | None:
    """The sum ``[slots, granularity]`` that a layer's backward adds to, in float32 or, of a float64
    bank, float64; None where it has to return a gradient.

    Args:
        node: from ``node_of``, in the forward pass.
        operands: what the layer's backward reads.
    """
    if node is None or torch.is_grad_enabled() or _is_watched(*operands):
        return None
    task = torch._C._current_graph_task_id()
    # A call of backward that nobody asked for the bank's gradient does not reach the node.
    if task < 0 or not torch._C._will_engine_execute_node(node):
        return None
    if task not in node.sums:
        dtype = torch.promote_types(node.weight.dtype, torch.float32)
        node.sums[task] = torch.zeros(node.weight.shape, dtype=dtype)
    total: Tensor = node.sums[task]
    return total


_PLAIN = torch._C._dispatch_keys(torch.empty(0)).raw_repr()


def _is_watched(*operands: Tensor | None) -> bool:
    """Whether more than plain memory of the CPU, read by kernels, may be at work."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch.is_anomaly_enabled()
        or bool(torch._C._len_torch_dispatch_stack())
        or torch._C._are_functorch_transforms_active()
        or any(
            torch._C._dispatch_keys(each).raw_repr() != _PLAIN
            for each in operands
            if each is not None
        )
    )
