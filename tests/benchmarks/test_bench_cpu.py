"""The CPU suites: what is measured, what is judged, how a run goes on, and what tables show."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import brute_force as brute
import pytest
import torch
from torch import Tensor

from benchmarks.harness import report
from benchmarks.harness import schema as format_
from benchmarks.harness.__main__ import main as harness_main
from benchmarks.harness.cases import Layer
from benchmarks.harness.cpu import bandwidth, decoder, grid, run, schema, subject, traffic
from benchmarks.harness.cpu import report as tables
from benchmarks.harness.cpu.grid import Bank, Group, Suite
from rpg_kernels import native
from rpg_kernels.bank.config import RPGConfig
from rpg_kernels.models import DecoderConfig

LINEAR = Layer("linear", ("llama-3-8b.gate_proj",), (300, 130))
CONV = Layer("conv2d", ("tiny.conv2d",), (96, 64, 3, 3), image=5)
BANKS = (Bank(10_000), Bank(20_000, 4))
TINY = Suite(
    (
        Group(LINEAR, "fp32", BANKS, (1, 5), BANKS[:1], (1,)),
        Group(LINEAR, "bf16", BANKS, (1, 5)),
        Group(CONV, "fp32", BANKS[:1], (2,)),
    ),
    series=2,
    seconds=0.0,
)
RATES = [
    bandwidth.Level("L1", 32 << 10, 200e9, 200e9),
    bandwidth.Level("L2", 1 << 20, 100e9, 100e9),
    bandwidth.Level("memory", 0, 10e9, 20e9),
]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_SETTLE", 0.0)
    monkeypatch.setattr(run, "_SAMPLE", 0.0)
    monkeypatch.setattr(bandwidth, "measure", lambda threads: RATES)
    monkeypatch.setattr(run.roofline, "matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(run.machine, "cache_bytes", lambda device: 1 << 18)


def measured(suite: Suite = TINY, **options: Any) -> dict[str, Any]:
    return run.run("cpu", suite, threads=1, **{"show": lambda line: None} | options)


def rows(record: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [r for r in record["results"] if all(r[k] == v for k, v in wanted.items())]


def test_a_run_has_every_point_judged_and_timed_in_every_series(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    record = measured(out=out)
    assert format_.load(out, schema.LAYERS_FILE) == record == run.load(out)
    assert record["complete"]
    assert len(record["results"]) == sum(len(group.points()) for group in TINY.groups)
    assert len(record["done"]) == 6
    for row in record["results"]:
        assert row["status"] == "ok", row["reason"]
        assert len(row["series_s"]) == 2
        assert row["samples"] == 2 * run.MIN_ROUNDS
        assert min(row["series_s"]) <= row["median_s"] <= max(row["series_s"])
        assert (row["error"] is None) == (row["impl"] == "dense")
        of_units = row["laps"] is not None and row["backend"] == "cpu"
        assert (row["traffic"] is None) == (row["op"] == "conv2d" or of_units)
    assert {row["backend"] for row in rows(record, impl="dense")} == {"torch"}
    assert {row["backend"] for row in rows(record, impl="rpg-reference")} == {"reference"}
    wanted = "cpu" if native.available() else "reference"
    assert {row["backend"] for row in rows(record, laps=4)} == {wanted}
    # 156 KB of fp32 weight: three pass twice the 256 KiB cache between two uses, and one more.
    assert rows(record, impl="dense", dtype="fp32", op="linear")[0]["copies"] == 5
    assert run.wrong(record) == []


def test_an_interrupted_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, lines = tmp_path / "cpu.json", list[str]()

    def interrupt(line: str) -> None:
        lines.append(line)
        if len(lines) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(out=out, show=interrupt)
    half = json.loads(out.read_text())
    assert not half["complete"]
    assert len(half["done"]) == 4
    later = list[str]()
    record = measured(out=out, show=later.append)
    assert record["complete"]
    assert record["created"] == half["created"]
    assert later[0].startswith("continues")
    assert [line.split("]")[0] for line in later[1:]] == ["[5/6", "[6/6"]
    assert {len(row["series_s"]) for row in record["results"]} == {2}
    # Another seed is another run, as is a complete one.
    for seed in (1, 0):
        record = measured(out=out, seed=seed, show=later.append)
        assert record["complete"]
    assert len(later) == 3 + 6 + 6


def test_what_is_wrong_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = subject.functional.linear

    def off(x: Tensor, weight: Any) -> Tensor:
        y = right(x, weight)
        return y + 1e-3 if len(x) == 5 else y

    monkeypatch.setattr(subject.functional, "linear", off)
    record = measured(replace(TINY, groups=TINY.groups[:1]))
    for row in rows(record, impl="rpg-kernels"):
        assert row["status"] == ("wrong" if row["batch"] == 5 else "ok")
        assert (row["median_s"] is None) == (row["batch"] == 5)
    assert len(run.wrong(record)) == 2
    assert "batch 5 ring, 10K rpg-kernels: output: error 0.001" in run.wrong(record)[0]


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")
def test_the_roofline_counts_what_the_kernel_moves() -> None:
    group = Group(Layer("linear", ("a.b",), (4096, 128)), "fp32", (Bank(2_000_000, 4),), (1, 16))
    weight = brute.window_bank(2_000_000, window=256, laps=4).place((4096, 128))
    jobs = [
        replace(job, weight=weight, backend="cpu") if job.weight else job
        for job in subject.Subject(group, 1 << 20, 0).jobs()
    ]
    counts = {
        (job.point.impl, job.point.batch): traffic.count(
            job, 4 * 128 * job.point.batch, 4 * 4096 * job.point.batch, 1, RATES
        )
        for job in jobs
    }
    weights, positions = 4096 * 128, 4096 * 2
    dense = counts["dense", 1]
    assert (dense.read["memory"], dense.operations) == (4 * weights, 2 * weights)
    # Every fourth row's slot from an 8 MB bank; 8192 entries written and read, products of 2 KB
    # written and read, sums of 16 KB read and written: all of these in the first cache.
    ours = counts["rpg-kernels", 1]
    assert ours.read["memory"] == weights
    assert ours.read["L1"] - 4 * (128 + 4096) == positions * (2 * 2 + 4 * 1.25)
    assert ours.update == {"L1": positions * 2 * 4}
    assert ours.operations == 2 * weights // 4 + positions
    # Sixteen rows of x: a 256 KB strip of sums in the second cache, the window still read once.
    many = counts["rpg-kernels", 16]
    assert many.read["memory"] == weights
    assert many.update == {"L2": positions * 2 * 4 * 16}
    assert many.operations == 16 * ours.operations
    times = traffic.floors(asdict(ours), RATES, {"float32": 50e9})
    assert times["memory"] == pytest.approx(weights / 10e9)
    assert times["L1"] == pytest.approx((ours.read["L1"] + ours.update["L1"]) / 200e9)
    assert times["arithmetic"] == pytest.approx(ours.operations / 50e9)


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


def test_suites_hold_what_is_promised() -> None:
    quick, full = (grid.choose(name) for name in ("cpu", "cpu-full"))
    assert {str(group) for group in quick.groups} <= {str(group) for group in full.groups}
    shapes = {group.layer.weight for group in full.groups}
    for wanted in ((768, 768), (3072, 768), (1024, 4096), (4096, 4096), (14336, 4096),
                   (4096, 14336), (1000, 512), (512, 512, 3, 3), (512, 256, 1, 1)):  # fmt: skip
        assert wanted in shapes
    for group in full.groups:
        if group.layer.op == "linear":
            assert group.batches == (1, 2, 4, 8, 16, 32)
            assert {bank.dof for bank in group.banks} == {45_000, 200_000, 2_000_000, 20_000_000}
            assert {bank.laps for bank in group.banks} == {None, 4, 16}
    (one,) = grid.choose("cpu-full", ["vit-l"], [8], [45_000], ["bf16"]).groups
    assert {(p.impl, p.batch) for p in one.points()} == {("dense", 8), ("rpg-kernels", 8)}
    with pytest.raises(ValueError, match="case: got 'nothing', wanted something of suite cpu: l"):
        grid.choose("cpu", ["nothing"])
    with pytest.raises(ValueError, match="suite: got 'gpu'"):
        grid.choose("gpu")


@pytest.mark.parametrize("make", [tables.speed, tables.layers, tables.roofline, tables.tokens])
def test_tables_without_a_file(make: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert make(tmp_path) == ["not measured"]


def test_tables_show_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_ROOF_BANKS", tuple((b.dof, b.laps) for b in BANKS))
    record = measured(out=tmp_path / "cpu.json")
    for row in record["results"]:
        seconds = {"dense": 2e-3, "rpg-reference": 4e-3}.get(row["impl"], 1e-3 * row["batch"])
        row.update(series_s=[seconds, seconds], median_s=seconds)
    rows(record, impl="dense", batch=1, dtype="bf16")[0]["series_s"] = [1e-3, 3e-3]
    if native.available():
        record["results"][2]["traffic"] = {
            "read": {"L2": 2_500_000}, "update": {}, "operations": 10**7, "dtype": "float32"
        }  # fmt: skip
        record["matrix_per_s"] = {"float32": 1e11, "bfloat16": 2e11}
    rows(record, batch=5, dtype="fp32", laps=4)[0].update(status="wrong", median_s=None)
    (tmp_path / "cpu.json").write_text(json.dumps(record))
    (tmp_path / "cut.json").write_text(json.dumps(record | {"complete": False, "created": "9"}))
    (tmp_path / "law.json").write_text('{"benchmark": "law"}')
    text = "\n".join(tables.layers(tmp_path))
    assert "(" + "[result file]({up}benchmarks/results/cpu.json))." in text
    assert "| llama-3-8b.gate_proj, 300x130, fp32: batch | 1 | 5 |" in text
    assert "| dense | 2 ms | 2 ms |" in text
    assert "| ring, 10K | 1 ms (2.0x) | 5 ms (0.40x) |" in text
    assert "| 4 laps, 20K | 1 ms (2.0x) | wrong |" in text
    assert "| rpg-reference, ring, 10K | 4 ms (0.50x) |  |" in text
    assert "| dense | 2 ms ±50% | 2 ms |" in text
    assert "| tiny.conv2d, 96x64x3x3, fp32: images | 2 |" in text
    assert "| 300x130, bf16 | dense | 2 ms ±50% |" in "\n".join(tables.speed(tmp_path))
    if native.available():
        roof = "\n".join(tables.roofline(tmp_path))
        assert "L1 200 and 200, L2 100 and 100, memory 10 and 20." in roof
        assert "operations per second: float32 100, bfloat16 200." in roof
        line = (
            "| 300x130 fp32, ring, 10K, batch 1 |  | 2.5 |  |  | 25 us (L2) | 100 us | 1 ms | 10% |"
        )
        assert line in roof


def test_the_decoder_is_measured_and_shown(tmp_path: Path, capsys: Any) -> None:
    config = DecoderConfig(200, 64, 1, 2, 2, 96)
    out = tmp_path / "decoder.json"
    record = decoder.run(config, RPGConfig(10_000, laps=2), tokens=3, series=2,
                         threads=1, out=out, show=lambda line: None)  # fmt: skip
    assert decoder.load(out) == record
    assert run.load(out) is None
    assert [(r["network"], r["dtype"]) for r in record["results"]] == [
        (network, dtype) for dtype in ("fp32", "bf16") for network in ("dense", "rpg-kernels")
    ]
    assert decoder.wrong(record) == []
    virtual = 4 * 64 * 64 + 3 * 64 * 96 + 64 * 200
    assert record["model"]["virtual_weights"] == virtual
    dense, ours = record["results"][:2]
    assert (dense["linear_bytes"], ours["linear_bytes"]) == (4 * virtual, 4 * 9984)
    assert ours["same_tokens"]
    for row in record["results"]:
        row.update(series_s=[0.01, 0.01], median_s=0.01 if row is ours else 0.025, error=1e-6)
    text = "\n".join(tables.tokens_of(out, record))
    assert "| rpg-kernels, fp32 | 100.0 | 2.50 | 0.0 MB | 0.1 MB | 1e-06 | yes |" in text
    ours["error"] = 1.0
    assert "decoder fp32: logits differ by 1 of" in decoder.wrong(record)[0]


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(grid.SUITES, "cpu", TINY)
    out = tmp_path / "cpu.json"
    arguments = ["--suite", "cpu", "--case", "tiny", "--threads", "1", "--out", str(out)]
    assert harness_main(arguments) == 0
    assert "| ring, 10K |" in capsys.readouterr().out
    held = run.load(out)
    assert held is not None
    assert held["options"]["part"] == ["tiny.conv2d fp32"]
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


def test_the_report_knows_the_tables() -> None:
    assert set(tables.TABLES) <= set(report.BLOCKS)
