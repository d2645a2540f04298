"""The table of pruned channels: rows in pairs, a tiny run of one pair, and what its costs show."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.accuracy import records
from benchmarks.paper import __main__, report, running
from benchmarks.paper.channel_pruning import EXPERIMENT, SHARE

PAIR = "ResNet-18, RPG 700K*"


def test_each_network_stands_before_its_pruned_one() -> None:
    rows = EXPERIMENT.rows
    for whole, half in zip(rows[::2], rows[1::2], strict=True):
        assert half.unshared == whole.name
        assert {**whole.settings, "flops": SHARE} == dict(half.settings)


def test_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "paper_channel_pruning.jsonl"
    options = [
        "channel_pruning",
        "--size",
        "tiny",
        "--seeds",
        "0",
        "--only",
        PAIR,
        "--out",
        str(out),
    ]
    assert __main__.main(options) == 0
    whole, half = records.read(out)
    assert half["accuracy_before"] == whole["accuracy_before"]  # the same trained network
    assert 20 < half["flops_share"] <= 50
    assert whole["flops_share"] == 100
    assert half["mflops"] == pytest.approx(whole["mflops"] * half["flops_share"] / 100)
    assert half["dof"] == whole["dof"]
    assert half["virtual_weights"] < whole["virtual_weights"]
    # Another process, where the whole network is not there, gives the same.
    alone = tmp_path / "alone.jsonl"
    again = [*options[:-3], "*700K, half*", "--out", str(alone)]
    assert __main__.main(again) == 0
    (run,) = records.read(alone)
    for key in ("accuracy_before", "accuracy_at_once", "test_accuracy", "channels"):
        assert run[key] == half[key], key
    capsys.readouterr()
    assert __main__.main([*options, "--costs"]) == 0
    assert "| inference |" in capsys.readouterr().out


def test_rows_without_inference_say_so() -> None:
    costs = {"step_seconds": 1.0, "rounds": [1.0], "state_bytes": 10**6,
             "saved_beyond_activations_bytes": 0}  # fmt: skip
    whole, half = EXPERIMENT.rows[:2]
    seconds = {whole.name: 0.5, half.name: 0.25}
    timed = {
        "rows": {name: {**costs, "inference_seconds": one} for name, one in seconds.items()},
        "clock": "process time",
        "environment": {"device_name": "x", "threads": 1, "torch": "2", "commit": None},
    }
    lines = report.costs_table(EXPERIMENT, timed)
    assert lines[2].endswith("| 500 ms | 1.00 |")
    assert lines[3].endswith("| 250 ms | 0.50 |")
    assert lines[4].count("not measured") == 7
    assert running.load("channel_pruning") is EXPERIMENT
