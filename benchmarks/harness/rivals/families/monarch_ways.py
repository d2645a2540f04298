"""torch-structured: Monarch layers, two block-diagonal factors with a permutation between them."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of CUDA kernels that it has not, and of old names of torch's
    from torch_structured.monarch.monarch_linear import MonarchLinear

from benchmarks.harness.rivals.contender import TRAINING, Layers, Problem, Way
from benchmarks.harness.rivals.gradients import trained

_PIECE = 512  # rows of the identity that go through a layer at once


def _monarch(blocks: int, problem: Problem) -> Layers:
    rows, columns = problem.shape
    with torch.random.fork_rng():
        torch.manual_seed(problem.seed)
        layers = problem.layers(
            lambda: MonarchLinear(columns, rows, bias=False, nblocks=blocks).bfloat16()
        )

    def weight() -> Tensor:
        """What layer 0 makes of the identity, in fp32: its weight ``[N, K]``."""
        wide = MonarchLinear(columns, rows, bias=False, nblocks=blocks)
        wide.load_state_dict(layers[0].state_dict())
        with torch.no_grad():
            return torch.cat([wide(part) for part in torch.eye(columns).split(_PIECE)]).t()

    def forward(i: int, x: Tensor) -> Tensor:
        y: Tensor = layers[i](x)
        return y

    parameters = [list(layer.parameters()) for layer in layers]
    return trained(problem, torch.bfloat16, forward, parameters, weight)


WAYS = tuple(
    Way(
        f"Monarch bf16, {blocks} blocks, training",
        "structured",
        partial(_monarch, blocks),
        TRAINING,
    )
    for blocks in (4, 16, 64)
)
