"""How the cases of this folder run: in a process of their own, which decides the device.

Triton reads TRITON_INTERPRET when it is imported, so one process either interprets kernels, on
CPU tensors, or compiles them, for CUDA tensors. The files in ``cases`` run either way.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
CASES = Path(__file__).parent / "cases"
HELPERS = Path(__file__).parents[2] / "helpers"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(name: str, *, interpreted: bool) -> None:
    """Run one file of cases and fail with its output."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(CASES.parent), str(HELPERS), os.environ.get("PYTHONPATH", "")))
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", CASES / name],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=CASES.parents[3],
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
