"""The packing law against true random permutations and signs, and bad maps that must fail.

Every statistic is computed for a number of keys of the law and for as many true random
permutations. Compared are its mean and its spread, as z-scores. Seeds are fixed, so a run gives the
same scores every time; ``docs/law.md`` has what a longer run found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from rpg_kernels.law.ring import LayerLaw, Permutation, keys, most_square_factors, sign_word

PASS = 5.5  # the law stays below this; about 8000 scores are computed, of small samples
FAIL = 10.0  # a bad map must exceed this in at least one statistic

# rows, blocks, keys, slots of the banks
SHAPES = [
    (4096, 16, 12, (704, 8191)),
    (4096, 4, 16, (704, 2048)),
    (512, 72, 12, (704, 4608)),
    (20011, 1, 16, (704, 2503)),
    (10007, 3, 16, (704, 7500)),
    (4099, 16, 10, (704, 8192)),
    (32001, 2, 10, (7, 8192)),
    (1, 4096, 40, (64, 509)),
    (997, 13, 30, (704, 1625)),
    (64, 36, 60, (7, 288)),
    (64, 9, 120, (7, 72)),
    (31, 31, 100, (7, 120)),
    (37, 13, 120, (7, 64)),
    (12, 12, 150, (7, 36)),
    (1, 64, 200, (7, 16)),
    (509, 1, 120, (7, 64)),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many operators on small tensors: a second thread mostly waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def law(rows: int, blocks: int, key: int) -> Tensor:
    return Permutation(rows * blocks, seed=3, layer=key).forward(torch.arange(rows * blocks))


def random(rows: int, blocks: int, key: int) -> Tensor:
    return torch.randperm(rows * blocks, generator=torch.Generator().manual_seed(key))


def identity(rows: int, blocks: int, key: int) -> Tensor:
    return torch.arange(rows * blocks)


def affine(rows: int, blocks: int, key: int) -> Tensor:
    size = rows * blocks
    factor, shift = (k % size for k in keys(3, key, 0, 0, 2))
    while math.gcd(factor, size) != 1:
        factor += 1
    return (torch.arange(size) * factor + shift) % size


def four_rounds(rows: int, blocks: int, key: int) -> Tensor:
    """A Feistel network on the natural digits (row, block)."""
    q = torch.arange(rows * blocks)
    digits = [q // blocks, q % blocks]
    for r, k in enumerate(keys(3, key, 0, 0, 4)):
        h = ((digits[r % 2] ^ k) * 0x7FEB352D) & 0xFFFFFFFF
        h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        size = (rows, blocks)[1 - r % 2]
        digits[1 - r % 2] = (digits[1 - r % 2] + ((h * size) >> 32)) % size
    return digits[0] * blocks + digits[1]


def chi_square(cells: Tensor, count: int) -> float:
    seen = torch.bincount(cells, minlength=count).double()
    return float(((seen * seen).sum() * count / seen.sum()) - seen.sum())


def statistics(p: Tensor, after: Tensor, rows: int, blocks: int, banks: tuple[int, ...]) -> dict:
    """Statistics of a permutation; ``after`` is that of the next layer."""
    size = rows * blocks
    q = torch.arange(size)
    minor = most_square_factors(size)[1]
    coarse, fine = min(16, size), min(64, size)
    out: dict[str, float] = {}
    distances = (1, 2, 7, 64, 1024, blocks, 2 * blocks, 8 * blocks, 512 * blocks, minor, size // 2)
    for lag in sorted({lag for lag in distances if 0 < lag < size}):
        first, second = p[:-lag], p[lag:]
        difference = (second - first) % size
        counts = torch.bincount(difference, minlength=size).double()
        out[f"difference {lag}"] = chi_square(difference * fine // size, fine)
        out[f"equal differences {lag}"] = float((counts * counts).sum())
        joint = (first * coarse // size) * coarse + second * coarse // size
        out[f"joint {lag}"] = chi_square(joint, coarse * coarse)
        out[f"low bits {lag}"] = chi_square((first % 8) * 8 + second % 8, 64)
        if minor > 1:
            out[f"minor digit {lag}"] = float((first % minor == second % minor).sum())
            out[f"major digit {lag}"] = float((first // minor == second // minor).sum())
    out["value by position"] = chi_square((q * fine // size) * fine + p * fine // size, fine * fine)
    for mod in {8, 64, blocks, minor} - {1}:
        if mod < size:
            out[f"modulo {mod}"] = chi_square((q % mod) * mod + p % mod, mod * mod)
            out[f"value by {mod}"] = chi_square((q % mod) * fine + p * fine // size, mod * fine)
    for name, shift in (("layers", after - p), ("shift", p - q), ("mirror", p + q)):
        counts = torch.bincount(shift % size, minlength=size).double()
        out[f"equal {name}"] = float((counts * counts).sum())
    out["layers joint"] = chi_square((p * coarse // size) * coarse + after * coarse // size, 256)
    out["layers low bits"] = chi_square((p % 8) * 8 + after % 8, 64)
    for slots in banks:
        out |= coincidences((p % slots).view(rows, blocks), slots)
    return out


def coincidences(slot: Tensor, slots: int) -> dict[str, float]:
    """How often two rows read the same slot at the same block, and rows read pairs of slots."""
    rows, blocks = slot.shape
    out: dict[str, float] = {}
    resonant = slots // math.gcd(slots, blocks)  # rows this far apart differ by whole laps
    for distance in sorted({1, 2, 3, 8, 64, 128, 512, 1024, resonant}):
        if distance < rows:
            equal = (slot[:-distance] == slot[distance:]).sum(1).double()
            name = f"slots {slots} rows {distance}"
            out[name] = float(equal.mean())
            out[f"{name} squared"] = float((equal * equal).mean())
            out[f"{name} most"] = float(equal.max())
    other = slot[torch.randperm(rows, generator=torch.Generator().manual_seed(rows))]
    out[f"slots {slots} random rows"] = float((slot == other).double().mean())
    if blocks > 1:
        pairs = (slot[:, :-1] * slots + slot[:, 1:]).flatten()
        counts = torch.unique(pairs, return_counts=True)[1].double()
        out[f"slots {slots} pairs"] = float((counts * counts).sum())
    return out


Map = Callable[[int, int, int], Tensor]


def sample(make: Map, rows: int, blocks: int, count: int, banks: tuple[int, ...]) -> dict:
    """Name -> values over ``count`` keys, as one tensor each."""
    maps = [make(rows, blocks, key) for key in range(count + 1)]
    each = [statistics(maps[k], maps[k + 1], rows, blocks, banks) for k in range(count)]
    return {name: torch.tensor([one[name] for one in each]) for name in each[0]}


def score(x: Tensor, y: Tensor) -> float:
    """z-score of the difference of two means."""
    difference = float(x.mean() - y.mean())
    noise = math.sqrt(float(x.var() + y.var()) / len(x))
    return difference / noise if noise else math.copysign(2 * FAIL, difference) * (difference != 0)


def scores(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """z-scores of means and of mean squared deviations from the wanted mean."""
    out = {}
    for name in got:
        x, y = got[name].double(), wanted[name].double()
        out[name] = score(x, y)
        out[f"{name} spread"] = score((x - y.mean()) ** 2, (y - y.mean()) ** 2)
    return out


def worst(values: dict[str, float]) -> tuple[float, str]:
    return max((abs(z), name) for name, z in values.items())


@pytest.mark.parametrize(("rows", "blocks", "count", "banks"), SHAPES)
def test_law_looks_like_random_permutations(
    rows: int, blocks: int, count: int, banks: tuple[int, ...]
) -> None:
    wanted = sample(random, rows, blocks, count, banks)
    assert worst(scores(sample(law, rows, blocks, count, banks), wanted)) < (PASS, "")


@pytest.mark.parametrize("make", [identity, affine, four_rounds])
def test_bad_maps_fail(make: Map) -> None:
    rows, blocks, banks = 4096, 16, (704, 8192)
    wanted = sample(random, rows, blocks, 6, banks)
    failed = scores(sample(make, rows, blocks, 6, banks), wanted)
    assert worst(failed) > (FAIL, "")
    assert sum(abs(z) > FAIL for z in failed.values()) >= 2


# Lopsided products, where too few rounds let pairs of positions keep their difference.
@pytest.mark.parametrize(
    ("rows", "blocks", "slots"),
    [(20011, 32, 32768), (50021, 12, 32768), (32003, 16, 32768), (4096, 64, 32768)],
)
def test_rows_whole_laps_apart_do_not_coincide_too_often(
    rows: int, blocks: int, slots: int
) -> None:
    size, minor = rows * blocks, most_square_factors(rows * blocks)[1]
    distance = slots // math.gcd(slots, minor) * max(1, minor // blocks)
    seen, compared = 0, 0
    for key in range(3):
        slot = (law(rows, blocks, key) % slots).view(rows, blocks)
        for laps in range(1, 5):
            equal = slot[: -laps * distance] == slot[laps * distance :]
            seen, compared = seen + int(equal.sum()), compared + equal.numel()
    # Of the size - 1 other positions, size / slots - 1 share the slot.
    expected = compared * (size / slots - 1) / (size - 1)
    assert abs(seen - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize(
    ("rows", "blocks", "count"),
    [
        (4096, 16, 4),
        (512, 72, 4),
        (4096, 4, 6),
        (128256, 16, 1),
        (997, 13, 20),
        (4099, 16, 6),
        (20011, 32, 1),
        (50257, 12, 2),
        (64, 36, 60),
        (37, 13, 150),
        (20011, 1, 6),
        (300007, 1, 2),
    ],
)
def test_pairs_keep_their_difference_hardly_more_often(rows: int, blocks: int, count: int) -> None:
    """The weakest point of the law: a few per cent more such pairs, over all pairs of a layer."""
    size = rows * blocks
    minor = most_square_factors(size)[1]
    q = torch.arange(size)
    kept = []
    for make in (law, random):
        kept.append(0.0)
        for key in range(count):
            p = make(rows, blocks, key)
            shift = ((p // minor - q // minor) % (size // minor)) * minor + p % minor
            counts = torch.bincount(shift, minlength=size).double()
            kept[-1] += float((counts * (counts - 1) / 2).sum())
    assert abs(kept[0] / kept[1] - 1) < 0.03


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_tiny_permutations_are_equally_likely(size: int) -> None:
    count = 1200 if size == 5 else 480  # at least 10 for each that there is
    q = torch.arange(size)
    drawn = torch.stack([Permutation(size, seed=k, layer=1).forward(q) for k in range(count)])
    seen = torch.unique(drawn, dim=0, return_counts=True)[1].double()
    cells = math.factorial(size)
    assert len(seen) == cells
    chi = float(((seen - count / cells) ** 2).sum() * cells / count)
    assert abs(chi - (cells - 1)) < 4.5 * math.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("size", [6, 7, 16, 31, 36, 64, 100, 144, 169])
def test_small_permutations_spread_every_position(size: int) -> None:
    count = 400
    q = torch.arange(size)
    drawn = torch.stack([Permutation(size, seed=1, layer=k).forward(q) for k in range(count)])
    for values in (drawn[:, 0], drawn[:, -1], (drawn[:, 1] - drawn[:, 0] - 1) % size):
        cells = size - (values is not drawn[:, 0] and int(values.max()) < size - 1)
        chi = chi_square(values, cells)
        assert abs(chi - (cells - 1)) < 4.5 * math.sqrt(2 * (cells - 1))
    fixed = float((drawn == q).sum()) / count  # 1 on average, with variance 1
    assert abs(fixed - 1) * math.sqrt(count) < 4


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """z-scores of the correlation of every column of ±1 with every other."""
    return first.T @ second / math.sqrt(len(first))


def plus_minus(words: Tensor) -> Tensor:
    """32 columns of ±1 from the bits of words."""
    return ((words[:, None] >> torch.arange(32)) & 1).float() * 2 - 1


COUNT = 1 << 16


@pytest.mark.parametrize(("seed", "layer", "far"), [(0, 0, 0), (1, 5, 2**31 - 2**22)])
def test_sign_words_are_balanced_and_independent(seed: int, layer: int, far: int) -> None:
    q = torch.arange(COUNT) + far
    words = [plus_minus(sign_word(q, seed, layer, 0, word)) for word in range(4)]
    every = torch.cat(words, 1)
    found = [every.sum(0) / math.sqrt(COUNT)]  # balance
    upper = torch.triu_indices(128, 128, 1)
    found.append(correlations(every, every)[upper[0], upper[1]])  # bits of a block
    others = [sign_word(q + lag, seed, layer, 0, 0) for lag in (1, 2, 3, 8, 64, 72)]
    others += [sign_word(q + (1 << e), seed, layer, 0, 0) for e in (10, 12, 16, 18, 20)]
    others += [sign_word(q, seed, layer + 1, 0, 0), sign_word(q, seed + 1, layer, 0, 0)]
    others += [sign_word(q, seed, layer, 1, 0), q - far]
    p = Permutation(COUNT, seed, layer).forward(q - far)
    others += [p, p % 704, p % 31250]
    for other in others:
        columns = plus_minus(other)
        found.append(correlations(words[0], columns[:, columns.sum(0).abs() < COUNT / 2]))
    z = torch.cat([each.flatten() for each in found])
    assert float(z.abs().max()) < PASS
    assert abs(float(z.std()) - 1) < 0.02


def test_vector_and_element_signs_of_a_layer() -> None:
    """What the layer returns, against the neighbouring row, block, element, and the slot."""
    n, b = torch.arange(4096)[:, None], torch.arange(16)
    for reflect in ("vector", "element"):
        layer = LayerLaw(3, 1, 4096, 16, 64, 704, 5, reflect, permute=True)
        sign = layer.negative(n, b).float() * 2 - 1
        sign = sign if reflect == "element" else sign[..., :1]
        assert bool((layer.negative(n, b)[..., :1] * 2 - 1 == sign).all()) is (reflect == "vector")
        pairs = [(sign[:-d], sign[d:]) for d in (1, 2, 8, 64, 512, 2048)]
        pairs += [(sign[:, :-d], sign[:, d:]) for d in (1, 2, 8)]
        pairs += [(sign[..., :-d], sign[..., d:]) for d in (1, 2, 16, 32) if sign.shape[-1] > 1]
        slot = layer.slot(n, b)[..., None]
        pairs += [(sign, ((slot >> bit) & 1).float() * 2 - 1) for bit in range(7)]
        pairs.append((sign, torch.ones(1)))
        for first, second in pairs:
            product = first * second
            assert abs(float(product.sum())) < 5 * math.sqrt(product.numel())
