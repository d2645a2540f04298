"""Strided 1x1 convolutions of few channels, whose weight gradients oneDNN alone gets wrong.

It may write past its own memory there, so this is a process of its own.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import torch, rpg_kernels as rpg
torch.manual_seed(0)
torch.set_num_threads(THREADS)
for channels, groups in ((1, 1), (3, 1), (4, 1), (5, 1), (12, 1), (6, 2), (64, 16)):
    for stride, padding in ((2, 0), ((2, 1), 0), (3, 1)):
        bank = rpg.ParameterBank(dof=64, granularity=1)
        layer = rpg.nn.Conv2d(
            channels, 48, 1, stride, padding, groups=groups, bias=False, bank=bank
        )
        x = torch.randn(32, channels, 8, 8).to(memory_format=torch.channels_last)
        for backend in ("auto", "reference"):
            bank.weight.grad = None
            with rpg.backend(backend):
                y = layer(x)
                dy = torch.randn_like(y)
                y.backward(dy)
            double = x.double().contiguous()
            weight = torch.zeros(48, channels // groups, 1, 1).double().requires_grad_()
            torch.conv2d(double, weight, None, stride, padding, 1, groups).backward(dy.double())
            wanted = layer.virtual_weight.pack(weight.grad.float())
            error = (bank.weight.grad - wanted).abs().max()
            assert error <= 1e-5 * wanted.abs().max(), (channels, groups, stride, backend)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients(threads: int) -> None:
    program = PROGRAM.replace("THREADS", str(threads))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
