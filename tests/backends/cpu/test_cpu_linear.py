"""The compiled CPU kernels of a linear layer against written-out weights, in float64."""

from __future__ import annotations

import random

import brute_force as brute
import pytest
import torch
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels.backends.cpu import factored, rules, tiles, units
from rpg_kernels.bank.virtual_weight import VirtualWeight

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")

# None, or (window, laps)
WINDOWS = [None, (64, 1), (64, 4), (128, 3), (256, 16)]
ROWS = [1, 2, 7, 63, 64, 100, 129, 300, 1000, 4096, 5000]
COLUMNS = [32, 60, 64, 110, 128, 250]


def layer(rng: random.Random, window: tuple[int, int] | None, shape: tuple[int, int]):
    """A weight behind another layer, so that it begins in the middle of a window."""
    granularity = rng.choice([32, 64, 128])
    slots = rng.choice([300, 704, 1121])
    bank = brute.unit_bank(
        slots * granularity,
        granularity,
        rng.choice(["vector", "none"]),
        window=window and window[0],
        laps=window and window[1],
        seed=rng.randrange(100),
        init_std=1.0,
    )
    bank.place((rng.randint(1, 200), 64))
    return bank, bank.place(shape, scale=rng.choice([0.5, -1.25]))


def exact(weight: VirtualWeight, x: Tensor, dy: Tensor, bias: Tensor | None):
    """y, dx and dw in float64, from the weight that the reference unpacks."""
    bank = weight.bank.weight.detach().double().requires_grad_()
    with rpg.backend("reference"):
        dense = torch.ops.rpg_kernels.unpack(bank, None, weight.spec, "reference")
    x = x.detach().double().requires_grad_()
    y = torch.nn.functional.linear(x, dense, None if bias is None else bias.double())
    return y.detach(), *torch.autograd.grad(y, (x, bank), dy.double())


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).eps
    size = wanted.abs().max().clamp(min=1e-6)
    assert got.isfinite().all()
    assert (got.double() - wanted).abs().max() <= (4 * unit + 4e-6) * size


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("batch", [1, 3, 7, 16, 37])
def test_against_the_written_out_weight(window: tuple[int, int] | None, batch: int) -> None:
    rng = random.Random(f"{window} {batch}")
    for _ in range(4):
        rows, columns = rng.choice(ROWS), rng.choice(COLUMNS)
        dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
        bank, weight = layer(rng, window, (rows, columns))
        if rng.random() < 0.3 and dtype != torch.float32:
            bank.to(dtype)
        if rules.unsupported_weight(
            "linear", weight.spec
        ):  # odd columns may be cut into small blocks
            continue
        x, dy = torch.randn(batch, columns).to(dtype), torch.randn(batch, rows).to(dtype)
        bias = torch.randn(rows).to(dtype) if rng.random() < 0.5 else None
        y, dx, dw = exact(weight, x, dy, bias)
        op, spec, raw = torch.ops.rpg_kernels, weight.spec, bank.weight.detach()
        close(op.linear(x, raw, None, bias, spec, "cpu"), y, dtype)
        close(op.linear_input_grad(dy, raw, None, spec, "cpu"), dx, dtype)
        grad = op.linear_bank_grad(dy, x, None, spec, raw.dtype, "cpu")
        rounds = window is not None and units.pairs("linear_bank_grad", dtype, raw.dtype, spec)
        close(grad, dw, dtype if rounds else raw.dtype)


def test_ring_without_permutation_and_half_slots() -> None:
    """Blocks smaller than the bank's slots, and the ablation of the paper."""
    for permute in (True, False):
        for window, laps in ((None, None), (64, 4)):
            bank = brute.unit_bank(
                128 * 200, 128, permute=permute, window=window, laps=laps, init_std=1.0
            )
            weight = bank.place((500, 32))
            assert weight.placement.matrix.block == 32
            x, dy = torch.randn(5, 32), torch.randn(5, 500)
            y, dx, dw = exact(weight, x, dy, None)
            op, raw = torch.ops.rpg_kernels, bank.weight.detach()
            close(op.linear(x, raw, None, None, weight.spec, "cpu"), y, x.dtype)
            close(op.linear_input_grad(dy, raw, None, weight.spec, "cpu"), dx, x.dtype)
            got = op.linear_bank_grad(dy, x, None, weight.spec, raw.dtype, "cpu")
            close(got, dw, x.dtype)


def test_unread_slots_and_padding_may_hold_anything() -> None:
    """Infinities that no weight reads reach no result, neither forward nor backward."""
    bank = brute.unit_bank(64 * 300, 64, window=64, laps=4, init_std=1.0)
    weight = bank.place((200, 110))  # the last block's elements 46 to 63 are padding
    with torch.no_grad():
        grad = torch.ops.rpg_kernels.linear_bank_grad(
            torch.randn(7, 200), torch.randn(7, 110), None, weight.spec, torch.float32, "reference"
        ).flatten()
        unread = grad == 0
        assert unread.any()
        bank.weight.view(-1)[unread] = float("inf")
    for batch in (1, 4, 16):
        x, dy = torch.randn(batch, 110), torch.randn(batch, 200)
        op, raw = torch.ops.rpg_kernels, bank.weight.detach()
        assert op.linear(x, raw, None, None, weight.spec, "cpu").isfinite().all()
        assert op.linear_input_grad(dy, raw, None, weight.spec, "cpu").isfinite().all()


def test_same_bits_every_time_and_close_for_other_threads() -> None:
    bank = rpg.ParameterBank(64 * 500, 64, init_std=1.0)
    weight = bank.place((5000, 200))
    x, dy, before = torch.randn(20, 200), torch.randn(20, 5000), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            op, raw = torch.ops.rpg_kernels, bank.weight.detach()
            results.append(
                (
                    op.linear(x, raw, None, None, weight.spec, "cpu"),
                    op.linear_input_grad(dy, raw, None, weight.spec, "cpu"),
                    op.linear_bank_grad(dy, x, None, weight.spec, torch.float32, "cpu"),
                )
            )
    finally:
        torch.set_num_threads(before)
    for one, again in zip(results[1], results[3], strict=True):
        assert one.equal(again)
    for alone, others in zip(results[0], results[2], strict=True):
        close(others, alone.double(), torch.float32)
    # Rows and columns are one thread's: these do not depend on how many there are.
    assert results[0][0].equal(results[2][0])
    assert results[0][1].equal(results[2][1])


def test_strided_and_empty_inputs() -> None:
    bank = brute.unit_bank(64 * 500, 64, window=64, laps=2)
    weight = bank.place((300, 128))
    x = torch.randn(128, 6).t()
    with rpg.backend("cpu"):
        y = rpg.functional.linear(x, weight)
        assert rpg.functional.linear(x[:0], weight).shape == (0, 300)
        deep = rpg.functional.linear(torch.randn(2, 3, 128)[:, ::2], weight)
    assert y.equal(
        torch.ops.rpg_kernels.linear(x.contiguous(), bank.weight, None, None, weight.spec, "cpu")
    )
    assert deep.shape == (2, 2, 300)


def test_dispatch_takes_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    # A processor whose dense products are faster in 16 bits, and no others.
    monkeypatch.setattr(tiles, "dense_gain", lambda dtype: 1 if dtype == torch.float32 else 16)
    shared = rpg.nn.Linear(64, 1024, bank=brute.unit_bank(64 * 512, window=64, laps=4))
    alone = rpg.nn.Linear(64, 1024, bank=rpg.ParameterBank(64 * 5000))
    element = rpg.nn.Linear(64, 1024, bank=rpg.ParameterBank(64 * 512, reflect="element"))
    assert rpg.explain(shared, torch.empty(50, 64)).backend == "cpu"
    assert rpg.explain(alone, torch.empty(1, 64)).backend == "cpu"
    for batch in (50, 100, 1000):
        assert rpg.explain(alone, torch.empty(batch, 64)).backend == "cpu"
    low = rpg.nn.Linear(64, 1024, bank=alone.virtual_weight.bank, bias=False).bfloat16()
    few, many = torch.empty(32, 64).bfloat16(), torch.empty(33, 64).bfloat16()
    assert rpg.explain(low, few).backend == "cpu"
    assert rpg.explain(low, many).backend == "reference"
    explained = rpg.explain(element, torch.empty(1, 64))
    assert explained.backend == "reference"
    assert "one sign for a slot use" in explained.reason
    assert "would be slower" in rpg.explain(low, many).reason
    with rpg.backend("reference"):  # asked for, so nothing was left to it
        assert "would be slower" not in rpg.explain(low, many).reason
    assert "would be slower" not in rpg.explain(low, many[:0]).reason
    with rpg.scratch_limit(1000):
        assert rpg.explain(shared, torch.empty(50, 64)).backend == "reference"


def test_explain_says_how_many_rows_share_a_product() -> None:
    small, ring = rpg.ParameterBank(64 * 64), rpg.ParameterBank(64 * 800)
    shared = "the product of a slot is shared by the rows that read it, {} on average"
    alone = "every row has products of its own, as no slot is read by several"
    kernel = torch.empty(1, 64, 3, 3)
    for layer, x, wanted in (
        (rpg.nn.Linear(64, 256, bank=small), torch.empty(5, 64), shared.format(4)),
        (rpg.nn.Linear(64, 1024, bank=ring), torch.empty(5, 64), shared.format(1.28)),
        (rpg.nn.Linear(64, 800, bank=ring), torch.empty(5, 64), alone),
        (rpg.nn.Linear(64, 64, bank=small), torch.empty(5, 64), alone),
        (rpg.nn.Conv2d(64, 128, 1, bank=small), kernel, shared.format(2)),
        (rpg.nn.Conv2d(64, 64, 1, bank=small), kernel, alone),
    ):
        explained = rpg.explain(layer, x)
        assert (explained.backend, explained.reason) == ("cpu", f"compiled CPU kernels; {wanted}")
        with rpg.backend("cpu"):
            assert rpg.explain(layer, x) == explained
            assert rpg.explain(layer, x[:0]).backend == "cpu"


def test_refusals() -> None:
    element = rpg.ParameterBank(64 * 512, reflect="element").place((100, 64))
    small = rpg.ParameterBank(64 * 512, 4).place((100, 64))
    good = brute.unit_bank(64 * 512, window=64, laps=4).place((1000, 64))
    x = torch.randn(2, 64)
    with rpg.backend("cpu"):
        with pytest.raises(RuntimeError, match="one sign for a slot use"):
            rpg.functional.linear(x, element)
        with pytest.raises(RuntimeError, match="blocks of 16 to 128 elements, not of 4"):
            rpg.functional.linear(x, small)
        with pytest.raises(RuntimeError, match=r"not in torch\.float64"):
            torch.ops.rpg_kernels.linear(
                x.double(), good.bank.weight.double(), None, None, good.spec, "cpu"
            )
        with rpg.scratch_limit(1000), pytest.raises(RuntimeError, match="wanted at least"):
            rpg.functional.linear(x, good)
        assert rpg.functional.linear(x, good).shape == (2, 1000)


def test_steps_of_many_threads_and_little_scratch() -> None:
    """More threads share the scratch limit, and still never make a call slower by the count."""
    small = rpg.ParameterBank(16_384).place((14336, 4096))
    ring = rpg.ParameterBank(200_000).place((14336, 4096))
    before = torch.get_num_threads()
    cost: dict[object, float] = {}
    try:
        for threads in (1, 2, 8, 64):
            torch.set_num_threads(threads)
            for weight in (small, ring):
                for op in factored.PRODUCTS:
                    for batch in (1, 3, 16, 64):
                        step = factored.steps(op, batch, weight.spec)
                        assert step is not None
                        assert step.scratch <= 4 << 20
                        new = factored._cost(op, batch, weight.spec, step)
                        key = op, batch, weight.spec
                        assert new <= cost.get(key, new)
                        cost[key] = new
    finally:
        torch.set_num_threads(before)
    least = factored.smallest("linear", small.spec)
    with rpg.scratch_limit(least):
        assert factored.steps("linear", 16, small.spec) is not None
    with rpg.scratch_limit(least - 1):
        assert factored.steps("linear", 16, small.spec) is None


def test_explain_knows_autocast() -> None:
    layer = rpg.nn.Linear(64, 8000, bank=rpg.ParameterBank(64 * 5000))
    x = torch.empty(200, 64)
    with torch.autocast("cpu", torch.bfloat16):
        explained = rpg.explain(layer, x)
    assert explained.dtype == "torch.bfloat16"
    assert explained.backend == rpg.explain(layer.bfloat16(), x.bfloat16()).backend


def test_sums_of_thousands_of_rows_are_as_exact_as_torchs() -> None:
    """Of an input gradient whose rows share nothing, which once added one row after the other."""
    weight = rpg.ParameterBank(64 * 6000, init_std=1.0).place((4096, 128))
    bank, dy = weight.bank.weight.detach(), torch.randn(5, 4096)
    dense = weight.unpack().detach()
    exact = dy.double() @ dense.double()
    got = torch.ops.rpg_kernels.linear_input_grad(dy, bank, None, weight.spec, "cpu")
    error, torchs = (got - exact).abs().max(), (dy @ dense - exact).abs().max()
    assert error <= 2 * torchs + 1e-7 * exact.abs().max()
