"""The console script: its commands, and one sentence for a mistake."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from rpg_kernels import timing
from rpg_kernels.backends import dispatch, registry
from rpg_kernels.backends.call import Call
from rpg_kernels.cli import main


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--help"], "summary"),
        (["summary", "--help"], "resnet34"),
        (["bench", "--help"], "benchmarks.harness"),
        (["--version"], "rpg-kernels 0."),
    ],
)
def test_help_and_version(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert text in capsys.readouterr().out


def test_summary_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "summary resnet18 --dof 2000000 --granularity 64 --stem cifar --num-classes 10"
    assert main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "layer4.1.conv2" in printed
    assert "11,157,504" in printed or "11157504" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("summary resnet18 --dof 0", "dof: got 0"),
        ("summary resnet18 --granularity 3", "granularity: got 3"),
        ("bench 4x", "shape: got '4x'"),
        ("bench 0x4", "shape: got '0x4'"),
        ("bench 4x4 9", "shape: got '9'"),
        ("bench 4x4 --batch 1,0", "batch: got '0'"),
        ("bench 4x4 --dtype fp8", "dtype: got 'fp8'"),
        ("bench 4x4 --dof many", "dof: got 'many'"),
        ("bench 4x4 --laps 65", "laps: got 65"),
        ("summary resnet18 --laps 12", "laps: got 12, wanted at most 5"),
        ("bench 4x4 --device tape", "device: got 'tape'"),
        ("bench 4x4 --device cuda:99", "device: got 'cuda:99'"),
    ],
)
def test_bad_options_end_with_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(("made", "argument"), [("ParameterBank", "dof"), ("Linear", "shape")])
def test_bench_without_the_memory(
    made: str, argument: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises a RuntimeError, with the frames of C++ below its sentence."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no memory for it\nframe #0")

    monkeypatch.setattr(timing, made, refuse)
    assert main(["bench", "4x4", "--dof", "1K", "--device", "cpu"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"rpg-kernels: {argument}: got ")
    assert "no memory for it" in printed
    assert printed.count("\n") == 1


def test_bench_times_the_shapes_that_are_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_ROUNDS", (2, 2))
    monkeypatch.setattr(timing, "_SAMPLE", 0.0)
    options = "--batch 1,3 --dof 1K --dtype bf16 --device cpu"
    assert main(f"bench 8x16 24x8 {options}".split()) == 0
    _, bank, head, *rows, _, hint = capsys.readouterr().out.splitlines()
    assert "dof=960" in bank
    assert "benchmarks.harness" in hint
    assert head.endswith("back end")
    assert [row.split()[:3] for row in rows] == [
        [weight, batch, kind]
        for weight in ("8x16", "24x8")
        for batch in ("1", "3")
        for kind in ("forward", "forward+backward")
    ]
    assert {row.split()[-1] for row in rows} <= set(registry.names())


def test_bench_tells_the_layers_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that gives calls of our operators three seconds and torch's one."""
    ours: list[str] = []
    real = dispatch.implementation

    def implementation(call: Call) -> Callable[..., Tensor]:
        ours.append(call.op)
        return real(call)

    def sampled(calls: dict[Any, Callable[[], object]], _: float) -> dict[Any, list[float]]:
        found = {}
        for key, call in calls.items():
            ours.clear()
            call()
            found[key] = [3.0 if ours else 1.0]
        return found

    monkeypatch.setattr(dispatch, "implementation", implementation)
    monkeypatch.setattr(timing, "_sampled", sampled)
    assert main(["bench", "8x16", "--batch", "2", "--dof", "1K", "--device", "cpu"]) == 0
    rows = capsys.readouterr().out.splitlines()[3:5]
    assert [row.split()[3:-1] for row in rows] == [["1", "s", "±0%", "3", "s", "±0%", "3"]] * 2


def test_figures() -> None:
    figure = timing.figure([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (figure.median_s, figure.samples) == (3.0, 5)
    assert (figure.q10_s, figure.q90_s) == pytest.approx((1.4, 4.6))
    assert figure.spread == pytest.approx(3.2 / 3)
    assert timing.figure([7.0]) == timing.Figure(7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize("text", ["", "M", "0", "-5", "1.5K", "4x"])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="dof: got"):
        timing.count(text)
    assert [timing.count(t) for t in ("45K", "2M", "7", "3k")] == [45_000, 2_000_000, 7, 3_000]


def test_bench_reads_with_laps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_ROUNDS", (1, 1))
    lines = [*timing.run(["8x64"], ["2"], dof="16384", laps=2, device_name="cpu")]
    assert "laps=2" in lines[1]


def test_samples_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SAMPLE", 0.0)
    order: list[int] = []
    calls = {("pass", i): lambda i=i: order.append(i) for i in range(3)}
    found = timing._sampled(calls, time_s=0.0)
    assert {len(samples) for samples in found.values()} == {timing._ROUNDS[0]}
    assert order[6:] == [0, 1, 2] * timing._ROUNDS[0]  # the first six warmed up and counted


def test_demo_says_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--data", "x"], ["--help"]):
        assert main(["demo", *arguments]) == 1
        printed = capsys.readouterr().err
        assert "python -m examples.demo" in printed
        assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new"), [("bench", "benchmarks.harness"), ("demo", "examples.demo")]
)
@pytest.mark.parametrize("form", ["import {0}", "import {0}.report", "from rpg_kernels import {1}"])
def test_what_moved_says_where_to(old: str, new: str, form: str) -> None:
    with pytest.raises(ImportError, match=rf"rpg_kernels\.{old} moved to {new}.*python -m {new}"):
        exec(form.format(f"rpg_kernels.{old}", old))
    importlib.import_module(new)
