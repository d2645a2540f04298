"""The channel graph of a model, by torch.fx.

Operations carry the numbers of channels on. A sum of two tensors binds theirs. Channels that meet
the model's input or output, or an operation that is not known here, are fixed: such a tensor keeps
its shape, so that what the operation does need not be known.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from rpg_kernels import _checks
from rpg_kernels.nn import VirtualLayer
from rpg_kernels.pruning import operations as known
from rpg_kernels.pruning.channel_graph import ChannelGraph, Use
from rpg_kernels.pruning.cutting import (
    LINEAR,
    NORMS,
    TRANSPOSED,
    channels_of,
    has_channels,
    is_depthwise,
)


@dataclass(frozen=True)
class Value:
    """A tensor of the traced network: its shape, and along one dimension its channels' numbers.

    ``numbers`` is None where nothing of the tensor can be removed.
    """

    shape: tuple[int, ...]
    dim: int = 0
    numbers: tuple[int, ...] | None = None


def channel_graph(model: nn.Module, example: Sequence[Any]) -> ChannelGraph:
    """Trace a model, and run it once.

    Args:
        model: in eval mode; nothing of it is changed.
        example: what it is called with.

    Raises:
        ValueError: torch.fx cannot trace it, or it has a layer that the trace does not call.
    """
    try:
        run = _Interpreter(model, fx.GraphModule(model, _Tracer().trace(model)))
        with torch.no_grad():
            run.run(*example)
    except Exception as error:
        got = f"one that torch.fx cannot trace and run ({type(error).__name__}: {error})"
        wanted = "a model whose forward has no branches that depend on tensors"
        raise _checks.fail("model", got[:500], wanted) from error
    for name, module in model.named_modules():
        # A layer that is only called while training, such as an auxiliary head, would no longer
        # fit what it reads.
        if has_channels(module) and name not in run.channels.uses:
            got = f"layer {name}, which the model does not call in eval mode"
            raise _checks.fail("model", got, "one that calls every layer, as a module")
    for use, why in run.unlike_others():
        run.channels.fix((*use.out, *use.into), f"{use.name}, {why}")
    return run.channels


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, VirtualLayer)
            or has_channels(m)
            or super().is_leaf_module(m, module_qualified_name)
        )


class _Interpreter(fx.Interpreter):
    """Runs the traced network, and notes what each node does with channels."""

    def __init__(self, model: nn.Module, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.model = model
        self.channels = ChannelGraph()
        self.values: dict[fx.Node, Value] = {}
        self.read_directly: set[str] = set()  # modules whose tensors the forward reads by name

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        value = self._value(n, result)
        if value is not None:
            self.values[n] = value
        return result

    def unlike_others(self) -> Iterator[tuple[Use, str]]:
        """Layers whose channels must stay, and why."""
        owners = Counter(
            id(tensor)
            for module in self.model.modules()
            for tensor in module._parameters.values()
            if tensor is not None
        )
        for use in self.channels.uses.values():
            layer = use.layer
            grouped = getattr(layer, "groups", 1) > 1 and not is_depthwise(layer)
            tied = any(t is not None and owners[id(t)] > 1 for t in layer._parameters.values())
            own = isinstance(layer, VirtualLayer) or "weight" in layer._parameters
            if grouped:
                yield use, "which has groups"
            elif tied:
                yield use, "whose parameters are another layer's too"
            elif not own:  # a parametrised layer has a type of its own, and is not known at all
                yield use, "whose weight is computed from other parameters"
            elif layer._forward_hooks or layer._forward_pre_hooks:
                yield use, "which has hooks"
            elif use.name in self.read_directly:
                yield use, "whose weight the model's forward reads by itself"

    def _value(self, n: fx.Node, result: object) -> Value | None:
        """What a node's result is made of, after what the node binds and fixes are noted."""
        shape = tuple(result.shape) if isinstance(result, Tensor) else ()
        if n.op == "output":
            self._fix(n, "the model's output")
            return None
        if n.op == "get_attr":
            self.read_directly.add(str(n.target).rpartition(".")[0])
        if n.op in ("get_attr", "placeholder"):
            return Value(shape) if isinstance(result, Tensor) else None
        if n.op == "call_module":
            made = self._of_module(n, self.module.get_submodule(str(n.target)), shape)
        else:
            made = self._of_function(n, shape)
        if made is None:
            self._fix(n, f"{n.name}, an operation that pruning does not know")
            made = Value(shape)
        return made if isinstance(result, Tensor) else None

    def _fix(self, n: fx.Node, why: str) -> None:
        for node in n.all_input_nodes:
            if node in self.values:
                self.channels.fix(self.values[node].numbers, why)

    def _first(self, n: fx.Node) -> Value | None:
        """The value of the first argument, where it is the only tensor."""
        tensors = [node for node in n.all_input_nodes if node in self.values]
        only = len(tensors) == 1 and n.args and n.args[0] is tensors[0]
        return self.values[tensors[0]] if only else None

    def _of_module(self, n: fx.Node, module: nn.Module, shape: tuple[int, ...]) -> Value | None:
        x, kind = self._first(n), type(module)
        if x is None:
            return None
        if has_channels(module):
            return self._of_layer(n, module, x, shape)
        if kind in known.ELEMENTWISE_MODULES:
            return Value(shape, x.dim, x.numbers)
        if kind is nn.PReLU and cast(nn.PReLU, module).num_parameters == 1:
            return Value(shape, x.dim, x.numbers)
        if kind in known.BY_CHANNEL_MODULES:
            return _by_channel(x, shape)
        if kind is nn.Flatten:
            has = cast(nn.Flatten, module)
            return _flattened(x, shape, has.start_dim, has.end_dim)
        return None

    def _of_layer(self, n: fx.Node, layer: nn.Module, x: Value, shape: tuple[int, ...]) -> Value:
        name, (out, into) = str(n.target), channels_of(layer)
        axes = 0 if isinstance(layer, LINEAR) else len(getattr(layer, "kernel_size", ()))
        dim = len(x.shape) - 1 - axes
        if isinstance(layer, NORMS):
            dim = 1
        read = self._numbers(x, dim, into, name)
        use = self.channels.uses.get(name)
        if use is None:
            made = read if isinstance(layer, NORMS) else self.channels.new(out)
            use = self.channels.uses[name] = Use(name, layer, made, read)
            if is_depthwise(layer):
                self.channels.bind(made, read)
        else:
            self.channels.bind(use.into, read)
        of_output = shape if not isinstance(layer, TRANSPOSED) else x.shape
        use.positions += math.prod(of_output) // of_output[dim]
        before = n.args[0]
        if isinstance(layer, NORMS) and isinstance(before, fx.Node) and len(before.users) == 1:
            producer = self.channels.uses.get(str(before.target))
            if producer is not None and before.op == "call_module":
                producer.gate = False
        return Value(shape, dim, use.out)

    def _numbers(self, x: Value, dim: int, size: int, reader: str) -> tuple[int, ...]:
        """The channels that a layer reads along a dimension; fixed ones where there are none."""
        if x.numbers is not None and x.dim == dim and len(x.numbers) == size:
            return x.numbers
        self.channels.fix(x.numbers, f"{reader}, which reads another dimension")
        fresh = self.channels.new(size)
        self.channels.fix(fresh, f"{reader}, which reads what no layer made")
        return fresh

    def _of_function(self, n: fx.Node, shape: tuple[int, ...]) -> Value | None:
        target: Any = n.target
        if target in known.PAIRWISE:
            return self._pair(n, shape)
        if target in known.JOINS:
            return self._joined(n, shape)
        x = self._first(n)
        if x is None:
            return None if any(node in self.values for node in n.all_input_nodes) else Value(shape)
        if target in known.ELEMENTWISE:
            return Value(shape, x.dim, x.numbers)
        if target in known.BY_CHANNEL:
            return _by_channel(x, shape)
        if target in known.FLATTENS:
            ends = [*n.args[1:], *([0, -1][len(n.args) - 1 :])]
            start, end = n.kwargs.get("start_dim", ends[0]), n.kwargs.get("end_dim", ends[1])
            return _flattened(x, shape, cast(int, start), cast(int, end))
        if target in known.VIEWS:
            flat = len(n.args) == 3 and n.args[2] == -1 and shape[:1] == x.shape[:1]
            return _flattened(x, shape, 1, -1) if flat else None
        if target in known.MEANS:
            return _reduced(x, shape, n)
        return Value(()) if self._asks_another_size(n, x) else None

    def _asks_another_size(self, n: fx.Node, x: Value) -> bool:
        """Whether a node asks for sizes other than that of the channels."""
        if n.target in known.SIZES and len(n.args) == 2:
            asked = [n.args[1]]
        elif (n.target is getattr and n.args[1:] == ("shape",)) or n.target in known.SIZES:
            if any(user.target is not operator.getitem for user in n.users):
                return False
            asked = [user.args[1] for user in n.users]
        else:
            return n.target is getattr and n.args[1] in ("device", "dtype", "ndim")
        return all(isinstance(i, int) and i % len(x.shape) != x.dim for i in asked)

    def _pair(self, n: fx.Node, shape: tuple[int, ...]) -> Value | None:
        given = [self.values[a] for a in n.args if isinstance(a, fx.Node) and a in self.values]
        if len(n.args) != 2 or n.kwargs or not given:
            return None if given else Value(shape)
        carrying = [value for value in given if value.numbers is not None]
        if not carrying:
            return Value(shape)
        first, *others = sorted(carrying, key=lambda value: -len(cast(Any, value.numbers)))
        assert first.numbers is not None
        back = first.dim - len(first.shape)
        for other in given:
            size = other.shape[back] if len(other.shape) >= -back else 1
            if other is first:
                continue
            if other in others and other.dim - len(other.shape) == back and size > 1:
                self.channels.bind(first.numbers, cast(Any, other.numbers))
            elif other in others or size > 1:
                why = f"{n.name}, which joins it with a tensor of another kind"
                self.channels.fix(other.numbers, why)
                if size > 1:
                    self.channels.fix(first.numbers, why)
        return Value(shape, back + len(shape), first.numbers)

    def _joined(self, n: fx.Node, shape: tuple[int, ...]) -> Value | None:
        nodes = n.args[0] if n.args else None
        given = [self.values.get(node) for node in nodes] if isinstance(nodes, list | tuple) else []
        dim = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", 0)
        if not given or not isinstance(dim, int) or any(value is None for value in given):
            return None
        dim %= len(shape)
        parts = cast(list[Value], given)
        if all(value.numbers is not None and value.dim != dim for value in parts):
            first, *others = parts
            if all(other.dim == first.dim for other in others):
                for other in others:
                    self.channels.bind(cast(Any, first.numbers), cast(Any, other.numbers))
                return Value(shape, first.dim, first.numbers)
            return None
        numbers: list[int] = []
        for value in parts:
            numbers += self._numbers(value, dim, value.shape[dim], n.name)
        return Value(shape, dim, tuple(numbers))


def _by_channel(x: Value, shape: tuple[int, ...]) -> Value | None:
    """Of an operation on images or sequences, each channel by itself."""
    same = x.dim == 1 and len(shape) == len(x.shape) and shape[:2] == x.shape[:2]
    return Value(shape, x.dim, x.numbers) if same or x.numbers is None else None


def _flattened(x: Value, shape: tuple[int, ...], start: int, end: int) -> Value | None:
    """Dimensions start to end as one: each channel's number as often as it has positions."""
    start, end = start % len(x.shape), end % len(x.shape)
    if x.numbers is None:
        return Value(shape)
    if x.dim == start and len(shape) == len(x.shape) - (end - start):
        times = math.prod(x.shape[start + 1 : end + 1])
        return Value(shape, start, tuple(i for i in x.numbers for _ in range(times)))
    return Value(shape, x.dim, x.numbers) if x.dim < start else None


def _reduced(x: Value, shape: tuple[int, ...], n: fx.Node) -> Value | None:
    """A mean or the like over other dimensions than the channels'."""
    dims = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim")
    of = [dims] if isinstance(dims, int) else dims
    if x.numbers is None:
        return Value(shape)
    if not isinstance(of, list | tuple) or not of:
        return None
    gone = {cast(int, dim) % len(x.shape) for dim in of}
    if x.dim in gone:
        return None
    below = 0 if len(shape) == len(x.shape) else sum(dim < x.dim for dim in gone)
    return Value(shape, x.dim - below, x.numbers)
