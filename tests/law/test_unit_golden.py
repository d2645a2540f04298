"""Golden vectors of the unit law, against the package and the second implementation.

What a position reads is fixed by ``tests/golden/law3.json``, which is never edited.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import unit_brute
from ring_brute import key

from rpg_kernels.law.unit import MAX_UNIT, UNIT_LAW, UnitLaw

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "tests" / "golden" / "law3.json").read_text())
POINTS = {name: entry for name, entry in RECORD["entries"].items() if "points" in entry}
WHOLE = {name: entry for name, entry in RECORD["entries"].items() if "points" not in entry}


@pytest.mark.parametrize("name", POINTS)
def test_golden_points(name: str) -> None:
    entry = POINTS[name]
    c = UnitLaw(**entry["config"])
    assert c.start % c.laps == 0
    assert [key(c.seed, c.layer, 0, number) for number in (0, 1)] == entry["keys"]
    assert [key(c.seed, c.layer, 0, number) for number in (128, 129)] == entry["sign keys"]
    assert unit_brute.locate(c, 0, 0).groups.groups == entry["groups"]
    n, b = torch.tensor(entry["points"]).unbind(1)
    assert c.slot(n, b).tolist() == entry["slots"]
    assert [unit_brute.reads(c, *nb) for nb in entry["points"]] == entry["slots"]
    assert [unit_brute.use(c, *nb) for nb in entry["points"]] == entry["uses"]
    if c.reflect == "none":
        assert not c.negative(n, b).any()
        return
    assert c.sign_words(n, b).tolist() == entry["sign words"]
    for nb, words in zip(entry["points"], entry["sign words"], strict=True):
        assert words == [unit_brute.sign_word(c, *nb, number) for number in range(len(words))]
    for nb, row, bits in zip(
        entry["points"], c.negative(n, b).tolist(), entry["negative"], strict=True
    ):
        assert [int(bits, 16) >> e & 1 for e in range(c.granularity)] == row
        for e in {0, 1, c.granularity // 3, c.granularity - 1} & set(range(c.granularity)):
            assert row[e] == unit_brute.negative(c, *nb, e)


@pytest.mark.parametrize("name", WHOLE)
def test_golden_checksums(name: str) -> None:
    entry = WHOLE[name]
    c = UnitLaw(**entry["config"])
    n, b = torch.arange(c.rows)[:, None], torch.arange(c.blocks)
    slots = c.slot(n, b).numpy().astype("<i4").tobytes()
    words = c.sign_words(n, b).numpy().astype("<u4").tobytes()
    assert hashlib.sha256(slots).hexdigest() == entry["slots sha256"]
    assert hashlib.sha256(words).hexdigest() == entry["sign words sha256"]


def test_golden_vectors_cover_the_law() -> None:
    assert RECORD["law"] == UNIT_LAW
    laws = [UnitLaw(**entry["config"]) for entry in POINTS.values()]
    assert {c.reflect for c in laws} == {"element", "vector", "none"}
    assert {c.permute for c in laws} == {True, False}
    assert {c.taps for c in laws} >= {1, 3, 5, 9}
    assert any(c.taps == 1 < c.runs for c in laws)
    assert {c.laps for c in laws} >= {1, 2, 3, 4, 7, 8, 9, 16, 64}
    assert {c.window for c in laws} >= {None, 8, 4096}
    assert any(c.rows % 8 for c in laws)
    assert any(c.slots < 8 for c in laws)
    assert any(c.slots % 8 for c in laws)
    assert any(c.granularity < 8 for c in laws)
    assert any(c.groups(0) == 1 for c in laws)
    assert any(c.octets(0) % c.groups(0) == 0 and c.groups(0) > 8 for c in laws)
    assert any(c.octets(0) % c.groups(0) for c in laws)
    sizes = [-(-c.octets(0) // c.groups(0)) * c.taps for c in laws]
    assert min(sizes) == 1
    assert max(sizes) > 1.9 * MAX_UNIT
    assert any(size % c.laps for size, c in zip(sizes, laws, strict=True))
    assert any(c.rows_per_band < c.rows for c in laws)
    assert any(c.first(1) % c.laps for c in laws if c.rows_per_band < c.rows)
    assert any(c.rows_per_band == 8 for c in laws)
    assert any(c.start * 8 * c.granularity == 2**62 for c in laws)


def test_golden_vectors_cannot_be_changed_by_accident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("gold", ROOT / "tools" / "golden_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.UNIT_POINTS.keys() == POINTS.keys()
    assert tool.UNIT_WHOLE.keys() == WHOLE.keys()
    chosen = "whole, 100 x 20"
    monkeypatch.setattr(tool, "UNIT_WHOLE", {chosen: tool.UNIT_WHOLE[chosen]})
    monkeypatch.setattr(tool, "UNIT_POINTS", {"7 laps": tool.UNIT_POINTS["7 laps"]})
    out = tmp_path / "golden" / "law3.json"
    run = ["--law", "3", "--out", str(out)]
    assert tool.main(run) == 0
    record = json.loads(out.read_text())
    assert record == {"law": 3, "entries": {n: RECORD["entries"][n] for n in ("7 laps", chosen)}}
    record["entries"]["7 laps"]["slots"][3] += 1
    out.write_text(json.dumps(record))
    assert tool.main(run) == 1
    assert "'7 laps'" in capsys.readouterr().out
    assert json.loads(out.read_text()) == record
