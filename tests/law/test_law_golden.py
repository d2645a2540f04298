"""The packing law, exactly: golden vectors, and a second implementation (``ring_brute``)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from ring_brute import digits, key, locate, negative, permute, slot, word

from rpg_kernels.law.ring import LAW_VERSION, LayerLaw, Permutation, keys, most_square_factors

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / f"law{LAW_VERSION}.json").read_text())
POINTS = {name: entry for name, entry in GOLDEN["entries"].items() if "points" in entry}
WHOLE = {name: entry for name, entry in GOLDEN["entries"].items() if "points" not in entry}


def draw(rng: random.Random, **fixed: object) -> LayerLaw:
    """A layer of odd sizes, at most some 10^5 positions."""
    rows = rng.choice([1, 2, 3, 7, 13, 64, 97, 120, 499, 1024, rng.randint(1, 3000)])
    config = {
        "seed": rng.choice([0, 1, 2**63 - 1, rng.randrange(2**63)]),
        "layer": rng.choice([0, 1, 40, 5000]),
        "rows": rows,
        "blocks": rng.choice([1, 2, 3, 4, 9, 12, 16, 37, 64, rng.randint(1, 200)]),
        "granularity": 1 << rng.randrange(8),
        "slots": rng.choice([1, 2, 7, 50, 704, 31250, rng.randint(1, 1000)]),
        "reflect": rng.choice(["element", "vector", "none"]),
        "permute": rng.random() < 0.85,
    }
    config |= fixed
    config.setdefault("start", rng.choice([0, config["slots"] - 1, rng.randrange(config["slots"])]))
    return LayerLaw(**config)


def compare(c: LayerLaw, where: list[tuple[int, int]], rng: random.Random) -> None:
    n, b = torch.tensor(where).unbind(1)
    assert c.slot(n, b).tolist() == [slot(c, *nb) for nb in where]
    got = c.negative(n, b)
    assert got.shape == (len(where), c.granularity)
    for row, nb in zip(got.tolist(), where, strict=True):
        for e in {0, 1, c.granularity - 1, rng.randrange(c.granularity)} & set(range(len(row))):
            assert row[e] is negative(c, *nb, e), (c, nb, e)


def test_a_second_implementation_agrees() -> None:
    rng = random.Random(1)
    for _ in range(250):
        c = draw(rng)
        where = [(rng.randrange(c.rows), rng.randrange(c.blocks)) for _ in range(12)]
        compare(c, [(0, 0), (c.rows - 1, c.blocks - 1), *where], rng)


@pytest.mark.parametrize("blocks", [3, 1, 2**20, 2**31 - 1, 2**31, 12345])
def test_far_rows_in_bands(blocks: int) -> None:
    rng = random.Random(blocks)
    for rows in (2**33, 2**32 + 5, 2**31 // blocks + 1):
        c = draw(rng, rows=rows, blocks=blocks, granularity=32)
        band = c.rows_per_band
        where = [(n, b) for n in {0, band - 1, band, 2 * band, rows - 1} for b in {0, blocks - 1}]
        where += [(rng.randrange(rows), rng.randrange(blocks)) for _ in range(6)]
        compare(c, [(n, b) for n, b in where if 0 <= n < rows], rng)


def test_bands_hold_at_most_two_to_the_31_positions() -> None:
    for rows, blocks in ((2**31, 1), (2**31 + 1, 1), (2**33, 3), (5, 2**31), (2**29 + 1, 4)):
        c = draw(random.Random(0), rows=rows, blocks=blocks)
        assert c.rows_per_band * blocks <= 2**31
        assert c.rows_per_band == rows or 2 * c.rows_per_band * blocks > 2**31


SIZES = [*range(1, 150), 169, 257, 961, 1000, 1024, 9973, 12 * 997, 65521, 65537, 12 * 2999]


@pytest.mark.parametrize("first", range(0, len(SIZES), 40))
def test_every_permutation_is_a_bijection_with_an_inverse(first: int) -> None:
    for size in SIZES[first : first + 40]:
        p = Permutation(size, seed=size, layer=2, band=1)
        q = torch.arange(size)
        image = p.forward(q)
        assert torch.equal(q, torch.arange(size))  # the argument is left alone
        assert torch.equal(image.sort().values, q)
        assert torch.equal(p.inverse(image), q)
        assert torch.equal(p.forward(p.inverse(q)), q)


@pytest.mark.parametrize("size", [2**31, 2**31 - 1, 2**31 - 2, 3 * 2**29, 46337**2, 36 * 59652323])
def test_inverse_of_large_permutations(size: int) -> None:
    p = Permutation(size, seed=4, layer=0)
    edges = torch.tensor([0, 1, size // 2, size - 2, size - 1])
    q = torch.cat((edges, torch.randint(0, size, (1000,))))
    image = p.forward(q)
    assert 0 <= int(image.min()) <= int(image.max()) < size
    assert len(image.unique()) == len(q.unique())
    assert torch.equal(p.inverse(image), q)
    assert image[:5].tolist() == [permute(x, size, 4, 0, 0) for x in edges.tolist()]


@pytest.mark.parametrize("size", [1, 2, 12, 97, 144, 36864, 2**31 - 1, 2**31, 65521 * 3])
def test_digits_and_keys(size: int) -> None:
    assert most_square_factors(size) == digits(size)
    for seed, layer, band in ((0, 0, 0), (size, 3, 1), (2**63 - 1, 2**31, 7)):
        got = keys(seed, layer, band, 5, 4)
        assert got == tuple(key(seed, layer, band, number) for number in range(5, 9))


def test_slots_are_used_evenly_and_positions_are_their_uses() -> None:
    rng = random.Random(7)
    for _ in range(25):
        c = draw(rng, rows=rng.randint(1, 60), blocks=rng.randint(1, 30), slots=rng.randint(1, 900))
        n, b = torch.arange(c.rows)[:, None], torch.arange(c.blocks)
        readers: dict[int, list[tuple[int, int]]] = {s: [] for s in range(c.slots)}
        for position, s in enumerate(c.slot(n, b).flatten().tolist()):
            readers[s].append(divmod(position, c.blocks))
        uses = Counter(len(each) for each in readers.values())
        assert max(uses) - min(uses) <= 1
        for s, each in rng.sample(sorted(readers.items()), min(40, c.slots)):
            found = c.positions(s)
            assert found.shape == (len(each), 2)
            assert sorted(map(tuple, found.tolist())) == each


def test_positions_across_bands() -> None:
    c = LayerLaw(6, 1, 2**33, 3, 64, 2**31 - 1, 2**31 - 2, "element", permute=True)
    for s in (0, 1, 2**31 - 2, 12345):
        found = c.positions(s)
        assert len(found) in (12, 13)  # 3 * 2^33 positions on 2^31 - 1 slots
        assert c.slot(*found.unbind(1)).eq(s).all()
        assert len({(n // c.rows_per_band) for n, _ in found.tolist()}) > 4
    with pytest.raises(IndexError, match="slot: got 704, wanted 0 to 703"):
        draw(random.Random(0), slots=704).positions(704)


def test_reflection_without_signs_or_order() -> None:
    c = LayerLaw(0, 0, 4, 3, 8, 100, 95, "none", permute=False)
    n, b = torch.arange(4)[:, None], torch.arange(3)
    assert c.slot(n, b).flatten().tolist() == [95, 96, 97, 98, 99, 0, 1, 2, 3, 4, 5, 6]
    assert not c.negative(n, b).any()


@pytest.mark.parametrize("name", POINTS)
def test_golden_points(name: str) -> None:
    entry = POINTS[name]
    c = LayerLaw(**entry["config"])
    n, b = torch.tensor(entry["points"]).unbind(1)
    assert list(keys(c.seed, c.layer, 0, 0, 2)) == entry["keys"]
    assert list(keys(c.seed, c.layer, 0, 128, 2)) == entry["sign keys"]
    assert c.slot(n, b).tolist() == entry["slots"]
    assert [slot(c, *nb) for nb in entry["points"]] == entry["slots"]
    if c.reflect == "none":
        assert not c.negative(n, b).any()
        return
    assert c.sign_words(n, b).tolist() == entry["sign words"]
    for row, bits in zip(c.negative(n, b).tolist(), entry["negative"], strict=True):
        assert [int(bits, 16) >> e & 1 for e in range(c.granularity)] == row
    for nb, words in zip(entry["points"], entry["sign words"], strict=True):
        band, q, _, _ = locate(c, *nb)
        assert words == [word(q, c.seed, c.layer, band, i) for i in range(len(words))]


@pytest.mark.parametrize("name", WHOLE)
def test_golden_checksums(name: str) -> None:
    entry = WHOLE[name]
    c = LayerLaw(**entry["config"])
    n, b = torch.arange(c.rows)[:, None], torch.arange(c.blocks)
    slots = c.slot(n, b).numpy().astype("<i4").tobytes()
    words = c.sign_words(n, b).numpy().astype("<u4").tobytes()
    assert hashlib.sha256(slots).hexdigest() == entry["slots sha256"]
    assert hashlib.sha256(words).hexdigest() == entry["sign words sha256"]


def test_golden_vectors_cannot_be_changed_by_accident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("gold", ROOT / "tools" / "golden_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "WHOLE", {})
    monkeypatch.setattr(tool, "POINTS", {"12 x 12": tool.POINTS["12 x 12"]})
    out = tmp_path / "golden" / "law.json"
    run = ["--out", str(out)]
    assert tool.main(run) == 0
    record = json.loads(out.read_text())
    assert record["entries"]["12 x 12"] == GOLDEN["entries"]["12 x 12"]

    record["entries"]["12 x 12"]["slots"][3] += 1
    record["entries"]["of an older release"] = {"slots": [1]}
    out.write_text(json.dumps(record))
    assert tool.main(run) == 1
    assert "'12 x 12'" in capsys.readouterr().out
    assert json.loads(out.read_text()) == record
    assert tool.main([*run, "--new-law"]) == 0
    entries = json.loads(out.read_text())["entries"]
    assert entries["12 x 12"] == GOLDEN["entries"]["12 x 12"]
    assert entries["of an older release"] == {"slots": [1]}
