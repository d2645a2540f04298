"""``python -m tools.reports.triton_report`` writes the tables of docs/kernels.md; it needs no GPU.

What the compiler made of every kernel (triton_aot), and times predicted from it (triton_model).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import triton
import triton_aot as aot

from rpg_kernels.backends.triton.config import choose
from tools.reports import triton_model as model
from tools.reports.pages import replaced

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
LIMIT = 16 << 20  # bytes of scratch, the default on CUDA
LINEAR = tuple(itertools.product((16, 256, 1024, 4096), ((4096, 4096), (14336, 4096))))
# Images, channels, pixels across: the 3x3 convolutions of ResNet-18 and 34.
CONVOLUTIONS = tuple(itertools.product((32, 256), ((64, 56), (128, 28), (256, 14), (512, 7))))


def row(name: str, sign: str, source: str, arch: int, c: aot.Compiled, weights: int) -> str:
    """One line of the table of compiled kernels."""
    return (
        f"| {name} | {source}, {sign} | {arch} | {aot.per_weight(c, weights):.2f} | "
        f"{c.registers} | {c.shared} | {c.spills} ({c.spills_in_loop} in the loop) |"
    )


def compiled() -> tuple[str, dict[Any, float]]:
    """The table of compiled kernels, and lane-instructions per weight of those for sm_90."""
    lines = [
        f"Triton {triton.__version__}.",
        "",
        "| kernel | entries, sign | sm | in loop / weight | registers | shared | spills |",
        "|---|---|---|---|---|---|---|",
    ]
    rates = {}
    for (name, (sign, source)), arch in itertools.product(aot.CASES, aot.ARCHITECTURES):
        c, weights = (aot.large_conv if "conv" in name else aot.large)(name, arch, sign, source)
        lines.append(row(name, sign, source, arch, c, weights))
        if arch == 90 and source == "scratch":
            rates[name, sign] = aot.per_weight(c, weights)
    return "\n".join(lines), rates


def _fused(
    name: str, m: int, n: int, channels: int, taps: int, sign: str, rates: dict[Any, float]
) -> tuple[float, str]:
    bank = name.endswith("bank_grad")
    c = choose(name, m, n, channels, 64, torch.float16, times=taps if bank else 1)
    rate = rates[name, "entry" if bank and sign == "folded" else sign]
    made = c.block_n * (c.block_m if bank else c.block_k)
    step = model.step_of(name, c, rate * made, sign == "element")
    product = model.product_of(name, m, n, channels, taps)
    return model.fused(name, product, step, n * channels * taps, c.splits)


def predicted(rates: dict[Any, float]) -> str:
    """The table of predicted times."""
    lines = [
        "| kernel | batch | weight | dense, us | vector, us | element, us | unpacked, us "
        "| dense / vector | bound by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    sizes = [("linear", m, n, k, 1, f"{m}", f"{n} x {k}") for m, (n, k) in LINEAR]
    for images, (channels, across) in CONVOLUTIONS:
        what = f"{channels} x {channels} x 3 x 3"
        pixels = images * across * across
        sizes.append(("conv2d", pixels, channels, channels, 9, f"{images} images", what))
    for kind, m, n, channels, taps, batch, weight in sizes:
        for name in (kind, f"{kind}_input_grad", f"{kind}_bank_grad"):
            dense = model.dense(m, n, channels * taps, taps)
            (vector, bound), (element, _) = (
                _fused(name, m, n, channels, taps, sign, rates) for sign in ("folded", "element")
            )
            unpacked = model.unpacked(m, n, channels * taps, LIMIT)
            times = " | ".join(f"{t * 1e6:.1f}" for t in (dense, vector, element, unpacked))
            if name.endswith("bank_grad"):  # unpacks nothing
                times = times.rpartition("| ")[0] + "| –"
            lines.append(
                f"| {name} | {batch} | {weight} | {times} | {dense / vector:.2f} | {bound} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Write both tables."""
    table, rates = compiled()
    text = replaced(PAGE.read_text(), "compiled", table)
    PAGE.write_text(replaced(text, "predicted", predicted(rates)))


if __name__ == "__main__":
    main()
