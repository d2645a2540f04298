"""A linear layer on this CPU: ours, with and without windows, beside torch's dense layer.

Writes a JSON file with every repeat's time and prints a table of medians::

    python benchmarks/cpu_linear.py --out benchmarks/results/cpu_linear.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import rpg_kernels as rpg
from rpg_kernels.bench.machine import environment

SHAPES = [(14336, 4096), (4096, 4096)]
BATCHES = [1, 2, 4, 8, 16, 32, 256]
# label, degrees of freedom, window, laps
BANKS = [
    ("ring, 45K", 45_000, None, None),
    ("ring, 200K", 200_000, None, None),
    ("windows 64 x 4, 200K", 200_000, 64, 4),
    ("windows 256 x 4, 200K", 200_000, 256, 4),
    ("windows 256 x 4, 20M", 20_000_000, 256, 4),
    ("windows 256 x 16, 200K", 200_000, 256, 16),
    ("windows 256 x 16, 20M", 20_000_000, 256, 16),
]
ROTATED = 3  # dense weights taken in turn, so that they come from memory


def times(function: Callable[[int], object], repeats: int) -> list[float]:
    """Seconds of each call, after two that do not count: the fastest of up to four series, which
    end with the first whose median is near its minimum, since nothing else ran beside that."""
    best: list[float] = []
    for _ in range(4):
        out = []
        for i in range(repeats + 2):
            begin = time.perf_counter()
            function(i)
            out.append(time.perf_counter() - begin)
        series = out[2:]
        if not best or statistics.median(series) < statistics.median(best):
            best = series
        if statistics.median(best) < 1.2 * min(best):
            break
    return best


def measure(n: int, k: int, repeats: int) -> list[dict[str, object]]:
    """All rows of one shape."""
    rows: list[dict[str, object]] = []

    def add(name: str, batch: int, dtype: torch.dtype, seconds: list[float]) -> None:
        row = {"n": n, "k": k, "batch": batch, "dtype": str(dtype)[6:], "name": name}
        rows.append({**row, "seconds": seconds})
        print(f"{n}x{k} {batch:4} {row['dtype']:9} {name:24} "
              f"{1e3 * statistics.median(seconds):9.3f} ms", flush=True)  # fmt: skip

    for dtype in (torch.float32, torch.bfloat16):
        dense = [torch.randn(n, k).to(dtype) for _ in range(ROTATED)]
        for batch in BATCHES:
            x = torch.randn(batch, k).to(dtype)
            add("dense", batch, dtype, times(
                lambda i, x=x, dense=dense: torch.nn.functional.linear(x, dense[i % ROTATED]),
                repeats))  # fmt: skip
        del dense
        for label, dof, window, laps in BANKS:
            bank = rpg.ParameterBank(dof, 64, window=window, laps=laps, dtype=dtype)
            weight = bank.place((n, k))
            for batch in BATCHES:
                x = torch.randn(batch, k).to(dtype)
                with torch.no_grad():
                    add(label, batch, dtype, times(
                        lambda i, x=x, w=weight: rpg.functional.linear(x, w), repeats))  # fmt: skip
    return rows


def table(rows: list[dict[str, object]]) -> list[str]:
    """Medians in milliseconds, and how many times faster than dense, as Markdown."""
    lines = []
    for n, k in SHAPES:
        for dtype in ("float32", "bfloat16"):
            part = {(r["name"], r["batch"]): statistics.median(r["seconds"])  # type: ignore[arg-type]
                    for r in rows if (r["n"], r["k"], r["dtype"]) == (n, k, dtype)}  # fmt: skip
            if not part:
                continue
            head = [f"{n}x{k}, {dtype}: batch", *(str(b) for b in BATCHES)]
            lines += ["| " + " | ".join(head) + " |", "|---" + "|---:" * len(BATCHES) + "|"]
            for name in ["dense", *(label for label, *_ in BANKS)]:
                cells = []
                for batch in BATCHES:
                    value, dense = part[name, batch], part["dense", batch]
                    ratio = "" if name == "dense" else f" ({dense / value:.1f}x)"
                    cells.append(f"{1e3 * value:.2f} ms{ratio}")
                lines.append("| " + " | ".join([name, *cells]) + " |")
            lines.append("")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file with every time")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--table", type=Path, help="print the table of such a file instead")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(json.loads(args.table.read_text(encoding="utf-8"))["rows"])))
        return 0
    rows = [row for n, k in SHAPES for row in measure(n, k, args.repeats)]
    if args.out:
        record = {
            "environment": environment(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "rows": rows,
        }
        args.out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
