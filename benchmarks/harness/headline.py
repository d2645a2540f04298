"""The README's two tables: where ours is faster, and where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import table
from benchmarks.harness.cpu import networks, networks_run, run
from benchmarks.harness.cpu.grid import BANKS, TRAINING, Bank
from benchmarks.harness.cpu.report import newest, times
from benchmarks.harness.table import NOT_MEASURED
from rpg_kernels import timing

_LINEAR = "llama-3-8b.q_proj"  # 4096 x 4096


@dataclass(frozen=True)
class Line:
    """A row of a table, in words, and which measured row it is of."""

    words: str
    case: str
    dtype: str
    batch: int
    what: str
    bank: Bank


_FOUR, _SIXTEEN, _RING = BANKS
_LARGE = Bank(20_000_000, 4)
_STEP = "resnet18-cifar"
WINS = (
    Line("ResNet-18, 32x32 images, training step, batch 32", _STEP, "bf16", 32, TRAINING, _FOUR),
    Line("ResNet-18, more laps and a smaller bank", _STEP, "bf16", 32, TRAINING, networks.NINE),
    Line("ResNet-18 as in the first row", _STEP, "fp32", 32, TRAINING, _FOUR),
    Line("linear 4096x4096, training, batch 256", _LINEAR, "bf16", 256, TRAINING, _FOUR),
    Line("linear 4096x4096, training, batch 1024", _LINEAR, "bf16", 1024, TRAINING, _SIXTEEN),
    Line("linear 4096x4096, forward, batch 1", _LINEAR, "bf16", 1, "forward", _FOUR),
)
LOSSES = (
    Line("ResNet-18, whole ring, training step, batch 32", _STEP, "bf16", 32, TRAINING, _RING),
    Line("linear 4096x4096, whole ring, training", _LINEAR, "bf16", 256, TRAINING, _RING),
    Line("linear 1024x1024, training, batch 1", "vit-l.proj", "bf16", 1, TRAINING, _FOUR),
    Line("linear 4096x4096, training, batch 1", _LINEAR, "bf16", 1, TRAINING, _LARGE),
    Line("linear 4096x4096, whole ring, forward, batch 1", _LINEAR, "bf16", 1, "forward", _RING),
)  # fmt: skip


def wins(results: Path) -> list[str]:
    """Six rows where ours is faster."""
    return [*_heading(results), *_table(WINS, results)]


def losses(results: Path) -> list[str]:
    """Rows where ours is slower."""
    return _table(LOSSES, results)


def _heading(results: Path) -> Iterator[str]:
    for load in (networks_run.load, run.load):
        for path, record in newest(results, load)[:1]:
            first, *_ = table.heading(record)
            lacks = record["lacks"]
            of = "Networks" if load is networks_run.load else "Linear layers"
            file = f"[file]({{up}}benchmarks/results/{path.name})"
            without = f"; no {', '.join(lacks)}." if lacks else "."
            yield f"{of}: {first}; {record['clock']} time ({file}){without}"
    yield ""


def _table(lines: Sequence[Line], results: Path) -> list[str]:
    rows = [
        row
        for load in (networks_run.load, run.load)
        for _, record in newest(results, load)[:1]
        for row in record["results"]
        if row["ratio"] and row.get("network") != networks_run.PUBLISHED
    ]
    cells = []
    for line in lines:
        found = [row for row in rows if _is(row, line)]
        bank = (str(line.bank), line.dtype)
        if not found:
            cells.append((line.words, *bank, NOT_MEASURED, "", ""))
            continue
        row = found[0]
        dense, ours = (
            row.get("dense_seconds") or row.get("dense_s"),
            row.get("seconds") or row.get("ours_s"),
        )
        ratio = times(row["ratio"]["median"])
        cells.append((line.words, *bank, timing.seconds(dense), timing.seconds(ours), ratio))
    head = ("what", "bank", "dtype", "fastest dense", "ours", "ratio")
    return table.markdown(head, cells)


def _is(row: dict[str, Any], line: Line) -> bool:
    of_row = (row.get("case") or row.get("layer"), row["dtype"], row["batch"], row["what"])
    wanted = (line.case, line.dtype, line.batch, line.what)
    return of_row == wanted and Bank(row["dof"], row["laps"]) == line.bank


TABLES = {"wins": wins, "losses": losses}
