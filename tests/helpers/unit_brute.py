"""The unit law written again from ``docs/unit_law.md``, in plain Python integers.

Shares no code with the package; keys, words and the permutation of law 1 come from the second
implementation ``ring_brute``. ``walk`` deals uses out one by one and inverts by searching;
``reads`` computes the slot of a single position.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import torch
from ring_brute import permute, word

from rpg_kernels.law.unit import UnitLaw

INT32 = 2**31


def small(number: int) -> int:
    """A number that 32-bit arithmetic must hold, with its sign."""
    assert -INT32 <= number < INT32
    return number


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def taps_of_unit(taps: int, laps: int) -> int:
    return max(d for d in divisors(taps) if d <= laps)


@lru_cache(maxsize=1024)
def groups_of(octets: int, taps: int, laps: int, window: int | None) -> int:
    """Groups of a band's octets, section 2."""
    if window is None:
        window = 256 if taps == 1 else 64
    aim = min(window // 8 * laps, 1024)
    near: list[tuple[Fraction, int]] = []
    for size in range(1, min(octets, 2 * aim) + 1):
        unit = size * taps
        if octets % size or unit % laps or not aim <= 2 * unit <= 4 * aim:
            continue
        near.append((max(Fraction(unit, aim), Fraction(aim, unit)), size))
    if near:
        near.sort()
        assert len(near) == 1 or near[0][0] < near[1][0]  # never two at once
        return octets // near[0][1]
    nearest = int(Fraction(octets * taps, aim) + Fraction(1, 2))
    return min(max(nearest, 1), octets)


class Groups(NamedTuple):
    """Octets of a band, cut into groups: the larger ones come first."""

    octets: int
    groups: int

    def first(self, group: int) -> int:
        """The first octet of a group, or where the last one ends."""
        return self.octets // self.groups * group + min(group, self.octets % self.groups)

    def size(self, group: int) -> int:
        return self.first(group + 1) - self.first(group)

    def group_of(self, octet: int) -> int:
        return bisect.bisect_right(range(self.groups), octet, key=self.first) - 1


class Band(NamedTuple):
    number: int
    first_row: int
    rows: int
    octets: int
    first_use: int


def band_of(c: UnitLaw, n: int) -> Band:
    height = c.rows
    if -(-c.rows // 8) * 8 * c.blocks > 2**31:
        height = 1
        while 2 * height * c.blocks <= 2**31:
            height *= 2
        assert height % 8 == 0
    number = n // height
    rows = min(height, c.rows - number * height)
    octets = -(-rows // 8)
    assert octets * 8 * c.blocks <= 2**31
    return Band(number, number * height, rows, octets, c.start + number * (height // 8) * c.blocks)


def shuffle(i: int, size: int, unit: int, c: UnitLaw, band: int) -> int:
    """Where the octet number i of a unit goes, section 4."""
    assert size <= 2**15
    for j in range(16):
        w = word(unit, c.seed, c.layer, band, 18 + j)
        upper, lower = divmod(w, 2**16)
        offset = upper * size // 2**16
        small(upper * size)
        partner = (offset - i) % size
        summand = lower % 256 * 256 + lower // 256
        number = small(max(i, partner) * (lower | 1) + summand)
        if number // 2**15 % 2 == 1:
            i = partner
    return i


def residue(row: int, w: int) -> int:
    """The slot of its octet that a row reads, section 5."""
    return ((row ^ w // 2**29) - w % 8) * (w // 8 | 1) % 8


class Place(NamedTuple):
    """The numbers of a position, section 3."""

    band: Band
    column: int
    group: int
    groups: Groups
    i: int
    q: int


def locate(c: UnitLaw, n: int, b: int) -> Place:
    """Numbers of one position."""
    band = band_of(c, n)
    run_blocks = c.blocks // c.runs
    tap, channel = divmod(b, run_blocks)
    column = tap // c.taps * run_blocks + channel
    groups = Groups(band.octets, groups_of(band.octets, c.taps, c.laps, c.window))
    octet = (n - band.first_row) // 8
    group = groups.group_of(octet)
    i = tap % c.taps * groups.size(group) + octet - groups.first(group)
    q = (column * band.octets + groups.first(group)) * c.taps + i
    small(8 * q + 7)
    return Place(band, column, group, groups, i, q)


def turn(c: UnitLaw, column: int, band: int, groups: int) -> int:
    """The group that comes first in a column."""
    return word(column, c.seed, c.layer, band, 17) * groups // 2**32 if c.permute else 0


def use(c: UnitLaw, n: int, b: int) -> int:
    """The use of one position's octet, counted through all layers."""
    band, column, group, groups, i, _ = locate(c, n, b)
    columns = c.blocks // c.taps
    comes_first = turn(c, column, band.number, groups.groups)
    # Octets of the groups between the two, going around.
    before = groups.first(group) - groups.first(comes_first)
    if group < comes_first:
        before += band.octets
    if c.permute:
        unit = small(column * groups.groups + group)
        i = shuffle(i, groups.size(group) * c.taps, unit, c, band.number)
        column = permute(column, columns, c.seed, c.layer, band.number)
    return band.first_use + small((column * band.octets + before) * c.taps + i)


def reads(c: UnitLaw, n: int, b: int) -> int:
    """Slot of one position."""
    place = locate(c, n, b)
    row = (n - place.band.first_row) % 8
    if c.permute:
        row = residue(row, word(place.q, c.seed, c.layer, place.band.number, 16))
    return (use(c, n, b) // c.laps * 8 + row) % c.slots


def sign_word(c: UnitLaw, n: int, b: int, number: int) -> int:
    """Of one position: bit 31 is the sign where a block has one."""
    place = locate(c, n, b)
    p = 8 * place.q + (n - place.band.first_row) % 8
    if c.reflect == "vector":
        shared = word(p // 32, c.seed, c.layer, place.band.number, 0)
        return shared * 2 ** (31 - p % 32) % 2**32
    return word(p, c.seed, c.layer, place.band.number, number)


def negative(c: UnitLaw, n: int, b: int, e: int) -> bool:
    """Sign of one element."""
    if c.reflect == "none":
        return False
    if c.reflect == "vector":
        return sign_word(c, n, b, 0) >= 2**31
    pair, odd = divmod(e % 32, 2)
    return bool(sign_word(c, n, b, e // 32) >> 15 - pair + 16 * odd & 1)


def listed_groups(octets: int, count: int) -> list[range]:
    """The octets of each group, dealt out one by one."""
    sizes = [0] * count
    for octet in range(octets):
        sizes[octet % count] += 1
    out, first = [], 0
    for size in sizes:
        out.append(range(first, first + size))
        first += size
    return out


def walk(c: UnitLaw) -> Iterator[tuple[int, int, int]]:
    """(row, block, slot) of the layer's uses in their order; rows beyond the layer are padding.

    Of layers of one band, whose permutations are inverted by listing them.
    """
    band = band_of(c, 0)
    assert band.rows == c.rows
    count = groups_of(band.octets, c.taps, c.laps, c.window)
    groups = listed_groups(band.octets, count)
    columns, run_blocks = c.blocks // c.taps, c.blocks // c.runs
    order = list(range(columns))
    if c.permute:
        order.sort(key=lambda column: permute(column, columns, c.seed, c.layer, 0))
    number = c.start
    for column in order:
        first = turn(c, column, 0, count)
        for group in [*range(first, count), *range(first)]:
            octets = groups[group]
            # The octets of a unit, tap by tap: (tap, octet of the rows).
            listed = [(tap, octet) for tap in range(c.taps) for octet in octets]
            size, unit = len(listed), column * count + group
            to = [shuffle(i, size, unit, c, 0) if c.permute else i for i in range(size)]
            assert sorted(to) == list(range(size))
            for place in range(size):
                i = to.index(place)
                tap, octet = listed[i]
                part, channel = divmod(column, run_blocks)
                b = (part * c.taps + tap) * run_blocks + channel
                w = word((column * band.octets + octets[0]) * c.taps + i, c.seed, c.layer, 0, 16)
                rows = [residue(row, w) if c.permute else row for row in range(8)]
                for k in range(8):
                    yield 8 * octet + rows.index(k), b, (number // c.laps * 8 + k) % c.slots
                number += 1


def wavefronts(addresses: Sequence[int], width: int) -> float:
    """Trips to shared memory of a warp's lanes, in units of the least possible.

    A trip serves the 128 bytes of 32 banks of 4 bytes; lanes go 128 / width at a time.
    """
    together = 128 // width
    trips = 0
    for first in range(0, len(addresses), together):
        banks: dict[int, set[int]] = {}
        for address in addresses[first : first + together]:
            for w in range(address // 4, (address + width) // 4):
                banks.setdefault(w % 32, set()).add(w)
        trips += max(len(words) for words in banks.values())
    return trips / (len(addresses) // together)


def draw(rng: random.Random, **fixed: object) -> UnitLaw:
    """A layer of odd sizes, mostly of some 10^4 positions."""
    rows = rng.choice([1, 2, 7, 8, 9, 63, 64, 65, 97, 200, rng.randint(1, 400)])
    if rng.random() < 0.15:
        rows = rng.randint(400, 3000)
    laps = rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 16, 64, rng.randint(1, 64)])
    runs = rng.choice([1, 1, 1, 2, 3, 4, 9, 25])
    window = rng.choice([None, None, 8, 16, 64, 8 * rng.randint(1, 64)])
    if window is not None and window // 8 * laps > 2**14:
        window = None
    config = {
        "seed": rng.choice([0, 1, 2**63 - 1, rng.randrange(2**63)]),
        "layer": rng.choice([0, 1, 40, 5000]),
        "rows": rows,
        "blocks": runs * rng.choice([1, 2, 3, 5, rng.randint(1, 12)]),
        "granularity": 1 << rng.randrange(8),
        "slots": rng.choice([1, 3, 7, 8, 9, 64, 77, 1000, 31250, rng.randint(1, 3000)]),
        "reflect": rng.choice(["element", "vector", "none"]),
        "permute": rng.random() < 0.85,
        "laps": laps,
        "window": window,
        "runs": runs,
    }
    config |= fixed
    laps = config["laps"]
    config.setdefault("start", laps * rng.choice([0, 1, rng.randrange(1000), 2**55 // laps]))
    config.setdefault("taps", rng.choice([d for d in divisors(config["runs"]) if d <= laps]))
    return UnitLaw(**config)


def everywhere(c: UnitLaw) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[rows, 1]`` and blocks ``[blocks]`` of all positions."""
    return torch.arange(c.rows)[:, None], torch.arange(c.blocks)
