"""What a training step of a network compiles, without a GPU: its calls, made on described tensors.

    PYTHONPATH=.:tests/helpers python tests/backends/triton/triton_step.py

says it of ResNet-18 on 128 images of 224 x 224 in bfloat16, on an sm_80 and an sm_90.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import triton_every as every
import triton_launches as launches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rpg_kernels as rpg
from rpg_kernels.backends.call import OPERATORS
from rpg_kernels.backends.proving import trial
from rpg_kernels.backends.proving.trial import Trial
from rpg_kernels.backends.triton import config, conv2d, embedding, linear, unpack
from rpg_kernels.backends.triton.rules import Triton
from rpg_kernels.models import resnet18
from rpg_kernels.ops import _library as library

MODULES = {"linear": linear, "conv2d": conv2d, "embedding": embedding, "unpack": unpack}


class _Seen(TorchDispatchMode):
    """Notes the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "rpg_kernels":
            name = func.name().partition("::")[2].partition(".")[0]
            self.calls += _single(name, args[:-1])
        return func(*args, **(kwargs or {}))


def _single(op: str, args: tuple[Any, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Both gradients at once are two operators here."""
    if op not in ("linear_grads", "conv2d_grads"):
        yield op, args
        return
    dy, bank, table, x, placement, *geometry, dtype = args
    size = [list(x.shape)] if op == "conv2d_grads" else []
    kind = op.partition("_")[0]
    yield f"{kind}_input_grad", (dy, bank, table, *size, placement, *geometry)
    yield f"{kind}_bank_grad", (dy, x, table, placement, *geometry, dtype)


def calls(model: nn.Module, x: Tensor) -> list[tuple[str, tuple[Any, ...]]]:
    """Operators and operands of a forward and a backward; model and x on meta."""
    with _Seen() as seen:
        model(x).float().sum().backward()
    return seen.calls


def kernels(
    made: list[tuple[str, tuple[Any, ...]]], architecture: int
) -> set[launches.Specialisation]:
    """What calls are compiled to."""
    found: set[launches.Specialisation] = set()
    as_there = every.as_on(every.GPUS[architecture], {})
    with torch.no_grad(), launches.recorded(found.add), as_there:
        for op, args in made:
            getattr(MODULES[OPERATORS[op]], op)(*args)
    return found


def on_trial(op: str, args: tuple[Any, ...]) -> tuple[Trial, tuple[Any, ...]]:
    """What the call is tried with, and its operands, on meta."""
    made = trial.made(Triton(), library.call(op, args, ""))
    operands = [
        torch.empty_strided(
            o["shape"], o["stride"], dtype=getattr(torch, o["dtype"]), device="meta"
        )
        if isinstance(o, dict)
        else getattr(torch, o)
        if role == "dtype"
        else o
        for role, o in zip(trial.ROLES[op], made.operands, strict=True)
    ]
    return made, tuple(operands)


def kernels_on_trial(
    made: list[tuple[str, tuple[Any, ...]]], architecture: int
) -> set[launches.Specialisation]:
    """What the trials of calls are compiled to."""
    found: set[launches.Specialisation] = set()
    gpu = every.GPUS[architecture]
    for op, args in made:
        one, operands = on_trial(op, args)
        with config.as_if(*one.parts), every.as_on(gpu, {}), launches.recorded(found.add):
            getattr(MODULES[OPERATORS[op]], op)(*operands)
    return found


def resnet(images: int = 128, size: int = 224, **bank: Any) -> tuple[nn.Module, Tensor]:
    """ResNet-18 in bfloat16 with a bank in float32, as under autocast, and its input."""
    with torch.device("meta"):
        model = resnet18(10, stem="imagenet")
    model = rpg.convert(model, rpg.RPGConfig(**{"dof": 2_000_000, **bank})).bfloat16()
    model.rpg_bank.float()
    return model, torch.empty(images, 3, size, size, dtype=torch.bfloat16, device="meta")


def main() -> None:
    """Print the numbers of kernels."""
    made = calls(*resnet())
    for architecture in every.GPUS:
        found = kernels(made, architecture)
        by_kernel = collections.Counter(one.kernel for one in found)
        sys.stdout.write(f"sm_{architecture}: {len(found)} kernels, {dict(by_kernel)}\n")


if __name__ == "__main__":
    main()
