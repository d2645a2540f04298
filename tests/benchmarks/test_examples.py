"""The examples run as they are, in a fresh interpreter."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import processes
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_train_own_model() -> None:
    pytest.importorskip("sklearn")
    # One thread: the layers are small, and threads that wait for each other on a busy machine take
    # many times longer.
    script = EXAMPLES / "train_own_model.py"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = processes.run(sys.executable, "-W", "error::UserWarning", script, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["layer", "shape", "virtual"]
    assert any("degrees of freedom" in line for line in lines)
    accuracies = [float(a) for a in re.findall(r"accuracy ([0-9.]+)%", done.stdout)]
    assert len(accuracies) == 3
    # Chance is 10 %.
    assert accuracies[-1] > 90
    saved = re.search(r"saved ([0-9,]+) bytes", done.stdout)
    assert saved is not None
    assert int(saved[1].replace(",", "")) < 40_000
    assert lines[-2] == "loaded: the same outputs"
    assert lines[-1].startswith("materialised: ")


def test_looped_decoder() -> None:
    script = EXAMPLES / "looped_decoder.py"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    small = ("--steps", "12", "--width", "32", "--batch-size", "8")
    done = processes.run(sys.executable, "-W", "error::UserWarning", script, *small, env=env)
    assert done.returncode == 0, done.stderr
    _, *rows = done.stdout.splitlines()
    same, remapped, narrower, unshared = (
        int(re.search(r"([0-9,]+) numbers", row)[1].replace(",", "")) for row in rows
    )
    assert same == remapped >= narrower
    assert unshared > 2 * same
    bits = [float(re.search(r"([0-9.]+) bits", row)[1]) for row in rows]
    assert all(1 < b < 6.9 for b in bits)  # 7 is chance
