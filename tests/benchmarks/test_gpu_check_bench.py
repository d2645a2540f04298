"""The benchmark of a check on a GPU: cases in a process that is replaced when it ends early."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import bench_tools as tools
import pytest

from benchmarks.harness import schema, suites
from benchmarks.harness.cases import Case, Layer
from rpg_kernels import native
from tools.gpu_check import bench, compile_ahead

HAS_SIMT = native.available() and hasattr(native.module(), "simt")
needs_simt = pytest.mark.skipif(not HAS_SIMT, reason="needs a development build, `make test`")


def bench_worker(body: str) -> list[str]:
    """A worker's command whose ``answer`` measures the tiny case of a number, on the CPU."""
    root = Path(__file__).resolve().parents[2]
    code = (
        f"import os, sys; sys.path[:0] = [{str(root)!r}, {str(Path(__file__).parent)!r}]\n"
        "import bench_tools\n"
        "from benchmarks.harness import suites\n"
        "from tools.gpu_check import bench, worker\n"
        "suites.suite = lambda name, dtype: [bench_tools.case(batch=b) for b in (1, 2, 3)]\n"
        f"{body}\n"
        "worker.serve(lambda item: answer(item))\n"
    )
    return [sys.executable, "-c", code]


def items(*impls: str) -> list[str]:
    return [" ".join(("gpu", str(number), *impls)) for number in range(3)]


def rows(path: Path) -> list[tuple[str, str, str]]:
    return [(r["case"][-1], r["impl"], r["status"]) for r in schema.load(path)["results"]]


def test_cases_become_one_file(tmp_path: Path) -> None:
    command = bench_worker("answer = lambda item: bench.answer(item, 'cpu', 'fp32')")
    path = tmp_path / "bench.json"
    assert bench.deal(command, items("dense", "rpg-reference"), path, time.monotonic() + 900) == 0
    record = schema.load(path)
    assert record["complete"]
    assert rows(path) == [
        (batch, name, "ok") for batch in "123" for name in ("dense", "rpg-reference")
    ]


def test_a_case_that_ends_its_process_is_measured_without_who_is_to_blame(tmp_path: Path) -> None:
    body = (
        "def answer(item):\n"
        "    suite, number, *impls = item.split()\n"
        "    if number == '1' and 'unpack' in impls: os.abort()\n"
        "    return bench.answer(item, 'cpu', 'fp32')\n"
    )
    path = tmp_path / "bench.json"
    command = bench_worker(body)
    assert bench.deal(command, items("dense", "unpack"), path, time.monotonic() + 900) == 1
    assert sorted(rows(path)) == [
        ("1", "dense", "ok"), ("1", "unpack", "ok"), ("2", "dense", "ok"),
        ("3", "dense", "ok"), ("3", "unpack", "ok"),
    ]  # fmt: skip


def test_who_is_to_blame() -> None:
    item = "gpu 0 dense rpg-cuda rpg-triton"

    def left(record: dict[str, Any]) -> list[str]:
        return bench.without_one(item, record).split()[2:]

    assert left({}) == ["dense", "rpg-triton"]
    results = [
        {"impl": "rpg-triton", "status": "failed"}, {"impl": "rpg-cuda", "status": "failed"},
    ]  # fmt: skip
    assert left({"record": {"results": results}}) == ["dense", "rpg-cuda"]
    assert bench.without_one("gpu 0 dense", {}) == ""


def test_no_case_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    command = bench_worker("answer = lambda item: bench.answer(item, 'cpu', 'fp32')")
    assert bench.deal(command, items("dense"), tmp_path / "bench.json", time.monotonic() - 1) == 0
    assert not (tmp_path / "bench.json").exists()


def test_suites_are_dealt_whole() -> None:
    for name in ("gpu", "gpu-longer"):
        assert len(bench.items(name, ["dense"])) == len(suites.suite(name, "bf16"))


def test_kernels_are_compiled_for_every_case_before_it_is_timed() -> None:
    for name in (compile_ahead.SUITE, compile_ahead.LONGER):
        every = compile_ahead.every(name)
        count = len(suites.suite(name, "bf16"))
        assert set(every) == {f"{name} {i} {impl}" for i in range(count) for impl in bench.SUSPECTS}


@needs_simt
def test_a_call_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer("linear", ("tiny.wide",), (70, 128))
    small = [Case(layer, 3, 5_000, 64), tools.case("conv2d")]
    monkeypatch.setattr(suites, "suite", lambda name, dtype: small)
    found = {
        (number, name): compile_ahead.answer(f"gpu {number} {name}", "cpu", "fp32")["outcome"]
        for number in range(2)
        for name in ("rpg-simt", "unpack")
    }
    assert found == {
        (0, "rpg-simt"): "called", (0, "unpack"): "called",
        (1, "rpg-simt"): "does not apply", (1, "unpack"): "called",
    }  # fmt: skip
