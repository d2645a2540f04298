"""The fused convolution kernels against float64: geometries, groups, layouts, places, limits."""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import brute_force as brute
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_conv2d import LAST, TILES, check, random_call
from triton_process import DEVICE, INTERPRETED, bank_of

import rpg_kernels as rpg
from rpg_kernels import _tensors
from rpg_kernels.backends.triton import conv2d as kernels
from rpg_kernels.backends.triton import conv2d_input_grad, pixels, plan
from rpg_kernels.backends.triton.config import Config
from rpg_kernels.law.placement import Placement


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Results and scratch begin as NaN."""

    def poisoned(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(2**31 - 1)

    def image(x: Tensor, shape: Any) -> Tensor:
        return poisoned(_tensors.empty_image(x, shape))

    def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return poisoned(torch.empty(shape, dtype=dtype, device=device))

    with (
        mock.patch.object(kernels, "empty_image", image),
        mock.patch.object(conv2d_input_grad, "empty_image", image),
        mock.patch.object(plan, "scratch", scratch),
        mock.patch.object(plan, "COPY_FROM", 1),  # small layers copy the bank too
    ):
        yield


# 24 show every granularity with every kind of sign; each is several compilations on a GPU.
@pytest.mark.parametrize("seed", range(16 if INTERPRETED else 24))
def test_random(seed: int) -> None:
    weight, x, bias, how = random_call(seed)
    with rpg.scratch_limit(random.Random(seed).choice([0, 1000, 6000, 1 << 20, 1 << 20])):
        check(weight, x, bias, None if seed % 4 == 3 else TILES, **how)


@pytest.mark.parametrize(
    ("shape", "padding", "stride"),
    [((7, 3, 7, 7), 3, 2), ((7, 3, 3, 3), 1, 1), ((3, 8, 7, 5), (3, 2), 1)],
)
def test_stems_and_many_taps(shape: tuple[int, ...], padding: Any, stride: int) -> None:
    """Taps whose channels share a block; more taps than one word has bits."""
    weight = bank_of(900, torch.float32, granularity=64, reflect="element").place(shape)
    assert weight.placement.matrix.by_tap == (shape[1] == 8)
    x = torch.randn(1, shape[1], 5, 4).contiguous(memory_format=LAST)
    check(weight, x, None, Config(32, 16, 32, 4, 2, 2), stride=stride, padding=padding)


@pytest.mark.parametrize(("channels", "multiplier"), [(3, 1), (2, 3)])
def test_depthwise(channels: int, multiplier: int) -> None:
    bank = bank_of(100, torch.float32, granularity=64, reflect="element")
    weight = bank.place((channels * multiplier, 1, 3, 3))
    x = torch.randn(1, channels, 4, 5)
    for limit in (0, 1 << 20):
        with rpg.scratch_limit(limit):
            check(weight, x, None, padding=1, groups=channels)


@pytest.mark.parametrize(("g", "reflect"), [(4, "vector"), (32, "element")])
def test_scratch_stays_within_the_limit_and_changes_no_result(g: int, reflect: str) -> None:
    """Row bands, column bands, operand copies or none: the weights are the same bits."""
    permute = not INTERPRETED or g == 32
    bank = bank_of(400, torch.float16, granularity=g, reflect=reflect, permute=permute)
    weight = bank.place((32, 72, 2, 1), scale=0.5).narrow(1, 7, 60)
    x = torch.randn(1, 60, 6, 6).half().contiguous(memory_format=LAST)
    dy = torch.randn(1, 32, 3, 6).half()
    tiles = Config(16, 16, 32, 4, 2)
    cols = weight.placement.block_columns
    assert cols.low + cols.first > 0
    results, kinds = [], set()
    make, write = plan.scratch, plan.entry_table.write
    limits = (0, 4 * 2 * cols.count * 24, 1 << 16)
    for limit in limits:
        held: list[weakref.ref[Tensor]] = []

        def counted(*args: object, held: list[Any] = held, limit: int = limit) -> Tensor:
            tensor = make(*args)  # type: ignore[arg-type]
            held.append(weakref.ref(tensor))
            assert sum(t.nbytes for t in (r() for r in held) if t is not None) <= limit
            return tensor

        def recorded(out: Tensor, *args: object, limit: int = limit) -> None:
            kinds.add((limit, tuple(out.shape)))
            write(out, *args)  # type: ignore[arg-type]

        with (
            rpg.scratch_limit(limit),
            mock.patch.object(plan, "scratch", counted),
            mock.patch.object(plan.entry_table, "write", recorded),
        ):
            results.append(check(weight, x, None, tiles, dy, stride=(2, 1)))
    middle = {shape for limit, shape in kinds if limit == limits[1]}
    assert any(rows < 32 for _, rows in middle)  # a band of rows
    assert any(rows == 32 and count < 2 * cols.count for count, rows in middle)  # of columns
    assert (limits[2], (2 * cols.count, 32)) in kinds
    for y, dx, _ in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


@pytest.mark.parametrize(("g", "reflect"), [(8, "vector"), (32, "element")])
def test_tiles_of_every_configuration_hold_the_same_bits(g: int, reflect: str) -> None:
    """Against images of one pixel each, a convolution is the weight itself."""
    permute = not INTERPRETED or g == 8
    bank = bank_of(1500, torch.float16, granularity=g, reflect=reflect, permute=permute)
    weight = bank.place((18, 32, 1, 2), scale=1.0)
    wanted = brute.unpack(weight, brute.ring(bank)).detach().half()
    on, spec = bank.weight.detach().to(DEVICE), weight.spec
    how = ([1, 1], [0, 1], [1, 1], 1)
    x = torch.eye(32).half().view(32, 32, 1, 1).to(DEVICE)
    dy = torch.eye(18).half().view(18, 18, 1, 1).to(DEVICE)
    for config in (Config(64, 16, 16, 4, 2), Config(16, 32, 32, 4, 2), None):
        for limit in (0, 1 << 20):
            with rpg.scratch_limit(limit):
                y = kernels.conv2d(x, on, None, None, spec, *how, config)
                dx = kernels.conv2d_input_grad(
                    dy, on, None, [18, 32, 1, 2], spec, [1, 1], [0, 0], [1, 1], 1, config
                )
            assert torch.equal(y.cpu()[:, :, 0].permute(1, 0, 2).flip(2), wanted[:, :, 0])
            assert torch.equal(dx.cpu(), wanted)


@pytest.mark.parametrize("groups", [1, 2])
def test_tables(groups: int) -> None:
    bank = brute.table_bank(50, entries=6 * 12 * 6 + 5, dtype=torch.float32)
    bank.place((1, 5))
    weight = bank.place((6, 12, 3, 2), scale=0.7)
    for part in (weight, weight.narrow(1, 3, 8).narrow(0, 2, 4)):
        check(part, torch.randn(2, part.shape[1] * groups, 5, 4), padding=1, groups=groups)


@pytest.mark.parametrize("groups", [1, 3])
def test_law_of_several_bands(groups: int) -> None:
    """More than 2^31 positions: a launch per band, results that add up; groups cut in two."""
    g, rows = 8, 2**31 // 4
    bank = brute.bank_of(1000, torch.float32, granularity=g, reflect="element")
    whole = Placement(bank.generator, 3, g * 5, (rows, 2 * g, 2, 2), 0.5)
    height = whole.law.rows_per_band
    assert height < rows
    part = whole.narrow(0, height - 5, 9).narrow(1, 3, 2 * g - 5)
    n = torch.arange(height - 5, height + 4)[:, None]
    ring, b = bank.weight.detach().view(-1, g), torch.arange(8)
    w = ring[whole.law.slot(n, b)] * (1 - 2 * whole.law.negative(n, b).float())
    w = 0.5 * w.reshape(9, 2, 2, 2 * g).permute(0, 3, 1, 2)[:, 3:-2].double()
    x = torch.randn(3, w.shape[1] * groups, 4, 5)
    dy = torch.randn(3, 9, 3, 4)
    how, spec, on = (
        ([1, 1], [0, 0], [1, 1], groups),
        part.to_json(),
        bank.weight.detach().to(DEVICE),
    )
    y = kernels.conv2d(x.to(DEVICE), on, None, None, spec, *how)
    dx = kernels.conv2d_input_grad(dy.to(DEVICE), on, None, x.shape, spec, *how)
    dw = kernels.conv2d_bank_grad(dy.to(DEVICE), x.to(DEVICE), None, spec, *how, torch.float32)
    exact = F.conv2d(leaf := x.double().requires_grad_(), w, None, 1, 0, 1, groups)
    (wanted,) = torch.autograd.grad(exact, leaf, dy.double())
    op = torch.ops.rpg_kernels.conv2d_bank_grad  # the reference has the same bands
    grad = op(dy.double(), x.double(), None, spec, *how, torch.float64, "reference")
    for got, right in ((y, exact.detach()), (dx, wanted), (dw, grad)):
        torch.testing.assert_close(got.cpu().double(), right, rtol=1e-5, atol=1e-4)


def test_more_pixels_than_a_launch_numbers() -> None:
    """Images in several launches, whose bank gradients add up."""
    weight = bank_of(400, torch.float32, granularity=16).place((5, 16, 2, 2))
    with mock.patch.object(pixels, "MOST_PIXELS", 40):
        check(weight, torch.randn(3, 16, 5, 5), padding=(1, 0))
        torch.use_deterministic_algorithms(True)
        try:
            check(weight, torch.randn(3, 16, 5, 5))
        finally:
            torch.use_deterministic_algorithms(False)
    with mock.patch.object(pixels, "MOST_PIXELS", 20):
        check(weight, torch.randn(2, 16, 5, 5))  # the reference's


def test_more_steps_than_a_loop_counts() -> None:
    """What the kernels divide by multiplication stays small enough; others are the reference's."""
    weight = bank_of(400, torch.float32, granularity=16).place((5, 16, 2, 2))
    p, x = weight.placement, torch.empty(1, 1, 1, 1)
    shapes = {(512, 512, 3, 3): False, (64, 4_000_000, 1, 1): True, (64, 64, 1, 70_000): True}
    for shape, large in shapes.items():
        assert pixels.too_large(Placement(p.generator, 0, 0, shape, 1.0), x) == large
    with mock.patch.object(pixels, "MOST_STEPS", 4):
        check(weight, torch.randn(3, 16, 5, 5), padding=(1, 0))


@pytest.mark.parametrize(("g", "reflect", "channels"), [(16, "element", 20), (4, "vector", 3)])
def test_deterministic_bank_gradient(g: int, reflect: str, channels: int) -> None:
    bank = bank_of(300, torch.float32, granularity=g, reflect=reflect)
    weight = bank.place((15, channels + 2, 2, 2), scale=0.6).narrow(1, 1, channels)
    weight = weight.narrow(0, 2, 12)
    x, dy = torch.randn(2, 2 * channels, 5, 5), torch.randn(2, 12, 3, 3)
    how = {"stride": 2, "padding": 1, "groups": 2}
    torch.use_deterministic_algorithms(True)
    try:
        _, _, first = check(weight, x, None, TILES, dy, **how)
        with rpg.scratch_limit(4 * channels * 4 * 5):
            _, _, bands = check(weight, x, None, TILES, dy, **how)
        with rpg.scratch_limit(1 << 16):
            _, _, again = check(weight, x, None, TILES, dy, **how)
        assert torch.equal(first, again)
        assert torch.allclose(first, bands, rtol=1e-5, atol=1e-5)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", ["strided", "expanded", "flipped", "transposed", "part"])
def test_strides(layout: str) -> None:
    weight = bank_of(700, torch.float32, granularity=16).place((6, 16, 2, 1))

    def of(channels: int, size: int) -> Tensor:
        x = torch.randn(2, channels, size, size)
        return {
            "strided": torch.empty(4, 2 * channels, size, 3 * size)[::2, ::2, :, ::3].copy_(x),
            "expanded": x[:1, :1].expand(2, channels, size, size),
            "flipped": x.flip(1)[:, :, 1:, 1:],
            "transposed": x.transpose(2, 3),
            "part": torch.cat((x, x), 1).contiguous(memory_format=LAST)[:, 3 : 3 + channels],
        }[layout]

    x = of(16, 5)
    dy = of(6, 6)[:, :, 1:5, :5] if layout != "flipped" else of(6, 6)[:, :, :3, 1:]
    bias = torch.randn(12)[::2]
    check(weight, x, bias, TILES, dy)


@pytest.mark.parametrize("groups", [1, 2])
def test_one_by_one(groups: int) -> None:
    """Without copies where images are lines of channels; strided ones have classes without taps."""
    weight = bank_of(700, torch.float32, granularity=16).place((6, 16, 1, 1))
    x = torch.randn(2, 16 * groups, 3, 4).contiguous(memory_format=LAST)
    bias = torch.randn(6)
    check(weight, x, bias, groups=groups)
    check(weight.narrow(0, 2, 4), x, bias[:4], groups=groups, stride=2)
    check(weight, x.contiguous(), bias, groups=groups, padding=1)


@pytest.mark.parametrize("padding", [0, 5])
def test_outputs_of_one_pixel_and_padding_beyond_the_image(padding: int) -> None:
    weight = bank_of(700, torch.float32, granularity=8).place((3, 8, 3, 2))
    check(weight, torch.randn(2, 8, 3, 2), stride=9, padding=padding)
    check(weight, torch.randn(1, 8, 1, 1), stride=(1, 3), padding=(1, 5), dilation=(1, 2))


@pytest.mark.parametrize("kernel", [1, 3])
def test_empty_batch(kernel: int) -> None:
    weight = bank_of(640, torch.float32, granularity=16).place((20, 5, kernel, kernel))
    _, _, dw = check(weight, torch.randn(0, 5, 4, 4).contiguous(memory_format=LAST))
    assert not dw.any()


@pytest.mark.parametrize(
    ("channels", "reflect"), [(19, "element"), (19, "vector"), (4, "none"), (4, "element")]
)
def test_nan_reaches_what_reads_it_and_nothing_else(channels: int, reflect: str) -> None:
    bank = bank_of(1024, torch.float16, granularity=16, reflect=reflect)
    weight = bank.place((12, channels, 2, 2)).narrow(1, 1, channels - 1)
    index, _ = brute.index_and_sign(weight)
    unread = sorted(set(range(bank.dof)) - set(index.flatten().tolist()))
    with torch.no_grad():
        bank.weight.view(-1)[unread] = torch.nan  # padding and slots that this part never uses
        bank.weight.view(-1)[index[4, 1, 0, 1]] = torch.nan
    bad = index == index[4, 1, 0, 1]
    on, spec, how = bank.weight.detach().to(DEVICE), weight.spec, ([2, 2], [0, 0], [1, 1], 1)
    for batch in (2, 40):  # one tile of pixels, and several
        x = torch.ones(batch, channels - 1, 2, 2, dtype=torch.float16, device=DEVICE)
        y = kernels.conv2d(x, on, None, None, spec, *how, TILES)
        wanted = bad.any((1, 2, 3))[None, :, None, None]
        assert torch.equal(y.isnan().cpu(), wanted.expand(y.shape))
        dy = torch.ones_like(y)
        dx = kernels.conv2d_input_grad(dy, on, None, x.shape, spec, *how, TILES)
        assert torch.equal(dx.isnan().cpu(), bad.any(0).expand(x.shape))
        x[0, 2, 1, 1] = torch.nan  # which one tap reads
        dy[0, 3] = torch.nan
        dw = kernels.conv2d_bank_grad(dy, x, None, spec, *how, torch.float32, TILES)
        read = torch.zeros(bank.dof, dtype=torch.bool)
        read[index[:, 2, 1, 1]] = True
        read[index[3].flatten()] = True
        assert torch.equal(dw.view(-1).isnan().cpu(), read)


@pytest.mark.parametrize("channels", [16, 3])
def test_infinity_reaches_no_pixel_that_does_not_read_it(channels: int) -> None:
    """Tiles repeat the last row of a weight whose rows do not fill them: not into a product."""
    bank = bank_of(4096, torch.float32, granularity=16)
    weight = bank.place((5, channels, 2, 2))
    index, _ = brute.index_and_sign(weight)
    with torch.no_grad():
        bank.weight.view(-1)[index[4, 1, 0, 1]] = torch.inf
    wanted = torch.zeros(1, channels, 2, 2, dtype=torch.bool)
    wanted[0] = (index == index[4, 1, 0, 1]).any(0)
    how = ([2, 2], [0, 0], [1, 1], 1)
    dy = torch.ones(1, 5, 1, 1, device=DEVICE)
    on = bank.weight.detach().to(DEVICE)
    dx = kernels.conv2d_input_grad(dy, on, None, list(wanted.shape), weight.spec, *how)
    assert torch.equal(dx.isinf().cpu(), wanted)
    assert not dx.isnan().any()


def test_through_dispatch_and_autograd() -> None:
    bank = bank_of(640, torch.float32, granularity=16).to(DEVICE)
    layer = rpg.nn.Conv2d(16, 6, (2, 1), stride=2, padding=1, bank=bank).to(DEVICE)
    x = torch.randn(1, 16, 3, 3, device=DEVICE, requires_grad=True)
    grads = {}
    for name in ("triton", "reference"):
        with rpg.backend(name):
            assert rpg.explain(layer, x).backend == name
            leaves = (x, bank.weight)
            y = layer(x)
            grads[name] = (y, *torch.autograd.grad(y.sin().sum(), leaves, create_graph=True))
            second = sum(g.square().sum() for g in grads[name][1:])
            grads[name] += torch.autograd.grad(second, leaves)
    for ours, theirs in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_residue_classes_are_the_adjoint_of_the_forward(stride: int, dilation: int) -> None:
    """Every (input pixel, tap, output pixel) of the forward is in exactly one class."""
    p = rpg.ParameterBank(64).place((1, 1, 3, 4)).placement
    size, padding, strides, dilations = (7, 9), (2, 3), (stride, 2), (dilation, 2)
    out = [
        (s + 2 * q - d * (k - 1) - 1) // t + 1
        for s, q, d, k, t in zip(size, padding, dilations, (3, 4), strides, strict=True)
    ]
    wanted = {
        (i * strides[0] - 2 + th * dilations[0], j * strides[1] - 3 + tw * 2, th * 4 + tw, i, j)
        for i, j, th, tw in itertools.product(*map(range, (*out, 3, 4)))
    }
    wanted = {use for use in wanted if 0 <= use[0] < size[0] and 0 <= use[1] < size[1]}
    got = []
    for c in pixels.residue_classes(p, size, strides, padding, dilations):
        view = c.reads
        numbers = itertools.product(*map(range, (c.height, c.width, *view.taps)))
        got += [
            (
                c.first[0] + strides[0] * i,
                c.first[1] + strides[1] * j,
                view.first_tap + th * view.taps_apart[0] + tw * view.taps_apart[1],
                i + view.start[0] + th * view.reach[0],
                j + view.start[1] + tw * view.reach[1],
            )
            for i, j, th, tw in numbers
        ]
    got = [use for use in got if 0 <= use[3] < out[0] and 0 <= use[4] < out[1]]
    assert len(got) == len(set(got))
    assert set(got) == wanted


@pytest.mark.parametrize("last", [False, True])
def test_bank_gradient_in_parts_of_the_pixels(last: bool) -> None:
    weight = bank_of(400, torch.float32, granularity=16).place((5, 16, 2, 2))
    x = torch.randn(4, 16, 6, 5)
    if last:
        x = x.to(memory_format=LAST)
    for splits in (2, 5):
        check(weight, x, padding=(1, 0), config=replace(TILES, splits=splits))
