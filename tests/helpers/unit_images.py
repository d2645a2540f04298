"""Convolutions of the unit law, what the CPU kernels make of them, and what they define."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import unit_layers
from torch import Tensor
from unit_layers import CANARY, GUARD

from rpg_kernels import native
from rpg_kernels._tensors import empty_image
from rpg_kernels.backends.cpu import unit_conv2d
from rpg_kernels.backends.cpu.selection import selection
from rpg_kernels.law.explicit import explicit_map
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.geometry import conv_output
from rpg_kernels.law.placement import Placement
from rpg_kernels.law.unit import alignment

NAMES = ("y", "dx", "dw")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
op = torch.ops.rpg_kernels
Pair = tuple[int, int]


class Convolution:
    """A weight, images ``[B, C, H, W]`` for it, and a gradient of its result."""

    def __init__(
        self,
        shape: Sequence[int],
        batch: int,
        size: Pair,
        *,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        slots: int = 700,
        granularity: int = 64,
        laps: int = 4,
        taps: int | None = None,
        reflect: str = "vector",
        permute: bool = True,
        start: int = 0,
        scale: float = -0.75,
        dtype: torch.dtype = torch.float32,
        bank_dtype: torch.dtype = torch.float32,
        bias: bool = True,
        seed: int = 0,
    ) -> None:
        made = torch.Generator().manual_seed(seed)
        g, layer = Generator(slots, granularity, reflect, permute, None, laps, seed, 3), seed % 50
        shape = tuple(shape)
        step = alignment(Placement(g, layer, 0, shape, scale, taps=taps).matrix.block, laps)
        self.p = Placement(g, layer, start // step * step, shape, scale, taps=taps)
        self.spec, self.law = self.p.to_json(), native.layer_law(self.p.law)
        self.how, self.pairs = (stride, padding, dilation), False
        out = conv_output(size, shape[2:], *self.how)
        self.bank = torch.randn(slots, granularity, generator=made).to(bank_dtype)
        self.x = torch.randn(batch, shape[1], *size, generator=made).to(dtype)
        self.dy = torch.randn(batch, shape[0], *out, generator=made).to(dtype)
        self.bias = torch.randn(shape[0], generator=made).to(dtype) if bias else None
        self.elements, self.sign = explicit_map(self.p)

    @property
    def index(self) -> Tensor:
        """Which element of the bank each weight is, of those that are kept."""
        return self.elements.flatten()

    def choose(self, rows: Sequence[int] | None, columns: Sequence[int] | None) -> None:
        """Keep these rows and columns of the weight, and what belongs to them."""
        for dim, chosen in enumerate((rows, columns)):
            if chosen is None:
                continue
            self.p = self.p.select(dim, chosen)
            kept = torch.tensor(chosen)
            read = (self.elements, self.sign)
            self.elements, self.sign = (t.index_select(dim, kept) for t in read)
            name = "x" if dim else "dy"
            setattr(self, name, getattr(self, name).index_select(1, kept))
            if dim == 0 and self.bias is not None:
                self.bias = self.bias[kept]
        self.spec = self.p.to_json()

    def __str__(self) -> str:
        sizes = (list(self.x.shape), self.x.stride(), list(self.dy.shape), self.dy.stride())
        return f"{sizes} {self.how} {self.x.dtype} {self.bank.dtype} {self.p}"

    def forward(self, threads: int, lanes: int, rows: int) -> Tensor:
        """y of the native method, in a guarded workspace and from memory that holds NaN."""
        x, bias = self.x, None if self.bias is None else self.bias.float()
        how = (self.p.shape[2:], self.p.matrix.by_tap, *self.how)
        y = empty_image(x, self.dy.shape).fill_(float("nan"))
        part = selection(self.spec)
        size = self.law.unit_conv2d_workspace(x.shape, *how, threads, lanes, rows, self.pairs, part)
        memory = Guarded(size[0])
        self.law.unit_conv2d(
            native.given_bank(self.bank),
            *_typed(x),
            x.shape,
            x.stride(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            not y.is_contiguous(),
            *how,
            self.p.scale,
            threads,
            lanes,
            rows,
            memory.address,
            self.pairs,
            selection(self.spec),
        )
        memory.check(str(self))
        return y

    def grads(
        self, threads: int, lanes: int, rows: int, *, dx: bool = True, dw: bool = True
    ) -> list[Tensor]:
        """dx in the format of dy, dw in float32: those asked for."""
        x, dy = self.x, self.dy
        how = (self.p.shape[2:], self.p.matrix.by_tap, *self.how)
        made_dx = empty_image(dy, x.shape).fill_(float("nan"))
        made_dw = torch.zeros(self.bank.shape)
        tile = (threads, lanes, rows)
        wanted = (dx, dw, self.pairs, selection(self.spec))
        size = self.law.unit_conv2d_grads_workspace(x.shape, *how, *tile, *wanted)
        memory = Guarded(size[0])
        self.law.unit_conv2d_grads(
            native.given_bank(self.bank if dx else None),
            dy.data_ptr(),
            dy.stride(),
            x.data_ptr() if dw else 0,
            native.dtype_code(x.dtype),
            x.shape,
            x.stride(),
            made_dx.data_ptr() if dx else 0,
            not made_dx.is_contiguous(),
            made_dw.data_ptr() if dw else 0,
            *how,
            self.p.scale,
            threads,
            lanes,
            rows,
            memory.address,
            self.pairs,
            selection(self.spec),
        )
        memory.check(str(self))
        return [made_dx] * dx + [made_dw] * dw

    def called(self, number: int, backend: str = "", groups: int = 1) -> Tensor:
        """One of the results, by its operator."""
        x, dy, bank, how = self.x, self.dy, self.bank, (*self.how, groups)
        if number == 0:
            return op.conv2d(x, bank, None, self.bias, self.spec, *how, backend)
        if number == 1:
            return op.conv2d_input_grad(dy, bank, None, x.shape, self.spec, *how, backend)
        return op.conv2d_bank_grad(dy, x, None, self.spec, *how, bank.dtype, backend)

    def results(self, backend: str = "cpu") -> list[Tensor]:
        """In the order of NAMES, by the operators."""
        return [self.called(number, backend) for number in range(3)]

    def weight(self, bank: Tensor) -> Tensor:
        """The weight, written out from a bank."""
        return (bank.flatten()[self.elements] * self.sign).mul(self.p.scale)

    def exact(self) -> list[Tensor]:
        """By torch, in float64."""
        x, bank = (t.detach().double().requires_grad_() for t in (self.x, self.bank))
        bias = None if self.bias is None else self.bias.double()
        y = torch.nn.functional.conv2d(x, self.weight(bank), bias, *self.how)
        dx, dw = torch.autograd.grad(y, (x, bank), self.dy.double())
        return [y.detach(), dx, dw]

    def defined(self) -> list[Tensor]:
        """Without a bias, tap by tap: what lies outside of an image is met by nothing."""
        x, dy, weight = self.x.double(), self.dy.double(), self.weight(self.bank.double())
        y, dx, dense = (torch.zeros_like(t) for t in (dy, x, weight))
        sizes = zip(*self.how, dy.shape[2:], x.shape[2:], strict=True)
        axes = [(t, p, d, torch.arange(out), inside) for t, p, d, out, inside in sizes]
        for tap in torch.cartesian_prod(*(torch.arange(k) for k in self.p.shape[2:])):
            at, to = [], []
            for i, (step, pad, far, out, inside) in zip(tap.tolist(), axes, strict=True):
                place = out * step + i * far - pad
                keep = (place >= 0) & (place < inside)
                at, to = [*at, place[keep]], [*to, out[keep]]
            here, there = (..., at[0][:, None], at[1]), (..., to[0][:, None], to[1])
            w, part, dpart = weight[:, :, tap[0], tap[1]], x[here], dy[there]
            y[there] += torch.einsum("bchw,oc->bohw", part, w)
            dx[here] += torch.einsum("bohw,oc->bchw", dpart, w)
            dense[:, :, tap[0], tap[1]] = torch.einsum("bohw,bchw->oc", dpart, part)
        dw = torch.zeros(self.bank.numel(), dtype=torch.float64)
        dw.index_add_(0, self.index, (dense * self.sign * self.p.scale).flatten())
        return [y, dx, dw.view_as(self.bank)]


class Guarded:
    """Memory of so many bytes that holds NaN, and around it what must stay."""

    def __init__(self, size: int) -> None:
        memory = torch.full((size + 2 * GUARD + 64,), CANARY, dtype=torch.uint8)
        self.memory, self.size = memory[-memory.data_ptr() % 64 :], size
        self.memory[GUARD : GUARD + size] = 0xFF
        self.address = self.memory.data_ptr() + GUARD

    def check(self, what: str) -> None:
        assert (self.memory[:GUARD] == CANARY).all(), what
        assert (self.memory[GUARD + self.size :] == CANARY).all(), what


def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Workspaces of the operators hold NaN, and what is around them is checked; yields sizes."""
    given: list[int] = []
    memories: list[Guarded] = []

    def guarded(size: int) -> Tensor:
        memories.append(Guarded(size))
        given.append(size)
        return memories[-1].memory[GUARD:]

    monkeypatch.setattr(unit_conv2d, "workspace", guarded)
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # what is made and not written is NaN
    yield given
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)
    for memory in memories:
        memory.check("an operator")


def _typed(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), native.dtype_code(tensor.dtype)


def close(got: Tensor, exact: Tensor, what: str, eps: float = 0.0) -> None:
    """Up to the rounding of the result and of sums in float32; of dw these are over all pixels."""
    assert got.shape == exact.shape, what
    assert got.isfinite().all(), what
    if got.numel():
        far = (got.double() - exact).abs().max()
        unit = max(eps, torch.finfo(got.dtype).eps) + (2e-5 if got.dim() == 2 else 4e-6)
        assert far <= unit * exact.abs().max() + 1e-6, f"{what}: {far}"


def where_numbers_end(layer: Convolution, name: str) -> None:
    """What is no number is there, and only there, where the definition puts it."""
    number, height, out_height = NAMES.index(name), layer.x.shape[2], layer.dy.shape[2]
    exact, found = layer.defined()[number], [layer.called(number, "cpu")]
    for lanes in (1, 8):
        if number == 0:
            found.append(layer.forward(2, lanes, out_height))
        else:
            found.append(layer.grads(2, lanes, height)[number - 1])
    finite = exact.isfinite()
    for got in found:
        assert got.isfinite().equal(finite), f"{name}: {layer}"
        got, wanted = (torch.where(finite, t.double(), 0.0) for t in (got, exact))
        assert (got - wanted).abs().max() <= 0.02 * wanted.abs().max() + 1e-4, f"{name}: {layer}"


def products(layer: Convolution) -> int:
    """Slots of windows times elements that are weights, counted position by position."""
    p, law = layer.p, layer.p.law
    n, b = torch.arange(law.rows)[:, None], torch.arange(law.blocks)
    octets = law.slot(n, b) // 8
    column, group, _, _ = law.number(*torch.broadcast_tensors(n, b), 0)
    block = (b % p.matrix.run_blocks).expand_as(octets)
    read = torch.stack((block, column, group, octets), -1).flatten(0, 1).unique(dim=0)
    size = p.matrix.block
    return 8 * int((p.matrix.run - size * read[:, 0]).clamp(max=size).sum())


def laid_out(kind: int, x: Tensor) -> Tensor:
    """Images in one of the six ways in which they come, the last of them in odd strides."""
    if kind == 1:
        return x.contiguous(memory_format=torch.channels_last)
    if kind == 2:
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == 3:  # a part of larger images
        large = x.new_full([s + 2 for s in x.shape], float("nan"))
        large[1:-1, 1:-1, 1:-1, 1:-1] = x
        return large[1:-1, 1:-1, 1:-1, 1:-1]
    if kind == 4:  # every second of everything, images innermost
        large = x.new_full([2 * s for s in x.permute(1, 2, 3, 0).shape], float("nan"))
        large[::2, 1::2, ::2, 1::2] = x.permute(1, 2, 3, 0)
        return large[::2, 1::2, ::2, 1::2].permute(3, 0, 1, 2)
    if kind == 5:  # the same image, the same row
        return x[:1, :, :1].expand(x.shape)
    return x.contiguous()


KERNELS = [(1, 1), (3, 3), (1, 3), (5, 5), (2, 2), (3, 3)]
STRIDES = [(1, 1), (1, 1), (2, 2), (1, 2), (1, 1)]
PADDINGS = [(0, 0), (1, 1), (2, 2), (3, 0), (1, 9), (3, 3)]
DILATIONS = [(1, 1), (1, 1), (2, 1), (1, 3)]
SIZES = [(1, 1), (4, 4), (7, 9), (20, 20), (40, 24), (5, 16), (3, 64)]
MOST = 12_000_000  # multiplications


def convolutions(count: int, seed: int) -> Iterator[Convolution]:
    """Convolutions of all sorts."""
    rng = random.Random(seed)
    values: list[Sequence[Any]] = [KERNELS, STRIDES, PADDINGS, DILATIONS, SIZES, [1, 2, 9, 17]]
    values += [[16, 32, 64, 128], [1, 4, 9, 16], [8, 24, 100, 130], DTYPES, DTYPES, range(6)]
    dealt = [unit_layers.dealt(rng, each, count) for each in values]
    for kernel, stride, padding, dilation, size, batch, block, laps, out, *rest in zip(
        *dealt, strict=True
    ):
        dtype, bank_dtype, kind = rest
        channels = rng.choice([16, 70, 128, block, 2 * block - block // 8])
        reach = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        size = tuple(max(s, r) for s, r in zip(size, reach, strict=True))
        while (
            batch > 1 and out * channels * kernel[0] * kernel[1] * size[0] * size[1] > MOST / batch
        ):
            batch //= 2
        layer = Convolution(
            (out, channels, *kernel),
            batch,
            size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            slots=rng.choice([13, 130, 700, 1001]),
            granularity=block,
            laps=laps,
            taps=1 if max(stride) > 1 or rng.random() < 0.3 else None,
            reflect=rng.choice(["vector", "vector", "none"]),
            permute=rng.random() < 0.8,
            start=rng.choice([0, rng.randrange(10**6), rng.randrange(2**61, 2**62)]),
            scale=rng.choice([1.0, 0.5, -1.25, 0.037]),
            dtype=dtype,
            bank_dtype=bank_dtype,
            bias=rng.random() < 0.5,
            seed=rng.randrange(10**6),
        )
        layer.x, layer.dy = laid_out(kind, layer.x), laid_out(rng.randrange(6), layer.dy)
        yield layer
