"""tests/triton_cases/aot.py: the kernels compiled ahead of time, GPU or none."""

from __future__ import annotations

import triton_process as process

pytestmark = process.needs_triton


def test_compiled_ahead_of_time() -> None:
    process.run("aot.py", interpreted=False)
