"""What the compiler made of the unit law, for four architectures, without a GPU."""

from __future__ import annotations

import re

import pytest
import torch
import triton_aot as aot

from rpg_kernels.backends.triton.config import choose
from rpg_kernels.backends.triton.unit_law import UNITS, UNITS_IN_ORDER

# Lane-instructions per entry of the kernel that tabulates a layer, at 8 entries a thread: a vector
# sign and a unit, without the loop of its shuffle; and those of a round of it.
TABLE = {80: 201, 90: 194, 100: 194, 120: 203}
ROUND = {80: 26, 90: 25, 100: 25, 120: 26}


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_table(architecture: int) -> None:
    config = choose("unpack", 1, 4096, 4096, 64, torch.float16)
    more = {"ROUNDS": 6, "SWAP_ROUNDS": 0, "LAW": UNITS}
    constants = aot.linear_constants("folded", "law", **more)
    c = aot.build("slots", architecture, config, "fp16", **constants)
    code = [s for s in c.sass.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/(?!.*\bNOP\b)", s)]
    loop = c.loop()
    entries = constants["BLOCK"] / (32 * config.warps)
    assert (len(code) - len(loop)) / entries <= TABLE[architecture]
    assert len(loop) / entries <= ROUND[architecture]
    assert c.spills_in_loop == 0


@pytest.mark.parametrize(
    ("name", "g", "sign", "rounds"),
    [
        *((name, 16, "element", (6, 0, UNITS)) for name in aot.KERNELS),
        *((name, 1, "entry", (0, 24, UNITS)) for name in ("linear", "pack", "slots")),
        *((name, 64, "entry", (0, 0, UNITS_IN_ORDER)) for name in ("pack", "slots")),
    ],
)
def test_every_kernel_compiles(name: str, g: int, sign: str, rounds: tuple[int, ...]) -> None:
    """In line, where integers of 1 are constants, and where they have 64 bits."""
    plain = name in ("pack", "slots")
    config = choose("unpack" if plain else name, 1, 64, 64, g, torch.float16)
    more = {
        **dict(zip(("ROUNDS", "SWAP_ROUNDS", "LAW"), rounds, strict=True)),
        **{"PAIRS": False, "EVEN_K": False, "ADD": True, "BY_TAP": g != 1},
    }
    constants = aot.linear_constants(sign, "law", g, **more)
    how = {"ones": True} if g == 16 else {"integers": "i64" if g == 1 else "i32"}
    assert aot.build(name, 90, config, "fp16", **how, **constants).ptx


@pytest.mark.parametrize(("name", "most"), [("linear", 6.0), ("linear_input_grad", 7.6)])
def test_element_signs_of_a_large_batch(name: str, most: float) -> None:
    """Positions of the unit law cost little where rows stay, or are found once per step."""
    config = choose(name, 4096, 4096, 4096, 64, torch.float16)
    constants = aot.linear_constants("element", "scratch", LAW=UNITS, EVEN_N=True)
    c = aot.build(name, 90, config, "fp16", **constants)
    assert c.spills_in_loop == 0
    assert aot.per_weight(c, config.block_n * config.block_k) <= most
