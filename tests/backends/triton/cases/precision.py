"""TF32: asked for exactly where torch's switches allow it, and no less accurate than it is."""

from __future__ import annotations

from typing import Any

import brute_force as brute
import processes
import pytest
import torch
import triton_launches as launches
from torch import Tensor
from triton_process import DEVICE, INTERPRETED

from rpg_kernels.backends.triton import conv2d, linear
from rpg_kernels.backends.triton.config import dot_precision

# What is set -> (of convolutions, of matrices). The default of torch comes first; "old" are the
# switches from before torch 2.9, which set the new ones.
SWITCHES = {
    "pass": ("tf32", "ieee"),
    "b.cudnn.allow_tf32 = False": ("ieee", "ieee"),
    "b.cudnn.allow_tf32 = False; b.cudnn.allow_tf32 = True": ("tf32", "ieee"),
    "b.cuda.matmul.allow_tf32 = True": ("tf32", "tf32"),
    "b.cuda.matmul.allow_tf32 = True; b.cuda.matmul.allow_tf32 = False": ("tf32", "ieee"),
    "torch.set_float32_matmul_precision('high')": ("tf32", "tf32"),
    "b.cudnn.conv.fp32_precision = 'ieee'": ("ieee", "ieee"),
    "b.cuda.matmul.fp32_precision = 'tf32'": ("tf32", "tf32"),
    "b.fp32_precision = 'ieee'": ("ieee", "ieee"),
    "b.fp32_precision = 'tf32'": ("tf32", "tf32"),
    "b.fp32_precision = 'ieee'; b.cudnn.conv.fp32_precision = 'tf32'": ("tf32", "ieee"),
}
ASK = """
import os, torch
from rpg_kernels.backends.triton.config import dot_precision
b = torch.backends
for switch in {switches!r}:
    if os.fork() == 0:  # the switches set each other, and cannot all be taken back
        exec(switch)
        wide, low = torch.float32, (torch.float16, torch.bfloat16)
        got = (dot_precision(wide, convolution=True), dot_precision(wide))
        assert {{dot_precision(d, convolution=c) for d in low for c in (0, 1)}} == {{"ieee"}}
        print(switch, got, sep=" -> ", flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, switch
"""


def test_switches_of_torch_old_and_new() -> None:
    done = processes.python(ASK.format(switches=list(SWITCHES)))
    assert done.returncode == 0, done.stderr
    wanted = [f"{switch} -> {answer}" for switch, answer in SWITCHES.items()]
    assert done.stdout.splitlines() == wanted


def switch_to(matrices: str, convolutions: str) -> None:
    """Taken back by conftest.py."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    matmul.fp32_precision, cudnn.conv.fp32_precision = matrices, convolutions


def operators(dtype: torch.dtype, positive: bool = False) -> dict[str, Tensor]:
    """Every product, of one layer each; the same numbers in every call.

    Args:
        dtype: of everything.
        positive: absolute values of all numbers, so that results are sums of absolute products.
    """
    torch.manual_seed(0)
    bank = brute.bank_of(900, dtype, granularity=16, permute=False, reflect="none")
    kernel, matrix = bank.place((24, 16, 3, 3)), bank.place((40, 48))

    def on_device(t: Tensor) -> Tensor:
        return (t.abs() if positive else t).to(DEVICE, dtype)

    on = on_device(bank.weight.detach())
    x = on_device(torch.randn(2, 16, 6, 6)).contiguous(memory_format=torch.channels_last)
    dy = on_device(torch.randn(2, 24, 6, 6)).contiguous(memory_format=torch.channels_last)
    a, d = on_device(torch.randn(20, 48)), on_device(torch.randn(20, 40))
    how: Any = ([1, 1], [1, 1], [1, 1], 1)
    return {
        "linear": linear.linear(a, on, None, None, matrix.spec),
        "linear_input_grad": linear.linear_input_grad(d, on, None, matrix.spec),
        "linear_bank_grad": linear.linear_bank_grad(d, a, None, matrix.spec, dtype),
        "conv2d": conv2d.conv2d(x, on, None, None, kernel.spec, *how),
        "conv2d_input_grad": conv2d.conv2d_input_grad(
            dy, on, None, list(x.shape), kernel.spec, *how
        ),
        "conv2d_bank_grad": conv2d.conv2d_bank_grad(dy, x, None, kernel.spec, *how, dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("convolutions", ["ieee", "tf32"])
@pytest.mark.parametrize("matrices", ["ieee", "tf32"])
def test_the_switch_reaches_every_kernel(
    matrices: str, convolutions: str, dtype: torch.dtype
) -> None:
    switch_to(matrices, convolutions)
    found: list[launches.Specialisation] = []
    with launches.recorded(found.append):
        operators(dtype)
    asked = {one.kernel: launches.constants(one).get("PRECISION") for one in found}
    asked = {name: precision for name, precision in asked.items() if precision is not None}
    assert len(asked) == 6
    for name, precision in asked.items():
        switch = convolutions if name.startswith("conv2d") else matrices
        assert precision == (switch if dtype == torch.float32 else "ieee"), name


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter computes TF32 in fp32")
def test_tf32_is_as_accurate_as_its_operands() -> None:
    """At most 2^-10 of each operand is lost, where it is cut off after 11 bits; but some is."""
    full, sizes = operators(torch.float32), operators(torch.float32, positive=True)
    switch_to("tf32", "tf32")
    assert dot_precision(torch.float32) == dot_precision(torch.float32, convolution=True) == "tf32"
    for name, got in operators(torch.float32).items():
        error, size = (got - full[name]).abs(), sizes[name]
        assert bool((error <= 1.05 * 2**-9 * size).all()), name
        assert float(error.max()) > 2**-20 * float(size.max()), name
