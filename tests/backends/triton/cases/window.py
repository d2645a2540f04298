"""The window law on the device: its functions against the definition, then every operator."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import brute_force as brute
import pytest
import torch
import triton
import triton.language as tl
import triton_layers as layers
from torch import Tensor
from triton_layers import close
from triton_process import DEVICE, INTERPRETED, poisoned

from rpg_kernels.backends.triton import (
    entries,
    entry_table,
    linear,
    unpack,
    window_law,
)
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import Placement
from rpg_kernels.law.window import WindowLaw, alignment

DTYPES = (torch.float32, torch.float16) if INTERPRETED else brute.ALL[1:]
REFLECT = ("element", "vector", "none")
GOLDEN = json.loads((Path(__file__).parents[3] / "golden" / "law2.json").read_text())["entries"]

_position, _vector_sign = entries.position, entries.vector_sign
_slot_of, _sign_word = window_law.slot_of, entries._sign_word
_use, _row_and_block = window_law.use, window_law.row_and_block


@triton.jit
def _evaluate(
    n_ptr,  # [size]
    b_ptr,  # [size]
    law_ptr,  # [192]
    out_ptr,  # [7, size], int64
    size,
    blocks,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    SCRAMBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p, slot, the vector's sign, two words of elements' signs, and (n, b) again."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    n, b = tl.load(n_ptr + i, mask=mask, other=0), tl.load(b_ptr + i, mask=mask, other=0)
    p = _position(n, b, 0, blocks, law_ptr, SCRAMBLE)
    out = out_ptr + i
    tl.store(out, p.to(tl.int64), mask=mask)
    slot = _slot_of(p, law_ptr, ROUNDS, SWAP_ROUNDS, SCRAMBLE)
    tl.store(out + size, slot.to(tl.int64), mask=mask)
    tl.store(out + 2 * size, (_vector_sign(p, law_ptr, SCRAMBLE) >> 31).to(tl.int64), mask=mask)
    for w in tl.static_range(2):
        tl.store(out + (3 + w) * size, _sign_word(p, law_ptr, w).to(tl.int64), mask=mask)
    row, block = _row_and_block(p, blocks, law_ptr)
    tl.store(out + 5 * size, row.to(tl.int64), mask=mask)
    tl.store(out + 6 * size, block.to(tl.int64), mask=mask)


@triton.jit
def _uses(
    slot_ptr,  # [size]
    law_ptr,  # [192]
    out_ptr,  # [uses, 3, size], int64
    most_ptr,  # [1]
    size,
    blocks,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    SCRAMBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(n, b, whether there is one) of each use of each slot; how many there may be."""
    i = tl.arange(0, BLOCK)
    mask = i < size
    slot = tl.load(slot_ptr + i, mask=mask, other=0).to(tl.uint32)
    most = window_law.most_uses(law_ptr)
    tl.store(most_ptr, most)
    for number in range(0, most):
        p, live = _use(slot, number, law_ptr, ROUNDS, SWAP_ROUNDS, SCRAMBLE)
        n, b = _row_and_block(p, blocks, law_ptr)
        out = out_ptr + number * 3 * size + i
        tl.store(out, n.to(tl.int64), mask=mask)
        tl.store(out + size, b.to(tl.int64), mask=mask)
        tl.store(out + 2 * size, live.to(tl.int64), mask=mask)


def evaluate(law: WindowLaw, band: int, n: Tensor, b: Tensor) -> Tensor:
    """int64 [7, positions] of rows n, counted from the band's, and blocks b."""
    n, b = (t.flatten().to(DEVICE, torch.int32) for t in torch.broadcast_tensors(n, b))
    out = torch.full((7, n.numel()), -1, dtype=torch.int64, device=DEVICE)
    words = window_law.law_words(law, band, DEVICE)
    how = (n.numel(), law.blocks, *window_law.rounds(law, band), 1024)
    _evaluate[(triton.cdiv(n.numel(), 1024),)](n, b, words, out, *how)
    return out.cpu()


def check(law: WindowLaw, band: int, n: Tensor, b: Tensor) -> None:
    got = evaluate(law, band, n, b)
    n, b = (t.flatten() for t in torch.broadcast_tensors(n, b))
    whole = n + band * law.rows_per_band
    assert torch.equal(got[0], law.order(n, b, band)), law
    assert torch.equal(got[1], law.slot(whole, b)), law
    if law.reflect == "vector":
        assert torch.equal(got[2].bool(), law.negative(whole, b)[:, 0]), law
    if law.reflect == "element":
        words = law.sign_words(whole, b)[:, :2]
        assert torch.equal(got[3 : 3 + words.shape[1]].t(), words), law
    assert torch.equal(got[5], n), law
    assert torch.equal(got[6], b), law


def draw(rng: random.Random, **fixed: object) -> WindowLaw:
    """A layer of odd sizes, at most some 10^4 positions."""
    rows, window = rng.choice([1, 3, 13, 64, 97, 200, rng.randint(1, 400)]), 64 << rng.randrange(4)
    fields = {
        "seed": rng.choice([0, 2**63 - 1, rng.randrange(2**63)]),
        "layer": rng.choice([0, 40, 5000]),
        "rows": rows,
        "blocks": rng.choice([1, 2, 9, 16, rng.randint(1, 40)]),
        "granularity": 1 << rng.randrange(8),
        "slots": rng.choice([window, window + 1, 3 * window, window + 77, 31250]),
        "reflect": rng.choice(REFLECT),
        "permute": rng.random() < 0.85,
        "window": window,
        "laps": rng.choice([1, 2, 3, 4, 7]),
    } | fixed
    step = alignment(fields["rows"])
    fields.setdefault("start", step * rng.choice([0, 1, rng.randrange(1000), 2**55 // step]))
    return WindowLaw(**fields)


@pytest.mark.parametrize("name", [name for name, entry in GOLDEN.items() if "points" in entry])
def test_golden_points(name: str) -> None:
    entry = GOLDEN[name]
    law = WindowLaw(**entry["config"])
    rows, blocks = torch.tensor(entry["points"]).t()
    bands = rows // law.rows_per_band
    for band in bands.unique().tolist():
        here = bands == band
        got = evaluate(law, band, rows[here] - band * law.rows_per_band, blocks[here])
        assert torch.equal(got[1], torch.tensor(entry["slots"])[here])
        if law.reflect != "none":
            words = torch.tensor(entry["sign words"])[here, :2]
            signs = got[2:3] << 31 if law.reflect == "vector" else got[3 : 3 + words.shape[1]]
            assert torch.equal(signs.t(), words & (1 << 31) if law.reflect == "vector" else words)


@pytest.mark.parametrize("seed", range(16))
def test_whole_layers(seed: int) -> None:
    law = draw(random.Random(seed))
    check(law, 0, torch.arange(law.rows)[:, None], torch.arange(law.blocks))


@pytest.mark.parametrize(
    ("rows", "blocks", "slots", "window", "laps"),
    [
        (2**31, 1, 2**31, 2**22, 1),  # first slots of 2^31, the most that a divider takes
        (2**31, 1, 3 * 2**20 + 5, 64, 1),
        (2**20, 5000, 123457, 4096, 16),  # bands
        (1, 2**31, 2**22, 2**22, 64),
        (4097, 2**19 - 1, 70, 64, 3),
        (5 * 4096 + 77, 99991, 31250, 256, 4),
    ],
)
def test_far_positions(rows: int, blocks: int, slots: int, window: int, laps: int) -> None:
    rng = random.Random(rows)
    for offset in (0, 1, 12345):
        start = alignment(rows) * (2**55 + offset)
        law = draw(
            rng, rows=rows, blocks=blocks, slots=slots, window=window, laps=laps, start=start,
            permute=offset != 12345,
        )  # fmt: skip
        bands = -(-rows // law.rows_per_band)
        for band in {0, bands - 1}:
            height = law.rows_in(band)
            n = [0, height - 1, height // 4096 * 4096 % height]
            b = [0, blocks - 1, blocks // 2]
            n += [rng.randrange(height) for _ in range(300)]
            b += [rng.randrange(blocks) for _ in range(300)]
            check(law, band, torch.tensor(n + n[:3]), torch.tensor(b + b[2::-1]))


@pytest.mark.parametrize("seed", range(8))
def test_uses_of_slots(seed: int) -> None:
    rng = random.Random(seed)
    shape = {"rows": (1, 13, 70)[seed % 3], "blocks": rng.randint(1, 20)}
    law = draw(rng, slots=rng.choice([64, 130]), window=64, **shape)
    some = torch.tensor(sorted({0, law.slots - 1, *(rng.randrange(law.slots) for _ in range(9))}))
    words, how = window_law.law_words(law, 0, DEVICE), window_law.rounds(law)
    out = torch.full((4096, 3, some.numel()), -1, dtype=torch.int64, device=DEVICE)
    most = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    _uses[(1,)](some.to(DEVICE), words, out, most, some.numel(), law.blocks, *how, 16)
    found = out[: int(most)].cpu()
    for i, slot in enumerate(some.tolist()):
        n, b, live = found[:, :, i].t()
        assert torch.equal(torch.stack((n, b), -1)[live == 1], law.positions(slot)), law


def test_entries_in_scratch() -> None:
    """Parts of rows and of runs, with signs folded, in bit 31, and without."""
    law = draw(random.Random(0), rows=77, blocks=24, reflect="vector", permute=True, laps=2)
    words, rounds = window_law.law_words(law, 0, DEVICE), window_law.rounds(law)
    n, b = torch.arange(5, 70)[:, None], torch.tensor([2, 3, 4, 10, 11, 12, 18, 19, 20])
    slot, negative = law.slot(n, b), law.negative(n, b)[..., 0]
    for sign, wanted in (
        ("none", slot),
        ("folded", slot + negative * law.slots),
        ("entry", torch.where(negative, slot - 2**31, slot)),
    ):
        out = torch.full((9, 65), -1, dtype=torch.int32, device=DEVICE)
        entry_table.write(out, words, 5, 24, 2, sign, rounds, runs=3, run_blocks=8)
        assert torch.equal(out.t().cpu().long(), wanted)


@pytest.fixture
def poison() -> Iterator[None]:
    with poisoned():
        yield


def generator_of(seed: int, g: int) -> Generator:
    return Generator(
        64 + 37 * (seed % 2), g, REFLECT[seed % 3], permute=seed % 7 != 6, window=64,
        laps=1 + seed % 3, seed=seed, law=2,
    )  # fmt: skip


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("seed", range(8))
def test_linear(seed: int) -> None:
    """Entries in scratch, in bands of it and in line; parts of the weight; both ways of summing."""
    rng, dtype = random.Random(seed), DTYPES[seed % len(DTYPES)]
    g = (1, 4, 8, 16, 32, 64, 128, 64)[seed % 8]
    shape = (rng.choice([7, 24]), 17 if g == 1 else rng.choice([40, 71]))
    one = layers.layer(generator_of(seed, g), shape, dtype)
    if seed % 2:
        one = one.narrow((2, shape[0] - 3), (5, shape[1] - 11))
    limit = (1 << 20, 4 * 16 * (shape[1] // g + 2), 0)[seed % 3]
    tiles = layers.TILES if g >= 16 else None
    layers.check_linear(one, limit, ordered=seed in (3, 6), config=tiles)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("shape", "groups", "g"),
    [((9, 16, 3, 3), 1, 16), ((8, 8, 3, 1), 2, 8), ((3, 1, 3, 3), 3, 16), ((5, 3, 3, 3), 1, 32)],
)
@pytest.mark.parametrize("reflect", ["vector", "element"])
def test_conv2d(shape: tuple[int, ...], groups: int, g: int, reflect: str) -> None:
    one = layers.layer(Generator(70, g, reflect, window=64, laps=2, law=2), shape, torch.float32)
    layers.check_conv2d(one, groups, 1 << 20 if groups == 1 or reflect == "vector" else 0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("seed", range(8))
def test_lookup_unpack_and_pack(seed: int) -> None:
    g, dtype = (1, 4, 8, 16, 32, 64, 128, 16)[seed], DTYPES[seed % len(DTYPES)]
    generator = generator_of(seed, g)
    one = layers.layer(generator, (35, 21 if g == 1 else 42), dtype)
    if seed % 2:
        one = one.narrow((3, 30), (7, one.p.shape[1] - 11))
    layers.check_embedding(one)
    kernel = layers.layer(generator, [(4, 3, 5, 3), (7, 20, 3, 1)][seed % 2], dtype)
    for any_of_them in (one, kernel):
        layers.check_unpack_and_pack(any_of_them)


def test_bands() -> None:
    """More than 2^31 positions: words of each band, and gradients that add up."""
    generator = Generator(125, 8, "element", window=64, laps=4, law=2)
    whole = Placement(generator, 3, 8 * 256 * 5, (2**29, 64), 0.5)
    height = whole.law.rows_per_band
    assert height < 2**29
    part = whole.narrow(0, height - 5, 9).narrow(1, 3, 58)
    n, b = torch.arange(height - 5, height + 4)[:, None], torch.arange(8)
    values = torch.randn(125, 8)
    w = values[whole.law.slot(n, b)] * (1 - 2 * whole.law.negative(n, b).float())
    w = 0.5 * w.reshape(9, 64)[:, 3:61].double()
    x, dy = torch.randn(9, 58), torch.randn(9, 9)
    spec, on = part.to_json(), values.to(DEVICE)
    close(unpack.unpack(on, None, spec), w, torch.float32, "unpack")
    y = linear.linear(x.to(DEVICE), on, None, None, spec, layers.TILES)
    close(y, x.double() @ w.t(), torch.float32, "y")
    dx = linear.linear_input_grad(dy.to(DEVICE), on, None, spec, layers.TILES)
    close(dx, dy.double() @ w, torch.float32, "dx")
