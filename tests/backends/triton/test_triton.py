"""The files of cases/: in Triton's interpreter, compiled where there is a GPU, ahead of time."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import processes
import pytest
import triton_process as process

pytestmark = process.needs_triton

# Those that take long have a process of their own; the others share one, which imports torch once.
FILES = [
    ("linear.py",),
    ("conv2d.py",),
    ("unit.py",),
    ("stored.py",),
    (
        "embedding.py",
        "large_tiles.py",
        "law.py",
        "precision.py",
        "reference.py",
        "surroundings.py",
        "unpack.py",
    ),
]
AHEAD = [
    ("aot.py", "aot_ahead.py", "aot_embedding.py"),
    ("aot_conv2d.py", "aot_unit.py"),
    ("aot_every.py",),
    ("aot_stored.py",),
]


@pytest.mark.parametrize("files", FILES, ids=" ".join)
def test_interpreted(files: tuple[str, ...]) -> None:
    process.run(*files, interpreted=True)


@pytest.mark.gpu
@pytest.mark.parametrize("files", FILES, ids=" ".join)
def test_compiled(files: tuple[str, ...]) -> None:
    process.run(*files, interpreted=False, every=True)


@pytest.mark.parametrize("files", AHEAD, ids=" ".join)
def test_compiled_ahead_of_time(files: tuple[str, ...]) -> None:
    process.run(*files, interpreted=False)


def test_every_file_of_cases_runs() -> None:
    named = [name for files in (*FILES, *AHEAD) for name in files]
    assert sorted(named) == sorted(path.name for path in process.CASES.glob("*.py"))


def test_every_failure_of_a_run_is_named(tmp_path: Path) -> None:
    """However many there are, and however much they write."""
    text = "import pytest\n\n@pytest.mark.parametrize('i', range(60))\ndef test_it(i):\n"
    text += "    assert i % 2, 'x' * 5000\n"
    file = tmp_path / "many.py"
    file.write_text(text, "utf-8")
    with pytest.raises(AssertionError) as error:
        process.run(file, interpreted=True, every=True)
    message = str(error.value)
    assert all((f"test_it[{i}]" in message) is (i % 2 == 0) for i in range(60))
    assert len(message) < 30_000


# Modules beside torch, triton, pytest and hypothesis that an environment with a GPU may lack.
COLLECT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"PIL", "transformers", "torchvision", "xdist", "sklearn"}:
            raise ModuleNotFoundError(f"{name} is not there", name=name)

sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_cases_can_be_named_to_pytest_and_need_little() -> None:
    """As the check on a GPU does, in many processes: without this file, or anything on the path."""
    files = sorted(process.CASES.glob("*.py"))
    without = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = (sys.executable, "-c", COLLECT, *files)
    done = processes.run(*command, env=without, cwd=process.CASES.parents[3])
    assert done.returncode == 0, done.stdout[-4000:]
    for file in files:
        assert f"cases/{file.name}::test_" in done.stdout, file.name
