"""Golden vectors of the window law, against the package and the second implementation.

What a position reads is fixed by ``tests/golden/law2.json``, which is never edited.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import window_brute
from ring_brute import key, word

from rpg_kernels.law.window import WINDOW_LAW, WindowLaw, alignment

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "tests" / "golden" / "law2.json").read_text())
POINTS = {name: entry for name, entry in RECORD["entries"].items() if "points" in entry}
WHOLE = {name: entry for name, entry in RECORD["entries"].items() if "points" not in entry}


def sign_word(c: WindowLaw, n: int, b: int, number: int) -> int:
    """Of one position: bit 31 is the sign where a block has one."""
    band, p, _, _ = window_brute.locate(c, n, b)
    if c.reflect == "vector":
        return word(p // 32, c.seed, c.layer, band, 0) * 2 ** (31 - p % 32) % 2**32
    return word(p, c.seed, c.layer, band, number)


@pytest.mark.parametrize("name", POINTS)
def test_golden_points(name: str) -> None:
    entry = POINTS[name]
    c = WindowLaw(**entry["config"])
    assert c.start % alignment(c.rows) == 0
    ring = [key(c.seed, window_brute.RING, 0, number) for number in range(128, 134)]
    assert ring == entry["ring keys"]
    assert [key(c.seed, c.layer, 0, number) for number in (0, 1)] == entry["keys"]
    assert [key(c.seed, c.layer, 0, number) for number in (128, 129)] == entry["sign keys"]
    n, b = torch.tensor(entry["points"]).unbind(1)
    assert c.slot(n, b).tolist() == entry["slots"]
    assert [window_brute.reads(c, *nb) for nb in entry["points"]] == entry["slots"]
    assert [window_brute.address(c, *nb) for nb in entry["points"]] == entry["addresses"]
    if c.reflect == "none":
        assert not c.negative(n, b).any()
        return
    assert c.sign_words(n, b).tolist() == entry["sign words"]
    for nb, words in zip(entry["points"], entry["sign words"], strict=True):
        assert words == [sign_word(c, *nb, number) for number in range(len(words))]
    elements = range(c.granularity)
    for nb, row, bits in zip(
        entry["points"], c.negative(n, b).tolist(), entry["negative"], strict=True
    ):
        assert [int(bits, 16) >> e & 1 for e in elements] == row
        assert row == [window_brute.negative(c, *nb, e) for e in elements]


@pytest.mark.parametrize("name", WHOLE)
def test_golden_checksums(name: str) -> None:
    entry = WHOLE[name]
    c = WindowLaw(**entry["config"])
    n, b = torch.arange(c.rows)[:, None], torch.arange(c.blocks)
    slots = c.slot(n, b).numpy().astype("<i4").tobytes()
    words = c.sign_words(n, b).numpy().astype("<u4").tobytes()
    assert hashlib.sha256(slots).hexdigest() == entry["slots sha256"]
    assert hashlib.sha256(words).hexdigest() == entry["sign words sha256"]


def test_golden_vectors_cover_the_law() -> None:
    assert RECORD["law"] == WINDOW_LAW
    laws = [WindowLaw(**entry["config"]) for entry in POINTS.values()]
    assert {c.reflect for c in laws} == {"element", "vector", "none"}
    assert {c.permute for c in laws} == {True, False}
    assert {5000, 14336} <= {c.rows for c in laws}
    assert {c.scramble.rounds for c in laws} == {7, 8}
    assert any(c.laps & (c.laps - 1) for c in laws)
    assert any(c.slots % c.window for c in laws)
    assert any(c.window > 32768 for c in laws)  # of blocks smaller than the bank's slots
    assert any(c.rows_per_band < c.rows for c in laws)
    assert any(2**60 < c.start < 2**61 for c in laws)
    assert any(c.head(0) == c.rows * c.blocks for c in laws)
    assert any(c.units(0) == 0 < c.rows * c.blocks - c.head(0) for c in laws)
    assert any(c.head(1) for c in laws if c.rows_per_band < c.rows)
    assert {c.rows % 8192 for c in laws} >= {1, 63, 4097, 8191}  # strips of every height


def test_golden_vectors_cannot_be_changed_by_accident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("gold", ROOT / "tools" / "golden_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.WINDOW_POINTS.keys() == POINTS.keys()
    assert tool.WINDOW_WHOLE.keys() == WHOLE.keys()
    chosen = "whole, 100 x 20"
    monkeypatch.setattr(tool, "WINDOW_WHOLE", {chosen: tool.WINDOW_WHOLE[chosen]})
    monkeypatch.setattr(tool, "WINDOW_POINTS", {"7 laps": tool.WINDOW_POINTS["7 laps"]})
    out = tmp_path / "golden" / "law2.json"
    run = ["--law", "2", "--out", str(out)]
    assert tool.main(run) == 0
    record = json.loads(out.read_text())
    assert record == {"law": 2, "entries": {n: RECORD["entries"][n] for n in ("7 laps", chosen)}}
    record["entries"]["7 laps"]["slots"][3] += 1
    out.write_text(json.dumps(record))
    assert tool.main(run) == 1
    assert "'7 laps'" in capsys.readouterr().out
    assert json.loads(out.read_text()) == record
