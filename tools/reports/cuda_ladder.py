"""The steps of docs/ladder.md: how each is run, and what it is predicted to take."""

from __future__ import annotations

import math

import torch

from rpg_kernels import native
from rpg_kernels.backends.reference import naive
from rpg_kernels.bank.virtual_weight import VirtualWeight
from tools.reports import cuda_report as report
from tools.reports import shared_banks as banks
from tools.reports.cuda_counts import LAW, per_weight
from tools.reports.cuda_report import CACHE, LAYERS, Times, case_of, per_clock, plan, product_times
from tools.reports.cuda_sass import Kernel
from tools.reports.triton_model import H200, dense

NAIVE = "0. naive, loops: `rpg_kernels/backends/reference/naive.py`"
FILLS = {3: "gather", 4: "ring", 5: "windows"}
NAMES = {
    1: "a thread for each row, law 1",
    2: "a warp for each row",
    3: "copies into shared memory, tensor cores",
    4: "the whole ring in shared memory",
    5: "windows, each block multiplied once",
}
# Bytes of DRAM: the bank, once. 2M degrees of freedom in bf16; 45K; 1M.
BANKS = {1: 32768, 2: 32768, 3: 32768, 4: 704, 5: 16384}


def run(step: int, weight: VirtualWeight, x: torch.Tensor, order: int = 0) -> torch.Tensor:
    """y [N] of x [K], both bf16, by the kernels' own source on the CPU; step 0 gives float64."""
    if step == 0:
        elements = weight.bank.weight.detach().double()
        return naive.OPERATORS["linear"](x.double(), elements, None, None, weight.spec)
    simt = native._load()[0].simt  # type: ignore[union-attr]
    placement = weight.placement
    rows, columns = placement.shape
    law = native.layer_law(placement.law)
    ring = weight.bank.weight.detach().to(torch.bfloat16).contiguous()
    y = torch.full((rows,), math.nan, dtype=torch.bfloat16)
    addresses = ring.data_ptr(), x.data_ptr()
    if step < 3:
        tail = (y.data_ptr(), columns, placement.scale, order)
        simt.ladder_linear(law, step, *addresses, *tail)
        return y
    p = simt.plan_linear(law, 2, 1, columns, *banks.H200)
    assert report.FILLS[p.fill] == FILLS[step], "the layer leads to another fill"
    workspace = torch.full((max(1, p.workspace),), math.nan)
    counters = torch.zeros(max(1, p.counters), dtype=torch.int32)
    tail = (workspace.data_ptr(), counters.data_ptr(), order)
    y_etc = (0, y.data_ptr(), 1, columns, placement.scale)
    simt.linear(law, p, 2, *addresses, *y_etc, *tail)
    return y


def rate(step: int, of: dict[str, Kernel]) -> float:
    """Lane-instructions for a weight."""
    if step > 2:
        kernel = of["linear_kernel<Bfloat16, 1>"]
        return sum(per_weight(kernel, case_of(kernel.name, FILLS[step])).values())
    kernel = of["ladder_thread_kernel" if step == 1 else "ladder_warp_kernel"]
    outer, inner = kernel.loops()
    # An element for each pass of the first, two for each lane and pass of the second.
    return len(inner.own) / (1 if step == 1 else 2) + (len(outer.own) + LAW) / 64


def wavefronts(step: int) -> float:
    """Of the first-level cache for a weight, in steps without shared memory.

    A thread's read of its own block is one for each thread; a warp's of 128 bytes one for all, and
    two for its halves of x.
    """
    return 1 + 1 / 32 if step == 1 else 3 / 64


def times(step: int, of: dict[str, Kernel], rows: int, columns: int) -> Times:
    """Of one call."""
    if step > 2:
        kernel = of["linear_kernel<Bfloat16, 1>"]
        return product_times(kernel, 1, rows, columns, FILLS[step])
    busy = min(H200.processors, math.ceil(rows / (256 if step == 1 else 8)))
    mine = rows * columns / busy
    clocks = {
        "instructions": rate(step, of) * mine / H200.issue,
        "first-level cache": wavefronts(step) * mine,
        "second-level cache": 2 * mine / per_clock(CACHE) * busy / H200.processors,
    }
    return Times(clocks, 1, 1)


def copied(step: int, rows: int, columns: int) -> float:
    """Bytes of blocks that come from the second-level cache."""
    if step < 4:
        return 2 * rows * columns
    p = plan("linear", rows, columns, 1, 2, FILLS[step])
    if step == 4:
        return p.tiles * p.splits * 704 * 128
    return 2 * rows * columns / 4


def table(of: dict[str, Kernel]) -> str:
    """The table of the page."""
    head = " | ".join(f"{n} x {k}, us: bound by" for n, k in LAYERS)
    lines = [
        f"| step | DRAM, MB | second-level cache, MB of {LAYERS[0][0]} x {LAYERS[0][1]} "
        f"| lane-instructions for a weight | {head} | measured |",
        "|---|---|---|---|---|---|---|",
        f"| {NAIVE} | | | | | | not timed: it says what is right |",
    ]
    for step, name in NAMES.items():
        cells = []
        for layer in LAYERS:
            t = times(step, of, *layer)
            cells.append(f"{t.seconds * 1e6:.1f}: {t.bound}")
        lines.append(
            f"| {step}. {name} | {BANKS[step] * 128 / 1e6:.1f} "
            f"| {copied(step, *LAYERS[0]) / 1e6:.0f} | {rate(step, of):.1f} "
            f"| {' | '.join(cells)} | not yet run on a GPU |"
        )
    dense_cells = " | ".join(f"{dense(1, *layer) * 1e6:.1f}: DRAM" for layer in LAYERS)
    matrix = 2 * LAYERS[0][0] * LAYERS[0][1] / 1e6
    lines.append(
        f"| dense, cuBLAS | {matrix:.0f} | {matrix:.0f} | | {dense_cells} | not yet run on a GPU |"
    )
    return "\n".join(lines)
