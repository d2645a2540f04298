"""The tests that need a GPU, in several pytest processes at once.

    python -m tools.gpu_check.gpu_tests --out DIR [--jobs N]

Their results are in DIR/tests.jsonl, a line for each test as soon as it has ended.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tools.gpu_check.pool import Lines, Pool, Record
from tools.gpu_check.running import NOTHING_CODE, ROOT

RESULTS = "tests.jsonl"
GOOD = ("passed", "skipped")
_PACKAGES = ("pytest", "hypothesis")  # without these no test can be collected
_TRITON = Path("tests/backends/triton")


def files(root: Path = ROOT) -> list[Path]:
    """The files whose tests need a GPU. Triton's cases come by themselves, and not through the test
    that runs them in a process of its own, so that each is seen to pass or fail."""
    cases = [p for p in (root / _TRITON / "cases").glob("*.py") if not p.name.startswith("aot")]
    marked = [
        path
        for path in (root / "tests").rglob("test_*.py")
        if path != root / _TRITON / "test_triton.py" and marks(path.read_text(encoding="utf-8"))
    ]
    # What takes longest first: the doctor tests everything in one test, then the largest files.
    size = {path: path.stat().st_size for path in (*cases, *marked)}
    return sorted(size, key=lambda path: (path.name != "test_doctor.py", -size[path]))


def marks(source: str) -> bool:
    """Whether a file's code names the mark ``gpu``.

    Example:
        >>> marks("@pytest.mark.gpu\\ndef test(): pass"), marks("'mark.gpu'  # mark.gpu")
        (True, False)
    """
    return "mark.gpu" in source and any(
        isinstance(node, ast.Attribute)
        and node.attr == "gpu"
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "mark"
        for node in ast.walk(ast.parse(source))
    )


def missing_packages() -> list[str]:
    """The packages without which no test can be collected, of those that are not there."""
    import importlib.util

    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def pool(paths: Iterable[Path], jobs: int, lines: Lines, root: Path = ROOT) -> Pool:
    """Workers for the tests of files."""
    search = (root, root / "tests" / "helpers", root / _TRITON, ROOT)
    path = os.pathsep.join([*map(str, search), os.environ.get("PYTHONPATH", "")])
    plugins = ("-p", "tools.gpu_check.pytest_worker", "-p", "no:cacheprovider", "-p", "no:xdist")
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        *plugins,
        "--continue-on-collection-errors",
    )

    def emit(record: Record) -> None:
        lines.write(record)
        if record.get("outcome", "passed") not in GOOD:
            item = record.get("item", "a worker")
            print(f"{record['outcome']}: {item}: {record.get('message', '')}", flush=True)
            print(record.get("text", ""), flush=True)

    return Pool(
        (*command, *map(str, paths)),
        jobs,
        emit,
        group=lambda item: item.split("::")[0],
        environment={"PYTHONPATH": path, "TRITON_INTERPRET": "", "OMP_NUM_THREADS": "1"},
        item_seconds=100.0,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 when a test failed, crashed or was not run, 75 without a test."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=8)
    args = parser.parse_args(arguments)
    absent = missing_packages()
    if absent:
        print(f"tests: {sys.executable} lacks {' and '.join(absent)}; no test can be run")
        return 1
    lines = Lines(args.out / RESULTS)
    bad = ran = 0
    made = pool(files(), args.jobs, lines)
    emit = made.emit

    def counting(record: Record) -> None:
        nonlocal bad, ran
        ran += "item" in record
        bad += record.get("outcome", "passed") not in GOOD
        emit(record)

    made.emit = counting
    left = made.run()
    return int(bad > 0 or left > 0) if ran else NOTHING_CODE


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("tests: interrupted")
        sys.exit(130)
