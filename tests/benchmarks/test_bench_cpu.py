"""The CPU suites: what is measured, what is judged, how a run goes on, and what tables show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import machine, report
from benchmarks.harness import schema as format_
from benchmarks.harness.__main__ import main as harness_main
from benchmarks.harness.cases import Layer
from benchmarks.harness.cpu import (
    bandwidth,
    decoder,
    grid,
    opponents,
    rounds,
    run,
    schema,
    subject,
    traffic,
)
from benchmarks.harness.cpu import report as tables
from benchmarks.harness.cpu.grid import BATCHES, FORWARD, TRAINING, Bank, Point
from benchmarks.harness.cpu.opponents import Job
from benchmarks.harness.cpu.subject import Subject
from rpg_kernels import native
from rpg_kernels.bank.config import RPGConfig
from rpg_kernels.models import DecoderConfig

RESULTS = Path(__file__).parents[2] / report.RESULTS
LAYER = Layer("linear", ("tiny.linear",), (300, 130))
BANKS = (Bank(2_000_000, 4), Bank(10_000))
TINY = [
    Point(LAYER, "bf16", 1, FORWARD, BANKS),
    Point(LAYER, "bf16", 5, TRAINING, BANKS),
    Point(LAYER, "fp32", 5, FORWARD, BANKS),
    Point(LAYER, "fp32", 5, TRAINING, BANKS[:1]),
]
ROWS = sum(len(point.banks) for point in TINY)
RATES = [
    bandwidth.Level("L1", 32 << 10, 200e9, 200e9),
    bandwidth.Level("L2", 1 << 20, 100e9, 100e9),
    bandwidth.Level("memory", 0, 10e9, 20e9),
]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample lasts, and nothing is left out or refused unless a test asks for it."""
    for name in ("_SETTLE", "_SAMPLE"):
        monkeypatch.setattr(rounds, name, 0.0)
    monkeypatch.setattr(rounds, "QUIET", 1e9)
    monkeypatch.setattr(opponents, "_seconds", lambda job: 1.0)
    monkeypatch.setattr(bandwidth, "measure", lambda threads: RATES)
    monkeypatch.setattr(run.roofline, "matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(run.machine, "cache_bytes", lambda device: 1 << 18)


def measured(points: list[Point] = TINY, **options: Any) -> dict[str, Any]:
    return run.run(points, **{"show": lambda line: None, "seconds": 0.0} | options)


def rows(record: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [r for r in record["results"] if all(r[k] == v for k, v in wanted.items())]


def test_a_run_has_every_row_judged_and_timed_beside_the_fastest_dense(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    record = measured(out=out)
    assert format_.load(out, schema.LAYERS_FILE) == record == run.load(out)
    assert record["complete"]
    assert (record["environment"]["threads"], record["clock"]) == (1, "process")
    assert len(record["results"]) == ROWS
    for row in record["results"]:
        assert row["status"] == "ok", row["reason"]
        assert row["rounds"] == rounds.MIN_ROUNDS
        assert row["dense_s"] == row["dense_all"][row["dense"]] > 0 < row["ours_s"]
        assert row["ratio"]["q25"] <= row["ratio"]["median"] <= row["ratio"]["q75"]
        assert 0 <= row["error"] <= row["allowed"]
        assert row["roof"]["arithmetic"] <= row["dense_roof"]["arithmetic"]
        assert "torch fp32" in row["dense_all"] or row["what"] == TRAINING
    compiled = native.available()
    assert {row["backend"] for row in rows(record, laps=4)} == {"cpu" if compiled else "reference"}
    assert run.wrong(record) == []


def test_a_run_goes_on_where_it_stopped_and_takes_in_other_points(tmp_path: Path) -> None:
    out, lines = tmp_path / "cpu.json", list[str]()

    def interrupt(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(TINY[:3], out=out, show=interrupt)
    half = json.loads(out.read_text())
    assert (half["complete"], len(half["results"])) == (False, 4)
    later = list[str]()
    record = measured(TINY, out=out, show=later.append)
    assert later[0] == f"continues {out}, which has 2 of 4 points"
    assert [line.split("]")[0] for line in later[1:]] == ["[1/2", "[2/2"]
    assert record["complete"]
    assert record["created"] == half["created"]
    assert record["results"][:4] == half["results"]
    assert len(record["results"]) == ROWS
    # Nothing is left to do; another seed is another run.
    assert measured(TINY, out=out)["results"] == record["results"]
    assert measured(TINY[:1], out=out, seed=1)["options"]["points"] == [str(TINY[0])]


def test_what_is_disturbed_keeps_no_figure_and_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cpu.json"
    monkeypatch.setattr(rounds, "QUIET", -1.0)
    record = measured(TINY[:2], out=out)
    assert record["results"] == []
    assert set(record["disturbed"]) == {
        f"{point}, {bank}" for point in TINY[:2] for bank in point.banks
    }
    monkeypatch.setattr(rounds, "QUIET", 1e9)
    record = measured(TINY[:1], out=out)
    assert {run.name_of(row) for row in record["results"]} == {
        f"{TINY[0]}, {bank}" for bank in BANKS
    }
    assert len(record["disturbed"]) == 2


def test_several_threads_want_a_quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "load", lambda: 1e3)
    with pytest.raises(ValueError, match="threads: got 2, wanted 1 on a machine that is busy"):
        measured(threads=2)
    assert measured(TINY[:1])["load"] == {"before": 1e3, "busy": []}


@pytest.mark.parametrize("point", TINY[:2], ids=str)
@pytest.mark.parametrize("which", [0, -1])
def test_what_is_wrong_gets_no_figure(
    point: Point, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = subject.functional.linear

    class Off(torch.autograd.Function):
        """Wrong in y, or only in a gradient."""

        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y + 0.5 if which == 0 or point.what == FORWARD else y.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy * 1.5

    monkeypatch.setattr(subject.functional, "linear", lambda x, weight: Off.apply(right(x, weight)))
    record = measured([point])
    for row in record["results"]:
        assert (row["status"], row["ratio"], row["ours_s"]) == ("wrong", None, None)
    assert len(run.wrong(record)) == 2
    assert f"{point}, 4 laps, 2M: error " in run.wrong(record)[0]


def test_a_dense_layer_that_is_wrong_or_cannot_run_is_no_opponent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(dense: opponents.Dense) -> Any:
        raise RuntimeError("needs another processor\nand more")

    monkeypatch.setattr(opponents, "_onednn", broken)
    monkeypatch.setattr(opponents, "_mkl", lambda dense: lambda i, x: x @ dense.weights[i].t() + 1)
    (row,) = measured([Point(LAYER, "fp32", 5, FORWARD, BANKS[:1])])["results"]
    assert row["dense_missing"]["oneDNN packed fp32"] == "needs another processor"
    assert row["dense_missing"]["MKL packed fp32"].startswith("error 1, allowed ")
    assert row["dense_missing"].get("zentorch packed", "not installed") == "not installed"
    assert {"torch fp32", "torch fp32, medium"} <= set(row["dense_all"])


@pytest.mark.parametrize("dtype", grid.DTYPES)
def test_every_dense_layer_is_right(dtype: str) -> None:
    for what in grid.WHATS:
        one = Subject(Point(LAYER, dtype, 5, what, BANKS[:1]), 1 << 18, 0)
        jobs, _ = one.dense()
        assert len({job.name for job in jobs}) == len(jobs) >= 2
        for job in jobs:
            assert one.judge_dense(job).passed, job.name
            assert len(job.call(job.copies - 1)) == (1 if what == FORWARD else 3)


def test_what_is_hopeless_is_not_tried_on_the_whole_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opponents, "_seconds", lambda job: 5.0 if "own" in job.name else 1.0)
    (row,) = measured([Point(LAYER, "fp32", 5, TRAINING, BANKS[:1])])["results"]
    assert list(row["dense_all"]) == ["torch fp32"]
    assert "over 4 times as slow" in row["dense_missing"]["torch fp32, own buffers"]


def test_rounds_leave_dense_layers_that_are_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"ours": 1.0, "near": 2.0, "far": 2.5, "farther": 4.0}

    def sample(job: Job, earlier: Any) -> dict[str, float]:
        return {"process": seconds[job.name] * (1 + 0.01 * len(earlier)), "wall": 1.0}

    monkeypatch.setattr(rounds, "_sample", sample)
    ours, *dense = [Job(name, lambda i: (), 1) for name in seconds]
    samples = rounds.measure([ours], dense, "process", 0.0, rounds.random.Random(0))
    for name, held in (("slow", 1), ("near", 5)):
        by = {"ours": Job(name, lambda i: (), 1)}
        seconds.update(slow=1.6, near=1.05)
        taken = rounds.measure([ours], [dense[1]], "process", 0.0, rounds.random.Random(0), by)
        assert (len(taken["ours"]), len(taken[name])) == (5, held)
    seconds["near"] = 2.0
    assert {name: len(held) for name, held in samples.items()} == {
        "ours": 5, "near": 5, "far": 2, "farther": 1,
    }  # fmt: skip
    assert rounds.fastest(samples, ["near", "far", "farther"], "process") == "near"
    ratio = rounds.ratio(samples, "near", "ours", "process")
    assert (ratio.median, ratio.error) == (pytest.approx(2.0), pytest.approx(0.0))
    monkeypatch.setattr(rounds, "ENDLESS", 0.5)
    samples = rounds.measure([ours], dense, "process", 0.0, rounds.random.Random(0))
    assert (len(samples["ours"]), len(samples["near"])) == (1, 5)
    once = rounds.ratio(samples, "near", "ours", "process")
    assert (once.median, once.error) == (pytest.approx(2.0), 0.0)
    apart = {"a": [{"wall": t} for t in (1, 2, 3, 4, 5)], "b": [{"wall": 1.0}] * 5}
    assert rounds.ratio(apart, "a", "b", "wall") == rounds.Ratio(2.0, 3.0, 4.0, 5)
    assert rounds.Ratio(2.0, 3.0, 4.0, 9).error == pytest.approx(1.253 / 1.349 * 2 / 9)


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")
def test_the_roof_counts_bytes_and_products() -> None:
    layer = Layer("linear", ("a.b",), (4096, 128))
    work = {}
    for what in grid.WHATS:
        one = Subject(Point(layer, "fp32", 16, what, (Bank(2_000_000, 4),)), 1 << 20, 0)
        work[what] = traffic.dense(one, 1 << 20), traffic.ours(one, one.ours[0])
    weight, bank, activations = 4 * 4096 * 128, 8_000_000, 4 * 16 * (4096 + 128)
    dense, ours = work[FORWARD]
    assert dense == traffic.Work(weight, 0, 2 * weight, activations, 2 * 16 * 4096 * 128)
    assert ours == traffic.Work(weight // 4, 0, bank, activations, dense.operations // 4)
    dense, ours = work[TRAINING]
    assert (dense.read, dense.written, dense.operations) == (2 * weight, weight, 6 * 2**23)
    assert (ours.read, ours.written, ours.operations) == (weight // 2, bank, 6 * 2**21)
    times = traffic.floors(ours, RATES, {"float32": 5e10, "bfloat16": 1e10})
    assert times == {
        "arithmetic": pytest.approx(6 * 2**21 / 5e10),
        "memory": pytest.approx(weight / 2 / 10e9 + bank / 20e9),
        "L2": pytest.approx(2 * activations / 100e9),
    }
    assert set(traffic.floors(ours, [], {"float32": 5e10})) == {"arithmetic"}


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")
def test_streaming_touches_every_word_of_every_part_as_often_as_asked() -> None:
    words = torch.arange(2 * 64).view(2, 64)
    before = words.clone()
    native.stream(words, write=False, passes=3)
    assert torch.equal(words, before)
    native.stream(words, write=True, passes=3)
    assert torch.equal(words, before ^ 1)
    native.stream(words, write=True, passes=1)
    assert torch.equal(words, before)


def test_the_suite_holds_what_is_promised() -> None:
    usual, longer = grid.choose(), grid.choose(longer=True)
    assert {point.layer.weight for point in usual} == {
        (4096, 4096), (14336, 4096), (3072, 768), (768, 3072), (1024, 1024),
    }  # fmt: skip
    assert [point.dtype for point in usual] == sorted(point.dtype for point in usual)
    assert len(longer) == 5 * 2 * 2 * len(BATCHES) == len(usual) + 2 * 2 * 2
    for point in longer:
        laws = {(bank.dof, bank.laps) for bank in point.banks}
        wanted = {(2_000_000, None), (2_000_000, 4), (2_000_000, 16)}
        assert laws == wanted | ({(20_000_000, 4)} if point.batch == 1 else set())
    (one, _) = grid.choose(["vit-l"], [1], [20_000_000], ["bf16"])
    assert (one.banks, one.what) == ((Bank(20_000_000, 4),), FORWARD)
    with pytest.raises(ValueError, match="case: got 'nothing', wanted something of suite cpu: l"):
        grid.choose(["nothing"])


def test_the_machine_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "_CPU_INFO", info)
    assert machine.lacking() == []
    info.write_text("model name : x\nflags\t\t: fma avx2 avx512f\n")
    assert machine.lacking() == ["AVX512-BF16", "AMX"]


@pytest.mark.parametrize("make", [tables.speed, tables.layers, tables.roofline, tables.tokens])
def test_tables_without_a_file(make: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert make(tmp_path) == ["not measured"]


def test_tables_show_wins_and_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = measured(out=tmp_path / "cpu.json")
    for row in record["results"]:
        row.update(ours_s=2e-3, dense="torch fp32", dense_s=1e-3, dense_missing={"zen": "none"})
        row.update(ratio={"q25": 0.49, "median": 0.5, "q75": 0.52, "rounds": 5}, wait=1.5)
        row.update(roof={"arithmetic": 5e-4, "L2": 1e-3}, dense_roof={"memory": 4e-4})
    record["results"][0].update(
        ours_s=4e-4, ratio={"q25": 2.4, "median": 2.5, "q75": 2.5, "rounds": 5}
    )
    rows(record, dtype="fp32", laps=None)[0].update(status="wrong", ratio=None)
    record.update(disturbed={"a": 0.2}, lacks=["AVX-512"], load={"before": 7.0, "busy": []})
    monkeypatch.setattr(rounds, "QUIET", 0.08)
    (tmp_path / "cpu.json").write_text(json.dumps(record))
    (tmp_path / "cut.json").write_text(json.dumps(record | {"complete": False, "created": "9"}))
    (tmp_path / "law.json").write_text('{"benchmark": "law"}')
    text = "\n".join(tables.layers(tmp_path))
    for wanted in (
        "([result file]({up}benchmarks/results/cpu.json)).",
        "A processor without AVX-512.",
        "Load average 7.0 when it began, wall time 1.50 times process time.",
        "a row is kept where the standard error of the median is at most 8% of it.",
        "Not kept: 1 rows: a.",
        "tiny.linear, 300x130, bf16:",
        "| forward, 1 | 4 laps, 2M | 400 us | torch fp32 | 1 ms | 2.5x | 2.40 to 2.50 | 250% |",
        "| training, 5 | 4 laps, 2M | 2 ms | torch fp32 | 1 ms | 0.50x | 0.49 to 0.52 | 50% | 40",
        "| forward, 5 | ring, 10K | wrong |  |  |  |  |  |  |",
        "Not among dense layers: zen (none).",
    ):  # fmt: skip
        assert wanted in text
    short = "\n".join(tables.speed(tmp_path))
    assert "| bf16, 4 laps, 2M: batch | 1 | 5 |" in short
    assert "| 300x130, forward | 400 us (2.5x) |  |" in short
    assert "| 300x130, training |  | 2 ms (0.50x) |" in short
    roof = "\n".join(tables.roofline(tmp_path))
    assert "L1 200 and 200, L2 100 and 100, memory 10 and 20." in roof
    assert (
        "| 300x130 bf16, forward, batch 1 | 400 us | memory | 1 ms | 1 ms | L2 | 400 us |" in roof
    )
    many = record | {"environment": record["environment"] | {"threads": 2}}
    (tmp_path / "two.json").write_text(json.dumps(many))
    assert "\n".join(tables.layers(tmp_path)).count("result file") == 2


def test_what_is_committed_was_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for path in RESULTS.glob("*.json"):
        record = run.load(path)
        for row in record["results"] if record else ():
            assert row["status"] == "ok"
            assert rounds.Ratio(**row["ratio"]).error <= rounds.QUIET


def test_the_decoder_is_measured_and_shown(tmp_path: Path, capsys: Any) -> None:
    config = DecoderConfig(200, 64, 1, 2, 2, 96)
    out = tmp_path / "decoder.json"
    record = decoder.run(config, RPGConfig(10_000, laps=2), tokens=3, series=2,
                         threads=1, out=out, show=lambda line: None)  # fmt: skip
    assert decoder.load(out) == record
    assert run.load(out) is None
    assert [(r["network"], r["dtype"]) for r in record["results"]] == [
        (network, dtype) for dtype in ("bf16", "fp32") for network in ("dense", "rpg-kernels")
    ]
    assert decoder.wrong(record) == []
    virtual = 4 * 64 * 64 + 3 * 64 * 96 + 64 * 200
    assert record["model"]["virtual_weights"] == virtual
    dense, ours = record["results"][2:]
    assert (dense["linear_bytes"], ours["linear_bytes"]) == (4 * virtual, 4 * 9984)
    assert ours["same_tokens"]
    for row in record["results"]:
        row.update(series_s=[0.01, 0.01], median_s=0.01 if row is ours else 0.025, error=1e-6)
    text = "\n".join(tables.tokens_of(out, record))
    assert "| rpg-kernels, fp32 | 100.0 | 2.50 | 0.0 MB | 0.1 MB | 1e-06 | yes |" in text
    record["load"]["busy"] = ["something else ran"]
    out.write_text(json.dumps(record))
    assert tables.tokens(tmp_path) == ["not measured"]
    ours["error"] = 1.0
    assert "decoder fp32: logits differ by 1 of" in decoder.wrong(record)[0]


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grid, "points", lambda longer: iter(TINY))
    out = tmp_path / "cpu.json"
    options = "--suite cpu --case tiny --dtype fp32 --seconds 0 --out"
    arguments = [*options.split(), str(out)]
    assert harness_main(arguments) == 0
    assert "| forward, 5 | ring, 10K |" in capsys.readouterr().out
    held = run.load(out)
    assert held is not None
    assert held["options"]["points"] == [str(point) for point in TINY if point.dtype == "fp32"]
    for wrong, message in (
        (["--impl", "dense"], "impl: got ['dense'], wanted none with suite cpu"),
        (["--device", "cuda"], "device: got 'cuda', wanted 'cpu' with suite cpu"),
        (["--compare", "a", "b"], "suite: got 'cpu', wanted quick or full with --compare"),
        (["--seconds", "-1"], "seconds: got -1.0"),
    ):
        assert harness_main([*arguments, *wrong]) == 1
        assert message in capsys.readouterr().err
    assert harness_main(["--suite", "decoder", "--batch", "2"]) == 1
    assert "batch: got [2], wanted none with suite decoder" in capsys.readouterr().err
    assert harness_main(["--longer"]) == 1
    assert "longer: got an option, wanted none but with suite cpu" in capsys.readouterr().err


def test_the_report_knows_the_tables() -> None:
    assert set(tables.TABLES) <= set(report.BLOCKS)
