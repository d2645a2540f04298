"""Compile the Triton kernels without a GPU, and read what came out."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
from rpg_kernels.backends.triton.config import Config, Gpu, choose

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100, 120)
SPILL = re.compile(r"\b(?:STL|LDL)\b")
MMA = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA)\b")

KERNELS = {
    "linear": linear._forward_kernel,
    "linear_input_grad": linear._input_grad_kernel,
    "linear_bank_grad": linear_bank_grad._bank_grad_kernel,
    "conv2d": conv2d._forward_kernel,
    "conv2d_input_grad": conv2d_input_grad._input_grad_kernel,
    "conv2d_bank_grad": conv2d_bank_grad._bank_grad_kernel,
    "embedding": embedding._embedding_kernel,
    "embedding_bank_grad": embedding._embedding_grad_kernel,
    "unpack": unpack._unpack_kernel,
    "pack": sum_uses._gather_kernel,
    "slots": entry_table._slots_kernel,
}
# Integers that are multiples of 16 in the layers that must be fast.
_ALIGNED = (
    *("M", "N", "K", "blocks", "entry_stride", "rows", "columns", "stride_", "first"),
    *("per_group", "group", "channels", "offset", "length", "low"),
)
_INNERMOST = (
    *("stride_xk", "stride_dyn", "stride_dyk", "stride_c", "stride_xc", "stride_yn"),
    *("stride_dxc",),
)


PARTS = ("scales_ptr", "places_ptr")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture; what is not asked for is not disassembled."""

    ptx: str
    cubin: bytes
    shared: int
    warps: int

    @cached_property
    def sass(self) -> str:
        """The machine code as text."""
        return _tool("nvdisasm", self.cubin, "-c")

    @cached_property
    def registers(self) -> int:
        """Of a thread."""
        usage = _tool("cuobjdump", self.cubin, "-res-usage")
        return int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return len(SPILL.findall(self.sass))

    @property
    def spills_in_loop(self) -> int:
        """Loads and stores of local memory in the inner loop."""
        return sum(bool(SPILL.search(line)) for line in self.loop())

    @property
    def serialised(self) -> bool:
        """Whether wgmma products of the inner loop wait for each other, which ptxas only notes."""
        return sum("WARPGROUP.ARRIVE" in line for line in self.loop()) > 1

    def loop(self) -> list[str]:
        """Instructions of the shortest loop that holds a tensor-core instruction.

        Of the longest loop where none does, [] where there is no loop.
        """
        lines = [line.strip() for line in self.sass.splitlines()]
        at = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L_x_\d+):", line))}
        best: list[str] = []
        longest: list[str] = []
        for i, line in enumerate(lines):
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if not target or at.get(target[1], i) >= i:
                continue
            body = [s for s in lines[at[target[1]] : i + 1] if re.match(r"/\*[0-9a-f]+\*/", s)]
            longest = max(longest, body, key=len)
            if any(MMA.search(s) for s in body) and (not best or len(body) < len(best)):
                best = body
        return [re.sub(r"^/\*[0-9a-f]+\*/\s*", "", line) for line in best or longest]


def build(
    name: str,
    architecture: int,
    config: Config,
    dtype: str,
    ones: bool = False,
    bank: str = "",
    integers: str = "i32",
    aligned: bool = True,
    parts: tuple[str, ...] = (),
    **constants: Any,
) -> Compiled:
    """Compile a kernel of KERNELS.

    Args:
        name: of the kernel.
        architecture: 80, 90, 100 or 120.
        config: tile sizes.
        dtype: Triton's name of x, dy and the bank: "fp16", "bf16" or "fp32".
        ones: every integer is 1, which Triton makes a constant of.
        bank: dtype of the bank where it is another.
        integers: their type; Triton passes "i64" what does not fit "i32".
        aligned: sizes and strides are multiples of 16.
        parts: those of PARTS that the bank has, which is then kept in fewer bytes.
        constants: compile-time arguments, beside the tile sizes, and integers of 1.
    """
    kernel = KERNELS[name]
    tile = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
    }
    signature: dict[str, str] = {}
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, p in enumerate(kernel.params):
        number = not p.is_constexpr and p.name != "scale" and not p.name.endswith("_ptr")
        absent = p.name in PARTS and p.name not in parts
        given = p.is_constexpr or p.name in _INNERMOST or p.name in constants or absent
        if given or (ones and number):
            signature[p.name] = "constexpr"
            inner = 1 if number else None
            values[(i,)] = {**tile, **constants}.get(p.name, inner)
        elif p.name.endswith("_ptr"):
            pointee = {
                "law_ptr": "i32",
                "entry_ptr": "i32",
                "index_ptr": "i64",
                "magic_ptr": "i32",
                "grad_ptr": "fp32",
                "bank_ptr": bank or dtype,
                "scales_ptr": "fp32",
                "places_ptr": "i32",
                "out_ptr": "fp32"
                if name.endswith("bank_grad")
                else {"slots": "i32"}.get(name, dtype),
            }.get(p.name, dtype)
            signature[p.name] = f"*{pointee}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[p.name] = "fp32" if p.name == "scale" else integers
            if aligned and not p.do_not_specialize and p.name.startswith(_ALIGNED):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    done = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return Compiled(done.asm["ptx"], done.asm["cubin"], done.metadata.shared, config.warps)


def _tool(name: str, cubin: bytes, *arguments: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(TOOLS / name), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def linear_constants(
    sign: str, source: str = "scratch", g: int = 64, **more: Any
) -> dict[str, Any]:
    """Compile-time arguments of a large layer of whole tiles."""
    return {
        "G": g,
        "PARTS": 1,
        "SOURCE": source,
        "SIGN": sign,
        "PAIRS": sign in ("entry", "element"),
        "EVEN_K": True,
        "HAS_BIAS": False,
        "ADD": False,
        "SCATTER": True,
        "PRECISION": "ieee",
        "ROUNDS": 6,
        "SWAP_ROUNDS": 0,
        "LAW": 1,
        "BY_TAP": True,
        "BLOCK": 1024,
        "BLOCK_S": max(1, 1024 // g),
        "ONE_TAP": True,
        "UNIT_N": 1,
        "UNIT_K": 1,
        "WHOLE": False,
        "BITS_H": 0,
        "BITS_W": 0,
        "EVEN_N": False,
        "LINES": False,
        **more,
    }


def per_weight(c: Compiled, weights: int) -> float:
    """Lane-instructions of the loop for each of the weights that one pass generates."""
    return len(c.loop()) * 32 * c.warps / weights


def large(name: str, architecture: int, sign: str, source: str = "scratch") -> tuple[Compiled, int]:
    """A kernel as a 4096 x 4096 x 4096 layer of granularity 64 in fp16 runs it.

    Returns:
        (what was compiled, weights that one pass of its loop generates; for the bank gradient
        elements of dy that it reads).
    """
    shared = architecture in (90, 100)
    config = choose(name, 4096, 4096, 4096, 64, torch.float16, shared)
    if source == "law":  # as linear._stages
        config = replace(config, stages=min(3, config.stages))
    pairs = sign in ("entry", "element") and shared
    constants = linear_constants(sign, source, PAIRS=pairs, EVEN_N=True)
    inner = config.block_m if name == "linear_bank_grad" else config.block_k
    return build(name, architecture, config, "fp16", **constants), config.block_n * inner


def large_conv(
    name: str, architecture: int, sign: str, source: str = "scratch"
) -> tuple[Compiled, int]:
    """As ``large``, of a 3x3 layer of ResNet: 256 channels to 256, 128 images of 14 x 14."""
    pixels, channels = 128 * 14 * 14, 256
    shared = architecture in (90, 100)
    times = 9 if name == "conv2d_bank_grad" else 1
    config = choose(name, pixels, channels, channels, 64, torch.float16, Gpu(shared), times)
    if source == "law":
        config = replace(config, stages=min(3, config.stages))
    pairs = sign in ("entry", "element") and shared
    more = {"WHOLE": True, "BITS_H": 3, "BITS_W": 3, "EVEN_N": True, "LINES": True}
    constants = linear_constants(sign, source, PAIRS=pairs, **more)
    inner = config.block_m if name == "conv2d_bank_grad" else config.block_k
    return build(name, architecture, config, "fp16", **constants), config.block_n * inner


CASES = (
    *itertools.product(
        ("linear", "linear_input_grad", "conv2d", "conv2d_input_grad"),
        (
            ("folded", "scratch"),
            ("entry", "scratch"),
            ("element", "scratch"),
            ("folded", "law"),
        ),
    ),
    ("linear_bank_grad", ("entry", "scratch")),
    ("linear_bank_grad", ("element", "scratch")),
    ("conv2d_bank_grad", ("entry", "scratch")),
    ("conv2d_bank_grad", ("element", "scratch")),
)
