"""How the cases of this folder run: in a process of their own, which decides the device.

Triton reads TRITON_INTERPRET when it is imported, so one process either interprets kernels, on
CPU tensors, or compiles them, for CUDA tensors. The files in ``cases`` run either way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import brute_force as brute
import processes
import pytest
import torch
from torch import Tensor

import rpg_kernels as rpg

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"
if INTERPRETED:
    from triton.runtime import interpreter
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
if os.environ.get("TRITON_COUNT", ""):  # triton_count.py: the cases of a GPU, without one
    INTERPRETED = False
CASES = Path(__file__).parent / "cases"
HELPERS = Path(__file__).parents[2] / "helpers"

if INTERPRETED:
    # It computes every sum and product again in int64, to compare it with the dtype's range, and
    # then drops the answer, since debug is off: more than half of the time of these tests.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    # What the compiler refuses: products that sum over fewer than 16.
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = lambda lhs, rhs: (1, 1, 16)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(*files: str | Path, interpreted: bool, every: bool = False) -> None:
    """Run files of cases and fail with their output.

    Args:
        files: names in ``cases``, or paths.
        interpreted: on CPU tensors, otherwise compiled.
        every: go on after a failure, so that all are named. A run on a GPU is rare and dear.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(CASES.parent), str(HELPERS), os.environ.get("PYTHONPATH", "")))
    )
    paths = [CASES / name for name in files]
    how = ("--tb=short",) if every else ("-x",)
    pytests = (sys.executable, "-m", "pytest", "-q", *how, "-p", "no:cacheprovider")
    done = processes.run(*pytests, *paths, env=environment, cwd=CASES.parents[3])
    assert done.returncode == 0, named(done.stdout) + done.stdout[-6000:] + done.stderr[-2000:]


def named(output: str) -> str:
    """The lines of pytest's summary that name what failed, each cut to 300 characters."""
    lines = output.splitlines()
    failed = [line[:300] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return "".join(f"{line}\n" for line in failed)


def bank_of(dof: int, dtype: torch.dtype, **arguments: object) -> rpg.ParameterBank:
    """For tests that are not about the law: without its rounds, which take the interpreter long."""
    return brute.bank_of(dof, dtype, **{"permute": not INTERPRETED, **arguments})


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Results and scratch begin as NaN, and small layers copy the bank too."""
    from rpg_kernels.backends.triton import plan

    empty, new_empty = torch.empty, Tensor.new_empty

    def fill(tensor: Tensor) -> Tensor:
        floating = tensor.is_floating_point()
        return tensor.fill_(torch.nan if floating else torch.iinfo(tensor.dtype).max)

    def new(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        return fill(new_empty(self, *args, **kwargs))  # type: ignore[arg-type]

    def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return fill(empty(shape, dtype=dtype, device=device))

    with (
        mock.patch.object(Tensor, "new_empty", new),
        mock.patch.object(plan, "scratch", scratch),
        mock.patch.object(plan, "COPY_FROM", 1),
    ):
        yield
