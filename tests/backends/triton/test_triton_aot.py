"""Cases that compile the kernels ahead of time, GPU or none."""

from __future__ import annotations

import pytest
import triton_process as process

pytestmark = process.needs_triton


@pytest.mark.parametrize("name", ["aot.py", "aot_conv2d.py", "aot_embedding.py", "aot_window.py"])
def test_compiled_ahead_of_time(name: str) -> None:
    process.run(name, interpreted=False)
