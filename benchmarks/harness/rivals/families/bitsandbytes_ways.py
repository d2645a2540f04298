"""bitsandbytes: weights of four bits whose levels are normal quantiles (NF4), bf16 x."""

from __future__ import annotations

import copy

import torch
from bitsandbytes.nn import Linear4bit

from benchmarks.harness.rivals.contender import Layers, Problem, Way


def _nf4(problem: Problem) -> Layers:
    rows, columns = problem.shape
    layer = Linear4bit(
        columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
        compress_statistics=False,
    )  # fmt: skip
    layer.load_state_dict({"weight": problem.weight})
    layer = layer.to("cpu").eval().requires_grad_(False)
    if layer.weight.dtype != torch.uint8:  # moving to where it is already does not quantise
        layer.weight = layer.weight._quantize(torch.device("cpu"))
    layer(next(iter(problem.x_bf16.values())))  # packs for the processor
    layers = problem.layers(lambda: copy.deepcopy(layer))
    state = layer.weight.quant_state
    return Layers(
        lambda i, batch: layers[i](problem.x_bf16[batch]),
        len(layers),
        layer.weight.data.nbytes + state.absmax.nbytes,
        rows * columns,
    )


WAYS = (Way("bitsandbytes NF4, bf16 x", "int4", _nf4),)
