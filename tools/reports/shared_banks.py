"""Wavefronts of the CUDA kernels' accesses to shared memory, from addresses of real runs.

The SIMT shim writes down which bytes each thread of a launch accesses, and from which line of the
source (``_native.simt.accesses_of``). Here the accesses of a warp's 32 lanes are put together, the
n-th of a line with the n-th of the other lanes, and given to a model of shared memory: 32 banks of
4 bytes; accesses of 16 bytes go in four parts of 8 lanes, of 8 bytes in two of 16, of 4 and fewer
in one. A part takes as many wavefronts as the bank with the most different words has words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import rpg_kernels as rpg
from rpg_kernels import native
from tools.reports.cuda_sass import Line, Region, region

WARP = 32
H200 = (132, 227 * 1024)  # processors, bytes of shared memory that a CTA may have

_WINDOWS = {
    "windows: cp.async": [region("columns.h", "uint4* const target = ", until="ring_bytes")],
    "entries: write": [region("columns.h", "store(entry.span(8 * k", until=";")],
}
SITES = {
    "linear": {
        **_WINDOWS,
        "x: cp.async": [region("linear.cu", "return copy_async(target, source, valid)", until=";")],
        "blocks: ldmatrix": [region("linear.cu", "load_matrices(a,", until=";")],
        "x: ldmatrix": [region("linear.cu", "load_matrices(b[n][0],", until="b[n][1]")],
        "S: write": [
            region("linear.cu", "sums[lane.sum[n] + 32 * half]", until=";"),
            region("linear.cu", "store(sums.span(lane.sum[n]", until=";"),
            region("linear.cu", "s[spread_place(place", until=";"),
            region("linear.cu", "store(s.span(s_at(plane", until=";"),
        ],
        "blocks: read (fp32)": [region("linear.cu", "const auto w = load", until=";")],
        "x: read (fp32)": [
            region("linear.cu", "const auto v = load<Vector<float, 4>>(x", until=";")
        ],
        "entries: read": [region("linear.cu", "= entry[thread() + k * kThreads]", until=";")],
        "S: read": [
            region("linear.cu", "as_bits(s[place])", until=";"),
            region("linear.cu", "const auto v = load<Vector<float, 4>>(s", until=";"),
        ],
    },
    "linear_input_grad": {
        **_WINDOWS,
        "dy: read": [
            region("input_grad_permute.h", "const auto v = load<uint16_t>", until=";"),
            region("input_grad_permute.h", "auto v = load<Vector<uint32_t, 4>>", until=";"),
        ],
        "P: write": [
            region("input_grad_permute.h", "store(memory.p.span(target_byte, 2)", until=";"),
            region("input_grad_permute.h", "store(memory.p.span(plane * 16", until=";"),
        ],
        "blocks: ldmatrix": [
            region("input_grad_mma.h", "load_transposed(a, stage.blocks.span", until=";")
        ],
        "P: read": [
            region("input_grad_mma.h", "load_transposed(b, memory.p", until=";"),
            region("input_grad_mma.h", "b[0] = load<uint32_t>", until=";"),
            region("input_grad_mma.h", "b[1] = load<uint32_t>", until=";"),
        ],
        "T: read": [
            region(
                "input_grad_fma.h",
                "auto v = load<Vector<float, DyVectors::kVectorRows>>(target)",
                until=";",
            )
        ],
        "T: write": [region("input_grad_fma.h", "store(target, v);", until=";")],
        "blocks: read (fp32)": [region("input_grad_fma.h", "const auto w = load", until=";")],
        "T: read by all": [region("input_grad_fma.h", "const auto v =", until=";")],
        "sums: write": [
            region("input_grad_mma.h", "target[8 * half] = sum;", until=";"),
            region("input_grad_mma.h", "target[m * kSumPitch", until=";"),
            region("input_grad_fma.h", "= sum[0][m];", until=";"),
            region("input_grad_fma.h", "= sum[1][m];", until=";"),
        ],
        "sums: read": [
            region("input_grad_mma.h", "Vector<float, COUNT> mma_total("),
            region("input_grad_fma.h", "total += sums[", until=";"),
        ],
    },
    "linear_bank_grad": {
        "readers: write": [region("linear_bank_grad.cu", "store(memory.readers.span(", until=";")],
        "readers: read": [region("linear_bank_grad.cu", "load<Reader>(", until=";")],
        "T: write": [region("linear_bank_grad.cu", "store(memory.t.span(", until=";")],
        "T: read by all": [region("linear_bank_grad.cu", "const auto v = load", until=";")],
    },
}


@dataclass
class Count:
    """Of one kind of access: what it took, and the least that its bytes and lanes allow."""

    wavefronts: int = 0
    least: int = 0

    @property
    def ratio(self) -> float:
        """1.0 without conflicts."""
        return self.wavefronts / self.least


def wavefronts(accesses: Iterable[tuple[int, int]]) -> int:
    """Of one part: the most different words of one bank; (first byte, bytes) of its lanes."""
    words: dict[int, set[int]] = defaultdict(set)
    for offset, size in accesses:
        for word in range(offset // 4, (offset + size + 3) // 4):
            words[word % 32].add(word)
    return max(map(len, words.values()))


def count(lanes: dict[int, tuple[int, int]]) -> Count:
    """Of one instruction of a warp: by lane (first byte, bytes)."""
    size = max(size for _, size in lanes.values())
    part = {16: 8, 8: 16}.get(size, 32)
    out = Count()
    for first in range(0, WARP, part):
        chosen = [lanes[lane] for lane in range(first, first + part) if lane in lanes]
        if chosen:
            out.wavefronts += wavefronts(chosen)
            out.least += 1
    return out


def counted(accesses: list[tuple[Any, ...]], sites: dict[str, list[Region]]) -> dict[str, Count]:
    """Wavefronts of each kind of access in a recorded launch."""
    order: dict[tuple[str, int], str] = {}
    instructions: dict[Any, dict[int, tuple[int, int]]] = defaultdict(dict)
    turn: dict[Any, int] = defaultdict(int)
    for file, number, block, thread, offset, size in accesses:
        line = Line(Path(file).name, number)
        if (line.file, number) not in order:
            held = [n for n, parts in sites.items() for part in parts if part.holds(line)]
            order[line.file, number] = held[0] if held else ""
        name = order[line.file, number]
        if not name:
            continue
        here = (line, block, thread)
        instructions[name, line, block, thread // WARP, turn[here]][thread % WARP] = (offset, size)
        turn[here] += 1
    out: dict[str, Count] = {}
    for (name, *_), lanes in instructions.items():
        one = count(lanes)
        sum_ = out.setdefault(name, Count())
        sum_.wavefronts += one.wavefronts
        sum_.least += one.least
    return {name: out[name] for name in sites if name in out}


def recorded(
    kernel: str,
    batch: int,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 1024,
    columns: int = 128,
    granularity: int = 64,
    slots: int = 1024,
) -> dict[str, Count]:
    """Wavefronts of one launch of a layer of 4 laps, whose windows have 256 slots."""
    simt = native._load()[0].simt  # type: ignore[union-attr]
    bank = rpg.ParameterBank(slots * granularity, granularity, "vector", laps=4)
    matrix = bank.place((rows, columns)).placement
    law, code = native.layer_law(matrix.law), native.dtype_code(dtype)
    plan = getattr(simt, f"plan_{kernel}")(law, code, batch, columns, *H200)
    torch.manual_seed(0)
    ring = torch.randn(slots, granularity).to(dtype)
    x, dy = torch.randn(batch, columns).to(dtype), torch.randn(batch, rows).to(dtype)
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    dw = torch.empty(ring.shape)
    workspace = torch.empty(max(1, plan.workspace))
    counters = torch.zeros(max(1, plan.counters), dtype=torch.int32)
    given = {
        "linear": (ring, x, None, y),
        "linear_input_grad": (ring, dy, dx),
        "linear_bank_grad": (dy, x, dw),
    }[kernel]

    def launch() -> None:
        addresses = [0 if t is None else t.data_ptr() for t in given]
        tail = (batch, columns, 1.0, workspace.data_ptr(), counters.data_ptr(), 0)
        getattr(simt, kernel)(law, plan, code, *addresses, *tail)

    accesses_of: Callable[..., list[tuple[Any, ...]]] = simt.accesses_of
    return counted(accesses_of(launch), SITES[kernel])
