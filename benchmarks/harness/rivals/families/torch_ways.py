"""What torch alone can do: dense weights, and its products of int8 and int4."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.rivals.contender import TRAINING, Layers, Problem, Way
from benchmarks.harness.rivals.gradients import trained


def _dense(dtype: torch.dtype, problem: Problem) -> Layers:
    weights = problem.layers(lambda: problem.weight.to(dtype).clone())
    x = problem.x if dtype == torch.float32 else problem.x_bf16
    return Layers(
        lambda i, batch: F.linear(x[batch], weights[i]),
        len(weights),
        weights[0].nbytes,
        weights[0].numel(),
    )


def _packed(problem: Problem) -> Layers:
    """In the layout that oneDNN chooses for a batch, as ``torch.compile`` with freezing has it."""
    weights = problem.layers(lambda: problem.weight.bfloat16())
    ops, held = torch.ops.mkldnn, dict[int, list[Tensor]]()

    def call(i: int, batch: int) -> Tensor:
        if batch not in held:
            held.clear()
            held[batch] = [ops._reorder_linear_weight(w, batch) for w in weights]
        x = problem.x_bf16[batch]
        y: Tensor = ops._linear_pointwise(x, held[batch][i], None, "none", [], "")
        return y

    return Layers(call, len(weights), weights[0].nbytes, weights[0].numel())


def _int8_weights(problem: Problem) -> Layers:
    """x stays bf16, the weight is int8."""
    q, scale = problem.int8
    weights = problem.layers(q.clone)
    scales = scale.bfloat16()
    return Layers(
        lambda i, batch: torch._weight_int8pack_mm(problem.x_bf16[batch], weights[i], scales),
        len(weights),
        q.nbytes + scales.nbytes,
        q.numel(),
    )


def _dynamic(engine: str, problem: Problem) -> Layers:
    """x is rounded to int8 in the call, by its own range."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are to go; nothing else calls these
        torch.backends.quantized.engine = engine
        q, scale = problem.int8
        zeros = torch.zeros(len(q), dtype=torch.long)
        held = torch._make_per_channel_quantized_tensor(q, scale.double(), zeros, 0)
        packed = problem.layers(lambda: torch.ops.quantized.linear_prepack(held, None))
    return Layers(
        lambda i, batch: torch.ops.quantized.linear_dynamic(problem.x[batch], packed[i], False),
        len(packed),
        q.nbytes + scale.nbytes,
        q.numel(),
    )


def _static(problem: Problem) -> Layers:
    """x is rounded to int8 in the call, by a range that is known before."""
    q, scale = problem.int8
    ops = torch.ops.onednn
    span = max(float(x.abs().max()) for x in problem.x.values()) / 127
    zeros = torch.zeros(len(q), dtype=torch.int8)
    packed = problem.layers(lambda: ops.qlinear_prepack(q.clone(), None))

    def call(i: int, batch: int) -> Tensor:
        x = torch.round(problem.x[batch] / span).add_(128).clamp_(0, 255).to(torch.uint8)
        tail: tuple[object, ...] = (None, 1.0, 0, torch.bfloat16, "none", [], "")
        y: Tensor = ops.qlinear_pointwise(x, span, 128, packed[i], scale, zeros, *tail)
        return y

    return Layers(call, len(packed), q.nbytes + scale.nbytes, q.numel())


def _int_mm(problem: Problem) -> Layers:
    """Rows of x are rounded to int8 in the call, by operators of torch."""
    q, scale = problem.int8
    weights = problem.layers(q.clone)

    def call(i: int, batch: int) -> Tensor:
        x = problem.x[batch]
        span = x.abs().amax(1, keepdim=True) / 127
        y = torch._int_mm(torch.round(x / span).to(torch.int8), weights[i].t())
        return y.float().mul_(span).mul_(scale)

    return Layers(call, len(weights), q.nbytes + scale.nbytes, q.numel())


def _int4_weights(problem: Problem) -> Layers:
    """x stays bf16, the weight is int4 with a scale and a zero for each group."""
    q, scale = problem.int4
    ops, group = torch.ops.aten, problem.group
    packed = ops._convert_weight_to_int4pack_for_cpu(q.int() + 8, 1)
    weights = problem.layers(packed.clone)
    pairs = torch.stack([scale.t(), torch.zeros_like(scale.t())], -1).contiguous().bfloat16()
    scales = problem.layers(pairs.clone)

    def call(i: int, batch: int) -> Tensor:
        x = problem.x_bf16[batch]
        y: Tensor = ops._weight_int4pack_mm_for_cpu(x, weights[i], group, scales[i])
        return y

    return Layers(call, len(weights), packed.nbytes + pairs.nbytes, q.numel())


def _training(dtype: torch.dtype, problem: Problem) -> Layers:
    weights = problem.layers(lambda: problem.weight.to(dtype).clone().requires_grad_())
    forward: Callable[[int, Tensor], Tensor] = lambda i, x: F.linear(x, weights[i])  # noqa: E731
    return trained(
        problem, dtype, forward, [[w] for w in weights], lambda: weights[0].detach().float()
    )


WAYS = (
    Way("torch fp32", "fp32", partial(_dense, torch.float32)),
    Way("torch bf16", "bf16", partial(_dense, torch.bfloat16)),
    Way("torch bf16, packed by oneDNN", "bf16", _packed),
    Way("torch int8 weight, bf16 x", "int8", _int8_weights),
    Way("torch int8, dynamic (fbgemm)", "int8", partial(_dynamic, "fbgemm")),
    Way("torch int8, dynamic (oneDNN)", "int8", partial(_dynamic, "onednn")),
    Way("torch int8, static (oneDNN)", "int8", _static),
    Way("torch int8, rows (_int_mm)", "int8", _int_mm),
    Way("torch int4 weight, bf16 x", "int4", _int4_weights),
    Way("torch fp32, training", "fp32", partial(_training, torch.float32), TRAINING),
    Way("torch bf16, training", "bf16", partial(_training, torch.bfloat16), TRAINING),
)
