"""Every kind of call that dispatch can give to the Triton kernels, and what it compiles to.

The axes below multiply to far more calls than can be compiled. Of each operator on each kind of GPU
those are taken that show every two values of two axes together, chosen greedily with a fixed seed.

    PYTHONPATH=.:tests/helpers python tests/backends/triton/triton_every.py [80] [90]

compiles all of them and writes a line of JSON for each; nothing of it needs a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton_launches as launches
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.triton import (
    config,
    conv2d,
    embedding,
    linear,
    linear_bank_grad,
    pixels,
    plan,
    unpack,
)
from rpg_kernels.law.generator import Generator, TableGenerator
from rpg_kernels.law.placement import Placement

GPUS = {80: config.Gpu(False, 108), 90: config.Gpu(True, 132)}
META = torch.device("meta")
MATRICES = ("linear", "linear_input_grad", "linear_bank_grad")
CONVOLUTIONS = ("conv2d", "conv2d_input_grad", "conv2d_bank_grad")
ROWS = ("embedding", "embedding_bank_grad", "unpack", "pack")

_LAWS: dict[str, tuple[Any, ...]] = {
    "g": (1, 4, 8, 16, 64, 128),
    "reflect": ("vector", "element", "none", "table"),
    "laps": (None, 4),  # laws 1 and 3
    "scratch": (16 << 20, 0),
    "dtype": (torch.float16, torch.bfloat16, torch.float32),
    "bank": ("same", torch.float32),
    "tf32": (False, True),
}
# (batch, rows, columns): tiles of every shape; sizes that are multiples of 16, of 8, and odd.
_MATRIX: dict[str, tuple[Any, ...]] = {
    "size": (
        (4096, 4096, 4096),
        (128, 4096, 4096),
        (64, 14336, 1024),
        (1, 4096, 4096),
        (4096, 64, 64),
        (4096, 1000, 1000),
        (4096, 777, 1555),
        (20, 777, 1555),
        (3, 5, 7),
    ),
    "part": (False, True),
    "strided": (False, True),
    "bias": (False, True),
    "ordered": (False, True),
}
# (images, channels, out channels, kernel, size, groups, (stride, padding, dilation))
_CONVOLUTION: dict[str, tuple[Any, ...]] = {
    "size": (
        (256, 256, 256, 3, 14, 1, (1, 1, 1)),
        (256, 64, 64, 3, 56, 1, (1, 1, 1)),
        (1, 256, 256, 3, 7, 1, (1, 1, 1)),
        (64, 128, 256, 3, 28, 1, (2, 1, 1)),
        (64, 256, 512, 1, 28, 1, (1, 0, 1)),
        (64, 3, 64, 7, 224, 1, (2, 3, 1)),
        (64, 64, 64, 3, 28, 64, (1, 1, 1)),
        (64, 256, 256, 3, 28, 2, (1, 2, 2)),
        (64, 128, 128, 3, 28, 32, (1, 1, 1)),
        (64, 50, 70, 3, 28, 1, (1, 1, 1)),
        (256, 200, 600, 3, 14, 1, (1, 1, 1)),
        (64, 16, 32, 7, 28, 1, (1, 3, 1)),
    ),
    "part": (False, True),
    "layout": ("last", "contiguous", "slice"),
    "bias": (False, True),
    "ordered": (False, True),
}
_PLAIN: dict[str, tuple[Any, ...]] = {
    "size": ((4096, 4096, 4096), (70, 777, 1555), (1, 3, 5)),
    "part": (False, True),
    "strided": (False, True),
    "kernel": (1, 3),
}


def axes(op: str) -> dict[str, tuple[Any, ...]]:
    """What may vary of an operator's calls."""
    if op in ROWS:
        left = {k: v for k, v in _LAWS.items() if k not in ("scratch", "tf32", "bank")}
        return {**left, **_PLAIN}
    more = dict(_MATRIX if op in MATRICES else _CONVOLUTION)
    if op not in ("linear", "conv2d"):
        del more["bias"]
    if "bank_grad" not in op:
        del more["ordered"]
    return {**_LAWS, **more}


def _possible(call: dict[str, Any]) -> bool:
    law = call["g"] > 1 or call["laps"] or call.get("ordered")
    if law and call["reflect"] == "table":
        return False
    if call.get("tf32") and call["dtype"] != torch.float32:
        return False
    if call.get("ordered") and call["scratch"] == 0:
        return False  # the reference's, which has no room either
    return not (call.get("bank") == torch.float32 and call["dtype"] == torch.float32)


def calls(op: str, seed: int = 0, tries: int = 30) -> list[dict[str, Any]]:
    """Calls of an operator in which all pairs of values of its axes occur."""
    rng, names, values = random.Random(seed), list(axes(op)), axes(op)

    def pairs(call: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(a, call[a], b, call[b]) for a, b in itertools.combinations(names, 2)}

    def drawn(fixed: dict[str, Any]) -> dict[str, Any] | None:
        for _ in range(100):
            call = {name: rng.choice(values[name]) for name in names} | fixed
            if _possible(call):
                return call
        return None

    wanted = [
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(values[a], values[b])
    ]
    made: list[dict[str, Any]] = []
    seen: set[tuple[Any, ...]] = set()
    for a, x, b, y in wanted:
        if (a, x, b, y) in seen:
            continue
        some = [c for c in (drawn({a: x, b: y}) for _ in range(tries)) if c is not None]
        if some:  # otherwise the two exclude each other
            best = max(some, key=lambda call: len(pairs(call) - seen))
            made.append(best)
            seen |= pairs(best)
    return made


def _placed(
    call: dict[str, Any], shape: tuple[int, ...]
) -> tuple[Placement, Tensor, Tensor | None]:
    g, slots = call["g"], 2_000_000 // call["g"]
    dtype = call["dtype"] if call.get("bank", "same") == "same" else call["bank"]
    table, generator = None, None
    if call["reflect"] == "table":
        count = 1
        for size in shape:
            count *= size
        generator = TableGenerator(slots, count, "0" * 64)
        table = torch.empty(count, dtype=torch.int32, device=META)
    else:
        generator = Generator(slots * g, g, call["reflect"], laps=call["laps"])
    p = Placement(generator, 0, 0, shape, 0.5)
    if call["part"] and min(shape[:2]) > 2:
        p = p.narrow(1, 1, shape[1] - 1)
    bank = torch.empty(slots, g, dtype=dtype, device=META)
    return p, kept(bank, call["stored"]) if "stored" in call else bank, table


# Dtype of codes, or None where they are values, and whether slots are left out.
STORED = {"int8": (torch.int8, False), "float8": (torch.float8_e4m3fn, False)}
STORED |= {f"{form} compact": (kind, True) for form, (kind, _) in STORED.items()}
STORED |= {"float compact": (None, True)}


def kept(bank: Tensor, form: str) -> StoredValues:
    """A bank in one of the forms of STORED."""
    kind, compact = STORED[form]
    rows = len(bank) // 2 if compact else len(bank)
    codes = torch.empty(rows, bank.shape[1], dtype=kind or bank.dtype, device=META)
    scales = None if kind is None else torch.empty(rows, device=META)
    places = torch.empty(len(bank), dtype=torch.int32, device=META) if compact else None
    return StoredValues(codes, scales, places, bank.dtype)


def _image(call: dict[str, Any], channels: int, images: int, size: int) -> Tensor:
    shape, last = (images, channels, size, size), torch.channels_last
    if call["layout"] == "slice":
        whole = (images, channels + 3, size, size)
        return torch.empty(whole, dtype=call["dtype"], device=META, memory_format=last)[:, 3:]
    kind = last if call["layout"] == "last" else torch.contiguous_format
    return torch.empty(shape, dtype=call["dtype"], device=META, memory_format=kind)


def _matrix(call: dict[str, Any], rows: int, columns: int) -> Tensor:
    if call["strided"]:
        return torch.empty(columns, rows, dtype=call["dtype"], device=META).t()
    return torch.empty(rows, columns, dtype=call["dtype"], device=META)


def _run(op: str, call: dict[str, Any]) -> None:
    """One call on tensors without memory; its launches are recorded, not made."""
    dtype = call["dtype"]
    if op in CONVOLUTIONS:
        images, channels, out, kernel, size, groups, (stride, padding, dilation) = call["size"]
        p, bank, table = _placed(call, (out, channels // groups, kernel, kernel))
        rows, columns = p.selected_shape[:2]
        x = _image(call, columns * groups, images, size)
        how: Any = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
        after = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        dy = _image(call, rows, images, after)
        bias = torch.empty(rows, dtype=dtype, device=META) if call.get("bias") else None
        spec = p.to_json()
        if op == "conv2d":
            conv2d.conv2d(x, bank, table, bias, spec, *how)
        elif op == "conv2d_input_grad":
            conv2d.conv2d_input_grad(dy, bank, table, list(x.shape), spec, *how)
        else:
            conv2d.conv2d_bank_grad(dy, x, table, spec, *how, dtype)
        return
    m, rows, columns = call["size"]
    kernel = call.get("kernel", 1)
    shape = (rows, columns) if kernel == 1 or op not in ROWS[2:] else (rows, columns, kernel, 1)
    p, bank, table = _placed(call, shape)
    rows, columns = p.selected_shape[:2]
    spec = p.to_json()
    if op in MATRICES:
        x, dy = _matrix(call, m, columns), _matrix(call, m, rows)
        bias = torch.empty(rows, dtype=dtype, device=META) if call.get("bias") else None
        if op == "linear":
            linear.linear(x, bank, table, bias, spec)
        elif op == "linear_input_grad":
            linear.linear_input_grad(dy, bank, table, spec)
        else:
            linear_bank_grad.linear_bank_grad(dy, x, table, spec, dtype)
        return
    index = torch.empty(m, dtype=torch.int64, device=META)
    if op == "embedding":
        embedding.embedding(bank, table, index, spec)
    elif op == "embedding_bank_grad":
        embedding.embedding_bank_grad(_matrix(call, m, columns), index, table, spec, dtype)
    elif op == "unpack":
        unpack.unpack_tile(bank, table, p, dtype, channels_last=call["strided"])
    elif table is None:
        unpack.pack(torch.empty(p.selected_shape, dtype=dtype, device=META), None, spec, dtype)


@contextlib.contextmanager
def as_on(gpu: config.Gpu, call: dict[str, Any]) -> Iterator[None]:
    modules = (config, linear, linear_bank_grad, pixels)
    precision = "tf32" if call.get("tf32") else "ieee"
    cudnn: Any = torch.backends.cudnn
    switches = (cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    ordered = call.get("ordered", False)
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "gpu", return_value=gpu))
        stack.enter_context(
            mock.patch.object(plan, "products_read_shared", return_value=gpu.shared)
        )
        stack.enter_context(rpg.scratch_limit(call.get("scratch", 16 << 20)))
        torch.use_deterministic_algorithms(ordered)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            for switch in switches:
                switch.fp32_precision = precision
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = True
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value


def specialisations(
    architecture: int,
    ops: tuple[str, ...] = (*MATRICES, *CONVOLUTIONS, *ROWS),
    stored: str = "",
) -> dict[launches.Specialisation, str]:
    """What is compiled for one architecture -> a call that it is compiled for.

    Args:
        architecture: one of GPUS.
        ops: operators.
        stored: what banks are kept as, see STORED; "" as they are used.
    """
    found: dict[launches.Specialisation, str] = {}
    for op in ops:
        for call in calls(op):
            if stored:
                call["stored"] = stored
            made: list[launches.Specialisation] = []
            with launches.recorded(made.append), as_on(GPUS[architecture], call):
                _run(op, call)
            for one in made:
                found.setdefault(one, f"{op} {call}")
    return found


def pressure(s: launches.Specialisation) -> float:
    """About how many registers a thread of a product needs: those that spill come first."""
    c = launches.constants(s)
    sizes = sorted(c.get(name, 1) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    law = 1.5 if c.get("SOURCE") == "law" else 1.0
    return law * (sizes[2] * sizes[1] + sizes[1] * sizes[0]) / (32 * s.warps)


def main() -> None:
    """Compile everything; what spills is written with the call that asked for it."""
    architectures = [int(a) for a in sys.argv[1:]] or list(GPUS)
    every = [
        (one, architecture, call)
        for architecture in architectures
        for one, call in specialisations(architecture).items()
    ]
    for one, architecture, call in sorted(every, key=lambda item: -pressure(item[0])):
        began = time.process_time()
        usage = launches.usage(one, architecture)
        line = {
            "architecture": architecture,
            "kernel": one.kernel,
            "registers": usage.registers,
            "stack": usage.stack,
            "seconds": round(time.process_time() - began, 2),
            "constants": launches.constants(one),
            "warps": one.warps,
            "stages": one.stages,
            "call": call,
        }
        sys.stdout.write(json.dumps(line, default=str) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
