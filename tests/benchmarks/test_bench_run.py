"""Whole runs: what is wrong gets no figure, what breaks is recorded, what was finished is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_tools as tools
import pytest
import torch
from torch import Tensor

from benchmarks.harness import baselines, harness, measure, roofline, schema, table
from benchmarks.harness.__main__ import main as harness_main
from benchmarks.harness.cases import Case, Layer
from benchmarks.harness.problem import Problem, Stack
from rpg_kernels import native
from rpg_kernels.backends import dispatch
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.registry import Backend

NAMES = ("dense", "published", "unpack", "rpg-reference")


def row(record: dict[str, Any], impl: str) -> dict[str, Any]:
    (found,) = (row for row in record["results"] if row["impl"] == impl)
    return dict(found)


@pytest.mark.parametrize("op", ["linear", "conv2d", "embedding"])
def test_a_whole_run_is_valid_and_complete(op: str, tmp_path: Path) -> None:
    lines: list[str] = []
    out = tmp_path / "bench.json"
    record = tools.run(
        *NAMES,
        "rz_linear",
        cases=[tools.case(op)],
        roofs=op == "linear",
        out=out,
        show=lines.append,
    )
    assert lines == [f"[1/1] tiny.{op}/3 200 g8 element fp32"]
    assert schema.load(out) == record
    assert record["complete"]
    assert record["headline"] == "process"
    for name in NAMES:
        got = row(record, name)
        assert got["status"] == "ok", got["reason"]
        assert set(got["times"]) == {"forward", "backward", "full"}
        assert set(got["times"]["full"]) == {"cold", "warm"}
        for states in got["times"].values():
            for clocks in states.values():
                assert set(clocks) == {"process", "wall"}
                for figure in clocks.values():
                    assert figure["samples"] == measure.MIN_ROUNDS
                    assert 0 < figure["q10_s"] <= figure["median_s"] <= figure["q90_s"]
        memory = got["memory"]
        assert memory["full_peak"] >= memory["full_largest"] > 0
        weights = got["virtual_weights"]
        assert memory["per_virtual_weight"]["full_peak"] == memory["full_peak"] / weights
        assert (memory["per_dof"] is None) == (name == "dense")
        kinds = ("parameters", "gradients", "optimizer", "tables")
        assert memory["persistent"] == sum(memory[kind] for kind in kinds)
        assert len(got["floors"]) == (3 if op == "linear" else 0)
        assert all(floor["percent"] > 0 for floor in got["floors"].values())
        # Lookups on CPUs go to the native module, which is not among NAMES, where there is one.
        reference = op != "embedding" or not native.available()
        assert got["chosen"] == (reference and name == "rpg-reference")
    assert row(record, "rpg-reference")["memory"]["per_dof"]["persistent"] == (16 * 200 + 4) / 200
    assert row(record, "published")["memory"]["tables"] == 12 * tools.LAYERS[op].virtual_weights
    assert row(record, "rz_linear")["status"] == "does not apply"
    text = table.text(record)
    assert f"tiny.{op}/3  200 g8 element fp32" in text
    assert "DOES NOT APPLY: rz_linear is not installed" in text


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")
def test_a_back_end_that_cannot_read_a_weight_says_so_and_the_chosen_one_marked() -> None:
    layer = Layer("linear", ("tiny.wide",), (24, 64))
    vector, element = (Case(layer, 1, 6400, 32, reflect) for reflect in ("vector", "element"))
    record = tools.run("rpg-reference", "rpg-cpu", cases=[vector, element])
    found = {(r["reflect"], r["impl"]): (r["status"], r["chosen"]) for r in record["results"]}
    assert found == {
        ("vector", "rpg-cpu"): ("ok", True),
        ("vector", "rpg-reference"): ("ok", False),
        ("element", "rpg-cpu"): ("does not apply", False),
        ("element", "rpg-reference"): ("ok", True),
    }


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")
def test_lookups_of_every_weight_run_on_the_back_end_that_is_marked() -> None:
    """What a product on the CPU cannot read, signs of elements and small blocks, a lookup can."""
    record = tools.run(cases=[tools.case("embedding")])
    assert row(record, "rpg-cpu")["status"] == "ok"
    assert [r["impl"] for r in record["results"] if r["chosen"]] == ["rpg-cpu"]


def test_the_mark_is_of_the_call_that_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Geometry, dtypes and the bank: on a GPU a copy of it may be too much for the scratch."""
    asked: list[Call] = []
    real = dispatch.choose

    def choose(call: Call) -> Backend:
        if not call.forced:
            asked.append(call)
        return real(call)

    monkeypatch.setattr(dispatch, "choose", choose)
    for op, dtype in (("conv2d", "fp32"), ("conv2d", "amp"), ("linear", "bf16")):
        asked.clear()
        tools.run("unpack", cases=[tools.case(op, dtype=dtype)])
        problem, said = Problem(tools.case(op, dtype=dtype), tools.CPU), asked[0]
        baselines._call(problem, problem.weight)
        made = asked[-1]
        assert (said.op, said.rows, said.groups) == (made.op, made.rows, made.groups)
        for mine, its in ((said.x, made.x), (said.bank, made.bank)):
            assert mine is not None
            assert its is not None
            assert (mine.shape, mine.dtype) == (its.shape, its.dtype)


def test_what_is_wrong_is_red_and_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    tools.install(
        monkeypatch,
        tools.implementation("off", tools.changed(lambda y: y + 1e-3)),
        tools.implementation("grad", tools.changed(lambda y: y + 0.5 * (y - y.detach()))),
        tools.implementation("nan", tools.changed(lambda y: y * float("nan"))),
    )
    record = tools.run("dense", "off", "grad", "nan", roofs=True)
    off, grad, nan = (row(record, name) for name in ("off", "grad", "nan"))
    assert {off["status"], grad["status"], nan["status"]} == {"wrong"}
    assert off["times"] == nan["times"] == {}
    assert off["memory"] is grad["memory"] is nan["memory"] is None
    assert set(grad["times"]) == {"forward"}
    assert grad["floors"]["full"]["percent"] is None
    assert "output: error 0.001, allowed" in off["reason"]
    assert nan["accuracy"]["output"]["error"] is None
    lines = table.text(record, colour=True).splitlines()
    assert sum(line.startswith("\x1b[31m") for line in lines) == 3
    assert "\x1b[31m" not in table.text(record)


def breaking(error: Exception, when: str) -> Any:
    """An implementation that breaks when it is built, or in its first timed call."""

    def build(problem: Problem, copies: int) -> Stack:
        if when == "build":
            raise error
        stack = tools.changed(lambda y: y)(problem, copies)
        calls = 0

        def forward(i: int) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > 8:
                raise error
            return stack.forward(i)

        return Stack(copies, forward, stack.trained)

    return build


@pytest.mark.parametrize("when", ["build", "timing"])
def test_what_breaks_is_recorded_and_the_suite_goes_on(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {
        "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        "bug": KeyError("lost"),
    }
    for name, error in errors.items():
        tools.install(monkeypatch, tools.implementation(name, breaking(error, when)))
    record = tools.run("cuda", "dense", "cpu", "bug", cases=[tools.case(), tools.case("conv2d")])
    statuses = [(r["impl"], r["status"]) for r in record["results"]]
    one = [("cuda", "out of memory"), ("dense", "ok"), ("cpu", "out of memory"), ("bug", "failed")]
    assert statuses == one + one
    assert "Tried to allocate 9 GiB" in record["results"][0]["reason"]
    assert "lost" in record["results"][3]["reason"]
    assert record["results"][0]["times"] == {}
    assert "OUT OF MEMORY" in table.text(record)


def test_what_cannot_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    never = breaking(AssertionError("was built"), "build")
    tools.install(monkeypatch, tools.implementation("huge", never, expected=10**15))
    record = tools.run("huge", "dense")
    assert row(record, "huge")["status"] == "skipped"
    assert "expects to need 1000000.0 GB, and may use" in row(record, "huge")["reason"]
    assert row(record, "dense")["status"] == "ok"
    small = tools.run("dense", "rpg-reference", memory_limit=1000)
    assert [r["status"] for r in small["results"]] == ["skipped", "skipped"]


def test_an_interrupted_run_keeps_what_it_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bench.json"
    measured = measure.rows

    def interrupted(case: Any, plan: Any) -> Any:
        if case.op == "conv2d":
            raise KeyboardInterrupt
        return measured(case, plan)

    monkeypatch.setattr(measure, "rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tools.run("dense", cases=[tools.case(), tools.case("conv2d")], out=out)
    record = schema.load(out)
    assert not record["complete"]
    assert [r["case"] for r in record["results"]] == ["tiny.linear/3"]
    assert "INTERRUPTED" in table.text(record)


def test_samples_are_interleaved_in_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, str]] = []

    class Clock:
        headline = "wall"

        def sample(self, work: Any, kind: str, state: str) -> dict[str, float]:
            seen.append((str(id(work)), kind, state))
            return {"wall": 1.0}

        def note(self, work: Any) -> str | None:
            return "a note"

        def forget(self) -> None:
            seen.append(("", "", ""))

    monkeypatch.setattr(harness, "_clock", lambda *arguments: Clock())
    record = tools.run("dense", "rpg-reference")
    assert seen.pop() == ("", "", "")
    each = 2 * 3 * 2  # implementations, passes, states
    rounds = [seen[i : i + each] for i in range(0, len(seen), each)]
    assert len(rounds) == measure.MIN_ROUNDS + 1  # one to warm up
    assert all(set(r) == set(rounds[0]) and len(set(r)) == each for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    assert record["results"][0]["times"]["full"]["cold"]["wall"]["samples"] == measure.MIN_ROUNDS
    assert record["results"][0]["reason"] == "a note"


def test_settings_of_torch_come_back() -> None:
    def settings() -> tuple[object, ...]:
        cudnn = torch.backends.cudnn
        precision = torch.get_float32_matmul_precision()
        return torch.get_num_threads(), precision, cudnn.benchmark, cudnn.allow_tf32

    before = settings()
    during: list[tuple[object, ...]] = []
    record = tools.run("dense", threads=2, show=lambda line: during.append(settings()))
    assert during == [(2, "highest", True, False)]
    assert settings() == before
    assert record["environment"]["threads"] == 2
    assert record["headline"] == "wall"


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # bf16 products of that size take seconds where the processor has no instructions for them.
    monkeypatch.setattr(roofline, "matrix_rate", lambda device, dtype: 1e12)
    out = tmp_path / "bench.json"
    options = ["--case", "resnet18.layer1.conv3x3/1", "--dof", "5K", "--seconds", "0.001"]
    options += ["--impl", "dense", "rpg-reference", "--device", "cpu", "--dtype", "amp"]
    assert harness_main([*options, "--out", str(out)]) == 0
    record = schema.load(out)
    assert [r["dtype"] for r in record["results"]] == ["amp", "amp"]
    assert record["options"]["suite"] is None
    printed = capsys.readouterr().out
    assert "5K g64 vector amp" in printed
    assert str(out) in printed

    tools.install(monkeypatch, tools.implementation("rpg-bad", tools.changed(lambda y: y * 2)))
    assert harness_main([*options, "--impl", "rpg-bad", "--out", str(out)]) == 1
    assert "rpg-bad: wrong: output: error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "alexnet"], "case: got 'alexnet', wanted one of"),
        (["--impl", "cublas"], "impl: got 'cublas', wanted one of\n  dense "),
        (["--op", "conv3d"], "op: got 'conv3d', wanted one of 'linear'"),
        (["--dof", "many"], "dof: got 'many'"),
        (["--dtype", "int4"], "dtype: got 'int4', wanted one of 'fp32'"),
        (["--suite", "full", "--op", "linear"], "suite: got full, wanted no choice of cases"),
        (["--threads", "0"], "threads: got 0"),
        (["--seed", "-1"], "seed: got -1"),
        (["--seconds", "-1"], "seconds: got -1.0, wanted a number from 0"),
        (["--seconds", "nan"], "seconds: got nan"),
        (["--memory", "-1"], "memory: got -1.0, wanted a number of GB from 0"),
        (["--memory", "nan"], "memory: got nan"),
        (["--out", "."], "out: got the folder ., wanted a file"),
        (["--out", "/dev/null/bench.json"], "/dev/null"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measured(*arguments: Any) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(harness.roofline, "measure", measured)
    assert harness_main(["--device", "cpu", *options]) == 1
    assert message in capsys.readouterr().err


def test_no_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="cases: got none, wanted at least one"):
        harness.run([], impls=["dense"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness_main(["--device", "cuda"]) == 1
    assert "device: got 'cuda', wanted cpu" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness_main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "llama-3-8b.embed_tokens/{1,16,64,256,4096} [128256x4096]" in printed
    assert "rpg-reference" in printed


def test_records_are_json_without_extensions(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    tools.run("dense", out=out)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(out.read_text(), parse_constant=refuse)
