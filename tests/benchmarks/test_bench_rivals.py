"""Suite ``rivals``: every way that can run here is right, what is missing is said; its tables."""

from __future__ import annotations

import math
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import report as pages
from benchmarks.harness import schema as format_
from benchmarks.harness.__main__ import main as harness_main
from benchmarks.harness.cases import Layer
from benchmarks.harness.rivals import flush, points, report, run, schema, tokens, turns, worker
from benchmarks.harness.rivals.contender import ALLOWED, FORWARD, TRAINING, Layers, Problem
from benchmarks.harness.rivals.families import ours
from benchmarks.harness.rivals.points import Point
from benchmarks.harness.rivals.registry import FAMILIES, OURS, Family
from rpg_kernels.models import DecoderConfig

SHAPE = (96, 256)
LAYER = Layer("linear", ("tiny.linear",), SHAPE)
TINY = DecoderConfig(vocabulary=64, width=64, layers=2, heads=2, kv_heads=1, hidden=96)
BANK = 1024
unix = pytest.mark.skipif(sys.platform == "win32", reason="processes inherit a file descriptor")


def problem(copies: int = 2) -> Problem:
    return Problem(SHAPE, (1, 5, 40), 1, copies, seed=3)


def ways(what: str) -> list[Any]:
    return [
        pytest.param(family, way, id=way.name)
        for family in FAMILIES.values()
        if not family.missing()
        for way in family.ways(what, [BANK])
    ]


@pytest.mark.parametrize(("family", "way"), ways(FORWARD))
def test_every_way_gives_what_its_weight_stands_for(family: Family, way: Any) -> None:
    given = problem()
    with torch.no_grad():
        layers: Layers = way.make(given)
        assert layers.count == layers.lead + 2
        for batch in given.x:
            for i in (0, layers.lead, layers.count - 1) if not way.ours else (0,):
                error = given.error(layers.call(i, batch), batch, layers.exact)
                assert 0 < error <= ALLOWED[way.kind], (i, batch)
    numbers = math.prod(SHAPE)
    assert layers.parameters == (BANK if way.ours else numbers)
    least = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5}[way.kind]
    assert least * layers.parameters <= layers.nbytes <= 1.2 * least * layers.parameters


@pytest.mark.parametrize(("family", "way"), ways(TRAINING))
def test_training_is_judged_with_all_its_gradients(family: Family, way: Any) -> None:
    layers: Layers = way.make(problem())
    assert layers.check is not None
    assert all(0 < layers.check(batch) <= ALLOWED[way.kind] for batch in (1, 40))
    y, dx, *gradients = layers.call(0, 5)
    assert (y.shape, dx.shape) == ((5, SHAPE[0]), (5, SHAPE[1]))
    assert sum(g.numel() for g in gradients) == layers.parameters


def test_an_error_is_that_of_the_checked_rows() -> None:
    given = problem()
    exact = given.x[40].double() @ given.weight.double().t()
    assert given.error(exact, 40) < 1e-12
    assert given.error(exact[:5], 5) < 1e-12
    assert given.error(1.5 * exact, 40) == pytest.approx(0.5)
    exact[39] = 0  # the last row is checked
    assert given.error(exact, 40) > 0.1
    exact[3, 2] = float("nan")
    assert given.error(exact, 40) == math.inf
    assert given.error(exact[:, 1:], 40) == math.inf


def test_four_bits_hold_the_extreme_value_of_a_group() -> None:
    given = problem()
    q, scale = given.int4
    back = q.view(SHAPE[0], -1, given.group) * scale[..., None]
    parts = given.weight.view(SHAPE[0], -1, given.group)
    at = parts.abs().argmax(-1, keepdim=True)
    assert torch.allclose(back.gather(-1, at), parts.gather(-1, at))
    low, high = given.nibbles & 15, given.nibbles >> 4
    assert torch.equal(torch.stack((low, high), -1).flatten(1).char() - 8, q)


def test_layers_that_lead_read_the_whole_bank() -> None:
    given = problem()
    (four, _) = (way for way in FAMILIES[OURS].ways(FORWARD, [30_000]) if "bf16" in way.name)
    layers = four.make(given)
    assert layers.lead == math.ceil(30_000 / (math.prod(SHAPE) / 4)) > 1
    assert layers.count == layers.lead + 2


def test_banks_of_int8_are_there_when_the_package_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def quantize(model: torch.nn.Module, to: str, *, activations: str) -> torch.nn.Module:
        asked.append((to, activations))
        return model

    monkeypatch.setattr(ours.rpg, "quantize", quantize, raising=False)
    made = FAMILIES[OURS].ways(FORWARD, [2_000_000])
    assert len({way.name for way in made}) == len(made) == 3 * 3
    assert {way.kind for way in made} == {"bf16", "int8"}
    stored, rounded = FAMILIES[OURS].ways(FORWARD, [BANK])[2::2]
    for way in (stored, rounded):
        way.make(problem())
    assert asked == [("int8", "kept"), ("int8", "int8")]
    monkeypatch.delattr(ours.rpg, "quantize")
    assert {way.kind for way in FAMILIES[OURS].ways(FORWARD)} == {"bf16"}


def test_names_are_unique() -> None:
    names = [p.values[1].name for what in (FORWARD, TRAINING) for p in ways(what)]
    assert len(set(names)) == len(names)


@unix
def test_a_flush_reads_all_of_its_memory() -> None:
    handle = flush.shared(3 << 20)
    try:
        for threads in (1, 2):
            memory = flush.Flush(handle, threads)
            memory()
            assert memory.nbytes == 3 << 20
            assert int(memory._words.view(torch.uint8).sum()) == 3 << 20
            del memory
    finally:
        os.close(handle)


def measured(tmp_path: Path, **options: Any) -> dict[str, Any]:
    chosen = [Point(LAYER, FORWARD, batch) for batch in (1, 3)]
    settings: dict[str, Any] = {
        "families": [OURS, "torch", "absent"], "dofs": [BANK], "threads": 1, "seconds": 0.0,
        "flush_bytes": 1 << 20, "show": lambda line: None, "out": tmp_path / "rivals.json",
    }  # fmt: skip
    settings |= options
    return run.run(chosen, settings.pop("decoder", TINY), **settings)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose package nobody has, a small decoder, and a rate of memory that is given."""
    monkeypatch.setattr(tokens, "BANKS", (ours.Bank(BANK, 4),))
    monkeypatch.setattr(tokens, "ALLOWED", dict.fromkeys(tokens.ALLOWED, 1e9))
    memory = [run.Level("memory", 0, 1e10, 1e10)]
    monkeypatch.setattr(run.bandwidth, "measure", lambda threads: memory)
    needs = {"no-such-package": "rpg_no_such_package"}
    monkeypatch.setitem(FAMILIES, "absent", Family("absent", "nowhere", needs))
    monkeypatch.setattr(run, "TOKENS", 4)
    monkeypatch.setattr(run, "SERIES", 2)
    monkeypatch.setattr(turns, "MIN_ROUNDS", 3)
    monkeypatch.setattr(run.rounds, "QUIET", 1e9)


@unix
def test_a_run_has_all_ways_and_says_what_is_missing(tmp_path: Path, absent: None) -> None:
    record = measured(tmp_path)
    assert record["complete"]
    assert record == run.load(tmp_path / "rivals.json")
    wanted = [way.name for name in (OURS, "torch") for way in FAMILIES[name].ways(FORWARD, [BANK])]
    for batch in (1, 3):
        rows = [row for row in record["results"] if row["batch"] == batch]
        assert [row["name"] for row in rows] == wanted
        assert all(row["reason"] or len(row["following"]) >= 2 for row in rows)
        assert all(row["status"] == "ok" for row in rows if row["ours"])
    assert record["skipped"] == {
        "absent": "absent was skipped: no-such-package is not installed (extra `rivals`)."
    }
    (row, *_) = record["tokens"]
    assert (row["name"], len(row["ours_s"]), len(row["roof_s"])) == ("4 laps, 1024, bf16", 2, 2)
    assert record["model"]["roof_bytes"] == round(record["model"]["virtual_weights"] * 4.25 / 8)
    assert run.wrong(record) == []


@unix
def test_a_run_goes_on_and_measures_again_what_was_disturbed(
    tmp_path: Path, absent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    options: dict[str, Any] = {"decoder": None, "families": [OURS], "show": lines.append}
    monkeypatch.setattr(run, "ratio", lambda rival, own: run.Ratio(1.0, 2.0, 9.0, 3))
    monkeypatch.setattr(run, "fastest", lambda rows: rows[0])
    monkeypatch.setattr(run.rounds, "QUIET", 0.1)
    record = measured(tmp_path, **options)
    assert set(record["disturbed"]) == set(record["options"]["points"])
    monkeypatch.setattr(run.rounds, "QUIET", 1e9)
    record = measured(tmp_path, **options)
    assert record["disturbed"] == {}
    assert len(lines) == 2 * 4  # twice a process was started, had its ways, measured two points
    assert measured(tmp_path, **options)["results"] == record["results"]
    assert lines[8:] == [f"continues {tmp_path / 'rivals.json'}, which has 2 of 2 points"]
    assert run._same(record, record) is record
    assert run._same(record, record | {"versions": {"another": "1"}}) is None
    assert run._same(record, record | {"options": record["options"] | {"dofs": []}}) is None


@unix
def test_a_process_that_ends_is_told_of() -> None:
    handle = flush.shared(1 << 20)
    orders = worker.Orders(OURS, FORWARD, SHAPE, (1,), (BANK,), 1, 2, 0, handle)
    process = turns.Process(orders)
    try:
        made, why = process.prepared()
        assert (len(made), why) == (2 * len(ours.values()), "")
        assert "reason" in process.ask("turn", "no such way", 1)
        assert set(process.ask("turn", made[0]["name"], 1)) == set(turns.STATES)
        process._process.kill()
        assert "ended with -9" in process.ask("turn", made[0]["name"], 1)["reason"]
    finally:
        process.end()
        os.close(handle)


class Scripted:
    """A process that takes as long as it is told."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.asked = seconds, list[str]()

    def ask(self, do: str, name: str, batch: int) -> dict[str, Any]:
        self.asked.append(name)
        if self.seconds[name] < 0:
            return {"reason": "broken"}
        return dict.fromkeys(turns.STATES, self.seconds[name])


def test_rivals_far_behind_are_left_and_ours_never() -> None:
    process = Scripted({"fast": 1.0, "slow": 3.0, "other": 9.0, "ours": 9.0, "bad": -1.0})
    kinds = {"fast": "int8", "slow": "int8", "other": "int4", "ours": "int8", "bad": "int4"}
    asked: Any = [
        (process, {"name": name, "kind": kind, "ours": name == "ours"})
        for name, kind in kinds.items()
    ]
    samples, failed = turns.take(asked, 1, 0.0, random.Random(0))
    rounds = {name: len(of["following"]) for name, of in samples.items()}
    assert rounds == {"fast": 5, "slow": 2, "other": 5, "ours": 5, "bad": 0}
    assert failed == {"bad": "broken"}


def row(name: str, batch: int, seconds: list[float], kind: str, **fields: Any) -> dict[str, Any]:
    return {
        "point": f"p{batch}", "layer": "llama-3-8b.gate_proj", "weight_shape": [14336, 4096],
        "what": FORWARD, "batch": batch, "family": "f", "name": name, "kind": kind, "ours": False,
        "status": "ok", "reason": None, "error": 0.1, "allowed": 0.2, "parameters": 10,
        "nbytes": 10, "resident": 10, "flushed": seconds, "following": seconds,
    } | fields  # fmt: skip


def written(tmp_path: Path, absent: None) -> dict[str, Any]:
    record = measured(tmp_path, families=[OURS, "absent"])
    record["rates"] = [{"level": "memory", "capacity": 0, "read_bytes_per_s": 31.195136e9,
                        "update_bytes_per_s": 1.0}]  # fmt: skip
    record["results"] = [
        row("rival", 1, [2e-3, 2e-3, 2e-3], "int4"),
        row("rival", 32, [4e-3, 4e-3, 4e-3], "int8"),
        row("left", 1, [1e-3], "int8"),
        row("broken", 1, [], "int4", status="failed", reason="why", error=None),
        row("4 laps, 2M, int8 bank", 1, [1e-3, 1e-3, 1e-3], "int8", ours=True),
        row("16 laps, 2M, int8 bank", 1, [2e-3, 2e-3, 2e-3], "int8", ours=True),
        row("4 laps, 2M, int8 bank", 32, [8e-3, 8e-3, 8e-3], "int8", ours=True),
    ]
    return format_.validate(record, schema.FILE)


@unix
def test_tables_show_losses_and_what_was_left_out(tmp_path: Path, absent: None) -> None:
    record = written(tmp_path, absent)
    aims = [line.split(" | ") for line in report.aims(record)[2:]]
    verdicts = {cells[0].removeprefix("| "): cells[-1].removesuffix(" |") for cells in aims}
    assert verdicts["4 laps, 2M, int8 bank, batch 1"] == "2.0x, reached"
    assert verdicts["16 laps, 2M, int8 bank, batch 1"] == "0.50x, missed"
    assert verdicts["4 laps, 2M, int8 bank, batch 32"] == "0.50x, missed"
    assert verdicts["4 laps, 2M, int8 bank, batch 512"] == "not measured"
    text = "\n".join(report.tables_of(tmp_path / "rivals.json", record))
    for words in (
        "| fastest rival | rival | rival |",
        "| 4 laps, 2M, int8 bank | 2.0x | 0.50x |",
        "absent was skipped: no-such-package is not installed",
        "Not timed: broken: failed, why.",
        "| **4 laps, 2M, int8 bank** |",
    ):
        assert words in text
    assert "| broken |" not in text


def test_pages_know_the_tables(tmp_path: Path) -> None:
    for name in report.TABLES:
        assert report.TABLES[name](tmp_path) == ["not measured"]
        assert name in pages.BLOCKS


@pytest.mark.parametrize(
    ("patterns", "batches", "found", "decoder"),
    [
        ([], [], 18, True),
        (["decoder"], [], 0, True),
        (["training"], [], 6, False),
        (["llama-3-8b.q"], [1, 512], 2, False),
    ],
)
def test_a_part_of_the_suite(
    patterns: list[str], batches: list[int], found: int, decoder: bool
) -> None:
    chosen, tokens_too = points.choose(patterns, batches)
    assert (len(chosen), tokens_too) == (found, decoder)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--case", "nothing"], "case"),
        (["--impl", "nothing"], "impl"),
        (["--dtype", "bf16"], "dtype"),
        (["--device", "cuda"], "device"),
    ],
)
def test_refusals(options: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert harness_main(["--suite", "rivals", "--threads", "1", *options]) == 1
    assert word in capsys.readouterr().err
