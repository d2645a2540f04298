"""The reference with tiles by Triton's kernels, against float64 and the reference in PyTorch."""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Iterator
from unittest import mock

import brute_force as brute
import pytest
import torch
from torch import Tensor
from triton_process import DEVICE, INTERPRETED

import rpg_kernels as rpg
from rpg_kernels.backends import dispatch, registry
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.reference import conv2d, lent, linear
from rpg_kernels.backends.triton import rules
from rpg_kernels.backends.triton import unpack as kernels

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
            y = linear.linear(a, on, None, bias.to(DEVICE), spec, kernels)
            dx = linear.linear_input_grad(d, on, None, spec, kernels)
            dw = linear.linear_bank_grad(d, a, None, spec, bank_dtype, kernels)
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
        got = getattr(linear, name)(*arguments, kernels)
        wanted = getattr(torch.ops.rpg_kernels, name)(*arguments, "reference")
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
            y = conv2d.conv2d(x, on, None, None, weight.spec, *geometry, kernels)
            dy = torch.randn(y.shape, device=DEVICE, generator=None).to(memory_format=kind)
            ours["dx"] = conv2d.conv2d_input_grad(
                dy, on, None, x.shape, weight.spec, *geometry, kernels
            )
            ours["dw"] = conv2d.conv2d_bank_grad(
                dy, x, None, weight.spec, *geometry, torch.float32, kernels
            )
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
    make = kernels.unpack_tile

    def counted(*arguments: object) -> Tensor:
        tile = make(*arguments)  # type: ignore[arg-type]
        held.append(weakref.ref(tile))
        assert sum(t.nbytes for t in (r() for r in held) if t is not None) <= limit
        return tile

    with rpg.scratch_limit(limit), mock.patch.object(kernels, "unpack_tile", counted):
        linear.linear(x, bank, None, None, weight.spec, kernels)
    assert len(held) == 6


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Kernels that are interpreted are taken, and lent, as compiled ones are."""
    with (
        mock.patch.object(rules, "interpreted", return_value=False),
        mock.patch.object(rules, "unsupported_kind", return_value=""),
        mock.patch.object(rules.Triton, "device_types", None),
    ):
        yield


def test_through_autograd_with_every_kind_of_layer() -> None:
    """Large products of signs per element are the reference's, with kernels of Triton's."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(20, 16), torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 5)
    )
    config = rpg.RPGConfig(dof=300, granularity=8, reflect="element")
    rpg.convert(model, config).to(DEVICE)
    tokens = torch.randint(20, (700, 3), device=DEVICE)  # 2100 rows
    grads, tiles = {}, []
    make = kernels.unpack_tile

    def counted(*arguments: object) -> Tensor:
        tiles.append(arguments)
        return make(*arguments)  # type: ignore[arg-type]

    for name in ("auto", "reference"):
        with as_on_a_gpu(), mock.patch.object(kernels, "unpack_tile", counted), rpg.backend(name):
            grads[name] = torch.autograd.grad(
                model(tokens).square().mean(), list(model.parameters())
            )
        assert bool(tiles) is (name == "auto")  # forced, it is PyTorch alone: the way out
        tiles.clear()
    for ours, theirs in zip(grads["auto"], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("op", "rows", "reflect", "wanted"),
    [
        ("linear", 4096, "element", "reference"),
        ("linear", 2048, "element", "reference"),
        ("linear", 2047, "element", "triton"),
        ("linear", 4096, "vector", "triton"),
        ("linear_input_grad", 4096, "element", "reference"),
        ("linear_bank_grad", 4096, "element", "triton"),
        ("conv2d", 4096, "element", "reference"),
        ("conv2d_input_grad", 4096, "element", "reference"),
        ("conv2d_bank_grad", 4096, "element", "triton"),
        ("unpack", 4096, "element", "triton"),
    ],
)
def test_choice_by_size(op: str, rows: int, reflect: str, wanted: str) -> None:
    """As on a GPU, where nobody forces a back end."""
    shape = (40, 64, 1, 1) if op.startswith("conv2d") else (40, 64)
    weight = brute.bank_of(500, torch.float16, granularity=8, reflect=reflect).place(shape)
    width = 40 if op.endswith("input_grad") else 64
    size = (rows // 4096 or 1, width, 64, 64) if op.startswith("conv2d") else (rows, width)
    x = torch.empty(size, dtype=torch.float16, device="meta")
    geometry = ((1, 1), (0, 0), (1, 1), 1) if op == "conv2d" else ()
    call = Call(op, x, weight.spec, None, geometry)
    with as_on_a_gpu():
        assert dispatch.choose(call).name == wanted
        assert dispatch.choose(call._replace(forced="triton")).name == "triton"
        lent_by_triton = " by a kernel of triton " in registry.find("reference").explain(call)
        assert lent_by_triton is op.startswith(("linear", "conv2d"))


def test_a_table_counts_as_a_sign_for_each_element() -> None:
    bank = brute.table_bank(50, entries=40 * 64, dtype=torch.float16)
    call = Call("linear", torch.empty(4096, 64, device="meta"), bank.place((40, 64)).spec)
    with as_on_a_gpu():
        assert dispatch.choose(call).name == "reference"


def test_not_chosen_where_scratch_has_no_room() -> None:
    weight = brute.bank_of(500, torch.float32, granularity=8, reflect="element").place((40, 64))
    call = Call("linear", torch.empty(4096, 64, device="meta"), weight.spec)
    with as_on_a_gpu():
        for limit, wanted in ((0, "triton"), (639, "triton"), (640, "reference")):
            with rpg.scratch_limit(limit):
                assert dispatch.choose(call).name == wanted
                explained = registry.find("reference").explain(call)
                assert (" by a kernel of triton " in explained) is (wanted == "reference")


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("limit", [1, 200, 700, 800, 1300, 5000])
def test_lent_tiles_cover_a_weight_once(groups: int, limit: int) -> None:
    """Whole groups or parts of one; along rows for forwards, along columns for input gradients."""
    p = brute.bank_of(500, torch.float32, granularity=8).place((12, 20, 3, 1)).placement
    for cut in (lent.row_tiles, lent.column_tiles):
        seen = torch.zeros(12, 20, dtype=torch.int32)
        with rpg.scratch_limit(limit):
            for tile in cut(p, torch.float32, torch.device("cpu"), groups):
                seen[tile.rows, tile.columns] += 1
                rows, columns = tile.placement.selected_shape[:2]
                assert (tile.placement.selection[0][0], rows) == (tile.row, rows)
                within = tile.row // (12 // groups) == (tile.row + rows - 1) // (12 // groups)
                assert within or rows % (12 // groups) == 0
                alone = rows == 1 if cut is lent.row_tiles else columns <= 8
                assert rows * columns * 3 * 4 <= limit or alone
                assert columns == 20 if cut is lent.row_tiles else rows == 12 // groups
                first = tile.placement.selection[1][0]
                assert first % 8 == 0 or columns < 8  # a block is cut where it is all that fits
        assert (seen == 1).all()
