"""What the compiler made of the embedding kernels: registers and vectors."""

from __future__ import annotations

import re

import pytest
import torch
import triton_aot as aot

from rpg_kernels.backends.triton.config import choose

ATOMIC = re.compile(r"(?:atom|red)\.global\.gpu[\w.]*")  # red where the result is not used


def compiled(name: str, architecture: int, dtype: str, g: int, sign: str) -> aot.Compiled:
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    config = choose(name, 4096, 128256, 4096, g, torch_dtype)
    constants = aot.linear_constants(sign, "law", g)
    return aot.build(name, architecture, config, dtype, **constants)


@pytest.mark.parametrize(
    ("dtype", "g", "sign", "architecture"),
    [
        *(("bf16", 16, "element", architecture) for architecture in aot.ARCHITECTURES),
        ("bf16", 64, "entry", 90),
        ("fp32", 16, "entry", 90),
        ("fp32", 128, "element", 90),
    ],
)
def test_lookup_reads_and_writes_vectors(dtype: str, g: int, sign: str, architecture: int) -> None:
    c = compiled("embedding", architecture, dtype, g, sign)
    assert c.spills == 0
    # Of 16 bytes: the 2048 weights of a tile, read and written by 128 threads.
    vectors = 2048 * (4 if dtype == "fp32" else 2) // 16 // 128
    assert len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", c.ptx)) == vectors
    assert re.findall(r"st\.global[\w.:]*", c.ptx) == ["st.global.v4.b32"] * vectors


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_bank_gradient_adds_vectors(architecture: int) -> None:
    c = compiled("embedding_bank_grad", architecture, "bf16", 64, "element")
    assert c.spills == 0
    assert len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", c.ptx)) == 2
    vector = architecture >= 90
    atomics = ATOMIC.findall(c.ptx)
    assert len(atomics) == (4 if vector else 16)
    assert all((".v4." in a) == vector for a in atomics)


@pytest.mark.parametrize("g", [1, 8])
@pytest.mark.parametrize("name", ["embedding", "embedding_bank_grad"])
def test_small_blocks_do_not_spill(name: str, g: int) -> None:
    assert compiled(name, 90, "bf16", g, "element").spills == 0
