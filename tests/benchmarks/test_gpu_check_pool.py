"""Items dealt to processes that crash, hang and lose their GPU; tests dealt to pytest."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tools.gpu_check import gpu_tests, items, pool
from tools.gpu_check.pool import Lines, Pool, Queue

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import os, sys, time
from tools.gpu_check import worker
def answer(item):
    if item == "abort": os.abort()
    if item == "exit": sys.exit(3)
    if item == "hang": time.sleep(900)
    if item == "raise": raise ValueError("not this one")
    if item == "child": os.system("cat; echo noise")  # must not read what is dealt
    return {"outcome": "fine", "pid": os.getpid()}
if "lost" in sys.argv:
    worker.gpu_lost = lambda: "an illegal access" if seen.append(1) or len(seen) == 2 else ""
    seen = []
worker.serve(answer, ["a", "b"] if "own" in sys.argv else None)
"""


def made(
    every: list[str] | None, *words: str, jobs: int = 1, **options: Any
) -> tuple[list[dict[str, Any]], int]:
    """(records, items that are left) of a pool."""
    found: list[dict[str, Any]] = []
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = (sys.executable, "-c", WORKER, *words)
    with_path = {"PYTHONPATH": path}
    left = Pool(command, jobs, found.append, every, environment=with_path, **options).run()
    return found, left


def outcomes(found: list[dict[str, Any]]) -> dict[str, str]:
    return {r["item"]: r["outcome"] for r in found if "item" in r}


def test_what_dies_is_named_and_the_others_run() -> None:
    found, left = made(["a", "abort", "child", "raise", "exit", "b"], "x", jobs=2)
    assert outcomes(found) == {
        "a": "fine", "abort": "crashed", "child": "fine", "raise": "raised", "exit": "crashed",
        "b": "fine",
    }  # fmt: skip
    by_item = {r["item"]: r for r in found if "item" in r}
    assert "exit status -6" in by_item["abort"]["message"]
    assert "exit status 3" in by_item["exit"]["message"]
    assert by_item["raise"]["message"] == "ValueError: not this one"
    assert left == 0
    assert found[0] == {"planned": 6}
    assert found[-1] == {"left": 0}


def test_what_hangs_is_ended() -> None:
    """On a busy machine the other one takes long too."""
    found, _ = made(["hang", "a"], "x", item_seconds=0.5)
    assert outcomes(found) in (
        {"hang": "timed out", "a": "fine"},
        {"hang": "timed out", "a": "timed out"},
    )


def test_a_process_that_lost_its_gpu_is_replaced() -> None:
    found, _ = made(["a", "b", "c"], "lost")
    assert outcomes(found) == {"a": "fine", "b": "raised", "c": "fine"}
    by_item = {r["item"]: r for r in found if "item" in r}
    assert by_item["b"]["message"] == "an illegal access"
    assert by_item["a"]["pid"] == by_item["b"]["pid"] != by_item["c"]["pid"]


def test_a_worker_may_name_the_items() -> None:
    assert outcomes(made(None, "own", jobs=2)[0]) == {"a": "fine", "b": "fine"}


def test_workers_that_never_are_ready_are_said_of_once_each_start() -> None:
    found: list[dict[str, Any]] = []
    code = "import sys; sys.exit('no driver')"
    left = Pool((sys.executable, "-c", code), 1, found.append, ["a"]).run()
    assert left == 1
    broken = [r for r in found if r.get("outcome") == pool.BROKEN]
    assert len(broken) == 2
    assert "no driver" in broken[0]["message"]


def test_nothing_is_dealt_when_the_time_is_over() -> None:
    found, left = made(["a", "b"], "x", until=time.monotonic() - 1.0)
    assert left == 2
    assert outcomes(found) == {}


def test_an_interrupt_names_what_was_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Any]] = []
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = (sys.executable, "-c", WORKER, "x")
    busy = Pool(command, 1, found.append, ["a", "hang", "b"], environment={"PYTHONPATH": path})

    def join(
        self: threading.Thread, timeout: float | None = None, real: Any = threading.Thread.join
    ) -> None:
        if "a" in outcomes(found) and not busy._stopping.is_set():
            raise KeyboardInterrupt
        real(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        busy.run()
    assert outcomes(found) == {"a": "fine", "hang": "interrupted"}
    assert found[-1] == {"left": 1}


def test_workers_stay_with_a_group_and_then_help_with_the_largest() -> None:
    queue = Queue.of(["a1", "b1", "b2", "c1", "c2", "c3", "a2"], lambda item: item[0])
    assert queue.take("") == ("a", "a1")
    assert queue.take("a") == ("a", "a2")
    assert queue.take("a", busy=["b"]) == ("c", "c1")
    assert queue.take("x", busy=["b", "c"]) == ("b", "b1")  # both have two left
    assert len(queue) == 3
    assert [queue.take("b", busy=["c"])[1] for _ in range(4)] == ["b2", "c2", "c3", ""]


def test_long_texts_are_left_out_of_a_file_that_grows_too_large(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a.jsonl", limit=1000)
    for number in range(50):
        lines.write({"item": str(number), "text": "x" * 500})
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"cut off')
    found = list(pool.records(tmp_path / "a.jsonl"))
    assert [r["item"] for r in found] == list(map(str, range(50)))
    assert 1 <= sum("text" in r for r in found) <= 3
    assert (tmp_path / "a.jsonl").stat().st_size < 3000
    assert list(pool.records(tmp_path / "none.jsonl")) == []


TESTS = {
    "test_a.py": """
        import os, pytest
        @pytest.mark.gpu
        @pytest.mark.parametrize("i", range(3))
        def test_good(i): print("noise")
        @pytest.mark.gpu
        def test_bad(): assert 1 == 2
        @pytest.mark.gpu
        def test_crash(): os.abort()
        @pytest.mark.gpu
        def test_skip(): pytest.skip("one GPU")
        @pytest.mark.gpu
        def test_last(): assert os.environ.get("TRITON_INTERPRET") is None
        def test_not_on_a_gpu(): assert False
    """,
    "test_missing.py": """
        import no_such_package_anywhere
        import pytest
        @pytest.mark.gpu
        def test_it(): pass
    """,
    "test_broken.py": """
        import pytest
        from a_helper import not_there
        @pytest.mark.gpu
        def test_it(): pass
    """,
    "a_helper.py": "",
    "helpers/ours.py": "",
    "test_imports_ours.py": """
        import pytest
        import ours.below  # mark.gpu is in a comment only
    """,
    "backends/triton/test_triton.py": """
        import pytest
        @pytest.mark.gpu
        def test_nested(): assert False
    """,
    "backends/triton/cases/linear.py": "def test_case(): pass",
    "backends/triton/cases/aot.py": "def test_ahead(): assert False",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    for name, text in TESTS.items():
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "\n".join(line[8:] if line.strip() else "" for line in text.splitlines())
            if "\n" in text
            else text
        )
    return tmp_path


def test_every_test_that_needs_a_gpu_is_dealt(
    checkout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    files = gpu_tests.files(checkout)
    assert {path.name for path in files} == {
        "test_a.py", "test_missing.py", "test_broken.py", "linear.py",
    }  # fmt: skip
    lines = Lines(tmp_path / "tests.jsonl")
    assert gpu_tests.pool(files, 2, lines, checkout).run() == 0
    found = {r["item"]: r for r in pool.records(tmp_path / "tests.jsonl") if "item" in r}
    short = {name.removeprefix("tests/"): r["outcome"] for name, r in found.items()}
    assert short == {
        "test_a.py::test_good[0]": "passed",
        "test_a.py::test_good[1]": "passed",
        "test_a.py::test_good[2]": "passed",
        "test_a.py::test_bad": "failed",
        "test_a.py::test_crash": "crashed",
        "test_a.py::test_skip": "skipped",
        "test_a.py::test_last": "passed",
        "test_missing.py": "skipped",
        "test_broken.py": "failed",
        "backends/triton/cases/linear.py::test_case": "passed",
    }
    assert found["tests/test_a.py::test_bad"]["message"] == "assert 1 == 2"
    assert "def test_bad" in found["tests/test_a.py::test_bad"]["text"]
    assert "one GPU" in found["tests/test_a.py::test_skip"]["message"]
    assert found["tests/test_missing.py"]["message"] == "missing package no_such_package_anywhere"
    assert "cannot import name 'not_there'" in found["tests/test_broken.py"]["message"]
    assert "failed: tests/test_a.py::test_bad" in capsys.readouterr().out


def test_a_module_of_ours_is_no_missing_package(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    lines = Lines(tmp_path / "tests.jsonl")
    assert gpu_tests.pool([checkout / "tests/test_imports_ours.py"], 1, lines, checkout).run() == 0
    (record,) = (r for r in pool.records(tmp_path / "tests.jsonl") if "item" in r)
    assert record["outcome"] == "failed"
    assert "ours" in record["message"]


def test_the_files_of_this_checkout() -> None:
    names = {str(path.relative_to(ROOT / "tests")) for path in gpu_tests.files()}
    assert names >= {
        "backends/cuda/test_cuda_linear.py", "backends/triton/cases/unit.py",
        "packaging/test_doctor.py",
    }  # fmt: skip
    assert "backends/triton/test_triton.py" not in names
    assert not any(name.startswith("backends/triton/cases/aot") for name in names)
    assert "benchmarks/test_gpu_check_pool.py" not in names


@pytest.mark.parametrize("absent", ["pytest", "hypothesis"])
def test_without_pytest_it_says_so(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_tests, "_PACKAGES", (absent, f"no_{absent}"))
    assert gpu_tests.main(["--out", str(tmp_path)]) == 1
    said = f"tests: {sys.executable} lacks no_{absent}; no test can be run\n"
    assert capsys.readouterr().out == said


class Part:
    """A part of a check whose items are answered by the worker of these tests."""

    RESULTS, GOOD = "part.jsonl", ("fine", "does not apply")


@pytest.mark.parametrize(
    ("outcome", "status"), [("fine", 0), ("does not apply", 75), ("disagrees", 1)]
)
def test_the_status_of_a_part_is_that_of_its_items(
    outcome: str, status: int, tmp_path: Path
) -> None:
    code = (
        f"from tools.gpu_check import worker; worker.serve(lambda item: {{'outcome': {outcome!r}}})"
    )
    command = [sys.executable, "-c", code]
    assert items.deal(Part(), ["a x", "b x"], command, tmp_path, jobs=2) == status
    assert len(outcomes(list(pool.records(tmp_path / "part.jsonl")))) == 2
