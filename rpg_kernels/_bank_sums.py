"""One sum for what all layers of a model add to the gradient of their bank.

To autograd the gradient of every layer's bank is a tensor as large as the bank, which it adds to
that of the layer before. So a model of L layers would write and read about 4 · L · D numbers
backward, D being the bank's elements, however few of them a layer reads. Layers therefore read the
bank through one node of the graph (``values``), and backward add to a sum that belongs to this node
and to the call of backward. The node hands it on when all of them have.

It is left to autograd where anything looks on that has to see each gradient: derivatives of
gradients, transforms, tracing and compiling; and on GPUs, whose streams autograd keeps in order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary


class _Values(torch.autograd.Function):
    """The bank's values as layers read them: a view. ``sums``: one for each call of
    backward that is under way, by its number."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sums, ctx.shape, ctx.dtype = {}, weight.shape, weight.dtype
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        total: Tensor | None = ctx.sums.pop(torch._C._current_graph_task_id(), None)
        if total is None:
            return grad
        return (total if grad is None else total.add_(grad)).to(ctx.dtype)


# The values that layers have read last, while a graph holds them, and the weight's version then.
_latest: Any = WeakTensorKeyDictionary()


def values(weight: Tensor) -> Tensor:
    """What layers that read ``weight`` should read: the same view for all layers of a graph.

    Args:
        weight: of a bank.

    Returns:
        ``weight`` itself where gradients are left to autograd.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad) or not _is_plain(weight):
        return weight
    version = weight._version
    reference, seen = _latest.get(weight, (None, None))
    known: Tensor | None = None if reference is None else reference()
    # ``weight.data`` may have been replaced, which changes no version.
    if known is None or seen != version or known.data_ptr() != weight.data_ptr():
        known = _Values.apply(weight)  # type: ignore[no-untyped-call]
        _latest[weight] = TensorWeakRef(known), version
    return known


def node_of(bank: Tensor) -> Any:
    """The node that an operator's backward adds to, for ``sum_of``; None: there is none.

    Args:
        bank: that the operator reads.
    """
    node = bank.grad_fn
    return node if isinstance(node, _Values._backward_cls) else None


def sum_of(node: Any) -> Tensor | None:
    """The sum ``[slots, granularity]`` that a layer's backward adds to, in float32 or, of a float64
    bank, float64; None where it has to return a gradient.

    Args:
        node: from ``node_of``, in the forward pass.
    """
    task = torch._C._current_graph_task_id()
    if node is None or task < 0 or torch.is_grad_enabled():
        return None
    if not torch._C._will_engine_execute_node(node):  # nobody asked for the bank's gradient
        return None
    if task not in node.sums:
        dtype = torch.promote_types(node.dtype, torch.float32)
        node.sums[task] = torch.zeros(node.shape, dtype=dtype)
    total: Tensor = node.sums[task]
    return total


def _is_plain(weight: Tensor) -> bool:
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )
