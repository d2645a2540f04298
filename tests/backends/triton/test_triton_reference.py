"""cases/reference.py in Triton's interpreter, and compiled where there is a GPU."""

from __future__ import annotations

import pytest
import triton_process as process

pytestmark = process.needs_triton


def test_interpreted() -> None:
    process.run("reference.py", interpreted=True)


@pytest.mark.gpu
def test_compiled() -> None:
    process.run("reference.py", interpreted=False)
