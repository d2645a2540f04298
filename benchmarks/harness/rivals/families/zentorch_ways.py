"""AMD's zentorch. It keeps a packed copy of each weight beside the weight, and goes on with the
copy when the weight is changed in place."""

from __future__ import annotations

from typing import Any

import torch
import zentorch  # noqa: F401  registers torch.ops.zentorch

from benchmarks.harness.rivals.contender import Layers, Problem, Way

_OPS: Any = torch.ops.zentorch


def _bf16(problem: Problem) -> Layers:
    weights = problem.layers(
        lambda: _OPS.zentorch_weight_prepack_for_linear(problem.weight.bfloat16())
    )
    return Layers(
        lambda i, batch: _OPS.zentorch_linear_unary(
            problem.x_bf16[batch], weights[i], is_weight_prepacked=True
        ),
        len(weights),
        2 * problem.weight.numel(),
        problem.weight.numel(),
    )


def _int8(problem: Problem) -> Layers:
    """Rows of x are rounded to int8 in the call."""
    q, scale = problem.int8
    weights = problem.layers(q.clone)
    return Layers(
        lambda i, batch: _OPS.zentorch_dynamic_qlinear(problem.x_bf16[batch], weights[i], scale),
        len(weights),
        q.nbytes + scale.nbytes,
        q.numel(),
    )


def _int4(problem: Problem) -> Layers:
    q, scale = problem.int4
    packed = _OPS.zentorch_woq_repack_weight(q)
    weights = problem.layers(packed.clone)
    scales = problem.layers(lambda: scale.t().contiguous().bfloat16())
    return Layers(
        lambda i, batch: _OPS.zentorch_woq_linear(
            problem.x_bf16[batch], weights[i].t(), scales[i], None
        ),
        len(weights),
        packed.nbytes + scales[0].nbytes,
        q.numel(),
    )


WAYS = (
    Way("zentorch bf16, packed", "bf16", _bf16),
    Way("zentorch int8, dynamic", "int8", _int8),
    Way("zentorch int4 weight, bf16 x", "int4", _int4),
)
