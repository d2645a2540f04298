"""The kernels among torch's modes, odd sizes and wrong operands; streams, graphs, several GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import brute_force as brute
import pytest
import torch
from torch import Tensor
from triton_process import DEVICE, INTERPRETED, bank_of

import rpg_kernels as rpg
from rpg_kernels.functional import embedding, linear

op = torch.ops.rpg_kernels
F64 = torch.float64


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """What only a GPU has."""
    skip = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no GPU")
    return pytest.mark.gpu(skip(test))


def on_two_gpus(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    return on_gpu(skip(test))


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with rpg.backend("triton"):
        yield


def place(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, **arguments: Any
) -> rpg.VirtualWeight:
    """A weight on a bank of its own."""
    bank = bank_of(min(640, rows * columns + 200), dtype, **{"granularity": 16, **arguments})
    weight = bank.place((rows, columns), scale=0.6)
    weight.bank.to(DEVICE)
    return weight


def dense(weight: rpg.VirtualWeight) -> Tensor:
    """The weight in float64, on the CPU."""
    return brute.unpack(weight, brute.ring(weight.bank).cpu()).detach()


def bank_grad(weight: rpg.VirtualWeight, dy: Tensor, x: Tensor) -> Tensor:
    return brute.pack(weight, dy.detach().cpu().double().t() @ x.detach().cpu().double())


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def close(got: Tensor, wanted: Tensor) -> None:
    """Within the rounding of the dtype, for values of order 1 to 30."""
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 2e-1}.get(got.dtype, 1e-4)
    torch.testing.assert_close(got.detach().cpu().double(), wanted, rtol=1e-2, atol=tolerance)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast(enabled: bool) -> None:
    weight = place(5, 40)
    x, bias = randn(3, 40).requires_grad_(), randn(5).requires_grad_()
    leaves = (x, weight.bank.weight, bias)
    with torch.autocast(DEVICE.type, dtype=torch.float16, enabled=enabled):
        y = linear(x, weight, bias)
        assert embedding(torch.tensor([1], device=DEVICE), weight).dtype == torch.float32
    assert y.dtype == (torch.float16 if enabled else torch.float32)
    close(y, x.detach().cpu().double() @ dense(weight).t() + bias.detach().cpu().double())
    ones = torch.ones(3, 5, dtype=F64)
    dx, dw, db = torch.autograd.grad(y, leaves, ones.to(y))
    assert {g.dtype for g in (dx, dw, db)} == {torch.float32}
    for got, wanted in ((dx, ones @ dense(weight)), (dw, bank_grad(weight, ones, x))):
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-2, atol=2e-2)
    assert torch.equal(db, torch.full_like(db, 3))


def test_autocast_to_bfloat16() -> None:
    weight, x = place(5, 40), randn(3, 40)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        if INTERPRETED:
            with pytest.raises(RuntimeError, match="interpreter computes wrongly in bfloat16"):
                linear(x, weight)
            return
        y = linear(x, weight)
    assert y.dtype == torch.bfloat16
    close(y, x.cpu().double() @ dense(weight).t())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    weight, x = place(5, 40), randn(3, 40)
    indices = torch.tensor([4, 0], device=DEVICE)
    y, rows = linear(x, weight), embedding(indices, weight)
    with mode():
        inside = randn(3, 40).copy_(x)  # an inference tensor, under inference_mode
        for got in (linear(x, weight), linear(inside, weight)):
            assert torch.equal(got, y)
            assert not got.requires_grad
        assert torch.equal(embedding(indices, weight), rows)


@pytest.mark.parametrize("which", ["x", "bank", "bias"])
def test_gradient_of_one_input_only(which: str) -> None:
    weight, x, bias = place(5, 40), randn(3, 40), randn(5)
    leaf = {"x": x, "bank": weight.bank.weight, "bias": bias}[which]
    weight.bank.weight.requires_grad_(False)
    leaf.requires_grad_()
    dy = randn(3, 5)
    linear(x, weight, bias).backward(dy)
    assert [t.grad is not None for t in (x, weight.bank.weight, bias)].count(True) == 1
    assert leaf.grad is not None
    gradient = dy.cpu().double()
    wanted = {
        "x": gradient @ dense(weight),
        "bank": bank_grad(weight, dy, x),
        "bias": gradient.sum(0),
    }
    close(leaf.grad, wanted[which])


def test_nothing_wants_a_gradient() -> None:
    weight = place(5, 40)
    weight.bank.weight.requires_grad_(False)
    assert not linear(randn(3, 40), weight, randn(5)).requires_grad
    assert not embedding(torch.tensor([1], device=DEVICE), weight).requires_grad


def test_vmap() -> None:
    weight, x = place(5, 20), randn(3, 2, 20)
    indices, biases = torch.randint(5, (2, 3), device=DEVICE), randn(3, 5)
    y = linear(x, weight)
    assert torch.equal(torch.vmap(lambda x: linear(x, weight))(x), y)
    assert torch.equal(torch.vmap(lambda x: linear(x, weight), in_dims=1, out_dims=1)(x), y)
    got = torch.vmap(lambda x, b: linear(x, weight, b))(x, biases)
    torch.testing.assert_close(got, y + biases[:, None])
    rows = embedding(indices, weight)
    assert torch.equal(torch.vmap(lambda i: embedding(i, weight))(indices), rows)


def test_functional_gradients() -> None:
    weight, x = place(5, 20), randn(3, 20)
    indices = torch.tensor([1], device=DEVICE)
    bank = weight.bank.weight.detach()
    calls: tuple[tuple[Callable[[Tensor], Tensor], Tensor], ...] = (
        (lambda x: linear(x, weight).square().sum(), x),
        (lambda b: op.linear(x, b, None, None, weight.spec, "triton").square().sum(), bank),
        (lambda b: op.embedding(b, None, indices, weight.spec, "triton").square().sum(), bank),
    )
    for function, argument in calls:
        leaf = argument.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(function(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(function)(argument), wanted)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (2, 1, 40), (2, 3, 1), (17, 2, 5), (0, 5, 9)])
def test_smaller_than_a_tile(m: int, n: int, k: int) -> None:
    weight = place(n, k)
    x, bias, dy = randn(m, k).requires_grad_(), randn(n).requires_grad_(), randn(m, n)
    y = linear(x, weight, bias)
    close(y, x.detach().cpu().double() @ dense(weight).t() + bias.detach().cpu().double())
    dx, dw, db = torch.autograd.grad(y, (x, weight.bank.weight, bias), dy)
    gradient = dy.cpu().double()
    for got, wanted in (
        (dx, gradient @ dense(weight)),
        (dw, bank_grad(weight, dy, x)),
        (db, gradient.sum(0)),
    ):
        close(got, wanted)


def test_rows_that_lie_further_apart_than_32_bits_reach() -> None:
    """Storage of 4.3 GB, of which a few pages are touched."""
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of GPU memory")
    weight = place(5, 20, torch.float16)
    bank = weight.bank.weight
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    x = storage.as_strided((2, 20), (2**31 + 8, 1)).copy_(randn(2, 20))
    near = x.contiguous()
    assert torch.equal(op.linear(x, bank, None, None, weight.spec, "triton"), linear(near, weight))
    dy = storage.as_strided((2, 5), (2**31 + 8, 2), 21).copy_(randn(2, 5))
    flat = dy.contiguous()
    apart = op.linear_input_grad(dy, bank, None, weight.spec, "triton")
    assert torch.equal(apart, op.linear_input_grad(flat, bank, None, weight.spec, "triton"))
    how = (None, weight.spec, torch.float16, "triton")
    close(op.linear_bank_grad(dy, x, *how), bank_grad(weight, flat, near))
    rows = torch.tensor([3, 1], device=DEVICE)
    selected = torch.zeros(2, 5, dtype=F64)
    selected[[0, 1], [3, 1]] = 1
    close(op.embedding_bank_grad(x, rows, *how), bank_grad(weight, selected, near))


def test_operands_on_other_devices() -> None:
    weight = place(5, 20)
    bank, spec = weight.bank.weight, weight.spec
    x, dy, indices = randn(3, 20), randn(3, 5), torch.tensor([1, 2, 3], device=DEVICE)
    f32 = (torch.float32, "triton")
    calls: dict[str, Callable[[], object]] = {
        "x": lambda: linear(x.to("meta"), weight),
        "bias": lambda: linear(x, weight, torch.zeros(5, device="meta")),
        "dy": lambda: op.linear_input_grad(dy.to("meta"), bank, None, spec, "triton"),
        "indices": lambda: embedding(indices.to("meta"), weight),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{name}: got device meta, wanted device {DEVICE}"):
            call()
    with pytest.raises(ValueError, match=r"^x: got device meta, wanted device"):
        op.linear_bank_grad(dy, x.to("meta"), None, spec, *f32)
    with pytest.raises(ValueError, match=r"^indices: got device meta, wanted device"):
        op.embedding_bank_grad(x, indices.to("meta"), None, spec, *f32)
    table = brute.table_bank(50, 100, torch.float32).place((5, 20))
    bank, index = table.bank.weight.to(DEVICE), table.bank.table.to("meta")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"^table: got device meta, wanted device"):
        op.linear(x, bank, index, None, table.spec, "triton")


def all_of(weight: rpg.VirtualWeight, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dw) by autograd."""
    y = linear(x, weight)
    return (y.detach(), *torch.autograd.grad(y, (x, weight.bank.weight), dy))


def check(
    weight: rpg.VirtualWeight, x: Tensor, dy: Tensor, got: tuple[Tensor, Tensor, Tensor]
) -> None:
    a, d = x.detach().cpu().double(), dy.cpu().double()
    wanted = (a @ dense(weight).t(), d @ dense(weight), bank_grad(weight, dy, x))
    for ours, exact in zip(got, wanted, strict=True):
        scale = float(exact.abs().max())
        assert float((ours.cpu().double() - exact).abs().max()) < 4e-3 * scale


@on_two_gpus
def test_device_that_is_not_current() -> None:
    weight = place(40, 70, torch.float16)
    weight.bank.to("cuda:1")
    x = randn(33, 70, dtype=torch.float16).to("cuda:1").requires_grad_()
    dy = randn(33, 40, dtype=torch.float16).to("cuda:1")
    with torch.cuda.device(0):
        got = all_of(weight, x, dy)
        rows = embedding(torch.arange(40, device="cuda:1"), weight)
        assert torch.cuda.current_device() == 0
    assert {t.device for t in (*got, rows)} == {torch.device("cuda:1")}
    check(weight, x, dy, got)
    close(rows, dense(weight))


@on_two_gpus
def test_operands_on_two_gpus() -> None:
    weight = place(40, 70)
    weight.bank.to("cuda:0")
    x = torch.randn(3, 70, device="cuda:1")
    with pytest.raises(ValueError, match=r"^x: got device cuda:1, wanted device cuda:0"):
        linear(x, weight)
    with pytest.raises(ValueError, match=r"^bias: got device cuda:1, wanted device cuda:0"):
        linear(x.to("cuda:0"), weight, torch.zeros(40, device="cuda:1"))
    with pytest.raises(ValueError, match=r"^indices: got device cuda:1, wanted device cuda:0"):
        embedding(torch.tensor([1], device="cuda:1"), weight)


@on_gpu
@pytest.mark.parametrize("reflect", ["vector", "element"])
def test_side_stream(reflect: str) -> None:
    """Everything runs where it was called: right after a wait for that stream, and for no other."""
    weight = place(200, 300, torch.float16, granularity=64, reflect=reflect)
    values, dy = randn(150, 300, dtype=torch.float16), randn(150, 200, dtype=torch.float16)
    x, bank, spec = torch.zeros_like(values), weight.bank.weight.detach(), weight.spec

    def operators() -> tuple[Tensor, ...]:
        return (
            op.linear(x, bank, None, None, spec, "triton"),
            op.linear_input_grad(dy, bank, None, spec, "triton"),
            op.linear_bank_grad(dy, x, None, spec, bank.dtype, "triton"),
        )

    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    with torch.cuda.stream(side):  # compiles, fetches the law's words, fills the stream's pool
        operators()
        torch.cuda._sleep(1)
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # a second or two of work on the usual stream
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # x arrives late, on the side stream
        x.copy_(values)
        got = [t.cpu() for t in operators()]  # waits for the side stream
    assert not main.query(), "the usual stream was waited for, or idle"
    torch.cuda.synchronize()
    check(weight, values, dy, (got[0], got[1], got[2]))


@on_gpu
@pytest.mark.parametrize("reflect", ["vector", "element"])
@pytest.mark.parametrize("m", [1, 150])
def test_cuda_graph(m: int, reflect: str) -> None:
    weight = place(200, 300, torch.float16, granularity=64, reflect=reflect)
    x = randn(m, 300, dtype=torch.float16).requires_grad_()
    dy = randn(m, 200, dtype=torch.float16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        all_of(weight, x, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = all_of(weight, x, dy)
    for _ in range(3):
        with torch.no_grad():
            x.copy_(randn(m, 300))
            dy.copy_(randn(m, 200))
            weight.bank.weight.copy_(randn(*weight.bank.weight.shape))
        for t in captured:
            t.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        check(weight, x, dy, captured)


@on_gpu
def test_cuda_graph_of_a_lookup() -> None:
    weight = place(200, 300, torch.float16, granularity=64)
    indices = torch.randint(200, (70,), device=DEVICE)
    how = (weight.bank.weight.detach(), None, indices, weight.spec, "triton")
    op.embedding(*how)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op.embedding(*how)
    indices.copy_(torch.randint(200, (70,)))
    y.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, weight.unpack().detach()[indices])


@on_gpu
@pytest.mark.parametrize("m", [1, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_same_bits_in_every_run(dtype: torch.dtype, m: int) -> None:
    weight = place(500, 700, dtype, granularity=64, reflect="element")
    x, dy = randn(m, 700, dtype=dtype), randn(m, 500, dtype=dtype)
    bank, spec = weight.bank.weight.detach(), weight.spec

    def both() -> tuple[Tensor, Tensor]:
        y = op.linear(x, bank, None, None, spec, "triton")
        return y, op.linear_input_grad(dy, bank, None, spec, "triton")

    y, dx = both()
    for _ in range(20):
        again = both()
        assert torch.equal(again[0], y)
        assert torch.equal(again[1], dx)


@on_gpu
def test_more_than_2_to_the_31_outputs() -> None:
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of GPU memory")
    m, n = 2**16 + 3, 2**15 + 8
    weight = place(n, 16, torch.float16)
    x = randn(m, 16, dtype=torch.float16) / 4  # or its gradient overflows
    bank, spec = weight.bank.weight.detach(), weight.spec
    with rpg.backend("reference"):
        w = weight.unpack().detach().double()
    y = op.linear(x, bank, None, None, spec, "triton")
    assert y.numel() > 2**31
    crossing = 2**31 // n
    some = torch.tensor([0, 1, m // 3, crossing, crossing + 1, m - 1], device=DEVICE)
    close(y[some], (x[some].double() @ w.t()).cpu())
    dx = op.linear_input_grad(y, bank, None, spec, "triton")
    wanted = y[some].double() @ w
    assert float((dx[some].double() - wanted).abs().max() / wanted.abs().max()) < 4e-3
    chosen = torch.zeros_like(y)
    chosen[some] = y[some]
    del y
    dw = op.linear_bank_grad(chosen, x, None, spec, torch.float16, "triton")
    whole = chosen[some].double().t() @ x[some].double()
    exact = op.pack(whole, None, spec, F64, "reference")
    assert float((dw.double() - exact).abs().max() / exact.abs().max()) < 4e-3


@on_gpu
def test_lookup_of_more_than_2_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of GPU memory")
    weight = place(64, 4096, torch.float16, granularity=64)
    indices = torch.randint(64, (2**19 + 3,), device=DEVICE)
    bank, spec = weight.bank.weight.detach(), weight.spec
    w = weight.unpack().detach()
    y = op.embedding(bank, None, indices, spec, "triton")
    assert y.numel() > 2**31
    for part in (slice(0, 999), slice(2**18 - 500, 2**18 + 500), slice(-999, None)):
        assert torch.equal(y[part], w[indices[part]])
    y[:-7] = 0
    dw = op.embedding_bank_grad(y, indices, None, spec, torch.float16, "triton")
    last = (y[-7:].clone(), indices[-7:].clone())
    assert bool(dw.any())
    torch.testing.assert_close(
        dw, op.embedding_bank_grad(*last, None, spec, torch.float16, "triton"), rtol=1e-2, atol=1e-2
    )
