"""The fused linear kernels against float64, over odd shapes, places, maps, limits and strides."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import brute_force as brute
import naive_calls as calls
import pytest
import torch
from torch import Tensor
from triton_process import DEVICE, INTERPRETED, bank_of, poisoned

import rpg_kernels as rpg
from rpg_kernels.backends import dispatch
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.triton import linear as kernels
from rpg_kernels.backends.triton import linear_bank_grad, plan
from rpg_kernels.backends.triton.config import Config, Gpu, choose
from rpg_kernels.law.placement import Placement

REFLECT = ("element", "vector", "none")
GRANULARITY = (1, 2, 4, 8, 16, 32, 64, 128)
LIMITS = (None, 0, 400, 3000, 1 << 16)
DTYPES = (torch.float32, torch.float16) if INTERPRETED else brute.ALL[1:]
# None, row bands, all entries, and an operand copy beside them.
LIMITS_OF_BANDS = {4: (0, 18 * 4 * 17, 1 << 16), 32: (0, 3 * 4 * 17, 1 << 16)}
# Small tiles, so that small shapes have several; the usual ones are tested too.
TILES = Config(16, 16, 16, 4, 2, 2)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned():
        yield


def dense_in(
    dtype: torch.dtype, weight: rpg.VirtualWeight, x: Tensor, bias: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dw) with a dense weight in a dtype, on the CPU."""
    w = brute.unpack(weight, brute.ring(weight.bank)).detach().to(dtype)
    x, dy = x.to(dtype), dy.to(dtype)
    y = torch.nn.functional.linear(x, w, None if bias is None else bias.to(dtype))
    dw = dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return y, dy @ w, brute.pack(weight, dw)


def check(
    weight: rpg.VirtualWeight,
    x: Tensor,
    dy: Tensor,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All three operators, by the accuracy criterion."""
    bank, spec = weight.bank.weight.detach(), weight.spec
    table = None if weight.bank.table is None else weight.bank.table.to(DEVICE)
    bank, a, d = bank.to(DEVICE), x.to(DEVICE), dy.to(DEVICE)
    added = None if bias is None else bias.to(DEVICE)
    got = (
        kernels.linear(a, bank, table, added, spec, config),
        kernels.linear_input_grad(d, bank, table, spec, config),
        kernels.linear_bank_grad(d, a, table, spec, bank.dtype, config),
    )
    exact = dense_in(torch.float64, weight, x, bias, dy)
    torchs = dense_in(x.dtype, weight, x, bias, dy)
    wanted = (x.dtype, x.dtype, bank.dtype)
    for name, g, e, t, of in zip(("y", "dx", "dw"), got, exact, torchs, wanted, strict=True):
        assert g.dtype == of, name
        assert g.shape == e.shape, name
        if not g.numel():
            continue
        brute.assert_accurate(g.cpu(), e, t.to(of), name)
    return got


@pytest.mark.parametrize("seed", range(24))  # every granularity with every kind of sign
def test_random(seed: int) -> None:
    rng = random.Random(seed)
    g, dtype = GRANULARITY[seed % 8], DTYPES[seed % 5 % len(DTYPES)]
    bank_dtype = rng.choice([dtype, torch.float32])
    bank = brute.bank_of(
        rng.randrange(g, 3000),
        bank_dtype,
        granularity=g,
        reflect=REFLECT[seed % 3],
        permute=seed % 7 != 0,
        seed=seed,
    )
    bank.place((1, rng.randrange(1, 300)))
    rows, columns = rng.choice([1, 3, 16, 21, 40]), rng.choice([1, 13, 48, 64, 97, 150])
    weight = bank.place((rows, columns), scale=rng.uniform(0.2, 2))
    if min(rows, columns) > 3:
        first = rng.randrange(1, columns - 1)
        weight = weight.narrow(0, 1, rows - 2).narrow(1, first, rng.randint(1, columns - first))
    m = rng.choice([1, 5, 17, 33])
    x = torch.randn(m, weight.shape[1]).to(dtype)
    dy = torch.randn(m, weight.shape[0]).to(dtype)
    bias = torch.randn(weight.shape[0]).to(rng.choice([dtype, bank_dtype])) if seed % 2 else None
    limit = rng.choice(LIMITS)
    tiles = TILES if g >= 16 or g == 1 else None
    if limit is None:
        check(weight, x, dy, bias, tiles)
    else:
        with rpg.scratch_limit(limit):
            check(weight, x, dy, bias, tiles)


@pytest.mark.parametrize("laps", [None, 3])
def test_naive(laps: int | None) -> None:
    rng = random.Random(str(laps))
    weight = calls.part(rng, calls.drawn(rng, (40, 48), granularity=16, laps=laps))
    arguments = calls.arguments(weight, rng, torch.float32)
    for name in ("linear", "linear_input_grad", "linear_bank_grad"):
        operands = calls.cast(arguments[name], torch.float32)
        operands = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in operands]
        got = getattr(kernels, name)(*operands)
        calls.compare(name, arguments[name], got, torch.float32)


@pytest.mark.parametrize(("g", "reflect"), [(4, "vector"), (32, "vector"), (32, "element")])
def test_scratch_stays_within_the_limit_and_changes_no_result(g: int, reflect: str) -> None:
    """Row bands, column bands, operand copies or none: the weights are the same bits."""
    permute = not INTERPRETED or g == 4
    bank = bank_of(600, torch.float16, granularity=g, reflect=reflect, permute=permute)
    weight = bank.place((24, 72), scale=0.5).narrow(1, 7, 60)
    x, dy = torch.randn(17, 60).half(), torch.randn(17, 24).half()
    tiles = Config(16, 16, 32, 4, 2)
    results, kinds = [], set()
    make, write = plan.scratch, plan.entry_table.write
    for limit in LIMITS_OF_BANDS[g]:
        held: list[weakref.ref[Tensor]] = []

        def counted(*args: object, held: list[Any] = held, limit: int = limit) -> Tensor:
            tensor = make(*args)  # type: ignore[arg-type]
            held.append(weakref.ref(tensor))
            assert sum(t.nbytes for t in (r() for r in held) if t is not None) <= limit
            return tensor

        def recorded(*args: object, limit: int = limit) -> None:
            kinds.add(limit)
            write(*args)  # type: ignore[arg-type]

        with (
            rpg.scratch_limit(limit),
            mock.patch.object(plan, "scratch", counted),
            mock.patch.object(plan.entry_table, "write", recorded),
        ):
            results.append(check(weight, x, dy, None, tiles))
    assert kinds == set(LIMITS_OF_BANDS[g][1:])  # where entries were tabulated
    for y, dx, _ in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


@pytest.mark.parametrize(("g", "reflect"), [(4, "vector"), (64, "element")])
def test_tiles_of_every_configuration_hold_the_same_bits(g: int, reflect: str) -> None:
    """Against the unit matrix a product is the weight itself."""
    permute = not INTERPRETED or g == 64
    bank = bank_of(1500, torch.float16, granularity=g, reflect=reflect, permute=permute)
    weight = bank.place((18, 64), scale=1.0).narrow(1, 3, 58)
    wanted = brute.unpack(weight, brute.ring(bank)).detach().half()
    on, spec = bank.weight.detach().to(DEVICE), weight.spec
    x, dy = torch.eye(58).half().to(DEVICE), torch.eye(18).half().to(DEVICE)
    for config in (TILES, Config(32, 32, 32, 4, 2), Config(128, 16, 16 if g < 64 else 64, 4, 2)):
        for limit in (0, 1 << 20):
            with rpg.scratch_limit(limit):
                y = kernels.linear(x, on, None, None, spec, config)
                dx = kernels.linear_input_grad(dy, on, None, spec, config)
            assert torch.equal(y.cpu().t(), wanted)
            assert torch.equal(dx.cpu(), wanted)


@pytest.mark.parametrize("g", [4, 16, 128])
def test_bank_gradient_of_the_largest_tile(g: int) -> None:
    """Its halves are scattered one after the other."""
    weight = bank_of(1500, torch.float16, granularity=g, reflect="element").place((20, 300))
    x, dy = torch.randn(5, 300).half(), torch.randn(5, 20).half()
    check(weight, x, dy, None, Config(16, 256, 128, 8, 2))


@pytest.mark.parametrize("m", [1, 17])
def test_tables(m: int) -> None:
    bank = brute.table_bank(50, entries=21 * 70 + 5, dtype=torch.float32)
    bank.place((1, 5))
    weight = bank.place((21, 70), scale=0.7)
    for part in (weight, weight.narrow(1, 3, 50).narrow(0, 2, 15)):
        check(part, torch.randn(m, part.shape[1]), torch.randn(m, part.shape[0]), None, TILES)


@pytest.mark.parametrize("g", [8, 64])
def test_law_of_several_bands(g: int) -> None:
    """More than 2^31 positions: a launch per band, results that add up."""
    rows = 2**31 // 4
    matrix = (rows, 8 * g)
    bank = brute.bank_of(1000, torch.float32, granularity=g, reflect="element")
    whole = Placement(bank.generator, 3, g * 5, matrix, 0.5)
    height = whole.law.rows_per_band
    assert height < rows
    part = whole.narrow(0, height - 5, 9).narrow(1, 3, 8 * g - 5)
    n = torch.arange(height - 5, height + 4)[:, None]
    b = torch.arange(8)
    ring = bank.weight.detach().view(-1, g)
    w = ring[whole.law.slot(n, b)] * (1 - 2 * whole.law.negative(n, b).float())
    w = 0.5 * w.reshape(9, 8 * g)[:, 3:-2].double()
    x, dy = torch.randn(20, w.shape[1]), torch.randn(20, 9)
    spec, on = part.to_json(), bank.weight.detach().to(DEVICE)
    y = kernels.linear(x.to(DEVICE), on, None, None, spec)
    dx = kernels.linear_input_grad(dy.to(DEVICE), on, None, spec)
    torch.testing.assert_close(y.cpu().double(), x.double() @ w.t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dx.cpu().double(), dy.double() @ w, rtol=1e-5, atol=1e-4)
    op = torch.ops.rpg_kernels.linear_bank_grad  # the reference has the same bands
    reference = op(dy.double(), x.double(), None, spec, torch.float64, "reference")
    dw = kernels.linear_bank_grad(dy.to(DEVICE), x.to(DEVICE), None, spec, torch.float32)
    torch.testing.assert_close(dw.cpu().double(), reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("g", "reflect"), [(2, "vector"), (16, "element")])
def test_deterministic_bank_gradient(g: int, reflect: str) -> None:
    bank = bank_of(500, torch.float32, granularity=g, reflect=reflect)
    weight = bank.place((15, 60), scale=0.6).narrow(1, 5, 50).narrow(0, 2, 12)
    x, dy = torch.randn(33, 50), torch.randn(33, 12)
    torch.use_deterministic_algorithms(True)
    try:
        _, _, first = check(weight, x, dy, None, TILES)
        with rpg.scratch_limit(4 * 50 * 5):
            _, _, bands = check(weight, x, dy, None, TILES)
        with rpg.scratch_limit(8192):
            _, _, again = check(weight, x, dy, None, TILES)
        assert torch.equal(first, again)
        assert torch.allclose(first, bands, rtol=1e-5, atol=1e-5)
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_bank_gradient_of_a_table() -> None:
    weight = brute.table_bank(50, entries=11 * 70, dtype=torch.float32).place((11, 70))
    torch.use_deterministic_algorithms(True)
    try:
        check(weight, torch.randn(4, 70), torch.randn(4, 11), None, TILES)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "leading", "flipped"])
def test_strides(layout: str) -> None:
    weight = bank_of(700, torch.float32, granularity=16).place((20, 50))

    def of(columns: int) -> Tensor:
        x = torch.randn(6, columns)
        strided = torch.empty(12, 2 * columns)[::2, ::2]
        return {
            "transposed": x.t().contiguous().t(),
            "strided": strided.copy_(x),
            "expanded": x[:1].expand(6, -1),
            "leading": x.view(2, 3, -1).permute(1, 0, 2),
            "flipped": x.flip(0)[1:],
        }[layout]

    check(weight, of(50), of(20))


def test_misaligned_and_non_contiguous_banks() -> None:
    bank = bank_of(640, torch.float16, granularity=16, reflect="element")
    weight = bank.place((20, 50))
    x, dy = torch.randn(3, 50).half(), torch.randn(3, 20).half()
    values = bank.weight.detach().clone()
    shifted = torch.cat((values.new_zeros(1), values.flatten()))[1:].view(values.shape)
    assert shifted.data_ptr() % 4 == 2
    for moved in (shifted, values.t().contiguous().t()):
        bank.weight = torch.nn.Parameter(moved)
        check(weight, x, dy)


@pytest.mark.parametrize("leading", [(0,), (2, 0), ()])
def test_empty_batch_and_no_batch(leading: tuple[int, ...]) -> None:
    weight = bank_of(640, torch.float32, granularity=16).place((20, 50))
    y, dx, dw = check(weight, torch.randn(*leading, 50), torch.randn(*leading, 20))
    assert y.shape == (*leading, 20)
    assert dx.shape == (*leading, 50)
    assert leading == () or not dw.any()


@pytest.mark.parametrize("reflect", REFLECT)
def test_nan_reaches_what_reads_it_and_nothing_else(reflect: str) -> None:
    bank = bank_of(2048, torch.float16, granularity=16, reflect=reflect)
    weight = bank.place((12, 43))
    index, _ = brute.index_and_sign(weight)
    unread = sorted(set(range(bank.dof)) - set(index.flatten().tolist()))
    with torch.no_grad():
        bank.weight.view(-1)[unread] = torch.nan  # padding and slots that this layer never uses
        bank.weight.view(-1)[index[4, 17]] = torch.nan
    rows = (index == index[4, 17]).any(1)
    columns = (index == index[4, 17]).any(0)
    on = bank.weight.detach().to(DEVICE)
    for m in (1, 20):
        x = torch.ones(m, 43, dtype=torch.float16, device=DEVICE)
        dy = torch.ones(m, 12, dtype=torch.float16, device=DEVICE)
        y = kernels.linear(x, on, None, None, weight.spec)
        dx = kernels.linear_input_grad(dy, on, None, weight.spec)
        assert torch.equal(y.isnan().cpu(), rows.expand(m, 12))
        assert torch.equal(dx.isnan().cpu(), columns.expand(m, 43))


def test_through_dispatch_and_autograd() -> None:
    bank = bank_of(640, torch.float32, granularity=16).to(DEVICE)
    layer = rpg.nn.Linear(50, 20, bank=bank).to(DEVICE)
    x = torch.randn(3, 50, device=DEVICE, requires_grad=True)
    grads = {}
    for name in ("triton", "reference"):
        with rpg.backend(name):
            e = rpg.explain(layer, x)
            assert e.backend == name
            leaves = (x, bank.weight)
            y = layer(x)
            grads[name] = (y, *torch.autograd.grad(y.sin().sum(), leaves, create_graph=True))
            second = sum(g.square().sum() for g in grads[name][1:])
            grads[name] += torch.autograd.grad(second, leaves)
    for ours, theirs in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert rpg.explain(layer, x).backend == "reference"


@pytest.mark.parametrize(
    ("op", "dtype", "reason"),
    [
        ("linear", torch.float64, "not in torch.float64"),
        pytest.param(
            "linear",
            torch.bfloat16,
            "computes wrongly in bfloat16",
            marks=pytest.mark.skipif(not INTERPRETED, reason="the interpreter's flaw"),
        ),
    ],
)
def test_forced_where_it_cannot_run(op: str, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(RuntimeError, match=f"backend: got 'triton' for {op} .*{reason}"):
        dispatch.choose(Call(op, torch.empty(0, dtype=dtype, device=DEVICE), forced="triton"))


@pytest.mark.parametrize("limit", [0, 1 << 20])
@pytest.mark.parametrize(("std", "scale"), [(1e5, 1e-3), (1e-7, 1e4)])
def test_fp16_products_of_an_fp32_bank_out_of_its_range(
    std: float, scale: float, limit: int
) -> None:
    """scale * w is rounded to fp16, as by the reference, not w, which fp16 cannot hold."""
    bank = bank_of(640, torch.float32, granularity=16, reflect="vector")
    with torch.no_grad():
        bank.weight.mul_(std / bank.weight.std())
    weight = bank.place((20, 50), scale=scale)
    x, dy = torch.randn(17, 50).half(), torch.randn(17, 20).half()
    with rpg.scratch_limit(limit):
        check(weight, x, dy, None, TILES)


def test_infinity_in_the_last_row_stays_infinite() -> None:
    bank = bank_of(640, torch.float32, granularity=16, reflect="none")
    weight = bank.place((21, 50))
    index, _ = brute.index_and_sign(weight)
    with torch.no_grad():
        bank.weight.view(-1)[index[20, 7]] = torch.inf
    dy = torch.rand(5, 21, device=DEVICE) + 0.1
    dx = kernels.linear_input_grad(dy, bank.weight.detach().to(DEVICE), None, weight.spec, TILES)
    assert torch.equal(dx.isinf().any(0).cpu(), (index == index[20, 7]).any(0))
    assert not dx.isnan().any()


def test_bias_with_strides() -> None:
    weight = bank_of(700, torch.float32, granularity=16).place((20, 50))
    x, dy = torch.randn(6, 50), torch.randn(6, 20)
    for bias in (torch.randn(40)[::2], torch.randn(1).expand(20)):
        check(weight, x, dy, bias, TILES)


def test_table_with_strides_is_refused() -> None:
    bank = brute.table_bank(50, entries=11 * 70, dtype=torch.float32)
    weight = bank.place((11, 70))
    assert bank.table is not None
    table = bank.table.to(DEVICE).repeat_interleave(2)[::2]
    on = bank.weight.detach().to(DEVICE)
    with pytest.raises(ValueError, match=r"table: got strides \(2,\), wanted a contiguous table"):
        kernels.linear(torch.randn(3, 70, device=DEVICE), on, table, None, weight.spec)


def test_more_rows_than_one_launch_can_number() -> None:
    weight = bank_of(700, torch.float16, granularity=16).place((20, 50))
    x, dy = torch.randn(41, 50).half(), torch.randn(41, 20).half()
    with mock.patch.object(plan, "MAX_ROWS", 16):
        check(weight, x, dy, None, TILES)
        torch.use_deterministic_algorithms(True)
        try:
            check(weight, x, dy, None, TILES)
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("splits", [2, 3, 7])
def test_bank_gradient_in_parts_of_the_batch(splits: int) -> None:
    weight = bank_of(700, torch.float16, granularity=16).place((20, 50))
    for m in (5, 47):  # fewer steps than parts, and more
        x, dy = torch.randn(m, 50).half(), torch.randn(m, 20).half()
        check(weight, x, dy, None, replace(TILES, splits=splits))


def test_parts_fill_the_device_and_are_several_steps_each() -> None:
    for m, rows, columns, times in ((100352, 64, 64, 9), (4096, 768, 768, 1), (300, 64, 64, 1)):
        c = choose("linear_bank_grad", m, rows, columns, 64, torch.float16, Gpu(), times)
        tiles = times * -(-rows // c.block_n) * -(-columns // c.block_k)
        assert c.splits == 1 or m // c.splits >= 8 * c.block_m - c.block_m
        assert c.splits == 1 or tiles * c.splits >= 0.8 * Gpu().processors or m < 5000
    assert choose("linear_bank_grad", 4096, 4096, 4096, 64, torch.float16).splits == 1


@pytest.mark.parametrize("name", ["linear", "linear_input_grad", "linear_bank_grad"])
def test_a_failed_launch_leaves_nothing_behind(name: str) -> None:
    """No scratch stays held, and the next call is right."""
    weight = bank_of(640, torch.float32, granularity=16, reflect="element").place((20, 50))
    bank, spec = weight.bank.weight.detach().to(DEVICE), weight.spec
    x, dy = torch.randn(17, 50, device=DEVICE), torch.randn(17, 20, device=DEVICE)
    calls: dict[str, tuple[Any, ...]] = {
        "linear": (x, bank, None, None, spec, TILES),
        "linear_input_grad": (dy, bank, None, spec, TILES),
        "linear_bank_grad": (dy, x, None, spec, torch.float32, TILES),
    }
    call, made = getattr(kernels, name), plan.scratch
    wanted = call(*calls[name])
    held: list[weakref.ref[Tensor]] = []

    def counted(*args: object) -> Tensor:
        tensor = made(*args)  # type: ignore[arg-type]
        held.append(weakref.ref(tensor))
        return tensor

    def failing(*args: object, **kwargs: object) -> Any:
        raise RuntimeError("out of resource: shared memory")

    place = {"linear": (kernels, "_launch_forward"), "linear_input_grad": (kernels, "_steps")}
    module, attribute = place.get(name, (linear_bank_grad, "_launch"))
    with (
        mock.patch.object(plan, "scratch", counted),
        mock.patch.object(module, attribute, failing),
        pytest.raises(RuntimeError, match="out of resource"),
    ):
        call(*calls[name])
    gc.collect()  # the traceback's frames
    assert held
    assert all(reference() is None for reference in held)
    torch.testing.assert_close(call(*calls[name]), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's state")
def test_a_kernel_that_fails_leaves_the_interpreter_as_it_was() -> None:
    from triton.runtime import interpreter as triton_interpreter

    from rpg_kernels.backends.triton import interpreter

    weight = bank_of(640, torch.float32, granularity=16).place((20, 50))
    x, bank = torch.randn(17, 50), weight.bank.weight.detach()
    wanted = kernels.linear(x, bank, None, None, weight.spec, TILES)
    builder = triton_interpreter.InterpreterBuilder
    with (
        mock.patch.object(builder, "create_dot", side_effect=RuntimeError("in a kernel")),
        pytest.raises(triton_interpreter.InterpreterError, match="in a kernel"),
    ):
        kernels.linear(x, bank, None, None, weight.spec, TILES)
    assert not interpreter._patched
    assert torch.equal(kernels.linear(x, bank, None, None, weight.spec, TILES), wanted)
