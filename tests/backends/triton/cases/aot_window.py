"""What the compiler made of the window law, for four architectures, without a GPU."""

from __future__ import annotations

import re

import pytest
import torch
import triton_aot as aot

from rpg_kernels.backends.triton.config import choose
from rpg_kernels.backends.triton.window_law import IN_ORDER

# Lane-instructions per entry of the kernel that tabulates a layer, at 8 entries a thread: a vector
# sign and the scramble, and with it units that change places by 6 Feistel rounds.
TABLE = {
    ((0, 0), 80): 153, ((0, 0), 90): 151, ((0, 0), 100): 151, ((0, 0), 120): 154,
    ((6, 0), 80): 219, ((6, 0), 90): 213, ((6, 0), 100): 213, ((6, 0), 120): 221,
}  # fmt: skip


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize("rounds", [(0, 0), (6, 0)])
def test_table(rounds: tuple[int, int], architecture: int) -> None:
    config = choose("unpack", 1, 4096, 4096, 64, torch.float16)
    more = {"ROUNDS": rounds[0], "SWAP_ROUNDS": rounds[1], "SCRAMBLE": 7}
    constants = aot.linear_constants("folded", "law", **more)
    c = aot.build("slots", architecture, config, "fp16", **constants)
    code = [s for s in c.sass.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/(?!.*\bNOP\b)", s)]
    assert len(code) * 32 * config.warps / constants["BLOCK"] <= TABLE[rounds, architecture]
    assert c.spills == 0


@pytest.mark.parametrize("name", list(aot.KERNELS))
@pytest.mark.parametrize(
    ("g", "sign", "rounds"),
    [(16, "element", (6, 0, 7)), (1, "entry", (0, 24, 8)), (64, "folded", (0, 0, IN_ORDER))],
)
def test_every_kernel_compiles(name: str, g: int, sign: str, rounds: tuple[int, ...]) -> None:
    """In line, where integers of 1 are constants, and where they have 64 bits."""
    if sign == "folded" and name not in ("linear", "linear_input_grad", "conv2d", "slots"):
        sign = "entry"  # the others read the bank itself
    plain = name in ("pack", "slots")
    config = choose("unpack" if plain else name, 1, 64, 64, g, torch.float16)
    more = {
        **dict(zip(("ROUNDS", "SWAP_ROUNDS", "SCRAMBLE"), rounds, strict=True)),
        **{"PAIRS": False, "EVEN_K": False, "ADD": True, "BY_TAP": g != 1},
    }
    constants = aot.linear_constants(sign, "law", g, **more)
    how = {"ones": True} if g == 16 else {"integers": "i64" if g == 1 else "i32"}
    assert aot.build(name, 90, config, "fp16", **how, **constants).ptx


@pytest.mark.parametrize("name", ["linear", "linear_input_grad"])
def test_element_signs_of_a_large_batch(name: str) -> None:
    """Positions of the window law cost little where rows stay, or are found once per step."""
    config = choose(name, 4096, 4096, 4096, 64, torch.float16)
    constants = aot.linear_constants("element", "scratch", SCRAMBLE=7, EVEN_N=True)
    c = aot.build(name, 90, config, "fp16", **constants)
    assert c.spills_in_loop == 0
    assert aot.per_weight(c, config.block_n * config.block_k) <= 6.0
