"""Slots per second of the packing law in PyTorch, and of its inverse, on 1 and 2 threads.

    python -m benchmarks.law [--out FILE.json]

Evaluates a layer in chunks, as the reference operators do, and reports millions of slots per second
(median of several passes; nothing is kept between them). The inverse is that of the permutation;
"slots" is the whole law of a position, from row and block to slot and sign.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rpg_kernels.law.ring import LAW_VERSION, LayerLaw

# rows, blocks
SHAPES = [(4096, 64), (512, 72), (997, 13), (20011, 32), (20011, 1), (300007, 1)]


def rate(evaluate: Callable[[Tensor], object], total: int, chunk: int, repeats: int) -> float:
    """Positions per second."""
    passes = max(1, 2**20 // total)
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for _ in range(passes):
            for first in range(0, total, chunk):
                evaluate(torch.arange(first, min(total, first + chunk)))
        seconds.append(time.perf_counter() - begin)
    return passes * total / statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--chunk", type=int, default=2**16, help="positions at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    rows = []
    heading = ("blocks", "rounds", "threads", "forward", "inverse", "slots")
    print("{:>12} {:>16} {:>7} {:>8} {:>8} {:>8}".format(*heading))
    for n, b in SHAPES:
        law = LayerLaw(0, 0, n, b, 64, 31250, 0, "vector", permute=True)
        p = law.permutation(0)
        name = f"{p.rounds} Feistel" if p.rounds else f"{p.swap_rounds} swap-or-not"

        def whole(q: Tensor, law: LayerLaw = law, b: int = b) -> None:
            row = q.div(b, rounding_mode="floor")
            law.slot(row, q - row * b)
            law.sign_words(row, q - row * b)

        for threads in args.threads:
            torch.set_num_threads(threads)
            forward, inverse, slots = (
                rate(f, n * b, args.chunk, args.repeats) / 1e6
                for f in (p.forward, p.inverse, whole)
            )
            print(
                f"{f'{n} x {b}':>12} {name:>16} {threads:7}"
                f" {forward:8.1f} {inverse:8.1f} {slots:8.1f}"
            )
            rows.append(
                {
                    "rows": n,
                    "blocks": b,
                    "rounds": name,
                    "threads": threads,
                    "forward_per_s": forward * 1e6,
                    "inverse_per_s": inverse * 1e6,
                    "slots_and_signs_per_s": slots * 1e6,
                }
            )
    print("millions of positions per second")
    if args.out:
        result = {
            "benchmark": "law",
            "law": LAW_VERSION,
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "chunk": args.chunk,
            "rows": rows,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
