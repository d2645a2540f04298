"""Law 1 a second time, in plain Python integers, one position at a time.

Written from ``docs/law.md``; it shares no code with the package.
"""

from __future__ import annotations

import math

from rpg_kernels.law.ring import LayerLaw


def mix(z: int) -> int:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ z >> shift) * factor) % 2**64
    return z ^ z >> 31


def key(seed: int, layer: int, band: int, number: int) -> int:
    """Key number 0, 1, 2 ... of a band."""
    golden = 0x9E3779B97F4A7C15
    state = 0
    for part in (seed, layer, band):
        state = mix((state + part + golden) % 2**64)
    return mix((state + (number + 1) * golden) % 2**64) >> 32


def scatter(x: int, k: int, size: int) -> int:
    h = ((x ^ k) * 0x7FEB352D) % 2**32
    h = ((h ^ h >> 15) * 0x846CA68B) % 2**32
    return (h * size) >> 32


def digits(size: int) -> tuple[int, int]:
    minor = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
    return size // minor, minor


def permute(q: int, size: int, seed: int, layer: int, band: int) -> int:
    major, minor = digits(size)
    if minor >= 12 and major <= minor**3:
        if major <= 2 * minor:
            rounds = 6 if minor >= 128 else 8
        else:
            rounds = 10 if major <= minor**2 else 12
        i, j = divmod(q, minor)
        for r in range(0, rounds, 2):
            j = (j + scatter(i, key(seed, layer, band, r), minor)) % minor
            i = (i + scatter(j, key(seed, layer, band, r + 1), major)) % major
        return i * minor + j
    for r in range(24 if size <= 65536 else 48):
        pivot = (key(seed, layer, band, 2 * r) * size) >> 32
        partner = (pivot - q) % size
        if scatter(max(q, partner), key(seed, layer, band, 2 * r + 1), 2):
            q = partner
    return q


def word(q: int, seed: int, layer: int, band: int, number: int) -> int:
    h = q ^ key(seed, layer, band, 128 + 2 * number)
    h = ((h ^ h >> 17) * 0xED5AD4BB) % 2**32
    h = ((h ^ h >> 11 ^ key(seed, layer, band, 129 + 2 * number)) * 0xAC4C1B51) % 2**32
    h = ((h ^ h >> 15) * 0x31848BAB) % 2**32
    return h ^ h >> 14


def locate(c: LayerLaw, n: int, b: int) -> tuple[int, int, int, int]:
    """band, position in it, positions before it, its size."""
    height = c.rows
    if c.rows * c.blocks > 2**31:
        height = 1
        while 2 * height * c.blocks <= 2**31:
            height *= 2
    band = n // height
    before = band * height
    size = min(height, c.rows - before) * c.blocks
    return band, (n - before) * c.blocks + b, before * c.blocks, size


def slot(c: LayerLaw, n: int, b: int) -> int:
    band, q, before, size = locate(c, n, b)
    if c.permute:
        q = permute(q, size, c.seed, c.layer, band)
    return (c.start + before + q) % c.slots


def negative(c: LayerLaw, n: int, b: int, e: int) -> bool:
    band, q, _, _ = locate(c, n, b)
    if c.reflect == "none":
        return False
    if c.reflect == "vector":
        return word(q, c.seed, c.layer, band, 0) >= 2**31
    pair, odd = divmod(e % 32, 2)
    bit = 15 - pair + 16 * odd
    return bool(word(q, c.seed, c.layer, band, e // 32) >> bit & 1)
