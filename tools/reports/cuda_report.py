"""``python -m tools.reports.cuda_report`` writes the tables of docs/cuda.md and docs/ladder.md.

What nvcc makes of every kernel for every architecture (cuda_sass, cuda_counts), wavefronts of
shared memory from runs on the CPU (shared_banks), and times predicted from both. Compiling takes
some minutes on one core; ``--cache DIR`` keeps what was compiled.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import rpg_kernels as rpg
from rpg_kernels import native
from tools.reports import shared_banks as banks
from tools.reports.cuda_counts import INTEGERS, Case, column_loop, per_weight
from tools.reports.cuda_sass import (
    CUDA,
    ROOT,
    Kernel,
    compile_source,
    kernels,
    usage_of,
)
from tools.reports.pages import replaced
from tools.reports.triton_model import H200, OVERLAP, dense

PAGE = ROOT / "docs" / "cuda.md"
LADDER = ROOT / "docs" / "ladder.md"
SOURCES = ("linear", "linear_input_grad", "linear_bank_grad", "unpack", "ladder")
CACHE = 5.5e12  # bytes a second from the second-level cache, as others measured on an H100
# Lane-instructions for a weight at batch 16 and below: all, and without those of entries. The one
# loop for all tiles, which has no GPU behind it yet, is held to what it takes.
BUDGETS = {"linear": (2.5, 1.7), "linear_input_grad": (3.5, 2.2)}
TABLE_BUDGET = 0.85  # for entries, of the forward
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")  # of a release
COUNTED = ("80", "90a")  # in detail on the page: two generations that data centres have
LAYERS = ((14336, 4096), (4096, 4096))
FILLS = ("windows", "ring", "gather")  # as csrc/cuda/linear.h numbers them
Compiled = dict[str, dict[str, Kernel]]  # by architecture and name


def nvcc_version() -> str:
    """Such as 13.0.88."""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found[1] if found else "unknown"


def compiled(architecture: str, source: str, cache: Path) -> tuple[Path, str]:
    """(cubin, what ptxas says), from ``cache`` where they are there."""
    cubin = cache / f"{source}.{architecture}.cubin"
    log = cubin.with_suffix(".log")
    if not cubin.exists():
        log.write_text(compile_source(CUDA / f"{source}.cu", architecture, cubin))
    return cubin, log.read_text()


def batch_of(name: str) -> int:
    """The 8 of linear_kernel<Bfloat16, 8>."""
    return int(name.rpartition(", ")[2].rstrip(">"))


def case_of(name: str, fill: str = "windows") -> Case:
    """A column of a whole tile of a 14336 x 4096 layer."""
    kernel, batch = name.split("_kernel<")[0], batch_of(name)
    p = plan(kernel, 14336, 4096, batch, code_of(name), fill)
    made = FILLS[p.fill]
    return Case(batch, fill=made, rows=p.rows)


def code_of(name: str) -> int:
    """The number of a kernel's dtype."""
    return {"Float32": 1, "Bfloat16": 2, "Float16": 3}[name.split("<")[1].split(",")[0]]


def shared_bytes(name: str) -> str:
    """What a CTA has of a 14336 x 4096 layer of 4 laps on an H200."""
    if name.startswith(("unpack", "pack", "ladder")):
        return "1024" if name.startswith("unpack") else "0"
    kernel = name.split("_kernel<")[0]
    batch = 16 if kernel == "linear_bank_grad" else batch_of(name)
    return str(plan(kernel, 14336, 4096, batch, code_of(name), "windows").shared_bytes)


def plan(kernel: str, rows: int, columns: int, batch: int, code: int, fill: str) -> Any:
    """The plan of a layer of 4 laps, or of law 1."""
    simt = native._load()[0].simt  # type: ignore[union-attr]
    slots = {"windows": 16384, "ring": 704, "gather": 32768}[fill]
    generator = rpg.Generator(slots, 64, "vector", laps=4 if fill == "windows" else None)
    bank = rpg.ParameterBank.from_generator(generator, device="meta")
    law = native.layer_law(bank.place((rows, columns)).placement.law)
    return getattr(simt, f"plan_{kernel}")(law, code, batch, columns, *banks.H200)


def registers(of: dict[str, dict[str, tuple[int, int]]]) -> str:
    """Registers of each kernel and architecture, and shared memory."""
    lines = [
        f"nvcc {nvcc_version()}.",
        "",
        f"| kernel | shared memory | registers on sm_{' | sm_'.join(of)} | stack and spills |",
        "|---|---|" + "---|" * (len(of) + 1),
    ]
    for name in next(iter(of.values())):
        if name.split("<")[-1].startswith("Float16"):
            continue
        counts = " | ".join(str(of[a][name][0]) for a in of)
        spills = max(of[a][name][1] for a in of)
        lines.append(f"| {name} | {shared_bytes(name)} | {counts} | {spills} |")
    return "\n".join(lines)


KINDS = {
    "HMMA": "HMMA",
    "LDSM x4": r"LDSM\S*\.4",
    "LDS.128": r"LDS\.128",
    "LDS.64": r"LDS\.64",
    "LDS": r"LDS$",
    "STS.128": r"STS\.128",
    "STS.64": r"STS\.64",
    "STS": r"STS$",
    "LDGSTS.128": r"LDGSTS\S*\.128",
    "FFMA": "FFMA",
    "SHFL": "SHFL",
    "BAR": "BAR",
}


def tensor_kernels(of: dict[str, Kernel]) -> list[str]:
    """Names of the products."""
    return [name for name in of if name.startswith(("linear_kernel", "linear_input_grad_kernel"))]


def mix(of: dict[str, Kernel]) -> str:
    """Instructions of the loop over columns, as they stand in the code."""
    lines = [f"| kernel | all | {' | '.join(KINDS)} |", "|---|---|" + "---|" * len(KINDS)]
    for name in tensor_kernels(of):
        kernel = of[name]
        body = column_loop(kernel).body
        counts = [str(kernel.count(pattern, body)) for pattern in KINDS.values()]
        lines.append(f"| {name} | {len(body)} | {' | '.join(counts)} |")
    return "\n".join(lines)


def weight_row(name: str, architecture: str, kernel: Kernel) -> str:
    """One line of the table of lane-instructions."""
    parts = per_weight(kernel, case_of(name))
    cells = " | ".join(f"{part:.2f}" for part in parts.values())
    where = case_of(name)
    return (
        f"| {name} | {where.fill}, {where.rows} rows | {architecture} "
        f"| {cells} | {sum(parts.values()):.2f} |"
    )


def weights(of: Compiled) -> str:
    """Lane-instructions for each weight."""
    lines = [
        "| kernel | tile | sm | entries | products | sums | copies | around them | all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in tensor_kernels(next(iter(of.values()))):
        lines += [weight_row(name, a, of[a][name]) for a in COUNTED]
    return "\n".join(lines)


def totals(of: Compiled) -> str:
    """All lane-instructions for each weight, by architecture."""
    lines = [f"| kernel | tile | sm_{' | sm_'.join(of)} |", "|---|---|" + "---|" * len(of)]
    for name in tensor_kernels(next(iter(of.values()))):
        case = case_of(name)
        sums = (sum(per_weight(kernels_of[name], case).values()) for kernels_of in of.values())
        cells = " | ".join(f"{total:.2f}" for total in sums)
        lines.append(f"| {name} | {case.fill}, {case.rows} rows | {cells} |")
    return "\n".join(lines)


BANK_CASES = (
    *(("linear", batch, torch.bfloat16, 64) for batch in (1, 8, 16, 32)),
    ("linear", 16, torch.bfloat16, 32),
    ("linear", 8, torch.float32, 32),
    *(("linear_input_grad", batch, torch.bfloat16, 64) for batch in (1, 8, 16)),
    ("linear_input_grad", 8, torch.float32, 32),
    ("linear_bank_grad", 16, torch.bfloat16, 64),
)


def bank_row(kernel: str, batch: int, dtype: torch.dtype, granularity: int) -> str:
    """One line of the table of wavefronts."""
    counts = banks.recorded(kernel, batch, dtype, granularity=granularity)
    cells = "; ".join(f"{name} {count.ratio:.1f}" for name, count in counts.items())
    kind = str(dtype).removeprefix("torch.")
    return f"| {kernel} | {kind}, blocks of {granularity} | {batch} | {cells} |"


def conflicts() -> str:
    """Wavefronts of each kind of access."""
    lines = ["| kernel | bank | batch | wavefronts, of the least possible |", "|---|---|---|---|"]
    return "\n".join(lines + [bank_row(*case) for case in BANK_CASES])


@dataclass(frozen=True)
class Times:
    """Clocks of a column of a tile, and what they make of a call."""

    clocks: dict[str, float]
    columns: int  # of the CTA that has the most
    waves: int

    @property
    def bound(self) -> str:
        """The slowest resource."""
        return max(self.clocks, key=lambda name: self.clocks[name])

    @property
    def seconds(self) -> float:
        """Of a call."""
        clocks = self.waves * self.columns * self.clocks[self.bound]
        return clocks / OVERLAP / H200.clock + H200.launch


def per_clock(bytes_a_second: float) -> float:
    """Bytes for one processor in a clock, while all of them read."""
    return bytes_a_second / H200.processors / H200.clock


def shared_wavefronts(op: str, batch: int, case: Case) -> float:
    """Of a column: chunks written by copies and read by ldmatrix, and what goes with the rows."""
    blocks = (1 if case.fill == "ring" else 2) * case.places
    planes = max(1, batch // 8)  # of 16 bytes for each row and 16-bit number
    if op == "linear":
        # Fragments of x for each warp; S written and read, 4 bytes; entries.
        sums = case.places / 8 + case.rows / 32 if batch == 1 else 0
        if batch > 1:
            sums = (case.places + case.rows) / 8 * 2 * planes
        return blocks + 8 * 2 * planes + sums + 2 * case.rows / 32
    if batch == 1:  # dy read, P written with conflicts, and read by the four warps of a part
        return blocks + case.rows / 32 * (1 + 1.6) + 4 * 2 * case.places / 16
    return blocks + 2 * planes * case.rows / 8 + 4 * planes * case.rows / 8


def product_times(kernel: Kernel, batch: int, rows: int, columns: int, fill: str) -> Times:
    """Of the forward or the input gradient in bf16."""
    op = kernel.name.split("_kernel<")[0]
    p = plan(op, rows, columns, batch, 2, fill)
    case = case_of(kernel.name, fill)
    blocks = p.tiles * p.splits * p.batch_tiles
    at_once = min(H200.processors, blocks)
    copied = 128 * case.places if fill != "ring" else 128 * case.slots * p.splits / 64
    if op == "linear_input_grad":  # sums of tiles, written and read
        copied += 2 * 4 * case.block * p.batch_tile
    clocks = {
        "instructions": sum(per_weight(kernel, case).values()) * case.weights / H200.issue,
        "integers": sum(per_weight(kernel, case, INTEGERS).values()) * case.weights / 64,
        "shared memory": shared_wavefronts(op, p.batch_tile, case),
        "second-level cache": copied / per_clock(CACHE) * at_once / H200.processors,
    }
    return Times(clocks, math.ceil(64 / p.splits), math.ceil(blocks / H200.processors))


AIMS = {
    (14336, 1): "3.3",
    (14336, 16): "2.8",
    (4096, 1): "2.2",
    (4096, 16): "1.9",
    (4096, 64): "1.3",
}


def predicted(of: dict[str, Kernel]) -> str:
    """Times of both products with windows, against dense ones."""
    lines = [
        "| kernel | layer | batch | instructions, clocks of a column | integers | shared memory "
        "| second-level cache | columns of a processor | predicted, us | dense, us "
        "| dense / predicted | aim |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for op, batches in (("linear", (1, 8, 16, 64)), ("linear_input_grad", (1, 8, 16))):
        for (n, k), batch in itertools.product(LAYERS, batches):
            tile = plan(op, n, k, batch, 2, "windows").batch_tile
            times = product_times(of[f"{op}_kernel<Bfloat16, {tile}>"], batch, n, k, "windows")
            cells = " | ".join(f"{clocks:.0f}" for clocks in times.clocks.values())
            other, mine = dense(batch, n, k) * 1e6, times.seconds * 1e6
            aim = AIMS.get((n, batch), "–") if op == "linear" else "–"
            lines.append(
                f"| {op} | {n} x {k} | {batch} | {cells} | {times.waves * times.columns} "
                f"| {mine:.1f} | {other:.1f} | {other / mine:.1f} | {aim} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Write the tables of both pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path)
    cache = parser.parse_args().cache
    usage: dict[str, dict[str, tuple[int, int]]] = {}
    code: Compiled = {}
    with tempfile.TemporaryDirectory() as made:
        for architecture, source in itertools.product(ARCHITECTURES, SOURCES):
            cubin, log = compiled(architecture, source, cache or Path(made))
            usage.setdefault(architecture, {}).update(usage_of(log))
            read = source in ("linear", "linear_input_grad", "ladder")
            if read:
                code.setdefault(architecture, {}).update(kernels(cubin))
    hopper = code["90a"]
    tables = {
        "registers": registers(usage),
        "mix": mix(hopper),
        "weights": weights(code),
        "totals": totals(code),
        "wavefronts": conflicts(),
        "predicted": predicted(hopper),
    }
    text = PAGE.read_text("utf-8")
    for name, table in tables.items():
        text = replaced(text, name, table)
    PAGE.write_text(text, "utf-8")
    from tools.reports import cuda_ladder

    text = LADDER.read_text("utf-8")
    LADDER.write_text(replaced(text, "ladder", cuda_ladder.table(hopper)), "utf-8")


if __name__ == "__main__":
    main()
