"""The correctness gate: nothing that is wrong gets a figure.

Outputs, input gradients and parameter gradients are compared with the same computation in
float64, whose weight is put together from the map entry by entry. The criterion is that of the
tests::

    max|out - exact| <= 2 * max|torch in the same dtype - exact| + eps

where torch uses the weight rounded to that dtype, and eps is 2 * 2^-23 * max(1, max|exact|).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.cases import PASSES
from benchmarks.harness.problem import Problem, Stack

OUTPUT, INPUT_GRAD, PARAMETER_GRAD = "output", "input_grad", "parameter_grad"


@dataclass(frozen=True)
class Accuracy:
    """An error and what is allowed, both largest absolute differences."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """False for NaN as well."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Quantity:
    """What a result should be, in float64, and the error that is allowed."""

    exact: Tensor
    allowed: float

    def judge(self, got: Tensor) -> Accuracy:
        """Compare; NaN anywhere gives a NaN error, another shape an infinite one."""
        if got.shape != self.exact.shape:
            return Accuracy(float("inf"), self.allowed)
        return Accuracy(_largest(got.detach().double() - self.exact), self.allowed)


@dataclass(frozen=True)
class Exact:
    """The results that a problem should have, by whether the bank or a dense weight is trained."""

    output: Quantity
    input_grad: Quantity | None
    bank_grad: Quantity
    weight_grad: Quantity


def exact(problem: Problem, own_map: tuple[Tensor, Tensor, float] | None = None) -> Exact:
    """Compute the problem in float64 and, for what is allowed, in its own dtype.

    Args:
        problem: inputs and bank.
        own_map: index, sign and scale of an implementation with another map; None for ours.
    """
    case = problem.case
    index, sign, scale = own_map if own_map else (*problem.map(), problem.scale)
    ring = problem.bank.weight.detach().view(-1).double()
    weight = ring[index] * sign * scale
    results = []
    for dtype in (torch.float64, case.bank_dtype if case.op == "embedding" else case.x_dtype):
        w = weight.to(dtype).requires_grad_()
        if problem.rows is None:
            x = problem.x.detach().to(dtype).requires_grad_()
        else:  # the weight holds only the rows that are looked up
            x = torch.searchsorted(problem.rows, problem.x)
        y = problem.apply(x, w)
        leaves = [w, x] if x.requires_grad else [w]
        dw, *dx = torch.autograd.grad(y, leaves, problem.dy.to(dtype))
        packed = torch.zeros_like(ring).index_add_(
            0, index.flatten(), (dw.double() * sign * scale).flatten()
        )
        results.append((y.detach(), dx[0] if dx else None, packed.view_as(problem.bank.weight), dw))
    (y, dx_, packed, dw), (torch_y, torch_dx, torch_packed, torch_dw) = results
    bank_dtype = case.bank_dtype
    return Exact(
        quantity(y, torch_y),
        None if dx_ is None or torch_dx is None else quantity(dx_, torch_dx),
        quantity(packed, torch_packed.to(bank_dtype)),
        quantity(dw, torch_dw.to(bank_dtype)),
    )


def check(
    problem: Problem, stack: Stack, wanted: Exact, backward: bool = True
) -> dict[str, Accuracy]:
    """Run layer 0 on memory that held NaN, forward and as a rule backward, and judge what comes."""
    torch.full_like(problem.dy, float("nan"))
    y = stack.forward(0)
    result = {OUTPUT: wanted.output.judge(y)}
    if not backward:
        return result
    trained = stack.trained(0)
    leaves = [*problem.inputs, *trained]
    for leaf in leaves:
        torch.full_like(leaf, float("nan"))
    grads = list(torch.autograd.grad(y, leaves, problem.dy))
    if wanted.input_grad is not None:
        result[INPUT_GRAD] = wanted.input_grad.judge(grads.pop(0))
    grad = grads[0]
    if stack.trains == "weight":
        grad = grad if problem.rows is None else grad[problem.rows]
        result[PARAMETER_GRAD] = wanted.weight_grad.judge(grad)
    else:
        result[PARAMETER_GRAD] = wanted.bank_grad.judge(grad.view_as(problem.bank.weight))
    return result


def failures(accuracy: Mapping[str, Accuracy]) -> list[str]:
    """One sentence for each quantity that missed."""
    return [
        f"{name.replace('_', ' ')}: error {a.error:.2g}, allowed {a.allowed:.2g}"
        for name, a in accuracy.items()
        if not a.passed
    ]


def allowed_passes(accuracy: Mapping[str, Accuracy]) -> tuple[str, ...]:
    """The passes that may be timed: a forward needs its output right, the others everything."""
    if not accuracy[OUTPUT].passed:
        return ()
    return PASSES if PARAMETER_GRAD in accuracy and not failures(accuracy) else ("forward",)


def quantity(exact: Tensor, torchs: Tensor) -> Quantity:
    """What a result should be: exact, and within twice of what torch makes of it."""
    allowed = 2 * _largest(torchs.double() - exact)
    allowed += 2 * torch.finfo(torch.float32).eps * max(1.0, _largest(exact))
    return Quantity(exact, allowed)


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
