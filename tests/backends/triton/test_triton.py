"""The files of cases/: in Triton's interpreter, compiled where there is a GPU, ahead of time."""

from __future__ import annotations

import pytest
import triton_process as process

pytestmark = process.needs_triton

# Those that take long have a process of their own; the others share one, which imports torch once.
FILES = [
    ("linear.py",),
    ("conv2d.py",),
    ("window.py",),
    ("embedding.py", "law.py", "reference.py", "surroundings.py", "unpack.py"),
]
AHEAD = [("aot.py", "aot_embedding.py"), ("aot_conv2d.py", "aot_window.py")]


@pytest.mark.parametrize("files", FILES, ids=" ".join)
def test_interpreted(files: tuple[str, ...]) -> None:
    process.run(*files, interpreted=True)


@pytest.mark.gpu
@pytest.mark.parametrize("files", FILES, ids=" ".join)
def test_compiled(files: tuple[str, ...]) -> None:
    process.run(*files, interpreted=False)


@pytest.mark.parametrize("files", AHEAD, ids=" ".join)
def test_compiled_ahead_of_time(files: tuple[str, ...]) -> None:
    process.run(*files, interpreted=False)


def test_every_file_of_cases_runs() -> None:
    named = [name for files in (*FILES, *AHEAD) for name in files]
    assert sorted(named) == sorted(path.name for path in process.CASES.glob("*.py"))
