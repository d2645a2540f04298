"""Weights unpacked in chunks and multiplied by the library, against float64 and the reference."""

from __future__ import annotations

import random
import weakref
from unittest import mock

import brute_force as brute
import pytest
import torch
from torch import Tensor
from triton_process import DEVICE, INTERPRETED

import rpg_kernels as rpg
from rpg_kernels.backends import dispatch
from rpg_kernels.backends.triton.config import dot_precision
from rpg_kernels.backends.vendor import chunks, conv2d, linear

DTYPES = (torch.float32, torch.float16) if INTERPRETED else brute.ALL[1:]
REFLECT = ("element", "vector", "none")


def check(call: object, got: Tensor, exact: Tensor, torchs: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype, call
    assert got.shape == exact.shape, call
    brute.assert_accurate(got.detach().cpu(), exact, torchs.to(dtype), str(call))


@pytest.mark.parametrize("seed", range(6))
def test_linear(seed: int) -> None:
    rng = random.Random(seed)
    dtype = DTYPES[seed % len(DTYPES)]
    bank_dtype = rng.choice([dtype, torch.float32])
    bank = brute.bank_of(
        900, bank_dtype, granularity=(1, 4, 16, 64)[seed % 4], reflect=REFLECT[seed % 3], seed=seed
    )
    weight = bank.place((rng.choice([7, 20]), rng.choice([33, 66])), scale=0.5)
    if seed % 2:
        weight = weight.narrow(0, 2, 5).narrow(1, 3, 29)
    x = torch.randn(9, weight.shape[1]).to(dtype)
    dy = torch.randn(9, weight.shape[0]).to(dtype)
    bias = torch.randn(2 * weight.shape[0]).to(dtype)[::2]
    w = brute.unpack(weight, brute.ring(bank)).detach()
    on, spec, a, d = bank.weight.detach().to(DEVICE), weight.spec, x.to(DEVICE), dy.to(DEVICE)
    row = w.shape[1] * dtype.itemsize
    column = w.shape[0] * dtype.itemsize
    for limit in (3 * max(row, column), 1 << 20):
        with rpg.scratch_limit(limit):
            y = linear.linear(a, on, None, bias.to(DEVICE), spec)
            dx = linear.linear_input_grad(d, on, None, spec)
            dw = linear.linear_bank_grad(d, a, None, spec, bank_dtype)
        same = [t.to(dtype) for t in (x, w, bias, dy)]
        check("y", y, x.double() @ w.t() + bias, torch.addmm(same[2], x, same[1].t()), dtype)
        check("dx", dx, dy.double() @ w, dy @ same[1], dtype)
        exact, rounded = brute.pack(weight, dy.double().t() @ x.double()), (dy.t() @ x).double()
        check("dw", dw, exact, brute.pack(weight, rounded), bank_dtype)


def test_table() -> None:
    bank = brute.table_bank(50, entries=11 * 70, dtype=torch.float32)
    weight = bank.place((11, 70), scale=0.7)
    assert bank.table is not None
    on, table = bank.weight.detach().to(DEVICE), bank.table.to(DEVICE)
    x, dy = torch.randn(5, 70).to(DEVICE), torch.randn(5, 11).to(DEVICE)
    for name, arguments in (
        ("linear", (x, on, table, None, weight.spec)),
        ("linear_input_grad", (dy, on, table, weight.spec)),
        ("linear_bank_grad", (dy, x, table, weight.spec, torch.float32)),
    ):
        operator = getattr(torch.ops.rpg_kernels, name)
        got, wanted = (operator(*arguments, backend) for backend in ("vendor", "reference"))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((6, 8, 3, 3), 1), ((6, 4, 3, 1), 3), ((9, 1, 3, 3), 9), ((4, 3, 5, 5), 1)],
)
def test_conv2d(shape: tuple[int, ...], groups: int, last: bool) -> None:
    bank = brute.bank_of(700, torch.float32, granularity=16, reflect="element")
    weight = bank.place(shape, scale=0.5)
    kind = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, shape[1] * groups, 6, 5, device=DEVICE).to(memory_format=kind)
    geometry = ([2, 1], [1, 2], [1, 1], groups)
    on = bank.weight.detach().to(DEVICE)
    ours, theirs = {}, {}
    one = max(shape[1:][0] * shape[2] * shape[3], shape[0] // groups * shape[2] * shape[3]) * 4
    for limit in (2 * one, 1 << 20):
        with rpg.scratch_limit(limit):
            y = conv2d.conv2d(x, on, None, None, weight.spec, *geometry)
            dy = torch.randn(y.shape, device=DEVICE, generator=None).to(memory_format=kind)
            ours["dx"] = conv2d.conv2d_input_grad(dy, on, None, x.shape, weight.spec, *geometry)
            ours["dw"] = conv2d.conv2d_bank_grad(dy, x, None, weight.spec, *geometry, torch.float32)
        ours["y"] = y
        op = torch.ops.rpg_kernels
        theirs["y"] = op.conv2d(x, on, None, None, weight.spec, *geometry, "reference")
        theirs["dx"] = op.conv2d_input_grad(
            dy, on, None, x.shape, weight.spec, *geometry, "reference"
        )
        theirs["dw"] = op.conv2d_bank_grad(
            dy, x, None, weight.spec, *geometry, torch.float32, "reference"
        )
        for name, got in ours.items():
            assert got.stride() == theirs[name].stride(), name
            torch.testing.assert_close(got, theirs[name], rtol=1e-4, atol=1e-4)


def test_weights_in_memory_stay_within_the_limit() -> None:
    weight = brute.bank_of(500, torch.float32, granularity=8).place((40, 64))
    bank = weight.bank.weight.detach().to(DEVICE)
    x, limit = torch.randn(3, 64, device=DEVICE), 64 * 4 * 7
    held: list[weakref.ref[Tensor]] = []
    make = chunks.tile

    def counted(*arguments: object) -> Tensor:
        tile = make(*arguments)  # type: ignore[arg-type]
        held.append(weakref.ref(tile))
        assert sum(t.nbytes for t in (r() for r in held) if t is not None) <= limit
        return tile

    with rpg.scratch_limit(limit), mock.patch.object(chunks, "tile", counted):
        linear.linear(x, bank, None, None, weight.spec)
    assert len(held) == 6


def test_no_room_for_one_row() -> None:
    weight = brute.bank_of(500, torch.float32, granularity=8).place((40, 64))
    bank = weight.bank.weight.detach().to(DEVICE)
    with (
        rpg.scratch_limit(255),
        pytest.raises(RuntimeError, match="scratch_limit: got 255 bytes, wanted at least 256 for"),
    ):
        linear.linear(torch.randn(3, 64, device=DEVICE), bank, None, None, weight.spec)


def test_through_autograd_with_every_kind_of_layer() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(20, 16), torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 5)
    )
    rpg.convert(model, rpg.RPGConfig(dof=300, granularity=8)).to(DEVICE)
    tokens = torch.tensor([[1, 5, 5], [19, 0, 2]], device=DEVICE)
    grads = {}
    for name in ("vendor", "reference"):
        with rpg.backend(name):
            loss = model(tokens).square().sum()
            grads[name] = torch.autograd.grad(loss, list(model.parameters()))
    for ours, theirs in zip(grads["vendor"], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("op", "batch", "reflect", "wanted"),
    [
        ("linear", 4096, "element", "vendor"),
        ("linear", 1024, "element", "triton"),
        ("linear", 4096, "vector", "triton"),
        ("linear_bank_grad", 4096, "element", "triton"),
        ("conv2d", 4096, "element", "vendor"),
        ("embedding", 4096, "element", "triton"),
    ],
)
def test_choice_by_size(op: str, batch: int, reflect: str, wanted: str) -> None:
    """As on a GPU, where nobody forces a back end."""
    device = torch.device("cuda", 0)
    dispatch.decide.cache_clear()
    with (
        mock.patch.object(dispatch, "interpreted", return_value=False),
        mock.patch.object(dispatch, "why_not", return_value=""),
    ):
        rule = dispatch.decide(op, device, torch.float16, "", batch, reflect)
        forced = dispatch.decide(op, device, torch.float16, "triton", batch, reflect)
    dispatch.decide.cache_clear()
    assert rule.backend == wanted
    assert forced.backend == "triton"


def test_not_chosen_where_scratch_has_no_room() -> None:
    weight = brute.bank_of(500, torch.float32, granularity=8, reflect="element").place((40, 64))
    x = torch.empty(4096, 64, device="meta")  # a CPU has rules of its own
    call = dispatch.Call("linear", x, weight.spec)
    assert dispatch.size_of(call) == (4096, "element", False)
    for limit in (0, 255):
        with rpg.scratch_limit(limit):
            assert dispatch.size_of(call) == (0, "element", False)


def test_convolutions_follow_their_own_tf32_switch() -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            wanted = "tf32" if allowed else "ieee"
            assert dot_precision(torch.float32, convolution=True) == wanted
            assert dot_precision(torch.float32) == "ieee"
            assert dot_precision(torch.float16, convolution=True) == "ieee"
    finally:
        torch.backends.cudnn.allow_tf32 = before
