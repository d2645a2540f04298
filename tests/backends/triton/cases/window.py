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
from torch import Tensor
from triton_process import DEVICE, INTERPRETED, poisoned

import rpg_kernels as rpg
from rpg_kernels.backends.triton import (
    conv2d,
    embedding,
    entries,
    entry_table,
    linear,
    unpack,
    window_law,
)
from rpg_kernels.backends.triton.config import Config
from rpg_kernels.law.placement import Placement
from rpg_kernels.law.window import WindowLaw, alignment

DTYPES = (torch.float32, torch.float16) if INTERPRETED else brute.ALL[1:]
REFLECT = ("element", "vector", "none")
GOLDEN = json.loads((Path(__file__).parents[3] / "golden" / "law2.json").read_text())["entries"]
TILES = Config(16, 16, 16, 4, 2, 2)

_position, _vector_sign = entries.position, entries.vector_sign
_slot_of, _sign_word = window_law.slot_of, entries._sign_word
_use, _row_and_block = window_law.use, window_law.row_and_block


@triton.jit
def _evaluate(
    n_ptr,  # [size]
    b_ptr,  # [size]
    law_ptr,  # [128]
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
    law_ptr,  # [128]
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


def bank_of(seed: int, dtype: torch.dtype, g: int) -> rpg.ParameterBank:
    return brute.window_bank(
        (64 + 37 * (seed % 2)) * g, granularity=g, reflect=REFLECT[seed % 3],
        permute=seed % 7 != 6, window=64, laps=1 + seed % 3, seed=seed, init_std=1.0, dtype=dtype,
    )  # fmt: skip


def close(got: Tensor, exact: Tensor, dtype: torch.dtype, what: object) -> None:
    assert got.dtype == dtype, what
    assert got.shape == exact.shape, what
    size = max(1.0, float(exact.abs().max()))
    error = float((got.detach().cpu().double() - exact).abs().max()) / size
    assert error < (1e-5 if dtype == torch.float32 else 4e-3 if dtype == torch.float16 else 3e-2), (
        what
    )


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("seed", range(8))
def test_linear(seed: int) -> None:
    """Entries in scratch, in bands of it and in line; parts of the weight; both ways of summing."""
    rng, dtype = random.Random(seed), DTYPES[seed % len(DTYPES)]
    g = (1, 4, 8, 16, 32, 64, 128, 64)[seed % 8]
    bank = bank_of(seed, dtype, g)
    bank.place((1, rng.randrange(1, 300)))
    weight = bank.place((rng.choice([7, 24]), 17 if g == 1 else rng.choice([40, 71])), scale=0.7)
    if seed % 2:
        weight = weight.narrow(0, 2, weight.shape[0] - 3).narrow(1, 5, weight.shape[1] - 11)
    x, dy = (torch.randn(9, size).to(dtype) for size in reversed(weight.shape))
    on, spec, a, d = bank.weight.detach().to(DEVICE), weight.spec, x.to(DEVICE), dy.to(DEVICE)
    w = brute.unpack(weight, brute.ring(bank)).detach()
    tiles = TILES if g >= 16 else None
    limit = (1 << 20, 4 * 16 * (w.shape[1] // g + 2), 0)[seed % 3]
    with rpg.scratch_limit(limit):
        y = linear.linear(a, on, None, None, spec, tiles)
        dx = linear.linear_input_grad(d, on, None, spec, tiles)
        torch.use_deterministic_algorithms(seed in (3, 4))
        try:
            dw = linear.linear_bank_grad(d, a, None, spec, dtype, tiles)
        finally:
            torch.use_deterministic_algorithms(False)
    close(y, x.double() @ w.t(), dtype, "y")
    close(dx, dy.double() @ w, dtype, "dx")
    close(dw, brute.pack(weight, dy.double().t() @ x.double()), dtype, "dw")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("shape", "groups", "g"),
    [((9, 16, 3, 3), 1, 16), ((8, 8, 3, 1), 2, 8), ((3, 1, 3, 3), 3, 16), ((5, 3, 3, 3), 1, 32)],
)
@pytest.mark.parametrize("reflect", ["vector", "element"])
def test_conv2d(shape: tuple[int, ...], groups: int, g: int, reflect: str) -> None:
    bank = brute.window_bank(70 * g, g, reflect, window=64, laps=2, init_std=1.0)
    bank.place((3, 40))
    weight = bank.place(shape, scale=0.5)
    x = torch.randn(2, shape[1] * groups, 6, 5).to(memory_format=torch.channels_last)
    geometry = ([2, 1], [1, 1], [1, 1], groups)
    on = bank.weight.detach().to(DEVICE)
    a = x.double().requires_grad_()
    w = brute.unpack(weight, brute.ring(bank)).detach().requires_grad_()
    exact = torch.conv2d(a, w, None, *geometry)
    dy = torch.randn(exact.shape).to(memory_format=torch.channels_last)
    dx, dw = torch.autograd.grad(exact, (a, w), dy.double())
    with rpg.scratch_limit(1 << 20 if groups == 1 or reflect == "vector" else 0):
        y = conv2d.conv2d(x.to(DEVICE), on, None, None, weight.spec, *geometry)
        how = (on, None, x.shape, weight.spec, *geometry)
        ours = conv2d.conv2d_input_grad(dy.to(DEVICE), *how)
        grad = conv2d.conv2d_bank_grad(
            dy.to(DEVICE), x.to(DEVICE), None, weight.spec, *geometry, torch.float32
        )
    close(y, exact.detach(), torch.float32, "y")
    close(ours, dx, torch.float32, "dx")
    close(grad, brute.pack(weight, dw), torch.float32, "dw")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("seed", range(8))
def test_lookup_unpack_and_pack(seed: int) -> None:
    g, dtype = (1, 4, 8, 16, 32, 64, 128, 16)[seed], DTYPES[seed % len(DTYPES)]
    bank = bank_of(seed, dtype, g)
    bank.place((2, 70))
    kernel = bank.place([(4, 3, 5, 3), (7, 20, 3, 1)][seed % 2])
    weight = bank.place((35, 21 if g == 1 else 42), scale=0.6)
    if seed % 2:
        weight = weight.narrow(0, 3, 30).narrow(1, 7, 31)
    on, exact = bank.weight.detach().to(DEVICE), brute.unpack(weight, brute.ring(bank)).detach()
    rows, columns = weight.shape
    index = torch.tensor([3, 0, rows - 1, 3, rows // 2])
    y = embedding.embedding(on, None, index.to(DEVICE), weight.spec)
    close(y, exact[index], dtype, "rows")
    dy = torch.randn(5, columns).to(dtype)
    dense = torch.zeros(rows, columns, dtype=torch.float64).index_add_(0, index, dy.double())
    dw = embedding.embedding_bank_grad(dy.to(DEVICE), index.to(DEVICE), None, weight.spec, dtype)
    close(dw, brute.pack(weight, dense), dtype, "dw")
    for one in (weight, kernel):
        wanted = brute.unpack(one, brute.ring(bank)).detach().to(dtype)
        close(unpack.unpack(on, None, one.spec), wanted.double(), dtype, "unpack")
        values = torch.randn(one.shape).to(dtype)
        got = unpack.pack(values.to(DEVICE), None, one.spec, dtype)
        close(got, brute.pack(one, values.double()), dtype, "pack")


def test_bands() -> None:
    """More than 2^31 positions: words of each band, and gradients that add up."""
    bank = brute.window_bank(1000, 8, "element", window=64, laps=4, init_std=1.0)
    whole = Placement(bank.generator, 3, 8 * 256 * 5, (2**29, 64), 0.5)
    height = whole.law.rows_per_band
    assert height < 2**29
    part = whole.narrow(0, height - 5, 9).narrow(1, 3, 58)
    n, b = torch.arange(height - 5, height + 4)[:, None], torch.arange(8)
    values = bank.weight.detach()
    w = values.view(-1, 8)[whole.law.slot(n, b)] * (1 - 2 * whole.law.negative(n, b).float())
    w = 0.5 * w.reshape(9, 64)[:, 3:61].double()
    x, dy = torch.randn(9, 58), torch.randn(9, 9)
    spec, on = part.to_json(), values.to(DEVICE)
    close(unpack.unpack(on, None, spec), w, torch.float32, "unpack")
    y = linear.linear(x.to(DEVICE), on, None, None, spec, TILES)
    close(y, x.double() @ w.t(), torch.float32, "y")
    dx = linear.linear_input_grad(dy.to(DEVICE), on, None, spec, TILES)
    close(dx, dy.double() @ w, torch.float32, "dx")


def test_through_dispatch_and_autograd() -> None:
    torch.manual_seed(0)
    bank = brute.window_bank(64 * 4, 4, window=64, laps=2)
    model = torch.nn.Sequential(
        rpg.nn.Embedding(20, 16, bank=bank), rpg.nn.Linear(16, 24, bank=bank), torch.nn.Tanh(),
        torch.nn.Linear(24, 5),
    )  # fmt: skip
    rpg.attach(model, bank).to(DEVICE)
    tokens = torch.tensor([[1, 5, 5], [19, 0, 2]], device=DEVICE)
    grads = {}
    for backend in ("triton", "reference"):
        with rpg.backend(backend):
            assert rpg.explain(model[1], torch.randn(3, 16, device=DEVICE)).backend == backend
            loss = model(tokens).square().sum()
            grads[backend] = (loss, *torch.autograd.grad(loss, list(model.parameters())))
    for ours, theirs in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
