"""``torch.vmap`` of the operators.

Where only the activations, the gradients of results or the indices are batched, they are one more
leading dimension, and the operator is called once. Otherwise (banks, biases, and the gradients of
banks, of which each sample has one) it is called for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rpg_kernels.backends.call import OPERATORS
from rpg_kernels.ops import _library as lib

# Operator -> the argument that takes any leading dimensions, or of images one more batch.
FOLDED = {
    "linear": 0,
    "linear_input_grad": 0,
    "conv2d": 0,
    "conv2d_input_grad": 0,
    "embedding": 2,
}
_INPUT_SIZE = 3  # argument of conv2d_input_grad


class _Info(Protocol):
    batch_size: int


def _rule(name: str) -> Callable[..., tuple[Tensor, int]]:
    operator = getattr(torch.ops.rpg_kernels, name).default

    def run(info: _Info, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
        batched = [i for i, dim in enumerate(in_dims) if isinstance(dim, int)]
        if batched != [FOLDED.get(name)]:
            return _each(operator, info.batch_size, in_dims, args), 0
        folded = list(args)
        at = batched[0]
        folded[at] = args[at].movedim(in_dims[at], 0)
        if not name.startswith("conv2d"):
            return operator(*folded), 0
        leading = folded[at].shape[:2]
        folded[at] = folded[at].flatten(0, 1)
        if name == "conv2d_input_grad":
            images, *image = folded[_INPUT_SIZE]
            folded[_INPUT_SIZE] = [info.batch_size * images, *image]
        return operator(*folded).unflatten(0, leading), 0

    return run


def _each(operator: Any, batch: int, in_dims: Sequence[Any], args: Sequence[Any]) -> Tensor:
    """The results of all samples, stacked."""

    def sample(number: int) -> list[Any]:
        return [
            arg.select(dim, number) if isinstance(dim, int) else arg
            for arg, dim in zip(args, in_dims, strict=True)
        ]

    return torch.stack([operator(*sample(number)) for number in range(batch)])


def _both(
    input_grad: Sequence[int], bank_grad: Sequence[int], name: str
) -> Callable[..., tuple[tuple[Tensor, ...], tuple[int | None, ...]]]:
    """Two operators, by their own rules; each where something of its own is batched.

    Args:
        input_grad, bank_grad: which arguments of both gradients' operator each takes.
        name: of the layer's operator.
    """

    def run(
        info: _Info, in_dims: Sequence[Any], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        results: list[Tensor] = []
        dims: list[int | None] = []
        for kind, taken in (("input_grad", input_grad), ("bank_grad", bank_grad)):
            of, of_dims = [args[i] for i in taken], [in_dims[i] for i in taken]
            if kind == "input_grad" and name == "conv2d":  # which takes the size of x
                x, dim = of[_INPUT_SIZE], of_dims[_INPUT_SIZE]
                of_dims[_INPUT_SIZE] = None
                of[_INPUT_SIZE] = list((x.select(dim, 0) if isinstance(dim, int) else x).shape)
            if any(isinstance(dim, int) for dim in of_dims):
                result, dim = _rule(f"{name}_{kind}")(info, of_dims, *of)
            else:
                operator = getattr(torch.ops.rpg_kernels, f"{name}_{kind}").default
                result, dim = operator(*of), None
            results.append(result)
            dims.append(dim)
        return tuple(results), tuple(dims)

    return run


# (dy, bank, table, x, placement, [stride, padding, dilation, groups,] dtype, back end)
_BOTH = {
    "linear_grads": _both((0, 1, 2, 4, 6), (0, 3, 2, 4, 5, 6), "linear"),
    "conv2d_grads": _both((0, 1, 2, 3, *range(4, 9), 10), (0, 3, 2, *range(4, 11)), "conv2d"),
}


def register() -> None:
    """Register the rules of all operators, which are defined by now."""
    rules = {name: _rule(name) for name in OPERATORS} | _BOTH
    for name, rule in rules.items():
        torch.library.register_vmap(f"{lib.NAMESPACE}::{name}", rule, lib=lib.LIBRARY)
