"""The unit law on the device: its functions against the definition, then every operator."""

from __future__ import annotations

import random
from collections.abc import Iterator

import brute_force as brute
import pytest
import torch
import triton
import triton.language as tl
import triton_layers as layers
from torch import Tensor
from triton_layers import close
from triton_process import DEVICE, INTERPRETED, poisoned

import rpg_kernels as rpg
from rpg_kernels.backends.triton import entries, entry_table, linear, unit_law, unpack
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import Placement
from rpg_kernels.law.unit import UnitLaw, alignment

DTYPES = (torch.float32, torch.float16) if INTERPRETED else brute.ALL[1:]
REFLECT = ("element", "vector", "none")

_position, _vector_sign = entries.position, entries.vector_sign
_slot_of, _sign_word = unit_law.slot_of, entries._sign_word
_use, _row_and_block = unit_law.use, unit_law.row_and_block


@triton.jit
def _evaluate(
    n_ptr,  # [size]
    b_ptr,  # [size]
    law_ptr,  # [192]
    out_ptr,  # [7, size], int64
    size,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p, slot, the vector's sign, two words of elements' signs, and (n, b) again."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    n, b = tl.load(n_ptr + i, mask=mask, other=0), tl.load(b_ptr + i, mask=mask, other=0)
    p = _position(n, b, 0, 0, law_ptr, LAW)
    out = out_ptr + i
    tl.store(out, p.to(tl.int64), mask=mask)
    slot = _slot_of(p, law_ptr, ROUNDS, SWAP_ROUNDS, LAW)
    tl.store(out + size, slot.to(tl.int64), mask=mask)
    tl.store(out + 2 * size, (_vector_sign(p, law_ptr, LAW) >> 31).to(tl.int64), mask=mask)
    for w in tl.static_range(2):
        tl.store(out + (3 + w) * size, _sign_word(p, law_ptr, w).to(tl.int64), mask=mask)
    row, block = _row_and_block(p, law_ptr)
    tl.store(out + 5 * size, row.to(tl.int64), mask=mask)
    tl.store(out + 6 * size, block.to(tl.int64), mask=mask)


@triton.jit
def _uses(
    slot_ptr,  # [size]
    law_ptr,  # [192]
    out_ptr,  # [uses, 3, size], int64
    most_ptr,  # [1]
    size,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    LAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(n, b, whether there is one) of each use of each slot; how many there may be."""
    i = tl.arange(0, BLOCK)
    mask = i < size
    slot = tl.load(slot_ptr + i, mask=mask, other=0).to(tl.uint32)
    most = unit_law.most_uses(law_ptr)
    tl.store(most_ptr, most)
    for number in range(0, most):
        p, live = _use(slot, number, law_ptr, ROUNDS, SWAP_ROUNDS, LAW)
        n, b = _row_and_block(p, law_ptr)
        out = out_ptr + number * 3 * size + i
        tl.store(out, n.to(tl.int64), mask=mask)
        tl.store(out + size, b.to(tl.int64), mask=mask)
        tl.store(out + 2 * size, live.to(tl.int64), mask=mask)


def check(law: UnitLaw, band: int, n: Tensor, b: Tensor) -> None:
    """Rows n, counted from the band's, and blocks b, broadcast against each other."""
    n, b = (t.flatten() for t in torch.broadcast_tensors(n, b))
    out = torch.full((7, n.numel()), -1, dtype=torch.int64, device=DEVICE)
    words, how = unit_law.law_words(law, band, DEVICE), unit_law.rounds(law, band)
    block = min(8192, triton.next_power_of_2(n.numel()))
    grid = (triton.cdiv(n.numel(), block),)
    _evaluate[grid](n.to(DEVICE).int(), b.to(DEVICE).int(), words, out, n.numel(), *how, block)
    got = out.cpu()
    whole = n + band * law.rows_per_band
    assert torch.equal(got[0], 8 * law.number(n, b, band)[3] + n % 8), law
    assert torch.equal(got[1], law.slot(whole, b)), law
    if law.reflect == "vector":
        assert torch.equal(got[2].bool(), law.negative(whole, b)[:, 0]), law
    if law.reflect == "element":
        signs = law.sign_words(whole, b)[:, :2]
        assert torch.equal(got[3 : 3 + signs.shape[1]].t(), signs), law
    assert torch.equal(got[5], n), law
    assert torch.equal(got[6], b), law


def draw(rng: random.Random, **fixed: object) -> UnitLaw:
    """A layer of odd sizes, at most some 10^4 positions."""
    laps, runs = rng.choice([1, 3, 4, 9, 16]), rng.choice([1, 1, 6, 9])
    fields = {
        "seed": rng.choice([0, 2**63 - 1, rng.randrange(2**63)]),
        "layer": rng.choice([0, 40, 5000]),
        "rows": rng.choice([1, 3, 13, 64, 97, 200, rng.randint(1, 400)]),
        "blocks": runs * rng.choice([1, 2, rng.randint(1, 40 // runs)]),
        "granularity": 1 << rng.randrange(8),
        "slots": rng.choice([1, 5, 8, 77, 1000, 31250]),
        "reflect": rng.choice(REFLECT),
        "permute": rng.random() < 0.85,
        "laps": laps,
        "window": rng.choice([None, 8, 24, 256]),
        "runs": runs,
    } | fixed
    laps, runs = fields["laps"], fields["runs"]
    divisors = [t for t in range(1, min(runs, laps) + 1) if runs % t == 0]
    fields.setdefault("taps", rng.choice(divisors))
    far = rng.choice([0, 1, rng.randrange(1000), 2**50])
    return UnitLaw(start=laps * far, **fields)


@pytest.mark.parametrize("seed", range(16))
def test_whole_layers(seed: int) -> None:
    law = draw(random.Random(seed))
    check(law, 0, torch.arange(law.rows)[:, None], torch.arange(law.blocks))


@pytest.mark.parametrize(
    ("rows", "blocks", "runs", "slots", "laps"),
    [
        (2**31, 1, 1, 2**31, 1),  # slots of 2^31, the most that a divider takes
        (2**31, 1, 1, 3, 64),
        (2**20, 5000, 1, 123457, 9),  # bands, which begin in the middle of an octet's uses
        (7, 2**28, 1, 2**22, 4),  # 2^28 columns
        (4097, 9 * 58111, 9, 70, 3),  # bands, and columns that swap or not
        (5 * 4096 + 77, 99991, 1, 31250, 3),
    ],
)
def test_far_positions(rows: int, blocks: int, runs: int, slots: int, laps: int) -> None:
    rng = random.Random(rows)
    how = {"rows": rows, "blocks": blocks, "runs": runs, "slots": slots, "laps": laps}
    law = draw(rng, permute=True, **how)
    bands = -(-rows // law.rows_per_band)
    for band in {0, bands - 1}:
        height = min(law.rows_per_band, rows - band * law.rows_per_band)
        n = [0, height - 1, height // 2, height - 1]
        b = [0, blocks - 1, blocks // 2, 0]
        n += [rng.randrange(height) for _ in range(300)]
        b += [rng.randrange(blocks) for _ in range(300)]
        check(law, band, torch.tensor(n), torch.tensor(b))


def check_uses(law: UnitLaw, band: int, slots: list[int]) -> None:
    """The inverse; uses of padding are there too, and name rows beyond the last."""
    some, words = torch.tensor(slots), unit_law.law_words(law, band, DEVICE)
    out = torch.full((4096, 3, some.numel()), -1, dtype=torch.int64, device=DEVICE)
    most = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _uses[(1,)](some.to(DEVICE), words, out, most, len(slots), *unit_law.rounds(law, band), 16)
    found, first = out[: int(most)].cpu(), band * law.rows_per_band
    for i, slot in enumerate(slots):
        n, b, live = found[:, :, i].t()
        inside = (live == 1) & (n + first < law.rows)
        wanted = law.positions(slot)
        wanted = wanted[wanted[:, 0] // law.rows_per_band == band]
        assert torch.equal(torch.stack((n + first, b), -1)[inside], wanted), law


@pytest.mark.parametrize(
    ("rows", "blocks", "runs", "slots", "permute", "taps"),
    [
        (13, 6, 1, 5, True, 1),  # slots that an octet reads twice
        (5, 6, 6, 7, True, 1),
        (70, 20, 1, 130, True, 1),
        (70, 18, 9, 130, True, 3),  # several groups of several taps
        (29, 10, 1, 64, False, 1),
        (1, 9, 9, 1000, True, 9),
    ],
)
def test_uses_of_slots(
    rows: int, blocks: int, runs: int, slots: int, permute: bool, taps: int
) -> None:
    rng = random.Random(rows)
    how = {"rows": rows, "blocks": blocks, "runs": runs, "slots": slots, "permute": permute}
    law = draw(rng, taps=taps, laps=max(3, taps), window=8, **how)
    check_uses(law, 0, sorted({0, slots - 1, *(rng.randrange(slots) for _ in range(9))}))


def test_uses_of_slots_in_bands() -> None:
    """The first use of a band is one of several of its octet, which the band before reads too."""
    how = {"rows": 2**20, "blocks": 5000, "runs": 1, "slots": 2**31 - 5, "laps": 9}
    law = draw(random.Random(0), permute=True, **how)
    assert law.first(1) % law.laps
    first = law.first(1) // law.laps * 8
    check_uses(law, 1, [(first + i) % law.slots for i in (0, 7, 8, 12345)])


def test_entries_in_scratch() -> None:
    """Parts of rows and of runs, with signs folded, in bit 31, and without."""
    law = draw(random.Random(0), rows=77, blocks=12, runs=3, reflect="vector", permute=True, laps=4)
    words = unit_law.law_words(law, 0, DEVICE)
    n, b = torch.arange(5, 70)[:, None], torch.tensor([1, 2, 5, 6, 9, 10])
    slot, negative = law.slot(n, b), law.negative(n, b)[..., 0]
    for sign, wanted in (
        ("none", slot),
        ("folded", slot + negative * law.slots),
        ("entry", torch.where(negative, slot - 2**31, slot)),
    ):
        out = torch.full((6, 65), -1, dtype=torch.int32, device=DEVICE)
        entry_table.write(out, words, 5, 12, 1, sign, unit_law.UNITS, runs=3, run_blocks=4)
        assert torch.equal(out.t().cpu().long(), wanted)


@pytest.fixture
def poison() -> Iterator[None]:
    with poisoned():
        yield


def generator_of(seed: int, g: int, slots: int) -> Generator:
    return Generator(
        slots, g, REFLECT[seed % 3], permute=seed % 7 != 6,
        window=(None, 16)[seed % 2], laps=(4, 3, 1, 16, 9)[seed % 5], seed=seed,
    )  # fmt: skip


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("seed", range(7))
def test_linear(seed: int) -> None:
    """Entries in scratch, in bands of it and in line; parts of the weight; both ways of summing."""
    rng, dtype = random.Random(seed), DTYPES[seed % len(DTYPES)]
    g = (1, 4, 8, 16, 32, 64, 128)[seed]
    shape = (rng.choice([7, 24]), 7 if g == 1 else rng.choice([40, 71]))
    one = layers.layer(generator_of(seed, g, (60, 5, 200)[seed % 3]), shape, dtype)
    if seed % 2:
        one = one.narrow((2, shape[0] - 3), (5, shape[1] - 11))
    limit = (1 << 20, 4 * 16 * (shape[1] // g + 2), 0)[seed % 3]
    tiles = layers.TILES if g >= 16 else None
    layers.check_linear(one, limit, ordered=seed in (3, 6), config=tiles)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("shape", "taps", "groups", "g", "reflect"),
    [
        ((9, 16, 2, 2), 2, 1, 16, "vector"),
        ((18, 8, 3, 1), 1, 2, 8, "element"),
        ((10, 8, 3, 1), 3, 2, 16, "vector"),
        ((6, 1, 2, 2), 1, 3, 4, "element"),  # a run of all taps
        ((8, 16, 3, 3), 9, 1, 16, "element"),
    ],
)
def test_conv2d(shape: tuple[int, ...], taps: int, groups: int, g: int, reflect: str) -> None:
    generator = Generator(70, g, reflect, laps=9, window=8)
    one = layers.layer(generator, shape, DTYPES[shape[0] % len(DTYPES)], taps)
    layers.check_conv2d(one, groups, 1 << 20 if reflect == "vector" else 0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("seed", range(7))
def test_lookup_unpack_and_pack(seed: int) -> None:
    """Rings of one or two programs of pack each, since the interpreter takes long for its uses."""
    g, dtype = (1, 4, 8, 16, 32, 64, 128)[seed], DTYPES[seed % len(DTYPES)]
    generator = generator_of(seed, g, (60, 60, 60, 60, 30, 15, 7)[seed])
    one = layers.layer(generator, (19, 9 if g == 1 else 42), dtype)
    if seed % 2:
        one = one.narrow((3, 14), (7, 31))
    layers.check_embedding(one)
    kernel = layers.layer(generator, [(4, 3, 5, 3), (7, 20, 3, 1)][seed // 4], dtype)
    layers.check_unpack_and_pack((one, kernel)[seed // 2 % 2])


@pytest.mark.usefixtures("poison")
def test_pack_of_a_ring_of_few_slots() -> None:
    """Each octet of rows reads some slots twice, and the ring's end lies inside octets."""
    one = layers.layer(generator_of(1, 8, 5), (11, 16), torch.float32)
    layers.check_unpack_and_pack(one)


def test_bands() -> None:
    """More than 2^31 positions: words of each band, and weights of both sides."""
    generator = Generator(125, 8, "element", laps=4)
    whole = Placement(generator, 3, 5 * alignment(8, 4), (2**31, 16), 0.5)
    height = whole.law.rows_per_band
    assert height < 2**31
    part = whole.narrow(0, height - 5, 9).narrow(1, 3, 11)
    n, b = torch.arange(height - 5, height + 4)[:, None], torch.arange(2)
    values = torch.randn(125, 8)
    w = values[whole.law.slot(n, b)] * (1 - 2 * whole.law.negative(n, b).float())
    w = 0.5 * w.reshape(9, 16)[:, 3:14].double()
    x, dy = torch.randn(9, 11), torch.randn(9, 9)
    spec, on = part.to_json(), values.to(DEVICE)
    close(unpack.unpack(on, None, spec), w, torch.float32, "unpack")
    y = linear.linear(x.to(DEVICE), on, None, None, spec, layers.TILES)
    close(y, x.double() @ w.t(), torch.float32, "y")
    dx = linear.linear_input_grad(dy.to(DEVICE), on, None, spec, layers.TILES)
    close(dx, dy.double() @ w, torch.float32, "dx")


def test_through_dispatch_and_autograd() -> None:
    """One bank, read by an embedding and by a linear layer behind it."""
    generator = Generator(60, 4, "vector", laps=4)
    table = layers.layer(generator, (20, 16), torch.float32)
    matrix = layers.Layer(layers.layer(generator, (24, 16), torch.float32).p, table.bank)
    tokens = torch.tensor([[1, 5, 5], [19, 0, 2]])
    bank = table.bank.to(DEVICE).requires_grad_()
    ops, how = torch.ops.rpg_kernels, "triton"
    with rpg.backend("triton"):
        x = ops.embedding(bank, None, tokens.to(DEVICE), table.spec, how)
        y = ops.linear(x, bank, None, None, matrix.spec, how)
        y.square().sum().backward()
    weights = [one.weight.requires_grad_() for one in (table, matrix)]
    exact = weights[0][tokens] @ weights[1].t()
    dense = torch.autograd.grad(exact.square().sum(), weights)
    close(y, exact.detach(), torch.float32, "y")
    grad = sum(one.pack(of) for one, of in zip((table, matrix), dense, strict=True))
    close(bank.grad, grad, torch.float32, "dw")
