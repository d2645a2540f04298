"""The device functions of the packing law against the golden vectors and the definition."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_process import DEVICE

from rpg_kernels.backends.triton import entry_table, plan  # noqa: F401  (plan repairs the interpreter)
from rpg_kernels.backends.triton import law as device_law
from rpg_kernels.law.ring import LayerLaw, Permutation
from rpg_kernels.law.unit import UnitLaw

GOLDEN = json.loads((Path(__file__).parents[3] / "golden" / "law1.json").read_text())["entries"]
POINTS = {name: entry for name, entry in GOLDEN.items() if "points" in entry}
WHOLE = {name: entry for name, entry in GOLDEN.items() if "points" not in entry}

_permute, _unpermute = device_law.permute, device_law.unpermute
_slot_of, _sign_word = device_law.slot_of, device_law.sign_word


@triton.jit
def _evaluate(
    q_ptr,  # [size]
    law_ptr,  # [192]
    out_ptr,  # [7, size], int64
    size,
    ROUNDS: tl.constexpr,
    SWAP_ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """P(q), P^-1(q), slot(q) and four sign words."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    q = tl.load(q_ptr + i, mask=mask, other=0).to(tl.uint32)
    out = out_ptr + i
    tl.store(out, _permute(q, law_ptr, ROUNDS, SWAP_ROUNDS).to(tl.int64), mask=mask)
    tl.store(out + size, _unpermute(q, law_ptr, ROUNDS, SWAP_ROUNDS).to(tl.int64), mask=mask)
    tl.store(out + 2 * size, _slot_of(q, law_ptr, ROUNDS, SWAP_ROUNDS).to(tl.int64), mask=mask)
    for w in tl.static_range(4):
        tl.store(out + (3 + w) * size, _sign_word(q, law_ptr, w).to(tl.int64), mask=mask)


def evaluate(law: LayerLaw, band: int, q: Tensor) -> Tensor:
    """int64 [7, positions] of band positions q."""
    out = torch.full((7, q.numel()), -1, dtype=torch.int64, device=DEVICE)
    words = device_law.law_words(law, band, DEVICE)
    grid = (triton.cdiv(q.numel(), 1024),)
    _evaluate[grid](q.to(DEVICE), words, out, q.numel(), *device_law.rounds(law, band)[:2], 1024)
    return out.cpu()


def by_points(law: LayerLaw, points: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """(slots, sign words) of (row, block) points, band by band."""
    found: dict[int, Tensor] = {}
    bands = [n // law.rows_per_band for n, _ in points]
    for band in set(bands):
        here = [i for i, of in enumerate(bands) if of == band]
        q = [(points[i][0] - band * law.rows_per_band) * law.blocks + points[i][1] for i in here]
        found |= dict(zip(here, evaluate(law, band, torch.tensor(q)).t(), strict=True))
    values = [found[i].tolist() for i in range(len(points))]
    return [v[2] for v in values], [v[3 : 3 + law.words] for v in values]


@pytest.mark.parametrize("name", list(POINTS))
def test_golden_points(name: str) -> None:
    entry = POINTS[name]
    found, words = by_points(LayerLaw(**entry["config"]), entry["points"])
    assert found == entry["slots"]
    for got, wanted in zip(words, entry.get("sign words", words), strict=True):
        assert got[: len(wanted)] == wanted


@pytest.mark.parametrize("name", list(WHOLE))
def test_golden_layers(name: str) -> None:
    """The slots of a whole layer, by the kernel that writes them into scratch."""
    entry = WHOLE[name]
    law = LayerLaw(**entry["config"])
    if DEVICE.type == "cpu" and law.rows * law.blocks > 1 << 16:
        pytest.skip("too slow in the interpreter")
    out = torch.full((law.blocks, law.rows), -1, dtype=torch.int32, device=DEVICE)
    words = device_law.law_words(law, 0, DEVICE)
    entry_table.write(out, words, 0, law.blocks, 0, "none", device_law.rounds(law, 0)[2])
    data = out.t().contiguous().cpu().numpy().astype("<i4").tobytes()
    assert hashlib.sha256(data).hexdigest() == entry["slots sha256"]


@pytest.mark.parametrize(
    "size", [1, 2, 3, 7, 128, 144, 37 * 13, 20011, 4099 * 16, 4096 * 16, 2**31, 2**31 - 1]
)
def test_permutation_and_inverse(size: int) -> None:
    rng = random.Random(size)
    law = LayerLaw(7, 3, size, 1, 64, rng.randrange(1, 2**31), 0, "element", True)
    p = Permutation(size, 7, 3)
    drawn = [rng.randrange(size) for _ in range(500)]
    q = torch.tensor(sorted({0, size - 1, size // 2, *drawn}))
    got = evaluate(law, 0, q)
    assert torch.equal(got[0], p.forward(q.clone()))
    assert torch.equal(got[1], p.inverse(q.clone()))
    zero = torch.zeros_like(q)
    assert torch.equal(got[2], law.slot(q, zero))
    assert torch.equal(got[3:5].t(), law.sign_words(q, zero))


def test_bands_without_permutation() -> None:
    law = LayerLaw(1, 2, 2**20, 5000, 32, 123457, 99, "vector", False)
    assert law.rows_per_band < law.rows
    points = [[0, 0], [law.rows_per_band - 1, 4999], [law.rows_per_band, 0], [2**20 - 1, 17]]
    found, words = by_points(law, points)
    n, b = torch.tensor(points).t()
    assert found == law.slot(n, b).tolist()
    assert words == law.sign_words(n, b).tolist()


def test_another_law_is_refused() -> None:
    """A subclass has the fields that these words are made of, and other values."""
    law = UnitLaw(0, 0, 64, 16, 64, 704, 0, "vector", True, laps=4, window=None, runs=1, taps=1)
    with pytest.raises(TypeError, match="law: got a UnitLaw, wanted a LayerLaw"):
        device_law.law_words(law, 0, DEVICE)


def test_bfloat16_products_of_the_interpreter_are_still_wrong() -> None:
    """When this fails, the interpreter can be trusted with bfloat16: lift the refusal."""
    if DEVICE.type != "cpu":
        pytest.skip("the interpreter's flaw")
    x = torch.randn(16, 32).bfloat16()
    out = torch.full((16, 16), torch.nan, dtype=torch.float32)
    _product[(1,)](x, out)
    error = (out - x.float() @ x.float().t()).abs().max()
    assert not error < 1


@triton.jit
def _product(
    x_ptr,  # [16, 32]
    out_ptr,  # [16, 16]
):
    """out = x · xᵀ."""
    x = tl.load(x_ptr + tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :])
    i = tl.arange(0, 16)
    tl.store(out_ptr + i[:, None] * 16 + i[None, :], tl.dot(x, tl.trans(x)))
