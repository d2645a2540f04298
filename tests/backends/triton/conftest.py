"""Puts this folder on the path, so that the files of cases/ can be named to pytest directly.

    pytest tests/backends/triton/cases/*.py

runs them compiled where there is a GPU; with TRITON_INTERPRET=1 interpreted, on the CPU. They need
torch, triton, pytest and hypothesis.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Products in fp32 are compared with fp32's error: torch lets convolutions use TF32 by default.

    cases/precision.py is about TF32.
    """
    cudnn: Any = torch.backends.cudnn
    switches = (cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value
