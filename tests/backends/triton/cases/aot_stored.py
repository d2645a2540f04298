"""What the compiler made of kernels that read banks in fewer bytes, without a GPU."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton_aot as aot
import triton_every as every
import triton_launches as launches
import triton_step as step

from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.triton.config import choose

PRODUCTS = ("linear", "linear_input_grad", "conv2d", "conv2d_input_grad")
SMALL_SHARED = 99 * 1024  # bytes a program may have on sm_86, sm_89 and sm_120
FEW_BYTES = 64  # of stack, as in aot_every.py


@pytest.mark.parametrize("architecture", list(every.GPUS))
@pytest.mark.parametrize(
    ("op", "form"), [*zip(PRODUCTS, every.STORED, strict=False), ("embedding", "float8 compact")]
)
def test_nothing_spills(op: str, form: str, architecture: int) -> None:
    """The most crowded of all that is chosen, and one more; nothing needs what sm_80 lacks."""
    found = every.specialisations(architecture, (op,), form)
    some = [one for one in found if one.kernel == op]
    crowded = max(some, key=every.pressure)
    for one in (crowded, random.Random(op).choice(some)):
        done = launches.compile_for(one, architecture)
        c = launches.constants(one)
        law = c["SOURCE"] == "law" or c["G"] <= 8
        usage = launches.usage(one, architecture)
        assert usage.stack <= (FEW_BYTES if law else 0), found[one]
        assert architecture != 80 or done.metadata.shared <= SMALL_SHARED
        assert "e4m3" not in done.asm["ptx"]


@pytest.mark.parametrize("architecture", list(every.GPUS))
def test_codes_are_read_in_lines(architecture: int) -> None:
    """16 of them at a time, asynchronously, and none by itself."""
    chosen = choose("linear", 4096, 4096, 4096, 64, torch.float16, every.GPUS[architecture])
    config = replace(chosen, stages=2)
    constants = aot.linear_constants("entry", "scratch", PAIRS=False)
    how: dict[str, Any] = {"bank": "i8", "parts": ("scales_ptr",)}
    c = aot.build("linear", architecture, config, "fp16", **how, **constants)
    copies = re.findall(r"cp\.async\.cg\.shared\.global[^;]*, (?:0x10|16)", c.ptx)
    tile = config.block_k * (2 * config.block_m + config.block_n)  # bytes of x and of codes
    assert len(copies) == 2 * tile // (16 * 32 * config.warps)
    assert not re.findall(r"ld\.global[.\w:]*b8", c.ptx)


def test_banks_in_fewer_bytes_compile_as_few_kernels() -> None:
    """And float banks the same kernels as before, of which a step needs as many (aot_every.py)."""
    calls = [(op, args) for op, args in step.calls(*step.resnet()) if "bank_grad" not in op]
    for architecture, most in ((80, 11), (90, 17)):
        plain = step.kernels(calls, architecture)
        for one in plain:
            c = launches.constants(one)
            assert one.kernel == "slots" or (c["PARTS"], c["scales_ptr"], c["places_ptr"]) == (
                1,
                None,
                None,
            )
        kept = [(op, (args[0], every.kept(args[1], "int8"), *args[2:])) for op, args in calls]
        assert all(isinstance(args[1], StoredValues) for _, args in kept)
        assert len(step.kernels(kept, architecture)) <= most
