"""FLOPs of the operators for ``torch.utils.flop_counter``: those of torch's dense operators.

Each figure is what torch's own formula says of the dense operator that ours stands for, so that a
converted network counts equal to the dense one. Looking up, unpacking and packing multiply nothing.

``torch.utils.flop_counter`` imports triton, which this package must not do when it is imported. So
the formulas are registered when that module is: a finder of that one name runs the usual import,
adds them to what it made, and goes away.
"""

from __future__ import annotations

import importlib.abc
import math
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from rpg_kernels.backends.call import OPERATORS
from rpg_kernels.law.placement import parse

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]
_op = torch.ops.rpg_kernels
_aten = torch.ops.aten


def _torchs(operator: Any, *shapes: Any, out: Any = None) -> int:
    """What torch's formula says of a dense operator."""
    formula = sys.modules[COUNTER].flop_registry[operator]
    flops: int = formula(*shapes, out_val=out)
    return flops


def _matrix(leading: Shape, placement: str) -> int:
    """A product of a batch and the weight; its gradients have the same number."""
    rows, columns = parse(placement).selected_shape
    return _torchs(_aten.mm, [math.prod(leading[:-1]), columns], [columns, rows])


def linear(x: Shape, bank: Shape, table: Any, bias: Any, placement: str, *_: Any, **__: Any) -> int:
    """As ``aten.mm`` or ``aten.addmm``."""
    return _matrix(x, placement)


def linear_input_grad(
    dy: Shape, bank: Shape, table: Any, placement: str, *_: Any, **__: Any
) -> int:
    """As ``aten.mm``."""
    return _matrix(dy, placement)


def linear_bank_grad(dy: Shape, x: Shape, table: Any, placement: str, *_: Any, **__: Any) -> int:
    """As ``aten.mm``; packing only adds."""
    return _matrix(dy, placement)


def linear_grads(
    dy: Shape, bank: Shape, table: Any, x: Shape, placement: str, *_: Any, **__: Any
) -> int:
    """As two of ``aten.mm``."""
    return 2 * _matrix(dy, placement)


def conv2d(
    x: Shape,
    bank: Shape,
    table: Any,
    bias: Any,
    placement: str,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    groups: int,
    backend: str,
    *,
    out_shape: Any,
) -> int:
    """As ``aten.convolution``."""
    weight = list(parse(placement).selected_shape)
    geometry = (stride, padding, dilation, False, [0, 0], groups)
    return _torchs(_aten.convolution, x, weight, None, *geometry, out=out_shape)


def _convolution_backward(
    dy: Shape, x: Shape, placement: str, geometry: Sequence[Any], of: Sequence[bool]
) -> int:
    weight = list(parse(placement).selected_shape)
    *strides, groups = geometry
    arguments = (dy, x, weight, None, *strides, False, [0, 0], groups, list(of))
    gradients = (x if of[0] else None, weight if of[1] else None, None)
    return _torchs(_aten.convolution_backward, *arguments, out=gradients)


def conv2d_input_grad(
    dy: Shape,
    bank: Shape,
    table: Any,
    input_size: Shape,
    placement: str,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    groups: int,
    *_: Any,
    **__: Any,
) -> int:
    """As ``aten.convolution_backward`` for the input alone."""
    geometry = (stride, padding, dilation, groups)
    return _convolution_backward(dy, input_size, placement, geometry, (True, False, False))


def conv2d_bank_grad(
    dy: Shape,
    x: Shape,
    table: Any,
    placement: str,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    groups: int,
    *_: Any,
    **__: Any,
) -> int:
    """As ``aten.convolution_backward`` for the weight alone."""
    geometry = (stride, padding, dilation, groups)
    return _convolution_backward(dy, x, placement, geometry, (False, True, False))


def conv2d_grads(
    dy: Shape,
    bank: Shape,
    table: Any,
    x: Shape,
    placement: str,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    groups: int,
    *_: Any,
    **__: Any,
) -> int:
    """As ``aten.convolution_backward`` for both."""
    geometry = (stride, padding, dilation, groups)
    return _convolution_backward(dy, x, placement, geometry, (True, True, False))


def nothing(*_: Any, **__: Any) -> int:
    """What only reads and adds."""
    return 0


PRODUCTS: dict[str, Callable[..., int]] = {
    "linear": linear,
    "linear_input_grad": linear_input_grad,
    "linear_bank_grad": linear_bank_grad,
    "linear_grads": linear_grads,
    "conv2d": conv2d,
    "conv2d_input_grad": conv2d_input_grad,
    "conv2d_bank_grad": conv2d_bank_grad,
    "conv2d_grads": conv2d_grads,
}


def packet(name: str) -> Any:
    """What a counter knows an operator by."""
    return getattr(_op, name)


def _register(counter: ModuleType) -> None:
    for name in {**OPERATORS, **PRODUCTS}:
        if packet(name) not in counter.flop_registry:  # somebody's own formula stays
            counter.register_flop_formula(packet(name))(PRODUCTS.get(name, nothing))


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds the flop counter as the finders behind it do, and registers once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find else None
            if spec is not None:
                self._register_after(spec.loader)
                return spec
        return None

    def _register_after(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == COUNTER:
                _register(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                del loader.exec_module

        loader.exec_module = exec_module


def register() -> None:
    """Register the formulas of all operators, which are defined by now, at once or in time."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
