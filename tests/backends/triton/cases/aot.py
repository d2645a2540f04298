"""What the compiler made of the kernels, for four architectures, without a GPU."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import triton_aot as aot

from rpg_kernels.backends.triton.config import choose

INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
# Lane-instructions per generated weight in the loop of the large-batch tile. On sm_80 and sm_120,
# whose mma.sync does a quarter of wgmma's work per instruction, products alone are 2 of them.
FORWARD = {
    ("folded", 80): 5.5, ("folded", 90): 2.1, ("folded", 100): 2.4, ("folded", 120): 6.5,
    ("element", 80): 11.5, ("element", 90): 5.0, ("element", 100): 5.5, ("element", 120): 12.6,
}  # fmt: skip
SMALL_SHARED = 99 * 1024  # bytes a program may have on sm_86, sm_89 and sm_120
INPUT_GRAD = {
    ("folded", 90): 2.0, ("element", 90): 5.1, ("folded", 100): 2.4, ("element", 100): 5.5,
}  # fmt: skip


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize("sign", ["folded", "element"])
@pytest.mark.parametrize("name", ["linear", "linear_input_grad"])
def test_large_batch(name: str, sign: str, architecture: int) -> None:
    c, weights = aot.large(name, architecture, sign)
    assert INSTRUCTION[architecture] in c.ptx
    gathers = re.findall(r"cp\.async\.cg\.shared\.global[^;]*, (?:0x10|16)", c.ptx)
    assert len(gathers) >= 12
    assert not re.findall(r"ld\.global[.\w:]*b16", c.ptx)  # nothing is read two bytes at a time
    assert c.spills_in_loop == 0
    assert not c.serialised
    assert architecture in (90, 100) or c.shared <= SMALL_SHARED
    budget = (FORWARD if name == "linear" else INPUT_GRAD).get((sign, architecture))
    if budget is not None:
        assert aot.per_weight(c, weights) <= budget


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_bank_gradient(architecture: int) -> None:
    c, _ = aot.large("linear_bank_grad", architecture, "element")
    assert INSTRUCTION[architecture] in c.ptx
    assert not re.findall(r"ld\.global[.\w:]*b16", c.ptx)
    assert c.spills_in_loop == 0
    # Triton 3.9 writes red, since the results are not used; ptxas makes REDG of both.
    atomics = re.findall(r"(?:atom|red)\.global\.gpu[.\w:]*", c.ptx)
    assert atomics
    assert all(("v4" in a) == (architecture >= 90) for a in atomics)


def test_fp32_bank_that_is_converted_in_the_tile() -> None:
    for name in ("linear", "linear_input_grad"):
        config = replace(choose(name, 4096, 4096, 4096, 64, torch.float16, False), stages=2)
        constants = aot.linear_constants("element", PAIRS=False)
        c = aot.build(name, 120, config, "fp16", bank="fp32", **constants)
        assert c.shared <= SMALL_SHARED
        assert c.spills_in_loop == 0


@pytest.mark.parametrize("architecture", [90])
@pytest.mark.parametrize("name", ["unpack", "pack", "slots"])
def test_kernels_without_products(name: str, architecture: int) -> None:
    config = choose("unpack", 1, 4096, 4096, 64, torch.float16)
    for sign in ("entry", "element"):
        constants = aot.linear_constants(sign, "law")
        c = aot.build(name, architecture, config, "fp16", **constants)
        assert c.spills == 0
        assert not re.findall(r"st\.global[.\w:]*b16", c.ptx)  # whole vectors are stored
        if name == "unpack":
            code = [s for s in c.sass.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", s)]
            weights = config.block_n * config.block_k
            assert len(code) * 32 * config.warps / weights <= 25


@pytest.mark.parametrize(
    ("name", "dtype", "g", "precision"),
    [
        ("linear", "bf16", 1, "ieee"),
        ("linear_input_grad", "bf16", 16, "ieee"),
        ("linear_bank_grad", "bf16", 4, "ieee"),
        ("linear", "fp32", 16, "tf32"),
        ("linear_bank_grad", "fp32", 2, "tf32"),
        ("linear", "fp32", 32, "ieee"),
    ],
)
def test_other_dtypes_and_granularities(name: str, dtype: str, g: int, precision: str) -> None:
    """bfloat16 has no interpreter to run in: at least it compiles. fp32 has TF32 if allowed."""
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    config = choose(name, 32, 256, 256, g, torch_dtype)
    more = {"PAIRS": dtype == "bf16", "EVEN_K": False, "PRECISION": precision}
    constants = aot.linear_constants("element", "law", g, **more)
    c = aot.build(name, 90, config, dtype, **constants)
    tensor_cores = dtype == "bf16" or precision == "tf32"
    assert bool(re.search(r"wgmma\.mma_async|mma\.sync", c.ptx)) == tensor_cores


@pytest.mark.parametrize("name", list(aot.KERNELS))
@pytest.mark.parametrize(("g", "source", "sign"), [(1, "table", "entry"), (16, "law", "element")])
def test_integers_of_one(name: str, g: int, source: str, sign: str) -> None:
    """Sizes and strides of 1 become constants, which have fewer methods than tensors."""
    config = choose("unpack" if name in ("pack", "slots") else name, 1, 1, 1, g, torch.float16)
    more = {"PAIRS": False, "EVEN_K": False, "ADD": True, "HAS_BIAS": True, "BY_TAP": False}
    constants = aot.linear_constants(sign, source, g, **more)
    assert aot.build(name, 90, config, "fp16", ones=True, **constants).ptx
    if source == "table" and name not in ("pack", "slots"):
        assert aot.build(name, 90, config, "fp16", **constants).ptx


@pytest.mark.parametrize("architecture", [90, 120])
@pytest.mark.parametrize("name", ["linear", "linear_input_grad"])
@pytest.mark.parametrize("sign", ["folded", "element"])
def test_law_in_line_fits_shared_memory(name: str, sign: str, architecture: int) -> None:
    c, _ = aot.large(name, architecture, sign, "law")
    assert c.shared <= (227 * 1024 if architecture in (90, 100) else SMALL_SHARED)
    assert c.spills_in_loop == 0


@pytest.mark.parametrize(
    ("rounds", "integers", "names"),
    [((0, 24), "i32", ("linear", "slots", "pack")), ((12, 0), "i64", tuple(aot.KERNELS))],
)
def test_other_laws_and_wide_integers(
    rounds: tuple[int, int], integers: str, names: tuple[str, ...]
) -> None:
    for name in names:
        op = "unpack" if name in ("pack", "slots") or "embedding" in name else name
        config = choose(op, 64, 64, 64, 16, torch.float16)
        more = {"ROUNDS": rounds[0], "SWAP_ROUNDS": rounds[1], "PAIRS": False, "EVEN_K": False}
        constants = aot.linear_constants("element", "law", 16, **more)
        assert aot.build(name, 90, config, "fp16", integers=integers, **constants).ptx


@pytest.mark.parametrize("sign", ["folded", "element"])
@pytest.mark.parametrize("name", ["linear", "linear_input_grad", "linear_bank_grad"])
def test_sizes_that_are_multiples_of_eight_only(name: str, sign: str) -> None:
    """Rows of 1000 are read in 16 bytes too."""
    config = choose(name, 1024, 1000, 1000, 64, torch.float16)
    sign = "entry" if name == "linear_bank_grad" and sign == "folded" else sign
    more = {"EVEN_K": False, "UNIT_N": 8, "UNIT_K": 8, "PAIRS": sign == "element"}
    constants = aot.linear_constants(sign, **more)
    c = aot.build(name, 90, config, "fp16", aligned=False, **constants)
    assert not re.findall(r"(?:ld|st)\.global[.\w:]*b16", c.ptx)
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, (0x\w+|\d+)", c.ptx)
    assert sum(s in ("0x10", "16") for s in sizes) >= 12
    assert c.spills_in_loop == 0


@pytest.mark.parametrize("name", ["linear", "linear_input_grad", "linear_bank_grad"])
def test_plain_fp32_products_keep_their_registers(name: str) -> None:
    config = choose(name, 1024, 4096, 4096, 64, torch.float32)
    constants = aot.linear_constants("element", PAIRS=False)
    assert aot.build(name, 90, config, "fp32", **constants).spills_in_loop == 0
