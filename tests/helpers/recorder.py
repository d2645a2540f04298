"""A back end for tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rpg_kernels.backends.call import OPERATORS, Call
from rpg_kernels.backends.reference import conv2d, embedding, linear, unpack
from rpg_kernels.backends.registry import Backend

MODULES = {"linear": linear, "conv2d": conv2d, "embedding": embedding, "unpack": unpack}


class Recorder(Backend):
    """A back end for everything, by the reference, that records what it is asked for."""

    name = "recorder"
    summary = "a recorder"

    def __init__(self, wanted: Callable[[Call], bool] = lambda call: False) -> None:
        self.wanted = wanted
        self.seen: list[str] = []

    def unsupported(self, call: Call) -> str:
        return "no recorder works in float16" if call.dtype == torch.float16 else ""

    def preferred(self, call: Call) -> bool:
        return self.wanted(call)

    def explain(self, call: Call) -> str:
        return self.summary if self.takes(call) else self.unsupported(call) or "not wanted"

    def operator(self, call: Call) -> Callable[..., Tensor]:
        def record(*arguments: object) -> Tensor:
            self.seen.append(call.op)
            result: Tensor = getattr(MODULES[OPERATORS[call.op]], call.op)(*arguments)
            return result

        return record
