"""Lane-instructions for each weight that a kernel generates, from its machine code.

Of one column of blocks of a whole tile: each loop of the machine code is named by the source lines
in it, and each name has a number of passes of a warp, on average. Code outside of loops runs once
for a column, without what belongs to other fills or other signs. Pieces that only some warps run
are counted as if all did, so sums are somewhat too high, never too low.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tools.reports.cuda_sass import Kernel, Loop, loop_name, name_of, never_run, region

WARPS = 8
STEP = WARPS * 32


@dataclass(frozen=True)
class Case:
    """A column of a tile; in windows its rows are a unit, with whole octets of the ring."""

    batch_tile: int
    rows: int = 1024
    block: int = 64
    laps: int = 4
    fill: str = "windows"  # or ring, gather
    slots: int = 704  # of a ring

    @property
    def places(self) -> int:
        """Blocks that it multiplies with x."""
        return {"windows": self.rows // self.laps, "ring": self.slots, "gather": self.rows}[
            self.fill
        ]

    @property
    def weights(self) -> int:
        """That a column generates."""
        return self.rows * self.block


# Phases of the forward, as the tables call them, and the pieces of source in each.
_COMMON = {
    "octets": [region("columns.h", "8 * k < columns.rows; k += kThreads) {")],
    "rows": [region("columns.h", "i < columns.rows; i += kThreads) {", nth=1)],
    "units": [region("columns.h", "void find_units(")],
    "copies": [region("columns.h", "place + 3 * step < stage.filled;")],
    "rest of copies": [region("columns.h", "for (; place < stage.filled; place += step")],
    "prepared": [region("columns.h", "void prepare_rows(")],
    "blocks": [region("columns.h", "for (; place < columns.rows; place += step")],
    "ring slots": [region("columns.h", "place = ring_slot(columns.layer, p), sign", until=";")],
    "other": [region("columns.h", "void finish(")],
}
LINEAR = {
    **_COMMON,
    "x": [region("linear.cu", "void fill_x(")],
    "x, not aligned": [region("linear.cu", "for (int e = 0; e < int{16 / sizeof(Bits)}; ++e) {")],
    "fragments": [region("linear.cu", "void products_mma(")],
    "products": [
        region("linear.cu", "first < stage.filled; first += kWarps * 16) {"),
        region("linear.cu", "place < stage.filled; place += kThreads) {"),
    ],
    "steps": [region("linear.cu", "for (int c = 0; c < chunks; ++c) {")],
    "sums": [region("linear.cu", "for (int k = 0; k < kRows; ++k) {")],
}
INPUT_GRAD = {
    **_COMMON,
    "gaps": [
        region("input_grad_permute.h", "void clear("),
        region("input_grad_permute.h", "if (gaps) {"),
        region("input_grad_permute.h", "if (gaps) memory.flag", until=";"),
        region("input_grad_permute.h", "i < room; i += kThreads) {"),
    ],
    "flags": [
        region("input_grad_fma.h", "memory.t[i] = 0;", until=";"),
        region("input_grad_fma.h", "i < stage.filled; i += kThreads) {"),
    ],
    "flagged": [
        region("input_grad_fma.h", "memory.t[place_of(memory.entry[i])] = 1;", until=";"),
    ],
    "unread": [
        region("input_grad_fma.h", "for (int c = 0; c < chunks; ++c) stage", until=";"),
    ],
    "put rows": [region("input_grad_permute.h", "i < columns.rows; i += kThreads) {", nth=1)],
    "fragments": [region("input_grad_mma.h", "void input_grad_products(")],
    "eight laps": [region("input_grad_mma.h", "for (; lap < laps; lap += 8) {")],
    "four laps": [region("input_grad_mma.h", "for (; lap + 4 <= laps; lap += 4) {")],
    "one lap": [region("input_grad_mma.h", "for (; lap < laps; ++lap) {")],
    "slots": [region("input_grad_mma.h", "first < places; first += 16 * share.parts) {")],
    "row slots": [region("input_grad_mma.h", "first < columns.rows; first += 16 * share.parts) {")],
    "clear": [region("input_grad_fma.h", "i < terms * DyVectors::kVectorRows; i += kThreads) {")],
    "laps": [region("input_grad_fma.h", "for (int lap = 0; lap < laps; ++lap) {")],
    "terms": [
        region(
            "input_grad_fma.h",
            "const float sign = sign_of(memory.entry[i]);",
            until="store(target, v);",
        )
    ],
    "products": [region("input_grad_fma.h", "term < terms; term += parts) {")],
    "whole": [region("linear_input_grad.cu", "write<T>(args.call, index, total);", until=";")],
    "fours": [region("linear_input_grad.cu", "for (int m = out.m; m < batch;")],
    "parts": [region("linear_input_grad.cu", "for (int m = out.m; m < batch;", nth=1)],
    "parts of a sum": [region("input_grad_fma.h", "part < kThreads / pairs; ++part) {")],
}
PHASES = {
    "entries": ("octets", "units", "rows", "ring slots", "prepared", "put rows"),
    "products": (
        "fragments",
        "products",
        "steps",
        "eight laps",
        "four laps",
        "one lap",
        "slots",
        "row slots",
    ),
    "sums": (
        "sums",
        "flags",
        "flagged",
        "clear",
        "laps",
        "terms",
        "fours",
        "parts",
        "parts of a sum",
    ),
    "copies": ("copies", "blocks", "x"),
}


def passes(case: Case, kernel: Kernel) -> dict[str, float]:
    """Passes of a warp through each loop's body, for each time that it comes to the loop."""
    size = 4 if "Float32" in kernel.name else 2
    chunks = case.block * size // 16
    forward = kernel.name.startswith("linear_kernel")
    products = case.places / STEP if size == 4 else case.places / 16 / WARPS
    if not forward:
        products = case.places / (STEP / (case.block / 2))
    warps = WARPS / (case.block / 16)  # that share the slots, in the input gradient
    return {
        "rows": case.rows / STEP,
        "prepared": case.rows / STEP,
        "put rows": case.rows / STEP,
        "blocks": case.places * chunks / STEP if case.fill == "gather" else 0,
        "octets": case.rows / 8 / STEP,
        "units": 6,  # four of the 24 rounds of the permutation of columns at a time
        "copies": case.places * chunks / STEP,
        "products": products,
        "steps": chunks,
        "flags": case.places / STEP,
        "flagged": case.rows / STEP,
        "eight laps": math.ceil(case.laps / 8),
        "four laps": case.laps // 4,
        "one lap": case.laps % 4,
        "slots": case.places / 16 / warps,
        "row slots": case.rows / 16 / warps,
        "clear": case.places * min(4, case.batch_tile) / STEP,
        "laps": case.laps if case.fill == "windows" else 1,
        "fours": 1,  # 16 rows of blocks of 64
        "parts": max(1, case.block * case.batch_tile / STEP),
        "parts of a sum": STEP / (case.block / 2),
    }


# Pieces that a fill does not run, or not for every column.
_WINDOWS = (
    "octets",
    "units",
    "copies",
    "flags",
    "flagged",
    "eight laps",
    "four laps",
    "one lap",
    "slots",
)
_NEVER = ("other", "x, not aligned", "gaps", "unread", "whole", "rest of copies")
UNUSED = {
    "windows": (*_NEVER, "rows", "ring slots", "prepared", "blocks", "row slots"),
    "ring": (*_NEVER, *_WINDOWS, "prepared", "blocks"),
    "gather": (*_NEVER, *_WINDOWS, "ring slots"),
}
LAW = 90  # instructions of a lone slot by law 1 with 6 rounds, which is a function of its own


def column_loop(kernel: Kernel) -> Loop:
    """The loop over columns of blocks, the outermost with barriers."""
    loops = [loop for loop in kernel.loops() if kernel.count("BAR", loop.body) > 1]
    return max(loops, key=lambda loop: len(loop.body))


def never(case: Case, kernel: Kernel) -> tuple[str, ...]:
    """Pieces that a column of this kernel does not run."""
    mma = "Float32" not in kernel.name
    return (*UNUSED[case.fill], *(("parts",) if mma else ()))


def reads(case: Case, kernel: Kernel) -> dict[str, int]:
    """Reads or writes of shared memory in one pass of the loops that compilers unroll."""
    forward = kernel.name.startswith("linear_kernel")
    out = {"clear": 1, "copies": 1, "blocks": 1, "parts of a sum": 1}
    if forward and "Float32" in kernel.name:
        out["steps"] = 1 + case.batch_tile
    if not forward and "Float32" in kernel.name:
        out["products"] = 1 + max(1, case.batch_tile // 4)
    if not forward and "Float32" not in kernel.name:
        out["slots"] = {1: 3, 8: 3, 16: 5}[case.batch_tile]
    return out


# Of the integer pipe, which takes half as many in a clock as can be issued.
INTEGERS = re.compile(
    r"LOP3|SHF|IADD3|VIADD|LEA|ISETP|SEL|PRMT|MOV$|VIMNMX|PLOP3|IABS|FSETP|FSEL|P2R|R2P"
)


def per_weight(kernel: Kernel, case: Case, only: re.Pattern[str] | None = None) -> dict[str, float]:
    """Lane-instructions per weight of each phase, and of the code of a column around them.

    Args:
        kernel: a product.
        case: what it computes.
        only: opcodes that count; None for all.
    """
    regions = LINEAR if kernel.name.startswith("linear_kernel") else INPUT_GRAD
    trips, one_pass = passes(case, kernel), reads(case, kernel)
    phase_of = {part: phase for phase, parts in PHASES.items() for part in parts}
    totals = dict.fromkeys((*PHASES, "column"), 0.0)
    skipped = never(case, kernel)
    names = [name_of(instruction, regions) for instruction in kernel.instructions]
    # What compilers cannot have moved out of a piece says that the code around it belongs to it,
    # unless it has a condition of its own.
    fixed = re.compile(r"STS|STG|LDGSTS|BAR|SHFL|LDSM|HMMA|ATOM")
    guards = re.compile(r"BRA|ISETP|PLOP3|BSSY|BSYNC")
    unused = never_run(
        kernel,
        {
            i
            for i, name in enumerate(names)
            if name in skipped
            and fixed.match(kernel.instructions[i].opcode)
            and not kernel.instructions[i].text.startswith("@")
        },
    )

    def unrolled(name: str, loop: Loop) -> float:
        # Not those that never run: ptxas puts such before copies.
        real = {i for i in loop.own if not kernel.instructions[i].text.startswith("@!PT")}
        accesses = kernel.count(r"(LDS|LDSM|STS|LDGSTS)(\.|$)", real)
        return accesses / one_pass[name] if name in one_pass else 1

    def add(loop: Loop, times: float, inside: str) -> None:
        for i in loop.own - unused:
            name, opcode = names[i], kernel.instructions[i].opcode
            if (name in skipped and not guards.match(opcode)) or (only and not only.match(opcode)):
                continue
            if name in skipped:  # what finds out that the piece is not to run
                name = ""
            here = times
            if name == "terms":  # a term is added in one lap only
                here = times / trips["laps"]
            if "units" in (name, inside):  # by a warp, for 16 columns
                here = times / 16 / WARPS
            totals[phase_of.get(inside or name, "column")] += here
        named: dict[str, list[Loop]] = {}
        for inner in loop.nested:
            named.setdefault(loop_name(kernel, inner, regions), []).append(inner)
        for name, loops in named.items():
            if name in skipped or loops[0].header in unused:
                continue
            if name not in trips:
                raise LookupError(f"{kernel.name}: a loop of {name!r} at {loops[0].header}")
            # Of copies of one loop, the longest does what can be divided by its length; but each
            # plane of T is cleared.
            longest = max(loops, key=lambda of: len(of.own))
            for loop in loops if name == "clear" and not longest.nested else [longest]:
                add(loop, times * trips[name] / max(1, unrolled(name, loop)), name)

    add(column_loop(kernel), 1, "")
    if case.fill != "windows" and not only:
        totals["entries"] += LAW * case.rows / STEP
    return {name: total * STEP / case.weights for name, total in totals.items()}
