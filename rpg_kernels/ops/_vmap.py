"""``torch.vmap`` of the operators.

Where only the activations, the gradients of results or the indices are batched, they are one more
leading dimension, and the operator is called once. Otherwise (banks, biases, and the gradients of
banks, of which each sample has one) it is called for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def _register(name: str) -> None:
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

    torch.library.register_vmap(f"{lib.NAMESPACE}::{name}", run, lib=lib.LIBRARY)


def _each(operator: Any, batch: int, in_dims: Sequence[Any], args: Sequence[Any]) -> Tensor:
    """The results of all samples, stacked."""

    def sample(number: int) -> list[Any]:
        return [
            arg.select(dim, number) if isinstance(dim, int) else arg
            for arg, dim in zip(args, in_dims, strict=True)
        ]

    return torch.stack([operator(*sample(number)) for number in range(batch)])


def _linear_grads(info: _Info, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """Two operators, whose rules are known."""
    op = torch.ops.rpg_kernels

    def both(
        dy: Tensor, bank: Tensor, table: Any, x: Tensor, placement: str, dtype: Any, backend: str
    ) -> tuple[Tensor, Tensor]:
        dx = op.linear_input_grad(dy, bank, table, placement, backend)
        return dx, op.linear_bank_grad(dy, x, table, placement, dtype, backend)

    return torch.vmap(both, tuple(in_dims))(*args), (0, 0)


def register() -> None:
    """Register the rules of all operators, which are defined by now."""
    for name in OPERATORS:
        _register(name)
    name = f"{lib.NAMESPACE}::linear_grads"
    torch.library.register_vmap(name, _linear_grads, lib=lib.LIBRARY)
