"""The accuracy experiments: maps, networks, a results file that survives, tables and plots."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rpg_kernels as rpg
from benchmarks.accuracy import __main__, network, records, report, running, steps, summary
from benchmarks.accuracy.maps import MAPS, Ring
from benchmarks.accuracy.network import NETWORKS, Network, TableConv2d, build
from benchmarks.accuracy.rows import DECIDING, ROWS, TIERS, Row, plan
from benchmarks.accuracy.training import Recipe
from examples.demo import data, train
from examples.demo.data import Images
from examples.demo.networks import Architecture
from examples.demo.train import Pixels
from rpg_kernels.models.resnet import share_blocks

SHAPES = ((24, 16, 3, 3), (32, 16, 1, 1), (40, 24, 3, 3), (16, 1, 3, 3))
RECIPE = Recipe(network="tiny", images=None, epochs=2, batch_size=16, bfloat16=False)
TINY = ("rpg 17x g1 element", "narrow 17x")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "tiny", Network(Architecture((1, 1), 16, ()), stride=2))


@pytest.fixture
def pixels() -> Pixels:
    """Two kinds of images that differ in brightness."""
    labels = torch.arange(48) % 2
    values = torch.randint(0, 100, (48, 1, 16, 16)) + 120 * labels[:, None, None, None]
    images = Images("stripes", values.to(torch.uint8), labels, values[:20].byte(), labels[:20],
                    ("dark", "light"))  # fmt: skip
    return Pixels(images, torch.device("cpu"))


def runs(*seeds: int) -> list[tuple[Row, int]]:
    return [(ROWS[name], seed) for seed in seeds for name in TINY]


@pytest.mark.parametrize("granularity", [1, 8, 64])
@pytest.mark.parametrize("reflect", ["element", "vector", "none"])
def test_law_map_is_that_of_virtual_weights(granularity: int, reflect: str) -> None:
    row = Row("x", granularity=granularity, reflect=reflect)
    ring = Ring(row, dof=1920, seed=5)
    bank = rpg.ParameterBank(1920, granularity, reflect, seed=5)
    start = 0
    for layer, shape in enumerate(SHAPES):
        weight = bank.place(shape)
        entries = MAPS["law"](ring, shape, layer, start)
        start = entries.end
        read = bank.weight.flatten()[entries.index] * entries.sign
        assert torch.equal(read, weight.unpack())
        assert entries.sign.abs().eq(1).all()


@pytest.mark.parametrize("name", ["rpg 17x g1 element", "rpg 4x g64 vector"])
def test_network_computes_what_the_package_does(name: str) -> None:
    row = ROWS[name]
    built = build(row, "small", 3, 10, seed=3)
    theirs = NETWORKS["small"].dense(64, 3, 10)
    config = rpg.RPGConfig(built.dof, row.granularity, row.reflect, seed=3)
    share_blocks(theirs, config)
    own = {k: v for k, v in built.model.state_dict().items() if ".index" not in k}
    own = {k: v for k, v in own.items() if ".factor" not in k and "rpg_bank" not in k}
    theirs.load_state_dict(own, strict=False)
    with torch.no_grad():
        theirs.rpg_bank.weight.copy_(built.model.rpg_bank.weight.view_as(theirs.rpg_bank.weight))
    x = torch.randn(4, 3, 16, 16)
    for model in (built.model, theirs):
        model(x).square().sum().backward()
    torch.testing.assert_close(built.model.eval()(x), theirs.eval()(x))
    ours, other = (m.rpg_bank.weight.grad.flatten() for m in (built.model, theirs))
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert rpg.summary(theirs).virtual_weights == built.virtual_weights == 1_220_608


def test_table_convolution_has_the_map_as_its_weight() -> None:
    bank = rpg.ParameterBank(64, granularity=1)
    like = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
    entries = MAPS["hashed"](Ring(ROWS["hashed 17x"], 64, 0), (6, 4, 3, 3), 0, 0)
    layer = TableConv2d(like, bank, entries, 0.5)
    wanted = bank.weight.flatten()[entries.index] * entries.sign * 0.5
    assert torch.equal(layer.weight(), wanted)
    x = torch.randn(2, 4, 9, 9)
    expected = torch.nn.functional.conv2d(x, wanted, None, 2, 1)
    torch.testing.assert_close(layer(x), expected)
    gradient = torch.autograd.grad(layer(x).sum(), bank.weight)[0]
    other = torch.autograd.grad(expected.sum(), bank.weight)[0]
    torch.testing.assert_close(gradient, other)


def test_hashed_uses_are_independent() -> None:
    dof, shape = 512, (64, 64, 3, 3)
    entries = MAPS["hashed"](Ring(ROWS["hashed 17x"], dof, 1), shape, 2, 0)
    uses = torch.bincount(entries.index.flatten(), minlength=dof).double()
    # Poisson: the variance is the mean. An even map has none.
    assert uses.sum() == math.prod(shape)
    ratio = float(uses.var() / uses.mean())
    assert abs(ratio - 1) < 5 * math.sqrt(2 / dof)
    assert abs(float(entries.sign.mean())) < 5 / math.sqrt(math.prod(shape))
    agree = (entries.index.flatten()[1:] == entries.index.flatten()[:-1]).double().sum()
    expected = math.prod(shape) / dof
    assert abs(float(agree) - expected) < 5 * math.sqrt(expected)
    law = MAPS["law"](Ring(ROWS["rpg 17x g1 element"], dof, 1), shape, 0, 0)
    assert torch.bincount(law.index.flatten(), minlength=dof).unique().tolist() == [72]


def test_unsigned_has_no_signs_and_hashed_has_them() -> None:
    made = {n: MAPS[n](Ring(ROWS[f"{n} 17x"], 64, 0), (9, 8), 0, 7) for n in ("hashed", "unsigned")}
    assert made["unsigned"].sign.eq(1).all()
    assert Counter(made["hashed"].sign.flatten().tolist()).keys() == {1.0, -1.0}
    assert {entries.end for entries in made.values()} == {7 + 72}


@pytest.mark.parametrize("name", ["law", "hashed", "unsigned"])
def test_maps_follow_seed_and_layer(name: str) -> None:
    def index(seed: int, layer: int) -> list[int]:
        ring = Ring(Row("x", name, granularity=1), 256, seed)
        return MAPS[name](ring, (32, 8), layer, 0).index.flatten().tolist()

    assert index(0, 0) == index(0, 0)
    assert index(0, 0) != index(1, 0)
    assert index(0, 0) != index(0, 1)


def test_rows() -> None:
    assert {row.name for row in DECIDING} <= set(ROWS)
    design = [r for r in ROWS if r.startswith(("rpg 17x g", "rpg 4x g")) and "," not in r]
    assert len(design) == 2 * (5 * 3 - 1)
    order = plan([0, 1])
    first = len(TIERS[0])
    assert [(row.name, seed) for row, seed in order[: 2 * first]] == [
        (row.name, seed) for seed in (0, 1) for row in TIERS[0]
    ]
    assert len(set(order)) == len(order) == 2 * len(ROWS)
    assert {row.name for row, _ in plan([0], "hashed*")} == {"hashed 17x", "hashed 4x"}
    with pytest.raises(ValueError, match=r"only: got 'nothing'"):
        plan([0], "nothing")
    assert ROWS["rpg 4x g64 vector"].settings() == {"map": "law", "compression": 4}


def test_sizes_of_rows() -> None:
    def size(name: str) -> network.Built:
        with torch.device("cpu"):
            return build(ROWS[name], "small", 3, 10, seed=0)

    ours, narrow, hashed, dense = map(size, ("rpg 17x g128 vector", "narrow 17x", "hashed 17x",
                                             "dense"))  # fmt: skip
    assert ours.dof == hashed.dof == 71_680
    assert ours.trainable == hashed.trainable
    assert 0.9 * ours.trainable < narrow.trainable <= ours.trainable
    assert dense.dof == dense.virtual_weights == ours.virtual_weights
    # What is not shared starts alike.
    assert torch.equal(ours.model.conv1.weight, hashed.model.conv1.weight)
    assert torch.equal(ours.model.fc.weight, dense.model.fc.weight)
    assert torch.equal(ours.model.rpg_bank.weight, hashed.model.rpg_bank.weight)


def test_runs_are_recorded_and_not_repeated(tmp_path: Path, pixels: Pixels) -> None:
    out = tmp_path / "results" / "a.jsonl"
    assert running.run(runs(0), RECIPE, pixels, out) == 2
    before = out.read_bytes()
    assert running.run(runs(0), RECIPE, pixels, out) == 0
    assert out.read_bytes() == before
    assert running.run(runs(0, 1)[:3], RECIPE, pixels, out) == 1
    assert out.read_bytes().startswith(before)
    first, second, third = records.read(out)
    assert [(r["row"], r["seed"]) for r in (first, second, third)] == [
        (TINY[0], 0), (TINY[1], 0), (TINY[0], 1),
    ]  # fmt: skip
    assert first["settings"] == {
        "map": "law", "compression": 17, "granularity": 1, "reflect": "element",
    }  # fmt: skip
    assert len(first["accuracy_by_epoch"]) == len(first["loss_by_epoch"]) == RECIPE.epochs
    assert first["accuracy_by_epoch"][-1] == first["test_accuracy"]
    assert first["training_loss"] == first["loss_by_epoch"][-1]
    assert first["dof"] == network.degrees_of_freedom(ROWS[TINY[0]], first["virtual_weights"])
    assert first["data"] == {"name": "stripes", "train_images": 48, "test_images": 20}
    assert first["recipe"]["lr"] == first["lr"] == first["bank_lr"] == 0.2
    assert {"torch", "python", "commit", "rpg_kernels", "threads"} <= set(first["environment"])
    assert first["seconds"] > 0


def test_a_run_is_repeatable(tmp_path: Path, pixels: Pixels) -> None:
    found = []
    for name in ("a", "b"):
        running.run(runs(0), RECIPE, pixels, tmp_path / name)
        found.append([r["loss_by_epoch"] for r in records.read(tmp_path / name)])
    assert found[0] == found[1]


def test_a_killed_write_leaves_no_run(tmp_path: Path, pixels: Pixels) -> None:
    out = tmp_path / "a.jsonl"
    running.run(runs(0), RECIPE, pixels, out)
    first, second, _ = out.read_bytes().split(b"\n")
    out.write_bytes(first + b"\n" + second[: len(second) // 2])
    assert [r["row"] for r in records.read(out)] == [TINY[0]]
    assert running.run(runs(0), RECIPE, pixels, out) == 1
    assert [r["row"] for r in records.read(out)] == list(TINY)
    assert out.read_bytes().startswith(first + b"\n{")


def test_a_run_that_is_interrupted_leaves_nothing(
    tmp_path: Path, pixels: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.jsonl"
    running.run(runs(0)[:1], RECIPE, pixels, out)
    before = out.read_bytes()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.demo.train.right", stop)
    with pytest.raises(KeyboardInterrupt):
        running.run(runs(0), RECIPE, pixels, out)
    assert out.read_bytes() == before


def test_budget(tmp_path: Path, pixels: Pixels, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.jsonl"
    assert running.run(runs(0, 1), RECIPE, pixels, out, budget=1e-9) == 0
    assert not out.exists()
    assert running.run(runs(0), RECIPE, pixels, out, budget=10) == 2
    assert "the budget of 1e-09 minutes is used up" in capsys.readouterr().out


def test_what_does_not_belong_together_is_refused(tmp_path: Path, pixels: Pixels) -> None:
    out = tmp_path / "a.jsonl"
    running.run(runs(0)[:1], RECIPE, pixels, out)
    with pytest.raises(ValueError, match=r"out: got .* made with recipe \{'epochs': 2\}"):
        running.run(runs(0), replace(RECIPE, epochs=3), pixels, out)
    other = [(replace(ROWS[TINY[0]], granularity=8), 0)]
    with pytest.raises(ValueError, match="needs another name"):
        running.run(other, RECIPE, pixels, out)
    with out.open("a") as file:
        file.write('{"row": 1}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2: got .* wanted a run"):
        records.read(out)


def made_up(row: str, seed: int, accuracy: float, **changed: Any) -> dict[str, Any]:
    return {
        "row": row,
        "seed": seed,
        "settings": ROWS[row].settings(),
        "dof": round(2**20 / ROWS[row].compression),
        "test_accuracy": accuracy,
        "accuracy_by_epoch": [accuracy / 2, accuracy],
        "epoch_test_images": 10,
        "training_loss": 0.5,
        "data": {"name": "made up", "train_images": 9, "test_images": 5},
        "recipe": vars(Recipe()),
        "environment": {"device_name": "nothing", "threads": 1, "torch": "0"},
        **changed,
    }


def test_table_says_how_sure_it_is() -> None:
    element = [made_up("rpg 17x g1 element", s, a) for s, a in enumerate((68.0, 69.0, 70.0))]
    vector = [made_up("rpg 17x g64 vector", s, a) for s, a in enumerate((68.5, 69.5))]
    lines = report.tables([*element, *vector, made_up("dense", 0, 72.0, training_loss=None)])
    table = [line for line in lines if line.startswith("| ")]
    assert "| rpg 17x g1 element | 61,681 | 69.00 ± 0.58 | 3 |  | 0.500 |" in table
    assert (
        "| rpg 17x g64 vector | 61,681 | 69.00 ± 0.50 | 2, too few | +0.50 ± 0.00 | 0.500 |"
        in table
    )
    assert "| dense | 1,048,576 | 72.00 | 1, too few |  | not finite |" in table
    assert "| 1 | 69.00 ± 0.58 (n = 3) | as element | not measured |" in table
    assert "| 64 | not measured | 69.00 ± 0.50 (n = 2) | not measured |" in table
    assert lines[-1].startswith("Power law: not measured")
    assert "pooled over all rows, is 0.91 points (3 degrees" in "\n".join(lines)


def test_power_law_is_found() -> None:
    def accuracy(compression: float) -> float:
        return 100 - 400 * (2**20 / compression) ** -0.2

    rows = [f"rpg {c}x g64 vector" for c in (27, 17, 8, 4)]
    made = [made_up(r, 0, accuracy(round(ROWS[r].compression))) for r in rows]
    law = summary.power_law(summary.sweep(summary.summaries(made)))
    assert law is not None
    assert law.exponent == pytest.approx(-0.2, abs=1e-4)
    assert law.factor == pytest.approx(400, rel=1e-3)
    assert law.determination == pytest.approx(1)
    assert "fewer than 3 seeds: rpg 27x" in report.tables(made)[-1]


def test_plots_are_drawn_from_what_there_is() -> None:
    made = [made_up(name, s, 60 + i + s) for i, name in enumerate(ROWS) for s in (0, 1)
            if not ROWS[name].name.startswith("rpg 2x")]  # fmt: skip
    drawn = report.plots(made, "a")
    names = ("dof", "curves", "design_17x", "design_4x")
    assert set(drawn) == {f"a_{n}_{t}.svg" for n in names for t in ("light", "dark")}
    sweep = drawn["a_dof_light.svg"][0].series[0]
    assert [point.x for point in sweep.points] == sorted(point.x for point in sweep.points)
    assert all(p.low < p.y < p.high for p in sweep.points)
    assert set(report.plots(made[:1], "a")) == {
        f"a_{n}_{t}.svg" for n in ("dof", "curves", "design_17x") for t in ("light", "dark")
    }


def test_steps_are_timed_and_drawn_against_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(train, "STEP_ROUNDS", 1)
    results = tmp_path / "d.jsonl"
    recipe = Recipe(images=40, batch_size=8, bfloat16=False, augment=False)
    pixels = Pixels(data.load(None, 40, 10), torch.device("cpu"))
    record = steps.measure(recipe, pixels)
    steps.path_of(results).write_text(json.dumps(record))
    assert steps.read(results) == record
    assert steps.read(tmp_path / "other.jsonl") is None
    assert record["steps_of_epoch"] == 5
    networks = record["networks"]
    assert [row["row"] for row in networks.values()] == [one.row for one in steps.TIMED]
    size = {row["row"]: row["state_bytes"] for row in networks.values()}
    four, seventeen = size["rpg 4x g64 vector, 4 laps"], size["rpg 17x g64 vector, 4 laps"]
    assert seventeen < four < size["dense"] < size["rpg 4x g1 element"]
    assert all(row["step_seconds"] > 0 for row in networks.values())
    made = [made_up(one.row, s, 60.0 + s) for one in steps.TIMED[:3] for s in (0, 1)]
    drawn = report.plots(made, "a", record)
    assert set(drawn) == {"a_seconds_light.svg", "a_seconds_dark.svg"}
    chart = drawn["a_seconds_light.svg"][0]
    assert [one.line for one in chart.series] == ["dashed", "dashed", "solid"]
    dense = next(iter(networks.values()))
    assert chart.series[0].points[0].x == pytest.approx(5 * dense["step_seconds"])
    assert f"{dense['state_bytes'] / 1e6:.1f} MB" in chart.series[0].label


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "d.jsonl"
    options = ["run", "--network", "tiny", "--images", "64", "--test-images", "30", "--epochs",
               "1", "--seeds", "0", "--only", "narrow 17x", "--out", str(out)]  # fmt: skip
    assert __main__.main(options) == 0
    assert records.read(out)[0]["data"]["name"].startswith("digits")
    assert not json.loads(out.read_text())["recipe"]["augment"]
    capsys.readouterr()
    assert __main__.main([*options, "--list"]) == 0
    assert capsys.readouterr().out.split() == ["narrow", "17x", "seed", "0", "done"]
    assert __main__.main([*options, "--epochs", "0"]) == 1
    assert "epochs: got 0, wanted at least 1" in capsys.readouterr().err
    given = ["report", "--results", str(out), "--images", str(tmp_path / "images")]
    assert __main__.main([*given, "--check"]) == 1
    assert not out.with_suffix(".md").exists()
    assert __main__.main(given) == 0
    assert "narrow 17x" in out.with_suffix(".md").read_text()
    assert __main__.main([*given, "--check"]) == 0
    assert __main__.main(["report", "--results", str(tmp_path / "none")]) == 1
    assert "without runs" in capsys.readouterr().err
