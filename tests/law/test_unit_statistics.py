"""The unit law against random objects of the same kind, and bad ones that must fail.

A random object has the law's units and takes their uses in the law's way, but columns are permuted
by a true random permutation, groups turned and octets of a unit shuffled truly at random, and rows
of an octet take slots by a random map of the law's form; signs are tosses of a coin. So whatever
the law's constraints do to a statistic they do to both. As in ``test_law_statistics``, means and
spreads over keys are compared as z-scores, with fixed seeds; ``docs/unit_law.md`` has what longer
runs found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import pytest
import torch
from test_law_statistics import (
    FAIL,
    PASS,
    chi_square,
    coincidences,
    one_thread,  # noqa: F401
    plus_minus,
    scores,
    worst,
)
from torch import Tensor

from rpg_kernels.law import unit as unit_module
from rpg_kernels.law.ring import sign_word
from rpg_kernels.law.unit import UnitLaw


def pairs(out: dict[str, float], name: str, first: Tensor, second: Tensor, size: int) -> None:
    """Statistics of pairs of numbers from 0 to size - 1."""
    first, second = first.flatten(), second.flatten()
    fine, coarse = min(64, size), min(16, size)
    difference = (second - first) % size
    out[f"{name} difference"] = chi_square(difference * fine // size, fine)
    out[f"{name} low difference"] = chi_square(difference % 64, 64)
    out[f"{name} equal"] = float((difference == 0).sum())
    joint = (first * coarse // size) * coarse + second * coarse // size
    out[f"{name} joint"] = chi_square(joint, coarse * coarse)
    out[f"{name} low bits"] = chi_square((first % 8) * 8 + second % 8, 64)


class Shape(NamedTuple):
    rows: int
    blocks: int
    runs: int
    taps: int
    laps: int
    window: int | None
    slots: int
    keys: int  # that are compared


SHAPES = [
    Shape(1024, 16, 1, 1, 4, None, 2048, 6),
    Shape(512, 36, 9, 3, 4, None, 704, 8),
    Shape(320, 18, 9, 9, 16, None, 1000, 10),  # units share octets
    Shape(1003, 16, 1, 1, 7, 64, 1001, 6),  # and groups differ
    Shape(60, 64, 1, 1, 4, None, 300, 12),
    Shape(8, 200, 1, 1, 3, None, 200, 12),  # units of one octet
]


@dataclass
class Layer:
    """What the positions [rows, blocks] of one layer of one band read, and what led to it."""

    law: UnitLaw
    unit: Tensor
    i: Tensor  # octet's number in its unit
    shuffled: Tensor  # and its place among the unit's uses
    slot: Tensor
    sign: Tensor  # +1 or -1


Draw = Callable[[UnitLaw, int], Layer]


def everywhere(law: UnitLaw) -> tuple[Tensor, Tensor]:
    n, b = torch.broadcast_tensors(torch.arange(law.rows)[:, None], torch.arange(law.blocks))
    return n.contiguous(), b.contiguous()


def from_law(law: UnitLaw, key: int) -> Layer:
    n, b = everywhere(law)
    column, group, i, _ = law.number(n, b, 0)
    unit = column * law.groups(0) + group
    shuffled = law._shuffle(i, law._size(group, 0) * law.taps, unit, 0, inverse=False)
    return Layer(law, unit, i, shuffled, law.slot(n, b), 1 - 2 * law.negative(n, b)[..., 0].long())


def at_random(law: UnitLaw, key: int) -> Layer:
    generator = torch.Generator().manual_seed(key)
    n, b = everywhere(law)
    column, group, i, q = law.number(n, b, 0)
    groups, octets, taps = law.groups(0), law.octets(0), law.taps
    unit = column * groups + group
    sizes = law._size(torch.arange(groups), 0) * taps
    dealt = torch.rand((law.columns, groups, int(sizes.max())), generator=generator)
    dealt[torch.arange(int(sizes.max())) >= sizes[:, None].expand(law.columns, -1, -1)] = 2.0
    shuffled = dealt.argsort(-1).argsort(-1).view(law.columns * groups, -1)[unit, i]
    turn = torch.randint(groups, (law.columns,), generator=generator)[column]
    turned = (law._first_octet(group, 0) - law._first_octet(turn, 0)) % octets
    moved = torch.randperm(law.columns, generator=generator)[column]
    use = law.start + (moved * octets + turned) * taps + shuffled

    def draw(high: int) -> Tensor:
        return torch.randint(high, (octets * law.blocks,), generator=generator)[q]

    place = (((n % 8 ^ draw(8)) + draw(8)) * (2 * draw(4) + 1)) & 7
    slot = (use // law.laps * 8 + place) % law.slots
    sign = 2 * torch.randint(2, slot.shape, generator=generator) - 1
    return Layer(law, unit, i, shuffled, slot, sign)


def of_rows(out: dict[str, float], slot: Tensor) -> None:
    """How often two rows read the same slot, over columns, for all pairs of some rows."""
    if len(slot) == 1:
        return
    chosen = slot[torch.linspace(0, len(slot) - 1, min(len(slot), 160)).long()]
    equal = sum((chosen[:, None, b] == chosen[None, :, b]).long() for b in range(slot.shape[1]))
    assert isinstance(equal, Tensor)
    upper = torch.triu_indices(len(chosen), len(chosen), 1)
    each = equal[upper[0], upper[1]].double()
    for power in (1, 2, 3):
        out[f"pairs of rows, moment {power}"] = float((each**power).mean())
    out["pairs of rows, most"] = float(each.max())


def of_units(out: dict[str, float], layer: Layer) -> None:
    """Shuffles: each alone, and against those of the next columns."""
    law, groups = layer.law, layer.law.groups(0)
    size = int(law._size(torch.tensor(groups - 1), 0)) * law.taps  # the least that there is
    first = layer.i[::8] < size
    unit, i, shuffled = (each[::8][first] for each in (layer.unit, layer.i, layer.shuffled))
    table = torch.zeros((law.columns * groups, size), dtype=torch.long)
    table[unit, i] = shuffled
    coarse, number = min(size, 16), torch.arange(size)
    table = table.view(law.columns, groups, size)
    by_place = (number * coarse // size) * coarse + table.clamp(max=size - 1) * coarse // size
    out["place"] = chi_square(by_place.flatten(), coarse * coarse)
    for name, other in (("shift", -number), ("mirror", number)):
        moved = ((table + other) % size).view(-1, size)
        counts = torch.zeros_like(moved).scatter_add_(1, moved, torch.ones_like(moved)).double()
        out[f"units, equal {name}"] = float((counts * counts).sum())
    for lag in (1, 2, 9):
        if lag < law.columns:
            one, other = table[:-lag], table[lag:]
            difference = ((one - other) % size).view(-1, size)
            counts = torch.zeros_like(difference)
            counts.scatter_add_(1, difference, torch.ones_like(difference))
            out[f"units {lag}, equal differences"] = float((counts.double() ** 2).sum())
            both = (table.div(law.laps, rounding_mode="floor")).view(law.columns, -1, size)
            cell = (both[:-lag] * size + both[lag:]).flatten(0, 1)
            cell += torch.arange(len(cell))[:, None] * size * size
            counts = cell.unique(return_counts=True)[1].double()
            out[f"units {lag}, pairs together again"] = float((counts * (counts - 1)).sum())


def of_signs(out: dict[str, float], layer: Layer) -> None:
    sign, slot = layer.sign.double(), layer.slot
    out["signs"] = float(sign.mean())
    for lag in (1, 2, 8, 16, 32, 64):
        if lag < layer.law.rows:
            product = sign[:-lag] * sign[lag:]
            out[f"signs, rows {lag}"] = float(product.mean())
            out[f"signs, rows {lag} of columns"] = float(product.sum(0).square().mean())
            same = slot[:-lag] == slot[lag:]
            out[f"signs, rows {lag} of one slot"] = float(product[same].sum())
    for lag in (1, 2, 8):
        if lag < layer.law.blocks:
            out[f"signs, blocks {lag}"] = float((sign[:, :-lag] * sign[:, lag:]).mean())
    for bit in range(9):
        out[f"signs, bit {bit} of slots"] = float((sign * (1 - 2 * ((slot >> bit) & 1))).mean())
    by_slot = torch.zeros(layer.law.slots, dtype=torch.double)
    by_slot.scatter_add_(0, slot.flatten(), sign.flatten())
    out["signs of a slot"] = float(by_slot.square().mean())


def statistics(layer: Layer, after: Layer) -> dict[str, float]:
    """``after`` is the next layer, of the same shape."""
    law, slot, slots = layer.law, layer.slot, layer.law.slots
    out: dict[str, float] = coincidences(slot, slots)
    octets = law.octets(0) // law.groups(0)
    for lag in sorted({1, 2, 4, 8, 16, 64, 8 * octets, law.rows // 2}):
        if 0 < lag < law.rows:
            pairs(out, f"rows {lag}", slot[:-lag], slot[lag:], slots)
    for lag in sorted({1, 2, 3, 8, law.blocks // law.runs, law.blocks // law.runs * law.taps}):
        if 0 < lag < law.blocks:
            pairs(out, f"blocks {lag}", slot[:, :-lag], slot[:, lag:], slots)
            both = slot[:, :-lag] // 8 * slots + slot[:, lag:] // 8
            counts = both[::8].unique(return_counts=True)[1].double()
            out[f"blocks {lag} repeated octets"] = float((counts * counts).sum())
    pairs(out, "next layer", slot, after.slot, slots)
    of_rows(out, slot)
    of_units(out, layer)
    of_signs(out, layer)
    if slots % 8 == 0:  # elsewhere residues shift from pass to pass
        row = (torch.arange(law.rows) % 8)[:, None].expand_as(slot)
        out["residues of rows"] = chi_square((row * 8 + slot % 8).flatten(), 64)
        out["residues of octets"] = chi_square((slot // 8 % 8 * 8 + slot % 8).flatten(), 64)
    # Columns are sets of slots: how many of them two of the columns share.
    member = torch.zeros(min(law.blocks, 64), slots)
    member.scatter_(1, slot.T[:64], 1.0)
    shared = (member @ member.T).triu(1)
    out["columns shared"] = float(shared.square().sum())
    out["columns most shared"] = float(shared.max())
    out["columns neighbours shared"] = float(shared.diagonal(1).sum())
    return out


@cache
def sample(draw: Draw, shape: Shape, kind: type[UnitLaw] = UnitLaw) -> dict[str, Tensor]:
    """Name -> values over the shape's keys, as one tensor each."""
    each = []
    rows, blocks, runs, taps, laps, window, slots, count = shape
    for key in range(count):
        two = []
        for layer in (0, 1):
            length = -(-rows // 8) * blocks
            start = -(-(length * layer + 37 * key) // laps) * laps
            config = (key, layer, rows, blocks, 8, slots, start, "vector", True)
            two.append(draw(kind(*config, laps, window, runs, taps), 2 * key + layer))
        each.append(statistics(*two))
    return {name: torch.tensor([one[name] for one in each]) for name in each[0]}


@pytest.mark.parametrize("shape", SHAPES)
def test_law_looks_like_random_objects_of_its_kind(shape: Shape) -> None:
    assert worst(scores(sample(from_law, shape), sample(at_random, shape))) < (PASS, "")


class SameShuffle(UnitLaw):
    """One shuffle for all units."""

    def _shuffle(self, x: Tensor, size: Tensor, unit: Tensor, *args: int, inverse: bool) -> Tensor:
        return super()._shuffle(x, size, unit * 0, *args, inverse=inverse)


class Rotated(UnitLaw):
    """Octets of a unit in order, from a beginning of the unit's own."""

    def _shuffle(self, x: Tensor, size: Tensor, unit: Tensor, *args: int, inverse: bool) -> Tensor:
        return (x + self._word(unit, 0, 18)) % size


class NoTurns(UnitLaw):
    """The first group always comes first, so its rows share no octet with those of the last."""

    def _turn(self, column: Tensor, band: int) -> Tensor:
        return torch.zeros_like(column)


class SignsOfRows(UnitLaw):
    """One sign for a row, whatever its column."""

    def sign_words(self, n: Tensor, b: Tensor) -> Tensor:
        return super().sign_words(n, b * 0)


@pytest.mark.parametrize("kind", [SameShuffle, Rotated, NoTurns, SignsOfRows])
def test_bad_laws_fail(kind: type[UnitLaw]) -> None:
    shape = Shape(1024, 24, 1, 1, 4, 64, 20000, 5)
    failed = scores(sample(from_law, shape, kind), sample(at_random, shape))
    assert worst(failed) > (FAIL, "")


def shuffles(size: int, count: int, rounds: int = 16) -> Tensor:
    """[count, size]: where each unit of a column of many sends its octets."""
    law = UnitLaw(3, 1, 8 * size, count, 8, 800, 0, "none", True, 1, 8, 1, 1)
    kept = unit_module._ROUNDS
    unit_module._ROUNDS = rounds  # restored below: the law itself has no such choice
    try:
        unit = torch.arange(count)[:, None]
        x = torch.arange(size).expand(count, size).clone()
        return law._shuffle(x, torch.tensor(size), unit, 0, inverse=False)
    finally:
        unit_module._ROUNDS = kept


def of_pairs(shuffled: Tensor) -> float:
    """Pairs of a unit's octets that keep their difference, over those of random shuffles."""
    count, size = shuffled.shape
    moved = (shuffled - torch.arange(size)) % size
    seen = torch.zeros_like(moved).scatter_add_(1, moved, torch.ones_like(moved)).double()
    return float((seen * (seen - 1)).sum()) / (count * size)


@pytest.mark.parametrize("size", [8, 24, 72, 128, 344])
def test_pairs_of_octets_keep_their_difference_hardly_more_often(size: int) -> None:
    """The weakest point of the shuffle: with 2^-17, which adds to 1 / size."""
    count = 2**19 // size
    noise = 5 * (2 / (count * size)) ** 0.5
    assert abs(of_pairs(shuffles(size, count)) - 1 - size / 2**17) < noise
    if size > 24:
        assert of_pairs(shuffles(size, count, 6)) - 1 > 2 * noise


def test_tiny_shuffles_are_equally_likely() -> None:
    for size, count in ((2, 2000), (3, 6000), (4, 24000), (5, 48000)):
        seen = shuffles(size, count).unique(dim=0, return_counts=True)[1].double()
        cells = math.factorial(size)
        assert len(seen) == cells
        chi = float(((seen - count / cells) ** 2).sum() * cells / count)
        assert abs(chi - (cells - 1)) < 4.5 * math.sqrt(2 * (cells - 1))


def test_words_of_a_unit_are_independent() -> None:
    """All bits of the 18 words of an octet, a column and the 16 rounds, and of neighbours."""
    count = 2**14
    x = torch.arange(count + 64)
    bits = torch.cat([plus_minus(sign_word(x, 3, 5, 0, word)) for word in (0, *range(16, 34))], 1)
    upper = torch.triu_indices(bits.shape[1], bits.shape[1], 1)
    z = [((bits[:count].T @ bits[:count]) / count**0.5)[upper[0], upper[1]]]
    z += [((bits[:count].T @ bits[lag : count + lag]) / count**0.5).flatten() for lag in (1, 8, 64)]
    z.append(bits[:count].sum(0) / count**0.5)
    found = torch.cat(z)
    assert float(found.abs().max()) < PASS + 0.5  # of 1.3 million
    assert abs(float(found.std()) - 1) < 0.02
