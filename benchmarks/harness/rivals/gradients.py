"""Training of a layer: forward and all gradients in a call, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.harness.rivals.contender import Layers, Problem, relative


def trained(
    problem: Problem,
    dtype: torch.dtype,
    forward: Callable[[int, Tensor], Tensor],
    parameters: Sequence[Sequence[Tensor]],
    weight: Callable[[], Tensor],
) -> Layers:
    """Layers whose call runs forward and backward, through autograd.

    Judged are y and dx against float64 of the weight, and the gradients by a sum rule: y is of
    degree one in each parameter, so with dy = y every gradient, times its parameter, adds up to
    the squared norm of y.

    Args:
        problem: whose x is taken.
        dtype: of x and dy.
        forward: y of a layer's number and x.
        parameters: of each layer; those that layers share stand in each.
        weight: that layer 0 stands for, ``[N, K]``.
    """
    x = {batch: of.to(dtype).requires_grad_() for batch, of in problem.x.items()}
    generator = torch.Generator().manual_seed(problem.seed + 1)
    dy = {b: torch.randn(b, problem.shape[0], generator=generator).to(dtype) for b in x}

    def run(i: int, batch: int, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y = forward(i, x[batch])
            found = torch.autograd.grad(y, (x[batch], *parameters[i]), of(y))
        return (y.detach(), *found)

    def check(batch: int) -> float:
        rows = problem.checked[batch]
        y, dx, *_ = run(0, batch, lambda y: dy[batch])
        whole = weight()
        exact_x = x[batch].detach()[rows].double()
        exact_y = torch.cat([exact_x @ w.double().t() for w in whole.split(1024)], 1)
        pieces = zip(dy[batch][rows].split(1024, 1), whole.split(1024), strict=True)
        exact_dx = torch.stack([d.double() @ w.double() for d, w in pieces]).sum(0)
        errors = [
            relative(y[rows].double(), exact_y),
            relative(dx[rows].double(), exact_dx),
        ]
        y, _, *gradients = run(0, batch, lambda y: y.detach())
        squares = float(y.double().square().sum())
        for gradient, parameter in zip(gradients, parameters[0], strict=True):
            total = float((gradient.double() * parameter.detach().double()).sum())
            errors.append(abs(total / squares - 1))
        finite = all(bool(t.isfinite().all()) for t in (y, dx, *gradients))
        return max(errors) if finite else float("inf")

    held = parameters[0]
    return Layers(
        lambda i, batch: run(i, batch, lambda y: dy[batch]),
        len(parameters),
        sum(p.nbytes for p in held),
        sum(p.numel() for p in held),
        check=check,
    )
