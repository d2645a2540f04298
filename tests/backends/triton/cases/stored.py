"""Banks that are kept in fewer bytes, against the reference on their values written out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import brute_force as brute
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_conv2d import LAST, TILES, random_call
from triton_process import DEVICE, INTERPRETED, bank_of, poisoned

import rpg_kernels as rpg
from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.triton import conv2d, embedding, linear, plan, rules, unpack
from rpg_kernels.backends.triton import stored as device
from rpg_kernels.backends.triton.config import Config

FORMS = ("int8", "float8", "int8 compact", "float8 compact", "float compact", "nothing")
GRANULARITY = (64, 16, 8, 4, 128, 32, 1, 2)
REFLECT = ("element", "vector", "none")
DTYPES = (torch.float32, torch.float16) if INTERPRETED else brute.ALL[1:]
OPS = torch.ops.rpg_kernels
_numbers = device.numbers


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned():
        yield


def parts(slots: int, granularity: int, form: str, dtype: torch.dtype, seed: int) -> StoredValues:
    """Random parts of a form, whose rows lie in any order; places[i] is that of slot i."""
    draw = torch.Generator().manual_seed(seed)
    rows, places = slots, None
    if form.endswith("compact") or form == "nothing":
        here = torch.rand(slots, generator=draw) < (0.6 if form != "nothing" else 0.0)
        rows = int(here.sum())
        places = torch.full((slots,), -1, dtype=torch.int32)
        places[here] = torch.randperm(rows, generator=draw).int()
    shape = (rows, granularity)
    if form.startswith("float ") or form == "nothing":
        return StoredValues(torch.randn(shape, generator=draw).to(dtype), None, places, dtype)
    scales = 0.5 + torch.rand(rows, generator=draw)
    if form.startswith("int8"):
        codes = torch.randint(-127, 128, shape, generator=draw).to(torch.int8)
        return StoredValues(codes, scales / 100, places, dtype)
    codes = torch.randn(shape, generator=draw).to(torch.float8_e4m3fn)
    return StoredValues(codes, scales, places, dtype)


def of(bank: rpg.ParameterBank, form: str, seed: int) -> tuple[StoredValues, Tensor]:
    """(values in the shape and dtype of a bank, on the device; the same in float64)."""
    values = parts(bank.slots, bank.granularity, form, bank.weight.dtype, seed)
    return values.to(DEVICE), values.to(torch.float64).dense()  # type: ignore[return-value]


def check(name: str, got: Tensor, x: Tensor, dense: Tensor, *rest: Any) -> None:
    """A product, by the accuracy criterion."""

    def by_reference(dtype: torch.dtype) -> Tensor:
        some = [o.to(dtype) if isinstance(o, Tensor) else o for o in rest]
        made: Tensor = getattr(OPS, name)(x.to(dtype), dense.to(dtype), None, *some, "reference")
        return made

    assert got.dtype == x.dtype
    exact = by_reference(torch.float64)
    assert got.shape == exact.shape
    brute.assert_accurate(got.cpu(), exact, by_reference(x.dtype), name)


@triton.jit
def _numbers_kernel(code_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, _numbers(tl.load(code_ptr + i)))


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_every_code(kind: torch.dtype) -> None:
    """Zeros of both signs and subnormals too; the two codes of NaN never come, see check_parts."""
    codes = torch.arange(256, dtype=torch.uint8)
    wanted, given = codes.view(kind).float(), codes.to(DEVICE)
    got = torch.empty(256, device=DEVICE)
    _numbers_kernel[(1,)](given if kind.is_floating_point else given.view(kind), got, 256)
    numbers = ~wanted.isnan()
    assert int(numbers.sum()) == (254 if kind.is_floating_point else 256)
    bits = torch.int32
    assert torch.equal(got.cpu()[numbers].view(bits), wanted[numbers].view(bits))


@pytest.mark.parametrize(("seed", "laps"), [(i, 3 if i % 3 == 1 else None) for i in range(12)])
def test_linear(seed: int, laps: int | None) -> None:
    """Blocks as long as slots and shorter, law 1 and law 3, entries in scratch and in line."""
    rng = random.Random(str((seed, laps)))
    g, dtype = GRANULARITY[seed % 8], DTYPES[seed % 5 % len(DTYPES)]
    form, bank_dtype = FORMS[seed % len(FORMS)], rng.choice([dtype, torch.float32])
    bank = bank_of(
        rng.randrange(20, 60) * g, bank_dtype, granularity=g, reflect=REFLECT[seed // 2 % 3],
        laps=laps, seed=seed,
    )  # fmt: skip
    rows, columns = rng.choice([3, 16, 21]), rng.choice([13, 48, 64, 97])
    weight = bank.place((rows, columns), scale=rng.uniform(0.2, 2))
    if seed % 3 == 0:
        weight = weight.narrow(0, 1, rows - 2).narrow(1, 5, columns - 7)
    values, dense = of(bank, form, seed)
    m = rng.choice([1, 5, 17])
    x, dy = torch.randn(m, weight.shape[1]).to(dtype), torch.randn(m, weight.shape[0]).to(dtype)
    bias = torch.randn(weight.shape[0]).to(dtype) if seed % 2 else None
    added = None if bias is None else bias.to(DEVICE)
    tiles = Config(16, 16, 16, 4, 2, 2) if g >= 16 else None
    for limit in (0, 1 << 20):
        with rpg.scratch_limit(limit):
            y = linear.linear(x.to(DEVICE), values, None, added, weight.spec, tiles)
            dx = linear.linear_input_grad(dy.to(DEVICE), values, None, weight.spec, tiles)
        check("linear", y, x, dense, bias, weight.spec)
        check("linear_input_grad", dx, dy, dense, weight.spec)


@pytest.mark.parametrize("seed", range(6))
def test_conv2d(seed: int) -> None:
    """Runs of one tap and of all of them, groups, strides, parts, narrow layers."""
    weight, x, bias, how = random_call(seed, permute=not INTERPRETED)
    values, dense = of(weight.bank, FORMS[seed % len(FORMS)], seed)
    pairs = [
        list(v) if isinstance(v, tuple) else [v, v]
        for v in (how["stride"], how["padding"], how["dilation"])
    ]
    geometry = (*pairs, how["groups"])
    added = None if bias is None else bias.to(DEVICE)
    spec = weight.spec
    y = conv2d.conv2d(x.to(DEVICE), values, None, added, spec, *geometry, TILES)
    check("conv2d", y, x, dense, bias, spec, *geometry)
    dy = torch.randn(y.shape).to(x.dtype).contiguous(memory_format=LAST)
    size = list(x.shape)
    dx = conv2d.conv2d_input_grad(dy.to(DEVICE), values, None, size, spec, *geometry, TILES)
    check("conv2d_input_grad", dx, dy, dense, size, spec, *geometry)


@pytest.mark.parametrize(("form", "laps"), [(f, (None, 3)[i % 2]) for i, f in enumerate(FORMS)])
def test_rows_and_whole_weights(form: str, laps: int | None) -> None:
    """fp32 is code times scale times the layer's scale, rounded as the reference rounds it."""
    seed = FORMS.index(form)
    g = GRANULARITY[seed % 6]
    bank = brute.bank_of(
        50 * g, torch.float32, granularity=g, reflect=REFLECT[seed % 3], permute=False, laps=laps
    )
    values, exact = of(bank, form, seed)
    dense = exact.float()
    for shape in ((21, 70), (6, 11, 3, 2)):
        weight = bank.place(shape, scale=0.37)
        for part in (weight, weight.narrow(0, 2, 4).narrow(1, 3, 7)):
            wanted = OPS.unpack(dense, None, part.spec, "reference")
            assert torch.equal(unpack.unpack(values, None, part.spec).cpu(), wanted)
            last = unpack.unpack_tile(values, None, part.placement, torch.float16, True)
            torch.testing.assert_close(last.cpu(), wanted.half(), rtol=0, atol=0)
            if len(shape) == 2:
                index = torch.randint(part.shape[0], (3, 5))
                got = embedding.embedding(values, None, index.to(DEVICE), part.spec)
                assert torch.equal(got.cpu(), wanted[index])


def test_table() -> None:
    bank = brute.table_bank(50, entries=13 * 70, dtype=torch.float32)
    weight = bank.place((13, 70), scale=0.7)
    assert bank.table is not None
    table, x = bank.table.to(DEVICE), torch.randn(5, 70)
    for form in ("int8", "float8 compact"):
        values, dense = of(bank, form, 1)
        y = linear.linear(x.to(DEVICE), values, table, None, weight.spec)
        wanted = OPS.linear(x, dense.float(), bank.table.cpu(), None, weight.spec, "reference")
        torch.testing.assert_close(y.cpu(), wanted, rtol=1e-5, atol=1e-5)


def test_slots_that_were_left_out_are_zeros_whatever_lies_first() -> None:
    """A mask, and no product with zero, which would pass NaN and infinities on."""
    bank = brute.bank_of(16 * 40, torch.float32, granularity=16, permute=False)
    weight = bank.place((20, 40))
    places = torch.full((40,), -1, dtype=torch.int32)
    codes = torch.full((1, 16), torch.inf)
    values = StoredValues(codes, None, places, torch.float32).to(DEVICE)
    assert not unpack.unpack(values, None, weight.spec).any()
    y = linear.linear(torch.ones(3, 40, device=DEVICE), values, None, None, weight.spec)
    assert not y.any()


def test_no_copy_of_the_bank_is_made() -> None:
    """However often it is read."""
    bank = brute.bank_of(64 * 64, torch.float16, granularity=64, reflect="vector")
    weight = bank.place((64, 256))
    for form in FORMS:
        values, _ = of(bank, form, 0)
        with mock.patch.object(plan, "_cast", side_effect=AssertionError):
            made = plan.operand(values, weight.placement, torch.float16, 1 << 20, 128)
        codes, scales, places = made.ring.tensors
        held = [values.codes, values.scales, values.places]
        for mine, theirs in zip((codes, scales, places), held, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or mine.data_ptr() == theirs.data_ptr()  # type: ignore[union-attr]


def test_through_dispatch() -> None:
    """A forward and the gradient of x, through layers and torch's autograd."""
    bank = brute.bank_of(64 * 32, torch.float32, granularity=64, permute=False)
    net = torch.nn.ModuleDict(
        {
            "linear": rpg.nn.Linear(70, 24, bank=bank),
            "conv2d": rpg.nn.Conv2d(8, 12, 3, bank=bank),
            "narrow": rpg.nn.Conv2d(3, 12, 3, bank=bank),
        }
    )
    inputs = {"linear": (3, 70), "conv2d": (1, 8, 5, 5), "narrow": (1, 3, 5, 5)}
    drawn = {name: torch.randn(size) for name, size in inputs.items()}
    for form in ("int8", "float8 compact"):
        bank.hold(parts(bank.slots, 64, form, torch.float32, 3))
        net.to(DEVICE)
        found: dict[str, list[Tensor]] = {}
        for back_end in ("triton", "reference"):
            found[back_end] = []
            with rpg.backend(back_end):
                for name, layer in net.items():
                    x = drawn[name].to(DEVICE).requires_grad_()
                    assert rpg.explain(layer, x).backend == back_end
                    y = layer(x)
                    found[back_end] += [y, torch.autograd.grad(y.square().sum(), x)[0]]
        for ours, theirs in zip(found["triton"], found["reference"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_can_run_is_as_for_float_banks() -> None:
    x = torch.empty(3, 8, device="meta")
    weight = brute.bank_of(64, torch.float32, granularity=8).place((5, 8))
    for form in FORMS:
        values = parts(8, 8, form, torch.float32, 0)
        plain = Call("linear", x, weight.spec, values.dense())
        call = plain._replace(bank=values)
        assert rules.Triton().unsupported(call) == rules.Triton().unsupported(plain)
