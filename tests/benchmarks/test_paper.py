"""The tables of the paper: a runner that continues, costs, pages from files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpg_kernels as rpg
from benchmarks.accuracy import records
from benchmarks.accuracy.summary import Estimate
from benchmarks.paper import __main__, classification, costs, order, report, running
from benchmarks.paper.experiment import Experiment, Metric, Record, Row

DOF = 1024


@dataclass
class Fake:
    """A task whose networks are two linear layers, and whose runs are three steps of nothing."""

    lr: float = 0.5
    images: int = 7

    def __post_init__(self) -> None:
        self.trained: list[tuple[str, int]] = []

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"lr": self.lr, "sizes": (1, 2)}

    @property
    def data(self) -> Mapping[str, Any]:
        return {"name": "none", "images": self.images}

    def steps(self, row: Row) -> int:
        return 3

    def build(self, row: Row, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
        if row.settings["shared"]:
            rpg.convert(model, rpg.RPGConfig(dof=DOF, seed=seed), filter_fn=lambda *_: True)
        return model

    def run(self, row: Row, seed: int, on_step: Callable[[], object]) -> Record:
        self.trained.append((row.name, seed))
        for _ in range(self.steps(row)):
            on_step()
        return {"score": 10.0 * len(self.trained), "error": None}

    def training_step(self, model: nn.Module) -> Callable[[], object]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        x = torch.ones(4, 64)

        def step() -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        return step


EXPERIMENT = Experiment(
    name="fake",
    title="A table: made up",
    rows=(
        Row("small", {"shared": True, "sizes": (1,)}, {"score": 50.0}),
        Row("large", {"shared": False}, {"score": 60.0, "other data": 7.0}),
        Row("never", {"shared": False, "of": "none"}),
    ),
    metrics=(Metric("score", "score (%)"), Metric("error", "error", higher=False)),
    unshared="large",
    task=lambda size, data: Fake(),
    paper_data="large data",
    quoted=(Row("theirs", {}, {"score": 55.5}),),
    text="What it is.",
)


def made_up(row: str, seed: int, score: float | None, **changed: Any) -> Record:
    settings = next(r.settings for r in EXPERIMENT.rows if r.name == row)
    return {
        "row": row,
        "seed": seed,
        "settings": running.jobs.as_json(dict(settings)),
        "score": score,
        "error": 0.25,
        "dof": DOF if settings["shared"] else 8192,
        "virtual_weights": 8192,
        "trainable": 9000,
        "seconds": 90.0,
        "process_seconds": 60.0,
        **running.common(Fake()),
        "environment": {"device_name": "nothing", "threads": 1, "torch": "0", "python": "3",
                        "rpg_kernels": "1", "commit": "abc"},
        **changed,
    }  # fmt: skip


def write(path: Path, *runs: Record) -> None:
    for run in runs:
        records.append(path, run)


def test_all_rows_at_the_first_seed_and_nothing_twice(tmp_path: Path) -> None:
    task, out = Fake(), tmp_path / "results" / "paper_fake.jsonl"
    assert running.run(EXPERIMENT, task, out, [3], "[sl]*") == 2
    before = out.read_bytes()
    assert running.run(EXPERIMENT, task, out, [3, 1], "[sl]*") == 2
    assert running.run(EXPERIMENT, task, out, [3, 1], "[sl]*") == 0
    assert task.trained == [("small", 3), ("large", 3), ("small", 1), ("large", 1)]
    assert out.read_bytes().startswith(before)
    small, large, *_ = records.read(out)
    assert small["settings"] == {"shared": True, "sizes": [1]}
    assert small["recipe"] == {"lr": 0.5, "sizes": [1, 2]}
    assert (small["dof"], small["virtual_weights"]) == (DOF, 2 * 64 * 64)
    assert (large["dof"], large["virtual_weights"]) == (2 * 64 * 64, None)
    assert {"torch", "commit"} <= set(small["environment"])
    assert small["seconds"] > 0
    assert small["process_seconds"] >= 0


def test_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, out = Fake(), tmp_path / "paper_fake.jsonl"
    assert running.run(EXPERIMENT, task, out, [0], budget=1e-9) == 0
    assert not out.exists()
    assert "the budget of 1e-09 minutes is used up" in capsys.readouterr().out
    assert running.run(EXPERIMENT, task, out, [0], budget=10) == len(EXPERIMENT.rows)


def test_budget_goes_by_the_slowest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("benchmarks.accuracy.jobs.time.perf_counter", lambda: now[0])

    class Slow(Fake):
        def run(self, row: Row, seed: int, on_step: Callable[[], object]) -> Record:
            now[0] += 60 if row.name == "small" else 1
            return super().run(row, seed, on_step)

    task = Slow()
    # 60 + 1 s are over, and a third run might take 60 more.
    assert running.run(EXPERIMENT, task, tmp_path / "f.jsonl", [0], budget=2) == 2


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "paper_fake.jsonl"
    running.run(EXPERIMENT, Fake(), out, [0])
    with pytest.raises(ValueError, match=r"made with recipe \{'lr': 0.5\}, wanted \{'lr': 0.25\}"):
        running.run(EXPERIMENT, Fake(lr=0.25), out, [0])
    with pytest.raises(ValueError, match=r"made with data \{'images': 7\}"):
        running.run(EXPERIMENT, Fake(images=8), out, [0])
    other = replace(EXPERIMENT, rows=(Row("small", {"shared": False}),))
    with pytest.raises(ValueError, match=r"row 'small'.* needs another name"):
        running.run(other, Fake(), out, [1, 0])
    with pytest.raises(ValueError, match="only: got 'nothing', wanted a pattern of: small"):
        running.run(EXPERIMENT, Fake(), out, [0], "nothing")


def test_runs_of_another_experiment_count_where_they_are_the_same(tmp_path: Path) -> None:
    more = replace(EXPERIMENT, name="more", also=("fake",), rows=EXPERIMENT.rows[:2])
    theirs, out = tmp_path / "paper_fake.jsonl", tmp_path / "paper_more.jsonl"
    write(theirs, made_up("small", 0, 1.0), made_up("never", 0, 1.0),
          made_up("large", 0, 1.0, settings={"shared": True}),
          made_up("small", 1, 1.0, recipe={"lr": 9}))  # fmt: skip
    task = Fake()
    assert running.run(more, task, out, [0, 1]) == 3
    assert task.trained == [("large", 0), ("small", 1), ("large", 1)]
    found = running.runs_of(more, out)
    assert [(run["row"], run["seed"]) for run in found] == [*task.trained, ("small", 0)]
    assert found[-1]["borrowed"] == "fake"
    assert "1 further runs were made for fake" in "\n".join(report.provenance(more, found))


def test_costs_are_counted_and_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "ROUNDS", 3)
    record = costs.measure(EXPERIMENT, Fake(), "small")
    assert list(record["rows"]) == ["small", "large"]
    small, large = record["rows"]["small"], record["rows"]["large"]
    for row, numbers in ((small, DOF), (large, 2 * 64 * 64)):
        assert row["parameter_bytes"] == row["gradient_bytes"] == row["optimizer_bytes"]
        assert row["parameter_bytes"] == 4 * numbers
        assert len(row["rounds"]) == 3
        assert row["step_seconds"] == sorted(row["rounds"])[1]
    assert record["recipe"] == {"lr": 0.5, "sizes": [1, 2]}
    assert small["saved_beyond_activations_bytes"] is None


def test_every_function_runs_once_in_each_round() -> None:
    order_: list[int] = []
    steps = [lambda i=i: order_.append(i) for i in range(4)]
    assert [len(of_one) for of_one in costs.in_turn(steps, 5)] == [5] * 4
    assert all(sorted(order_[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 20, 4))


def test_no_row_is_dropped() -> None:
    runs = [made_up("small", s, a) for s, a in enumerate((50.0, 51.0, 52.0))]
    lines = report.results_table(EXPERIMENT, [*runs, made_up("large", 0, None)])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "network", "DoF", "virtual weights", "trainable", "score (%)",
        "paper: score (%), large data", "paper: other data", "error", "seeds",
    ]  # fmt: skip
    assert cells[2:] == [
        ["small", "1,024", "8,192", "9,000", f"51.0 ± {1 / math.sqrt(3):.2f}", "50", "",
         "0.2 ± 0.00", "3"],
        ["large", "8,192", "8,192", "9,000", "not finite", "60", "7", "0.2", "1"],
        ["never", "", "", "", "not run", "", "", "not run", "0"],
        ["theirs", "", "", "", "only in the paper", "55.5", "", "only in the paper", "0"],
    ]  # fmt: skip


def test_order_says_which_pairs_differ() -> None:
    assert order.differs(Estimate(51.0, 0.3, 3), Estimate(50.0, 0.3, 3))
    assert not order.differs(Estimate(50.8, 0.3, 3), Estimate(50.0, 0.3, 3))
    assert not order.differs(Estimate(90.0, None, 1), Estimate(50.0, 0.3, 3))

    def said(large: float) -> str:
        runs = [made_up("small", s, 50.0 + s) for s in (0, 1)]
        runs += [made_up("large", s, large + s) for s in (0, 1)]
        return "\n".join(order.statements(EXPERIMENT, runs))

    assert "- large before small" in said(60.0)
    assert "1 of them are in the same order here." in said(60.0)
    assert "- small before large" in said(40.0)
    assert "0 of them are in the same order here. Of the others these" in said(40.0)
    assert said(40.0).endswith(": small and large.")
    assert "- " not in said(50.5)
    assert "Of the others none differs" in said(49.9)
    lower = replace(EXPERIMENT, metrics=(replace(EXPERIMENT.metrics[0], higher=False),))
    runs = [made_up("small", s, 50.0 + s) for s in (0, 1)]
    runs += [made_up("large", s, 70.0 + s) for s in (0, 1)]
    assert "- small before large" in "\n".join(order.statements(lower, runs))


def test_page_is_made_from_files_and_noticed_when_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawings: list[int] = []

    def pictures(runs: list[Record], folder: Path) -> str:
        drawings.append(len(runs))
        (folder / "seen.png").write_bytes(b"picture")
        return "![What was seen](seen.png)"

    monkeypatch.setattr(costs, "ROUNDS", 1)
    experiment = replace(EXPERIMENT, pictures=pictures)
    results, images = tmp_path / "paper_fake.jsonl", tmp_path / "images"

    def stale(check: bool) -> list[str]:
        made = report.files(experiment, results, tmp_path, images, check)
        report.write(made, check)
        return sorted(path.name for path in made)

    with pytest.raises(ValueError, match="without runs"):
        stale(True)
    write(results, *(made_up("small", s, 50.0 + s) for s in (0, 1)), made_up("large", 0, 70.0))
    assert "paper_fake.md" in stale(True)
    assert not drawings
    assert not images.exists()
    plots = ["paper_fake_dof_dark.svg", "paper_fake_dof_light.svg"]
    assert stale(False) == ["paper_fake.md", *plots]
    assert (stale(True), stale(False), drawings) == ([], [], [3])
    page = (tmp_path / "paper_fake.md").read_text()
    assert page.startswith("# A table: made up\n")
    assert "![What was seen](../images/seen.png)" in page
    assert "3 runs with seeds 0, 1, 4.5 minutes in all (3.0 of the processor)" in page
    # A measurement adds a table and two plots; a run changes everything.
    record = costs.measure(EXPERIMENT, Fake())
    costs.path_of(results).write_text(json.dumps(record))
    assert len(stale(False)) == 1 + 2 * 2
    assert len(drawings) == 1
    write(results, made_up("large", 1, 71.0))
    assert len(stale(True)) == 1 + 3 * 2
    stale(False)
    assert drawings == [3, 4]
    (images / "seen.png").unlink()
    assert stale(True) == ["paper_fake.md"]
    costs.path_of(results).write_text(json.dumps({**record, "recipe": {}}))
    with pytest.raises(ValueError, match="another recipe"):
        stale(True)


def test_costs_stand_beside_the_unshared_row() -> None:
    def row(seconds: float, size: int, saved: int | None) -> dict[str, Any]:
        return {"step_seconds": seconds, "rounds": [seconds] * 3, "state_bytes": size,
                "saved_beyond_activations_bytes": saved}  # fmt: skip

    rows = {"small": row(0.5, 10**6, None), "large": row(2.0, 10**7, 30_000)}
    environment = made_up("small", 0, 1.0)["environment"]
    timed = {"rows": rows, "clock": "process time", "environment": environment}
    cells = [line.strip("| ").split(" | ") for line in report.costs_table(EXPERIMENT, timed)[2:5]]
    assert cells == [
        ["small", "500 ms", "0.25", "1.0 MB", "0.1", "not measured"],
        ["large", "2 s", "1.00", "10.0 MB", "1.00", "0.03 MB"],
        ["never", *["not measured"] * 5],
    ]
    own = replace(EXPERIMENT, rows=(replace(EXPERIMENT.rows[0], unshared="small"),))
    assert "| 500 ms | 1.00 |" in report.costs_table(own, timed)[2]


@pytest.mark.parametrize("name", ["classification", "blocks", "quantisation"])
def test_rows_can_be_built_and_have_the_paper_beside_them(name: str) -> None:
    experiment = running.load(name)
    names = [row.name for row in experiment.rows]
    assert len(set(names)) == len(names)
    assert {row.unshared or experiment.unshared for row in experiment.rows} <= set(names)
    for row in experiment.rows:
        shared = row.settings["kind"] != classification.DENSE
        assert shared == ("dof" in row.settings)
        weights = {18: 11_157_504, 34: 21_258_240}[row.settings["depth"]]
        assert row.settings.get("laps", 1) <= weights / row.settings.get("dof", weights)


@pytest.mark.parametrize("name", ["classification", "blocks", "quantisation"])
def test_tiny_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    rows = [row.name for row in running.load(name).rows]
    out = tmp_path / f"paper_{name}.jsonl"
    for row in rows:
        options = [name, "--size", "tiny", "--seeds", "0", "--only", row, "--out", str(out)]
        assert __main__.main(options) == 0
    runs = records.read(out)
    assert [run["row"] for run in runs] == rows
    for run in runs:
        dof = run["settings"].get("dof")
        ratio = run["virtual_weights"] / run["dof"]
        if dof is None:
            assert ratio == 1
        else:
            wanted = {18: 11_157_504, 34: 21_258_240}[run["settings"]["depth"]] / dof
            assert wanted <= ratio < 1.2 * wanted
        assert 0 <= run["test_accuracy"] <= 100
    capsys.readouterr()
    assert __main__.main([*options, "--list"]) == 0
    assert capsys.readouterr().out.split()[-1] == "done"
    assert __main__.main([*options, "--costs"]) == 0
    timed = costs.read(out)
    assert timed is not None
    assert all(row["saved_beyond_activations_bytes"] >= 0 for row in timed["rows"].values())


def test_committed_pages_are_what_the_files_give() -> None:
    assert __main__.main(["report", "--check"]) == 0


def test_command_line_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["nothing"]) == 1
    assert "name: got 'nothing', wanted one of: blocks, classification" in capsys.readouterr().err
    assert __main__.main(["classification", "--threads", "0"]) == 1
    assert __main__.main(["report", "nothing"]) == 1
