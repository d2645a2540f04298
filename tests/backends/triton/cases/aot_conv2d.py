"""What the compiler made of the convolution kernels, for four architectures, without a GPU."""

from __future__ import annotations

import re

import pytest
import torch
import triton_aot as aot

from rpg_kernels.backends.triton.config import choose

NAMES = ("conv2d", "conv2d_input_grad", "conv2d_bank_grad")
INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
SMALL_SHARED = 99 * 1024  # bytes a program may have on sm_86, sm_89 and sm_120
# Lane-instructions per generated weight in the loop.
BUDGET = {
    ("conv2d", "folded", 90): 2.5, ("conv2d", "element", 90): 5.4,
    ("conv2d", "folded", 100): 2.9, ("conv2d", "element", 100): 5.9,
    ("conv2d_input_grad", "folded", 90): 2.9, ("conv2d_input_grad", "element", 90): 6.3,
    ("conv2d_input_grad", "folded", 100): 3.4, ("conv2d_input_grad", "element", 100): 6.8,
}  # fmt: skip


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize("sign", ["folded", "element"])
@pytest.mark.parametrize("name", NAMES)
def test_large_layer(name: str, sign: str, architecture: int) -> None:
    bank_grad = name == "conv2d_bank_grad"
    if bank_grad:
        sign = "entry" if sign == "folded" else sign
    c, weights = aot.large_conv(name, architecture, sign, "scratch")
    assert INSTRUCTION[architecture] in c.ptx
    gathers = re.findall(r"cp\.async\.cg\.shared\.global[^;]*, (?:0x10|16)", c.ptx)
    assert len(gathers) >= 6
    assert not re.findall(r"ld\.global[.\w:]*b16", c.ptx)  # nothing is read two bytes at a time
    assert c.spills_in_loop == 0
    assert not c.serialised
    assert architecture in (90, 100) or c.shared <= SMALL_SHARED
    budget = BUDGET.get((name, sign, architecture))
    if budget is not None:
        assert aot.per_weight(c, weights) <= budget
    atomics = re.findall(r"\b(?:atom|red)\.global\.gpu[.\w:]*", c.ptx)
    assert bool(atomics) == bank_grad
    assert all(("v4" in a) == (architecture >= 90) for a in atomics)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "g", "precision", "more"),
    [
        ("bf16", 16, "ieee", {}),
        ("bf16", 4, "ieee", {"EVEN_K": False, "SCATTER": False}),
        ("bf16", 32, "ieee", {"BY_TAP": False, "EVEN_K": False}),
        ("fp32", 32, "tf32", {"BITS_H": 3, "BITS_W": 3, "EVEN_N": True, "LINES": True}),
    ],
)
def test_other_dtypes_and_branches(
    name: str, dtype: str, g: int, precision: str, more: dict[str, bool]
) -> None:
    """bfloat16 has no interpreter to run in: at least it compiles."""
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    config = choose(name, 1024, 64, 64, g, torch_dtype)
    more = {"PAIRS": dtype == "bf16", "PRECISION": precision, **more}
    constants = aot.linear_constants("element", "law", g, **more)
    c = aot.build(name, 90, config, dtype, **constants)
    assert re.search(r"wgmma\.mma_async|mma\.sync", c.ptx)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by_tap", [False, True])
@pytest.mark.parametrize(("source", "sign"), [("table", "entry"), ("scratch", "element")])
def test_integers_of_one(name: str, by_tap: bool, source: str, sign: str) -> None:
    """Sizes and strides of 1 become constants, which have fewer methods than tensors."""
    g = 1 if source == "table" else 8
    config = choose(name, 1, 1, 1, g, torch.float16)
    more = {"PAIRS": False, "EVEN_K": False, "ADD": True, "HAS_BIAS": True, "BY_TAP": by_tap}
    constants = aot.linear_constants(sign, source, g, **more)
    for ones in (True, False):
        assert aot.build(name, 90, config, "fp16", ones=ones, **constants).ptx
