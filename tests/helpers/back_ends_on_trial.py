"""Back ends that must prove themselves, each good or bad in its own way, on CPU tensors.

Importing this registers them before all others where BACK_ENDS_ON_TRIAL is set, as a process for
trials needs it; elsewhere ``register`` does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rpg_kernels.backends import registry
from rpg_kernels.backends.call import OPERATORS, Call
from rpg_kernels.backends.reference import conv2d, embedding, linear, unpack
from rpg_kernels.backends.registry import Backend

MODULES = {"linear": linear, "conv2d": conv2d, "embedding": embedding, "unpack": unpack}


def right(call: Call, operands: tuple[Any, ...]) -> Tensor:
    """What the operator should give."""
    result: Tensor = getattr(MODULES[OPERATORS[call.op]], call.op)(*operands)
    return result


class OnTrial(Backend):
    """Everything by the reference, then spoiled."""

    device_types = ("cpu",)
    must_prove = True
    wanted: ClassVar[bool] = False
    ran: ClassVar[list[str]] = []

    def __init__(self, name: str, spoil: Callable[[Tensor], Tensor]) -> None:
        self.name, self.summary, self.spoil = name, f"one that is {name}", spoil

    def unsupported(self, call: Call) -> str:
        return ""

    def preferred(self, call: Call) -> bool:
        return self.wanted

    def explain(self, call: Call) -> str:
        return self.summary if self.takes(call) else "not wanted"

    def configuration(self, call: Call) -> str:
        return "small" if call.rows < 8 else "large"

    def compile_ahead(self, calls: Sequence[Callable[[], object]]) -> None:
        """Makes them, each with a mark in a file; the crashing one does as it does."""
        for call in calls:
            call()
            with Path(os.environ["COMPILED_AHEAD"]).open("a", encoding="utf-8") as file:
                file.write("x")

    def operator(self, call: Call) -> Callable[..., Tensor]:
        def run(*operands: Any) -> Tensor:
            self.ran.append(f"{self.name} {call.op} {call.rows}")
            return self.spoil(right(call, operands))

        return run


def one_sign(y: Tensor) -> Tensor:
    """One of all results."""
    flat = y.flatten()
    at = int(flat.abs().argmax())
    flat[at] = -flat[at]
    return flat.view(y.shape)


def one_nan(y: Tensor) -> Tensor:
    y.view(-1)[-1] = float("nan")
    return y


def raises(y: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand much more")


def dies(y: Tensor) -> Tensor:
    print("my last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return y


def leaves(y: Tensor) -> Tensor:
    os._exit(0)


def is_killed(y: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGINT)  # which is survived
    os.kill(os.getpid(), signal.SIGKILL)
    return y


def hangs(y: Tensor) -> Tensor:
    time.sleep(900)
    return y


def lacks_memory(y: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def prints(y: Tensor) -> Tensor:
    print('{"state": "done", "wrong": "a lie", "lasting": true}', flush=True)
    return y


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "right": lambda y: y,
    "talkative": prints,
    "wrong": one_sign,
    "unclean": one_nan,
    "misshapen": lambda y: y.unsqueeze(0),
    "imprecise": lambda y: y * (1 + 2**-12),
    "of another dtype": lambda y: y.double(),
    "raising": raises,
    "crashing": dies,
    "leaving": leaves,
    "killed": is_killed,
    "hanging": hangs,
    "without memory": lacks_memory,
}
ALL = {name: OnTrial(name, spoil) for name, spoil in WAYS.items()}


def register(*names: str) -> None:
    """Before all others, in this order."""
    for name in reversed(names):
        registry.register(ALL[name], before=registry.names()[0])


def unregister() -> None:
    """All that are registered."""
    for name in ALL:
        if name in registry.names():
            registry.unregister(name)


if os.environ.get("BACK_ENDS_ON_TRIAL"):  # in a process for trials, which the tests set it for
    register(*ALL)
