"""The window law written again from ``docs/window_law.md``, in plain Python integers.

Shares no code with the package; keys, words and the permutation of law 1 come from the second
implementation ``ring_brute``. ``walk`` deals addresses out one by one, ``reads`` computes
them for a single position.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import torch
from ring_brute import permute, word

from rpg_kernels.law.window import WindowLaw, alignment

RING = 2**64 - 1
WINDOWS = [64, 128, 256, 512]


def scramble(window: int, seed: int, lap: int, j: int) -> int:
    """Local slot of position j of a lap."""
    octets = window // 8
    bits = int(math.log2(octets))
    octet, row = divmod(j, 8)
    h = word((lap * octets + octet) % 2**32, seed, RING, 0, 0)
    flip, factor, summand = h // 2**29, h // 8 | 1, h
    residue = ((row ^ flip) - summand) * factor % 8
    pair = (lap * 8 + residue) % 2**32
    factors, summands = word(pair, seed, RING, 0, 1), word(pair, seed, RING, 0, 2)
    for number in range(7 if bits >= 5 else 8):
        odd = factors // 16**number | 1
        octet = (octet * odd + summands // 16**number) % octets
        octet ^= octet // 2 ** max(1, bits // 2)
    return 8 * octet + residue


def strips(rows: int) -> Iterator[range]:
    """Rows cut into strips of 4096, then 2048, 1024 ... as often as they fit."""
    first = 0
    for height in (4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1):
        while rows - first >= height:
            yield range(first, first + height)
            first += height


def cells_of(start: int, size: int, cell: int) -> tuple[int, int]:
    """Positions before the first whole unit, and the number of whole units."""
    head = 0
    while (start + head) % cell and head < size:
        head += 1
    return head, (size - head) // cell


def walk(c: WindowLaw) -> Iterator[tuple[int, int, int, int]]:
    """(row, block, p, slot) of every position, of a layer that is one band."""
    assert c.rows * c.blocks <= 2**31
    cell = c.laps * c.window
    head, units = cells_of(c.start, c.rows * c.blocks, cell)
    p = 0
    for strip in strips(c.rows):
        for block in range(c.blocks):
            for row in strip:
                unit, rest = divmod(p - head, cell)
                z = c.start + p
                if 0 <= unit < units and c.permute:
                    place = permute(unit, units, c.seed, c.layer, 0)
                    z = c.start + head + place * cell + rest
                yield row, block, p, ring_slot(c, z)
                p += 1


def ring_slot(c: WindowLaw, z: int) -> int:
    """Slot of an address."""
    lap, j = divmod(z, c.window)
    local = scramble(c.window, c.seed, lap, j) if c.permute else j
    return (lap // c.laps * c.window + local) % c.slots


def locate(c: WindowLaw, n: int, b: int) -> tuple[int, int, int, int]:
    """band, p, and the band's first address and size; for layers of any size."""
    height = c.rows
    if c.rows * c.blocks > 2**31:
        height = 1
        while 2 * height * c.blocks <= 2**31:
            height *= 2
    band, row = divmod(n, height)
    rows = min(height, c.rows - band * height)
    first = c.start + band * height * c.blocks
    top = row // 4096 * 4096
    strip = 4096
    while top + strip > rows:  # row lies in what 4096 do not fit into any more
        strip //= 2
        if row >= top + strip <= rows:
            top += strip
    p = top * c.blocks + b * strip + row - top
    return band, p, first, rows * c.blocks


def address(c: WindowLaw, n: int, b: int) -> int:
    """Address of one position."""
    band, p, first, size = locate(c, n, b)
    cell = c.laps * c.window
    head = min(-first % cell, size)
    units = (size - head) // cell
    if c.permute and head <= p < head + units * cell:
        place = permute((p - head) // cell, units, c.seed, c.layer, band)
        p = head + place * cell + (p - head) % cell
    return first + p


def reads(c: WindowLaw, n: int, b: int) -> int:
    """Slot of one position."""
    return ring_slot(c, address(c, n, b))


def negative(c: WindowLaw, n: int, b: int, e: int) -> bool:
    """Sign of one element."""
    band, p, _, _ = locate(c, n, b)
    if c.reflect == "none":
        return False
    if c.reflect == "vector":
        return bool(word(p // 32, c.seed, c.layer, band, 0) >> p % 32 & 1)
    pair, odd = divmod(e % 32, 2)
    return bool(word(p, c.seed, c.layer, band, e // 32) >> 15 - pair + 16 * odd & 1)


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


def draw(rng: random.Random, **fixed: object) -> WindowLaw:
    """A layer of odd sizes, at most some 10^4 positions; every sixth of about 4096 rows or more."""
    rows = rng.choice([1, 2, 3, 7, 13, 63, 64, 65, 97, 120, 200, rng.randint(1, 400)])
    blocks = rng.choice([1, 2, 3, 9, 16, 37, rng.randint(1, 60)])
    if rng.random() < 0.17:
        rows, blocks = rng.choice([4095, 4096, 4097, 5000, rng.randint(4098, 9000)]), 2
    config = {
        "seed": rng.choice([0, 1, 2**63 - 1, rng.randrange(2**63)]),
        "layer": rng.choice([0, 1, 40, 5000]),
        "rows": rows,
        "blocks": blocks,
        "granularity": 1 << rng.randrange(8),
        "window": rng.choice(WINDOWS),
        "laps": rng.choice([1, 2, 3, 4, 7]),
        "reflect": rng.choice(["element", "vector", "none"]),
        "permute": rng.random() < 0.85,
    }
    config |= fixed
    window = config["window"]
    step = alignment(config["rows"])
    config.setdefault("slots", rng.choice([window, window + 1, 3 * window, window + 77, 31250]))
    config.setdefault("start", step * rng.choice([0, 1, rng.randrange(1000), 2**55 // step]))
    return WindowLaw(**config)


def everywhere(c: WindowLaw) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[rows, 1]`` and blocks ``[blocks]`` of all positions."""
    return torch.arange(c.rows)[:, None], torch.arange(c.blocks)
