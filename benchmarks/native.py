"""The compiled law, unpack and pack: slots per second, and bytes per second beside a copy.

    python -m benchmarks.native [--out FILE.json]

The law evaluates a layer's slots from a list of rows and blocks. unpack writes, and pack reads, a
whole layer of granularity g; the copy moves as many bytes as the layer has. Best of several passes
on each number of threads. `tile` is a layer that fits the reference's scratch limit and so stays in
cache; `layer` does not fit any cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rpg_kernels import ParameterBank, native
from rpg_kernels.law.ring import LayerLaw

LAW_SHAPES = [(4096, 64), (512, 72), (997, 13), (20011, 32), (20011, 1), (300007, 1)]
LAYERS = {"tile": (1024, 1024), "layer": (4096, 4096)}


def best(run: Callable[[], object], passes: int) -> float:
    """Seconds of the fastest pass."""
    run()
    seconds = []
    for _ in range(passes):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def law_rows(passes: int) -> list[dict[str, Any]]:
    out = []
    for rows, blocks in LAW_SHAPES:
        law = LayerLaw(0, 0, rows, blocks, 64, 31250, 0, "vector", permute=True)
        n, b = (
            t.contiguous()
            for t in torch.broadcast_tensors(
                torch.arange(rows)[:, None], torch.arange(blocks)[None]
            )
        )
        p = law.permutation(0)
        name = f"{p.rounds} Feistel" if p.rounds else f"{p.swap_rounds} swap-or-not"
        rate = rows * blocks / best(lambda law=law, n=n, b=b: native.slots(law, n, b), passes)
        print(f"{f'{rows} x {blocks}':>12} {name:>16} {rate / 1e6:8.0f} M slots/s")
        out.append({"rows": rows, "blocks": blocks, "rounds": name, "slots_per_s": rate})
    return out


def copy_rows(passes: int) -> list[dict[str, Any]]:
    out = []
    for size, shape in LAYERS.items():
        for dtype in (torch.float32, torch.bfloat16):
            source = torch.randn(shape).to(dtype)
            target = torch.empty_like(source)
            copied = best(lambda s=source, t=target: t.copy_(s), passes)
            for dof in (45_000, 2_000_000):
                for reflect in ("vector", "element"):
                    for granularity in (64, 16, 1):
                        bank = ParameterBank(dof, granularity, reflect, dtype=dtype)
                        weight = bank.place(shape, scale=0.37)
                        p = weight.placement
                        ring = bank.weight.detach()
                        blocks = source.view(-1, granularity)
                        grad = torch.zeros(ring.shape)
                        region = (0, shape[0], 1, p.matrix.blocks, 0, p.matrix.blocks)

                        def unpack(
                            p: Any = p, ring: Any = ring, blocks: Any = blocks, region: Any = region
                        ) -> None:
                            native.unpack(p.law, ring, blocks, 0.37, region, None)

                        def pack(
                            p: Any = p, grad: Any = grad, blocks: Any = blocks, region: Any = region
                        ) -> None:
                            native.pack(p.law, blocks, grad, 0.37, region, None, 1 << 20)

                        seconds = {"unpack": best(unpack, passes), "pack": best(pack, passes)}
                        row = {
                            "size": size,
                            "shape": shape,
                            "dtype": str(dtype).removeprefix("torch."),
                            "dof": dof,
                            "granularity": granularity,
                            "reflect": reflect,
                            "bytes": source.numel() * source.element_size(),
                            "copy_s": copied,
                            "unpack_s": seconds["unpack"],
                            "pack_s": seconds["pack"],
                        }
                        out.append(row)
                        shares = {k: copied / s for k, s in seconds.items()}
                        print(
                            f"{size:>6} {row['dtype']:>9} dof {dof:>8} g {granularity:>3} "
                            f"{reflect:>8}: copy {row['bytes'] / copied / 1e9:5.1f} GB/s, "
                            f"unpack {shares['unpack']:5.0%}, pack {shares['pack']:5.0%}"
                        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not native.available():
        raise SystemExit(f"the native module is not in use: {native.why_not()}")

    runs = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"{threads} threads, {native.build_info()['isa']}")
        law, copies = law_rows(args.passes), copy_rows(args.passes)
        runs.append({"threads": threads, "law": law, "copies": copies})
    if args.out:
        result = {
            "benchmark": "native",
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "build": native.build_info(),
            "runs": runs,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
