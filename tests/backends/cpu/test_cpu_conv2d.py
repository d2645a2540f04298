"""The compiled CPU kernel of convolutions against written-out weights, in float64."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels import native
from rpg_kernels._tensors import empty_image
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.cpu import conv2d as compiled
from rpg_kernels.backends.cpu import factored, rules
from rpg_kernels.bank.virtual_weight import VirtualWeight

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")

_op = torch.ops.rpg_kernels.conv2d

SLOTS = [40, 64, 300, 1121]  # of the ring
OUT = [1, 2, 63, 64, 100, 129, 300, 1024, 2000]
CHANNELS = [3, 4, 8, 32, 60, 64, 110, 128]
KERNELS = [(1, 1), (1, 1), (3, 3), (3, 3), (2, 3), (1, 5), (7, 7)]
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16]

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel does not write is NaN, in the result and in its memory."""
    workspace = compiled.workspace

    def memory(size: int) -> Tensor:
        return workspace(size).fill_(0xFF)

    def image(*how: object) -> Tensor:
        return empty_image(*how).fill_(float("nan"))  # type: ignore[arg-type]

    monkeypatch.setattr(compiled, "workspace", memory)
    monkeypatch.setattr(compiled, "empty_image", image)


def ring(slots: int) -> rpg.ParameterBank:
    """Of law 1: law 3 has kernels of its own (test_cpu_unit_conv2d.py)."""
    return rpg.ParameterBank(64 * slots, 64, init_std=1.0)


def weight_of(rng: random.Random, slots: int, shape: tuple[int, ...]):
    """A weight behind another layer, so that it begins in the middle of the ring."""
    granularity = rng.choice([32, 64, 128])
    reflect, seed = rng.choice(["vector", "none"]), rng.randrange(100)
    bank = rpg.ParameterBank(slots * granularity, granularity, reflect, seed=seed, init_std=1.0)
    bank.place((rng.randint(1, 200), 64))
    return bank, bank.place(shape, scale=rng.choice([0.5, -1.25]))


def exact(x: Tensor, weight: VirtualWeight, bias: Tensor | None, how: Geometry) -> Tensor:
    """In float64, from the weight that the reference unpacks."""
    bank = weight.bank.weight.detach().double()
    dense = torch.ops.rpg_kernels.unpack(bank, None, weight.spec, "reference")
    return torch.conv2d(x.double(), dense, None if bias is None else bias.double(), *how)


def check(
    x: Tensor,
    weight: VirtualWeight,
    bias: Tensor | None,
    how: Geometry,
) -> None:
    got = _op(x, weight.bank.weight.detach(), None, bias, weight.spec, *how, 1, "cpu")
    wanted = exact(x, weight, bias, how)
    assert got.dtype == x.dtype
    assert got.shape == wanted.shape
    assert got.stride() == empty_image(x, got.shape).stride()
    if got.numel():
        size = wanted.abs().max().clamp(min=1e-6)
        assert got.isfinite().all()
        assert (got.double() - wanted).abs().max() <= (4 * torch.finfo(x.dtype).eps + 4e-6) * size


def laid_out(rng: random.Random, x: Tensor) -> Tensor:
    """x in one of the ways in which images come: also strided, and from odd addresses on."""
    kind = rng.randrange(6)
    if kind == 0:
        return x.contiguous(memory_format=torch.channels_last)
    if kind == 1:
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == 2:  # a part of a larger image
        large = x.new_full([s + 2 for s in x.shape], float("nan"))
        part = large[1:-1, 1:-1, 1:-1, 1:-1]
        part.copy_(x)
        return part
    if kind == 3:  # every second of everything
        large = x.new_full([2 * s for s in x.shape], float("nan"))
        large[::2, 1::2, ::2, 1::2] = x
        return large[::2, 1::2, ::2, 1::2]
    if kind == 4:
        line = x.new_full((x.numel() + 3,), float("nan"))
        line[3:] = x.flatten()
        return line[3:].view(x.shape)
    return x


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_against_the_written_out_weight(slots: int, threads: int) -> None:
    rng = random.Random(f"{slots} {threads}")
    before, done = torch.get_num_threads(), 0
    torch.set_num_threads(threads)
    try:
        while done < 8:
            kernel, channels = rng.choice(KERNELS), rng.choice(CHANNELS)
            small = channels * kernel[0] * kernel[1] < 1000
            out = rng.choice(OUT) if small else rng.randint(1, 150)
            bank, weight = weight_of(rng, slots, (out, channels, *kernel))
            if rules.unsupported_weight("conv2d", weight.spec):
                continue
            done += 1
            dtype = rng.choice(DTYPES)
            if rng.random() < 0.3:
                bank.to(dtype)
            stride = rng.choice([(1, 1), (1, 1), (2, 2), (1, 3)])
            padding = rng.choice([(0, 0), (1, 1), (3, 0), (0, 9)])
            dilation = rng.choice([(1, 1), (1, 1), (2, 1), (1, 3)])
            reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
            height, width = (
                rng.choice([1, 2, 5, 7, 14, 19, 40]) + max(0, r - 1 - 2 * p)
                for r, p in zip(reach, padding, strict=True)
            )
            x = torch.randn(rng.choice([1, 1, 2, 5]), channels, height, width)
            x = laid_out(rng, x.to(dtype))
            bias = torch.randn(out).to(dtype) if rng.random() < 0.5 else None
            check(x, weight, bias, (stride, padding, dilation))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tile", [1, 4, 8, 16])
@pytest.mark.parametrize("last", [False, True])
def test_every_tile(tile: int, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in 16-bit numbers, with tiles that span images, and threads that share columns."""
    weight = ring(64).place((200, 60, 3, 3))
    for parts, threads in ((1, 1), (3, 1), (1, 3), (2, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            of_part, _ = native.layer_law(weight.placement.law).conv2d_workspace(threads, tile, 3)
            of_part = -(-of_part // 64) * 64
            step = factored.Steps(tile, 3, threads, parts * of_part, 0, parts)
            monkeypatch.setattr(factored, "steps", lambda *_, step=step: step)
            x = torch.randn(3, 60, 5, 5).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            check(x, weight, torch.randn(200), ((1, 1), (1, 1), (1, 1)))


def test_extremes() -> None:
    """Sizes of 1, empty batches and results, padding beyond the kernel, dilation beyond x."""
    bank = ring(64)
    point, kernel = bank.place((130, 64, 1, 1)), bank.place((70, 64, 3, 3))
    far = 2**31 - 1
    one = (1, 1)
    for last in (False, True):
        form = torch.channels_last if last else torch.contiguous_format
        x = torch.randn(2, 64, 5, 6).contiguous(memory_format=form)
        check(x[:0], point, None, (one, (0, 0), one))
        check(x[:, :, :1, :1], point, None, (one, (0, 0), one))
        check(x[:1, :, :1], kernel, None, (one, one, one))
        check(x, kernel, None, ((9, 9), (7, 8), one))
        check(x, kernel, None, ((far, far), (2, 2), one))
        # The outer taps lie in the padding, a long way off.
        got = _op(x, bank.weight, None, None, kernel.spec, one, (far, 1), (far, 1), 1, "cpu")
        dense = rpg.functional.unpack(kernel).detach()[:, :, 1:2]
        wanted = torch.conv2d(x.double(), dense.double(), None, 1, (0, 1))
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)
        bias = torch.randn(130)
        padded = _op(x[:, :, :0], bank.weight, None, bias, point.spec, one, one, one, 1, "cpu")
        assert padded.equal(bias[:, None, None].expand(2, 130, 2, 8))
    expanded = torch.randn(1, 64, 1, 1).expand(3, 64, 4, 4)
    check(expanded, kernel, None, (one, one, one))


def test_unread_slots_and_padding_may_hold_anything() -> None:
    """Infinities that no weight reads reach no result: 60 channels leave 4 elements of a block."""
    bank = ring(4000)
    weight = bank.place((200, 60, 3, 3))
    with torch.no_grad():
        dense = torch.randn(200, 60, 3, 3)
        unread = (
            torch.ops.rpg_kernels.pack(dense, None, weight.spec, torch.float32, "reference")
            .flatten()
            .eq(0)
        )
        assert unread.any()
        bank.weight.view(-1)[unread] = float("inf")
    for size in (1, 2, 3, 9):
        y = _op(
            torch.randn(1, 60, size, size),
            bank.weight.detach(),
            None,
            None,
            weight.spec,
            [1, 1],
            [1, 1],
            [1, 1],
            1,
            "cpu",
        )
        assert y.isfinite().all()


def test_same_bits_every_time_and_close_for_other_threads() -> None:
    bank = ring(64)
    weight, before = bank.place((500, 64, 3, 3)), torch.get_num_threads()
    for size in (3, 12):
        x, results = torch.randn(2, 64, size, size), []
        try:
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                results.append(
                    _op(
                        x,
                        bank.weight.detach(),
                        None,
                        None,
                        weight.spec,
                        [1, 1],
                        [1, 1],
                        [1, 1],
                        1,
                        "cpu",
                    )
                )
        finally:
            torch.set_num_threads(before)
        assert results[1].equal(results[3])
        torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-3)


def test_dispatch_takes_it_where_it_was_faster() -> None:
    bank = ring(64)
    shared = rpg.nn.Conv2d(64, 256, 3, padding=1, bank=bank)
    alone = rpg.nn.Conv2d(64, 64, 3, padding=1, bank=bank)
    grouped = rpg.nn.Conv2d(128, 256, 1, groups=2, bank=bank)
    large, small = torch.empty(1, 64, 56, 56), torch.empty(1, 64, 7, 7)
    assert rpg.explain(shared, large).backend == "cpu"
    assert rpg.explain(shared, large[0]).backend == "cpu"
    assert rpg.explain(alone, small).backend == "cpu"
    assert "would be slower" in rpg.explain(alone, large).reason
    assert rpg.explain(shared, small.bfloat16()).backend == "cpu"
    assert rpg.explain(shared, large.bfloat16()).backend == "reference"
    explained = rpg.explain(grouped, torch.empty(1, 128, 7, 7))
    assert explained.backend == "reference"
    assert "not in 2 groups" in explained.reason
    with rpg.scratch_limit(1000):
        assert rpg.explain(alone.float(), small).backend == "reference"


def test_dispatch_counts_output_pixels() -> None:
    """Of the product's rows there are as many; large strides leave few, large paddings add some."""
    bank = ring(64)
    for stride, padding, image, backend in (
        (1, 1, 8, "cpu"),
        (1, 1, 9, "reference"),
        (7, 1, 56, "cpu"),
        (7, 1, 57, "reference"),
        (1, 20, 4, "reference"),
        (40, 40, 56, "cpu"),
    ):
        alone = rpg.nn.Conv2d(64, 64, 3, stride, padding, bank=bank)
        assert rpg.explain(alone, torch.empty(1, 64, image, image)).backend == backend
    weight = bank.place((70, 64, 3, 2))
    for x in (torch.randn(2, 64, 9, 14), torch.randn(3, 64, 5, 6)):
        for how in (((1, 1), (0, 0), (1, 1)), ((3, 2), (4, 7), (2, 5)), ((1, 9), (30, 1), (1, 2))):
            y = torch.conv2d(x, weight.unpack(), None, *how)
            call = Call("conv2d", x, weight.spec, bank.weight, (*how, 1))
            assert call.rows == y.numel() // 70


def test_gradients_are_the_references() -> None:
    bank = ring(64)
    layer = rpg.nn.Conv2d(64, 256, 3, padding=1, bank=bank)
    x = torch.randn(1, 64, 4, 4, requires_grad=True)
    assert rpg.explain(layer, x).backend == "cpu"
    layer(x).square().sum().backward()
    got = x.grad, bank.weight.grad
    x.grad = bank.weight.grad = None
    with rpg.backend("reference"):
        layer(x).square().sum().backward()
    for one, other in zip(got, (x.grad, bank.weight.grad), strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    for op in ("conv2d_input_grad", "conv2d_bank_grad"):
        assert "leave the gradients" in rules.unsupported_weight(op, layer.virtual_weight.spec)


def test_refusals() -> None:
    bank = ring(64)
    grouped, good = bank.place((256, 64, 1, 1)), bank.place((256, 64, 3, 3))
    element = rpg.ParameterBank(64 * 512, reflect="element").place((100, 64, 1, 1))
    x = torch.randn(1, 64, 5, 5)
    with rpg.backend("cpu"):
        with pytest.raises(RuntimeError, match="not in 2 groups"):
            rpg.functional.conv2d(torch.randn(1, 128, 5, 5), grouped, groups=2)
        with pytest.raises(RuntimeError, match="one sign for a slot use"):
            rpg.functional.conv2d(x, element)
        with rpg.scratch_limit(1000), pytest.raises(RuntimeError, match="wanted at least"):
            rpg.functional.conv2d(x, good)
        least = factored.smallest("conv2d", good.spec)
        with rpg.scratch_limit(least):
            assert rpg.functional.conv2d(x, good).isfinite().all()
        with rpg.scratch_limit(least - 1), pytest.raises(RuntimeError, match=str(least)):
            rpg.functional.conv2d(x, good)


def test_the_module_refuses_another_weight() -> None:
    """Addresses are all that it gets; what they hold must at least fit the law."""
    law = native.layer_law(ring(64).place((256, 64, 3, 3)).placement.law)

    def call(size=(1, 64, 5, 5), kernel=(3, 3), padding=(0, 0), dilation=(1, 1), tile=16) -> None:
        law.conv2d(native.given_bank(None), 0, 1, size, (1, 1, 1, 1), 0, 0, False, kernel, True,
                   (1, 1), padding, dilation, 1.0, 1, 1, tile, 1, 0)  # fmt: skip

    for how, match in (
        ({"size": (1, 65, 5, 5)}, "kernel"),
        ({"kernel": (3, 2)}, "kernel"),
        ({"size": (1, 64, 2, 5)}, "dilation"),
        ({"dilation": (1, 2**62)}, "dilation"),
        ({"padding": (2**62, 0)}, "padding"),
        ({"size": (0, 64, 5, 5)}, "size"),
        ({"tile": 5}, "batch_tile"),
    ):
        with pytest.raises(ValueError, match=match):
            call(**how)  # type: ignore[arg-type]
