"""Suite ``networks``: what is measured, what is judged, how a run goes on, and its tables."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import report
from benchmarks.harness import schema as format_
from benchmarks.harness.__main__ import main as harness_main
from benchmarks.harness.cpu import networks, networks_report, networks_run, rounds, schema
from benchmarks.harness.cpu import networks_subject as subject
from benchmarks.harness.cpu.grid import FORWARD, TRAINING, Bank
from benchmarks.harness.cpu.networks import INFERENCE, Case, Point
from benchmarks.harness.cpu.opponents import Job
from examples.demo.published import share_as_published
from rpg_kernels import convert
from rpg_kernels.models.resnet import ResNet, is_block_convolution

RESULTS = Path(__file__).parents[2] / report.RESULTS
NET = Case(
    "resnet-tiny",
    lambda: ResNet((1, 1), 10, "cifar", 64),
    (3, 6, 6),
    lambda model, bank: convert(model, networks.config(bank), filter_fn=is_block_convolution),
    lambda model, dof: share_as_published(model, dof, is_block_convolution),
)
CONV, STRIDED = networks._conv(64, 5), networks._conv(64, 5, stride=2)
LINEAR = Case(
    "mlp",
    lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))),
    (64,),
    lambda model, bank: convert(model, networks.config(bank), filter_fn=lambda m, n: n == "1"),
)
BANKS = (Bank(4096, 4), Bank(1024))
TINY = [
    Point(NET, "fp32", 2, TRAINING, BANKS),
    Point(NET, "fp32", 1, INFERENCE, BANKS[:1]),
    Point(NET, "bf16", 2, TRAINING, BANKS[:1]),
    Point(CONV, "bf16", 2, TRAINING, BANKS),
    Point(STRIDED, "fp32", 1, FORWARD, BANKS[:1]),
    Point(LINEAR, "fp32", 3, TRAINING, (Bank(1024, 4),)),
]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_SETTLE", "_SAMPLE"):
        monkeypatch.setattr(rounds, name, 0.0)
    monkeypatch.setattr(rounds, "QUIET", 1e9)


def measured(points: list[Point] = TINY, **options: Any) -> dict[str, Any]:
    return networks_run.run(points, **{"show": lambda line: None, "seconds": 0.0} | options)


def test_a_run_has_every_row_beside_the_fastest_dense(tmp_path: Path) -> None:
    out = tmp_path / "networks.json"
    record = measured(out=out)
    assert format_.load(out, schema.NETWORKS_FILE) == record == networks_run.load(out)
    assert record["complete"]
    assert record["clock"] == "process"
    names = [(row["point"], row["network"], row["laps"]) for row in record["results"]]
    wanted = [(str(p), "rpg-kernels", bank.laps) for p in TINY for bank in p.banks]
    assert names == [(str(TINY[0]), "published", None), *wanted]
    for row in record["results"]:
        assert row["status"] == "ok"
        ours, dense = row["seconds"], row["dense_seconds"]
        assert ours > 0 < dense
        assert row["ratio"]["rounds"] >= rounds.FEW_ROUNDS
        assert dense == min(
            seconds for job, seconds in row["all"].items() if job == f"dense: {row['dense']}"
        )
        assert row["error"] <= networks_run.ALLOWED[row["dtype"]]
    by_way = record["results"][3]["all"]  # an inference
    assert "dense: fp32, oneDNN packed" in by_way
    assert {"4 laps, 4096: fp32, channels-last", "4 laps, 4096: fp32, contiguous"} <= set(by_way)
    linear = record["results"][-1]["all"]
    assert set(linear) == {
        f"{n}: fp32{p}" for n in ("dense", "4 laps, 1024") for p in ("", ", medium")
    }
    ours, published = record["results"][1]["memory"], record["results"][0]["memory"]
    dense = record["results"][1]["dense_memory"]
    assert ours["saved_beyond_activations"] == dense["saved_beyond_activations"] == 0
    assert published["saved_beyond_activations"] > 0
    assert ours["state"] < dense["state"] < published["state"]
    assert networks_run.wrong(record) == []
    text = "\n".join(networks_report.tables_of(out, record))
    for words in (
        "published, ring, 4096",
        "resnet-tiny, fp32, training, 2",
        "conv3x3 64->64 5x5, bf16",
    ):
        assert words in text


def test_a_run_goes_on_and_measures_again_what_was_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, lines = tmp_path / "networks.json", list[str]()
    first = measured(TINY[3:5], out=out)
    record = measured(TINY[3:], out=out, show=lines.append)
    assert [line.split("]")[0] for line in lines[1:]] == ["[1/1"]
    assert record["results"][: len(first["results"])] == first["results"]
    monkeypatch.setattr(rounds, "QUIET", -1.0)
    torch.manual_seed(5)
    record = measured(TINY[4:5], out=out, seed=1)
    assert (record["results"], list(record["disturbed"])) == ([], [f"{TINY[4]}: 4 laps, 4096"])
    monkeypatch.setattr(rounds, "QUIET", 1e9)
    record = measured(TINY[4:5], out=out, seed=1)
    assert (len(record["results"]), record["disturbed"]) == (1, {})


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_what_computes_something_else_is_not_timed(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.model(x)
            return y + value * y.abs().max()

    twin = subject._dense_twin
    monkeypatch.setattr(subject, "_dense_twin", lambda model: twin(model.model))
    share = NET.share
    wrong = Case(NET.name, NET.make, NET.sample, lambda m, b: Other(share(m, b)))
    record = measured([Point(wrong, "fp32", 2, INFERENCE, BANKS[:1])])
    (row,) = record["results"]
    assert (row["status"], row["ratio"]) == ("wrong", None)
    assert len(networks_run.wrong(record)) == 1
    assert "wrong" in "\n".join(networks_report.tables_of(Path("x.json"), record))


def test_what_is_not_installed_is_named() -> None:
    absent = Case("net", NET.make, NET.sample, NET.share, package="no_such_package")
    record = measured([Point(absent, "fp32", 1, INFERENCE, BANKS)])
    assert record["missing"] == {"net": "no_such_package is not installed"}
    text = networks_report.tables_of(Path("x.json"), record)
    assert text[-1] == "Not measured: net (no_such_package is not installed)."


def test_turns_leave_what_is_far_behind_in_its_group() -> None:
    now = [0]
    calls: dict[str, int] = {}

    def job(name: str, cost: int) -> Job:
        def call(i: int) -> tuple[Tensor, ...]:
            calls[name] = calls.get(name, 0) + 1
            now[0] += cost
            return ()

        return Job(name, call, 1)

    with pytest.MonkeyPatch.context() as patch:
        for clock in ("perf_counter", "process_time"):
            patch.setattr(rounds.time, clock, lambda: now[0] * 1e-9)
            patch.setattr(rounds.time, f"{clock}_ns", lambda: now[0])
        groups = {"dense": [job("a", 100), job("b", 120), job("c", 200)], "ours": [job("d", 300)]}
        samples = rounds.in_turn(groups, "process", 0.0, random.Random(0))
    assert {name: len(of) for name, of in samples.items()} == {"a": 3, "b": 2, "c": 1, "d": 3}
    assert rounds.fastest(samples, ["a", "b", "c"], "process") == "a"
    assert rounds.ratio(samples, "a", "d", "process").median == pytest.approx(1 / 3)


def test_choice_and_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(networks.choose()) == len(list(networks.points()))
    assert {p.batch for p in networks.choose(["resnet18-cifar"], [128])} == {128}
    assert {p.dtype for p in networks.choose(dtypes=["bf16"])} == {"bf16"}
    with pytest.raises(ValueError, match="something of suite networks: resnet18-cifar, "):
        networks.choose(["lstm"])
    assert harness_main(["--suite", "networks", "--dof", "1000"]) == 1
    assert "wanted none with suite networks" in capsys.readouterr().err


def test_committed_results_are_whole_and_right() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        if json.loads(path.read_text()).get("schema") == schema.NETWORKS:
            record = networks_run.load(path)
            assert record
            assert record["complete"]
            assert networks_run.wrong(record) == []
