"""The paper's table of fine-grained pruning: its rows, and what a run of them is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.utils import prune

from benchmarks.accuracy import records
from benchmarks.paper import __main__, costs, pruning, running
from benchmarks.paper.experiment import Row

RECIPE = pruning.RECIPES["tiny"]


def row(name: str) -> Row:
    return next(row for row in pruning.ROWS if row.name == f"ResNet-18, {name}")


def test_rows_are_at_the_same_numbers_of_elements() -> None:
    names = [row.name for row in pruning.ROWS]
    assert len(set(names)) == len(names)
    assert set(pruning.PAPER) <= set(names)
    for each in pruning.ROWS:
        kept = each.settings.get("kept", ())
        assert list(kept) == sorted(kept, reverse=True)
        if each.settings.get("by") == pruning.SLOT:
            assert all(count % 64 == 0 for count in kept)


def test_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(costs, "ROUNDS", 1)
    out = tmp_path / "paper_pruning.jsonl"
    options = ["pruning", "--size", "tiny", "--seeds", "0", "--out", str(out)]
    assert __main__.main(options) == 0
    runs = {run["row"]: run for run in records.read(out)}
    assert list(runs) == [row.name for row in pruning.ROWS]
    weights, rest = 11_157_504 // 64, {run["trainable"] - run["dof"] for run in runs.values()}
    assert len(rest) == 1  # norms, stem and classifier, which nothing prunes
    for run in runs.values():
        settings = run["settings"]
        slots = settings.get("by") == pruning.SLOT
        wanted = settings.get("kept", [settings.get("dof", 11_157_504)])[-1] * 8 * 8 // 64**2
        # Slots are counted whole; a bank is rounded down to them.
        assert abs(run["dof"] - wanted) < (64 if slots or "kept" not in settings else 1)
        assert abs(run["virtual_weights"] - weights) < 1000
        assert 0 <= run["test_accuracy"] <= 100
    # A row alone is what it is after those that it goes on from.
    name = row("RPG 274K, to 55K by slot in 2 rounds").name
    alone = tmp_path / "alone" / "paper_pruning.jsonl"
    assert __main__.main([*options[:-1], str(alone), "--only", name]) == 0
    (again,) = records.read(alone)
    for key in ("dof", "test_accuracy", "training_loss"):
        assert again[key] == runs[name][key]
    assert __main__.main([*options[:-1], str(alone), "--only", name, "--costs"]) == 0
    timed = costs.read(alone)
    assert timed is not None
    assert set(timed["rows"]) == {name, pruning.NAMES[pruning.DENSE]}


def test_a_round_prunes_what_the_training_before_it_found() -> None:
    """And trains from the early state: here again by hand, for one row."""
    pytest.importorskip("sklearn")
    task, found = pruning.Pruning(RECIPE, None), row("dense, to 274K by element in 3 rounds")
    record = task.run(found, 0, lambda: None)
    model, key = task._trained[(pruning.ELEMENT, *found.settings["kept"])][0], "layer1.0.conv1"
    before = task._trained[(pruning.ELEMENT, *found.settings["kept"][:-1])][0]
    parameters = pruning._parameters(before)
    values = torch.cat([(m.weight_orig * m.weight_mask).abs().flatten() for m, _ in parameters])
    least = values.sort(descending=True).values[record["dof"] - 1]
    layer = before.get_submodule(key)
    wanted = (layer.weight_orig * layer.weight_mask).abs() >= least
    assert torch.equal(model.get_submodule(key).weight_mask.bool(), wanted)
    assert prune.is_pruned(model)


def test_a_fresh_network_is_pruned_as_far_as_its_row() -> None:
    pytest.importorskip("sklearn")
    task = running.load("pruning").task("tiny", None)
    for name in ("RPG 274K, to 27K by slot in 3 rounds", "dense, to 27K by element in 6 rounds"):
        model = task.build(row(name), 0)
        assert 428 <= pruning._left(model) < 428 + 64
