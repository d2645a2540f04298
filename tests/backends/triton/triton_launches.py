"""What launches would be compiled to: the specialisations that Triton makes of their arguments.

A launch is recorded where the host code makes it, so that what is counted and compiled ahead of
time are the arguments of real calls, and no list of them kept by hand.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from rpg_kernels.backends.triton import (
    conv2d,
    conv2d_bank_grad,
    conv2d_input_grad,
    embedding,
    entry_table,
    linear,
    linear_bank_grad,
    sum_uses,
    unpack,
)

# Every kernel, where the host code finds it.
PLACES: dict[str, tuple[ModuleType, str]] = {
    "linear": (linear, "_forward_kernel"),
    "linear_input_grad": (linear, "_input_grad_kernel"),
    "linear_bank_grad": (linear_bank_grad, "_bank_grad_kernel"),
    "conv2d": (conv2d, "_forward_kernel"),
    "conv2d_input_grad": (conv2d_input_grad, "_input_grad_kernel"),
    "conv2d_bank_grad": (conv2d_bank_grad, "_bank_grad_kernel"),
    "embedding": (embedding, "_embedding_kernel"),
    "embedding_bank_grad": (embedding, "_embedding_grad_kernel"),
    "unpack": (unpack, "_unpack_kernel"),
    "pack": (sum_uses, "_gather_kernel"),
    "slots": (entry_table, "_slots_kernel"),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Specialisation:
    """One compilation, whatever the GPU.

    Args:
        kernel: its name in PLACES.
        types: of the arguments, in order; "constexpr" where ``values`` has one.
        values: of compile-time arguments, and integers of 1.
        aligned: numbers of the arguments that are multiples of 16.
        warps, stages: of the launch.
    """

    kernel: str
    types: tuple[str, ...]
    values: tuple[tuple[int, Any], ...]
    aligned: tuple[int, ...]
    warps: int
    stages: int


def constants(s: Specialisation) -> dict[str, Any]:
    """Compile-time arguments and integers of 1, by name."""
    params, _ = parameters(getattr(*PLACES[s.kernel]))
    return {params[i].name: value for i, value in s.values}


def parameters(kernel: Any) -> tuple[list[Any], JITFunction]:
    """(parameters of a kernel, itself as it would be compiled); also under the interpreter."""
    if isinstance(kernel, JITFunction):
        return kernel.params, kernel
    some = {k: v for k, v in kernel.kwargs.items() if k.startswith("do_not_specialize")}
    compiled = JITFunction(kernel.fn, **some)
    return compiled.params, compiled


def specialise(name: str, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The specialisation of a launch, as Triton's own binder makes it."""
    params, _ = parameters(kernel)
    given = {**dict(zip((p.name for p in params), args, strict=False)), **kwargs}
    types, values, aligned = [], [], []
    for i, p in enumerate(params):
        value = given[p.name]
        one = isinstance(value, int) and value == 1 and not p.do_not_specialize
        if p.is_constexpr or value is None or one:
            types.append("constexpr")
            values.append((i, value))
            continue
        if isinstance(value, Tensor):
            types.append(f"*{_TYPES[value.dtype]}")
            multiple = value.device.type == "meta" or value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            types.append("fp32")
            multiple = False
        else:
            types.append("i32" if -(2**31) <= value < 2**31 else "i64")
            multiple = value % 16 == 0
        if multiple and not p.do_not_specialize:
            aligned.append(i)
    options = (kwargs.get("num_warps", 4), kwargs.get("num_stages", 3))
    return Specialisation(name, tuple(types), tuple(values), tuple(aligned), *options)


class _Recorder:
    """Stands for a kernel: notes what is launched, and launches it where it is to run."""

    def __init__(
        self, name: str, kernel: Any, found: Callable[[Specialisation], None], run: bool
    ) -> None:
        self._name, self._kernel, self._found, self._run = name, kernel, found, run

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self._found(specialise(self._name, self._kernel, args, kwargs))
            if self._run:
                self._kernel[grid](*args, **kwargs)

        return launch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


@contextlib.contextmanager
def recorded(found: Callable[[Specialisation], None], run: bool = False) -> Iterator[None]:
    """Within, launches are told to ``found``; they run only where asked to."""
    with contextlib.ExitStack() as stack:
        for name, (module, attribute) in PLACES.items():
            kernel = getattr(module, attribute)
            wrapped = _Recorder(name, kernel, found, run)
            stack.enter_context(mock.patch.object(module, attribute, wrapped))
        yield


def compile_for(s: Specialisation, architecture: int) -> Any:
    """Triton's result for one architecture."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, attribute = PLACES[s.kernel]
    params, kernel = parameters(getattr(module, attribute))
    signature = {p.name: kind for p, kind in zip(params, s.types, strict=True)}
    constants = {(i,): value for i, value in s.values}
    attributes = {(i,): [["tt.divisibility", 16]] for i in s.aligned}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": s.warps, "num_stages": s.stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@dataclass(frozen=True)
class Usage:
    """What a thread has: registers, and bytes of stack, which is what spills take."""

    registers: int
    stack: int


def usage(s: Specialisation, architecture: int) -> Usage:
    """Of a specialisation, by the toolkit that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compile_for(s, architecture).asm["cubin"])
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return Usage(int(found[1]), int(found[2]))
