"""Kernels that are compiled ahead, many at once, as on an sm_90; nothing is launched."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from rpg_kernels.backends.triton import ahead, entry_table, linear
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import Placement

PLACEMENT = Placement(Generator(6400, 64, "vector"), 0, 0, (128, 256), 0.5).to_json()
KERNELS = (linear._forward_kernel, entry_table._slots_kernel)


class _Driver:
    """Of a GPU that compiles and runs nothing."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of what is compiled, by a compiler that returns when two kernels are in it at once."""
    names: list[str] = []
    two = threading.Barrier(2)

    def compile_one(source: Any, **how: Any) -> object:
        two.wait(60)
        names.append(source.fn.__name__)
        return object()  # which cannot be launched

    monkeypatch.setattr(driver, "_active", _Driver())
    monkeypatch.setattr(triton.compiler, "compile", compile_one)
    for kernel in KERNELS:
        kernel.device_caches.clear()
    yield names
    for kernel in KERNELS:
        kernel.device_caches.clear()


def test_compiled_at_once_and_not_launched(compiled: list[str]) -> None:
    bank, x = torch.randn(100, 64).half(), torch.randn(32, 256).half()

    def forward() -> None:
        linear.linear(x, bank, None, None, PLACEMENT)

    def broken() -> None:
        raise RuntimeError("this one's own fault")

    ahead.compiled([forward, broken, forward], threads=2)
    assert sorted(compiled) == ["_forward_kernel", "_slots_kernel"]
    ahead.compiled([forward])
    assert len(compiled) == 2  # nothing is compiled twice
    with pytest.raises(AttributeError, match="launch_metadata"):
        forward()  # outside of it kernels are launched
    assert triton.runtime._async_compile.active_mode.get() is None
