"""What a back end cannot run is asked of the very calls that are made, and is no failure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_tools as tools
import pytest
import torch

import rpg_kernels as rpg
from benchmarks.harness import baselines, calls, harness, measure, repeat, schema, suites, table
from benchmarks.harness.cases import Case, Layer
from benchmarks.harness.problem import Problem
from benchmarks.harness.timing import Work
from rpg_kernels import native
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.cuda import rules
from rpg_kernels.backends.reference.rules import Reference
from rpg_kernels.backends.triton import rules as triton

HAS_SIMT = native.available() and hasattr(native.module(), "simt")
needs_simt = pytest.mark.skipif(not HAS_SIMT, reason="needs a development build, `make test`")
GPU = torch.device("cuda")
WIDE = Layer("linear", ("tiny.wide",), (70, 128))


def ring(**settings: Any) -> Case:
    """A layer that the CUDA kernels multiply with, and whose bank gradient they do not have."""
    return Case(WIDE, 3, 5_000, 64, **settings)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules as they are on an H200: what is asked of the machine is answered."""
    build = {"cuda": "13.0", "cuda_architectures": "90a-real"}
    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(native, "build_info", lambda: build)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(rules, "kernels", lambda target: native.module().simt)
    remembered = (rules._cuda_gpu, rules._unsupported_gpu, rules._plan, triton._capability)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.mark.parametrize("dtype", ["fp32", "amp"])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("op", ["linear", "conv2d", "embedding"])
def test_what_is_asked_is_what_is_called(
    op: str, window: int | None, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = tools.case(op, dtype=dtype, dof=600, window=window, laps=window and 2)
    asked = calls.of(case, tools.CPU, "reference")
    made: list[Call] = []
    real = Reference.operator

    def operator(self: Reference, call: Call) -> Any:
        made.append(call)
        return real(self, call)

    monkeypatch.setattr(Reference, "operator", operator)
    problem = Problem(case, tools.CPU)
    work = Work(problem, baselines.IMPLEMENTATIONS["rpg-reference"].build(problem, 1))
    work.backward(0, work.stack.forward(0))

    def said(call: Call) -> tuple[Any, ...]:
        bank = call.bank
        geometry = [list(g) if isinstance(g, list | tuple) else g for g in call.geometry]
        return (
            call.op, call.forced, geometry, call.rows, call.device,
            json.loads(call.placement) | {"scale": 0},
            *((t.shape, t.stride(), t.dtype) for t in (call.x, bank) if t is not None),
        )  # fmt: skip

    assert [said(call) for call in asked] == [said(call) for call in made]


@needs_simt
def test_a_forward_without_a_backward_is_timed_alone() -> None:
    record = tools.run("rpg-simt", "rpg-cpu", "dense", cases=[ring()])
    mine, _, dense = record["results"]
    assert mine["status"] == dense["status"] == "ok"
    assert list(mine["times"]) == ["forward"]
    assert set(dense["times"]) == {"forward", "backward", "full"}
    assert list(mine["accuracy"]) == ["output"]
    assert mine["memory"] is None
    assert mine["reason"].startswith("forward only: backend: got 'simt' for linear_bank_grad")
    assert "forward only" in table.text(record)


@needs_simt
@pytest.mark.parametrize("reason", ["granularity", "scratch"])
def test_a_forced_back_end_that_refuses_does_not_apply(reason: str) -> None:
    case = ring(dtype="amp") if reason == "scratch" else tools.case()
    with rpg.scratch_limit(16 if reason == "scratch" else 1 << 30):
        record = tools.run("rpg-simt", cases=[case])
    (row,) = record["results"]
    assert row["status"] == schema.DOES_NOT_APPLY
    assert {"granularity": "blocks of 32 or 64", "scratch": "scratch_limit: got 16"}[reason] in (
        row["reason"]
    )
    assert not row["times"]


@needs_simt
@pytest.mark.parametrize("dtype", repeat.DTYPES)
def test_windows_that_the_cuda_kernels_take_are_compared_run_to_run(dtype: str) -> None:
    whole = {
        case.layer.names[0]
        for name, case in repeat.every(["simt"], [dtype])
        if not any(calls.refused(case, tools.CPU, name))
    }
    assert whole == {"repeat.windows", "repeat.one_of_windows"}
    for name, case in repeat.chosen(tools.CPU, ["simt"], [dtype]):
        assert repeat.compare(case, name, tools.CPU, runs=2) == {"output": 0, "gradients": 0}


@needs_simt
def test_every_headline_of_a_linear_layer_is_timed_in_a_cuda_kernel(h200: None) -> None:
    for case in suites.suite("gpu", "bf16"):
        forward, backward = calls.refused(case, GPU, "cuda")
        assert bool(forward) is (case.op != "linear")
        assert bool(backward) is (case.op != "linear" or case.window is None)
        assert calls.refused(case, GPU, "triton") == ("", "")


def test_the_headline_suite_has_what_was_asked_for() -> None:
    cases = suites.suite("gpu", "bf16")
    assert len(set(cases)) == len(cases) == 12
    windows = {(c.name, c.window, c.laps) for c in cases}
    assert windows >= {(f"llama-3-8b.q_proj/{batch}", 256, 4) for batch in (1, 16, 64, 256)}
    assert {c.op for c in cases} == {"linear", "conv2d", "embedding"}
    assert any(c.window is None for c in cases)
    longer = suites.suite("gpu-longer", "bf16")
    assert set(longer) >= set(suites.suite("quick", "bf16"))


def test_a_run_ends_at_its_limit_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(harness.time, "monotonic", lambda: now[0])
    real = measure.rows

    def rows(case: Case, plan: Any) -> Any:
        now[0] += 6.0
        return real(case, plan)

    monkeypatch.setattr(measure, "rows", rows)
    cases = [tools.case(batch=batch) for batch in (1, 2, 3)]
    out = tmp_path / "bench.json"
    record = tools.run("dense", cases=cases, out=out, limit=10.0)
    assert [row["case"] for row in record["results"]] == ["tiny.linear/1", "tiny.linear/2"]
    assert not record["complete"]
    assert schema.load(out) == record
    with pytest.raises(ValueError, match=r"limit: got -1\.0, wanted a number of seconds from 0"):
        tools.run("dense", limit=-1.0)


def test_a_file_of_before_there_were_windows_is_read(tmp_path: Path) -> None:
    record = tools.run("dense", out=tmp_path / "new.json")
    assert record["results"][0]["window"] is None
    for row in record["results"]:
        del row["window"], row["laps"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    assert schema.load(tmp_path / "old.json") == schema.load(tmp_path / "new.json")


def test_windows_are_part_of_a_setting() -> None:
    case = tools.case(dof=600, window=64, laps=2)
    assert case.setting == "600 g8 element fp32 w64x2"
    with pytest.raises(ValueError, match="window: got 64, wanted None without laps"):
        tools.case(dof=600, window=64)
    assert tools.case(dof=600, laps=2).setting == "600 g8 element fp32 x2"
    assert tools.run("dense", cases=[case])["results"][0]["window"] == 64
