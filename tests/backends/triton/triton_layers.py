"""One layer of any packing law, and its operators compared with a dense weight in float64.

The weight is the law's explicit map of the bank: no back end takes part in what is expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from triton_process import DEVICE

import rpg_kernels as rpg
from rpg_kernels.backends.triton import conv2d, embedding, linear, unpack
from rpg_kernels.backends.triton.config import Config
from rpg_kernels.law.explicit import explicit_map
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import Placement, place

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TILES = Config(16, 16, 16, 4, 2, 2)  # small, so that small shapes have several


@dataclass(frozen=True)
class Layer:
    """A weight, or a part of one, and its bank ``[slots, granularity]`` on the CPU."""

    p: Placement
    bank: Tensor

    @property
    def spec(self) -> str:
        """What operators are told of the weight."""
        return self.p.to_json()

    @property
    def dtype(self) -> torch.dtype:
        """Of the bank."""
        return self.bank.dtype

    @cached_property
    def map(self) -> tuple[Tensor, Tensor]:
        """(element of the bank, sign) of the selected weights."""
        (row, rows), (column, columns) = self.p.selection
        part = (slice(row, row + rows), slice(column, column + columns))
        index, sign = explicit_map(self.p)
        return index[part], sign[part].double()

    @cached_property
    def weight(self) -> Tensor:
        """scale · G · w in float64, ``[rows, columns, *kernel]``."""
        index, sign = self.map
        return self.p.scale * sign * self.bank.double().flatten()[index]

    def pack(self, dense: Tensor) -> Tensor:
        """scale · Gᵀ · dense in float64, ``[slots, granularity]``."""
        index, sign = self.map
        flat = torch.zeros(self.bank.numel(), dtype=torch.float64)
        flat.index_add_(0, index.flatten(), (sign * dense.double()).flatten())
        return self.p.scale * flat.view_as(self.bank)

    def narrow(self, rows: tuple[int, int], columns: tuple[int, int]) -> Layer:
        """The part of these (first, how many) rows and columns."""
        return Layer(self.p.narrow(0, *rows).narrow(1, *columns), self.bank)


def layer(
    generator: Generator,
    shape: Sequence[int],
    dtype: torch.dtype,
    taps: int | None = None,
    cursor: int = 12345,
    scale: float = 0.7,
) -> Layer:
    """A layer that follows others, on a bank of values of order 1."""
    p, _ = place(generator, 3, cursor, shape, scale, taps)
    return Layer(p, torch.randn(generator.slots, generator.granularity).to(dtype))


def close(got: Tensor, exact: Tensor, dtype: torch.dtype, what: object) -> None:
    """A result of a dtype that is accurate relative to its largest value, which is 1 or more."""
    assert got.dtype == dtype, what
    assert got.shape == exact.shape, what
    size = max(1.0, float(exact.abs().max()))
    error = float((got.detach().cpu().double() - exact).abs().max()) / size
    assert error < TOLERANCE[dtype], what


def check_linear(
    one: Layer, limit: int, *, ordered: bool, config: Config | None, m: int = 9
) -> None:
    """Forward and both gradients of a batch of m, with a limit of scratch."""
    w, dtype = one.weight, one.dtype
    x, dy = (torch.randn(m, size).to(dtype) for size in reversed(w.shape))
    bank, spec, a, d = one.bank.to(DEVICE), one.spec, x.to(DEVICE), dy.to(DEVICE)
    with rpg.scratch_limit(limit):
        y = linear.linear(a, bank, None, None, spec, config)
        dx = linear.linear_input_grad(d, bank, None, spec, config)
        torch.use_deterministic_algorithms(ordered)
        try:
            dw = linear.linear_bank_grad(d, a, None, spec, dtype, config)
        finally:
            torch.use_deterministic_algorithms(False)
    close(y, x.double() @ w.t(), dtype, "y")
    close(dx, dy.double() @ w, dtype, "dx")
    close(dw, one.pack(dy.double().t() @ x.double()), dtype, "dw")


def check_conv2d(one: Layer, groups: int, limit: int, size: tuple[int, int] = (6, 5)) -> None:
    """Forward and both gradients on two images, with a stride in one direction."""
    dtype = one.dtype
    x = torch.randn(2, one.weight.shape[1] * groups, *size).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    geometry = ([2, 1], [1, 1], [1, 1], groups)
    a, w = x.double().requires_grad_(), one.weight.clone().requires_grad_()
    exact = torch.conv2d(a, w, None, *geometry)
    dy = torch.randn(exact.shape).to(dtype).to(memory_format=torch.channels_last)
    dx, dense = torch.autograd.grad(exact, (a, w), dy.double())
    bank, spec = one.bank.to(DEVICE), one.spec
    with rpg.scratch_limit(limit):
        y = conv2d.conv2d(x.to(DEVICE), bank, None, None, spec, *geometry)
        ours = conv2d.conv2d_input_grad(dy.to(DEVICE), bank, None, x.shape, spec, *geometry)
        grad = conv2d.conv2d_bank_grad(dy.to(DEVICE), x.to(DEVICE), None, spec, *geometry, dtype)
    close(y, exact.detach(), dtype, "y")
    close(ours, dx, dtype, "dx")
    close(grad, one.pack(dense), dtype, "dw")


def check_embedding(one: Layer) -> None:
    """Rows of the weight, the first and the last among them, and their gradient."""
    w, dtype = one.weight, one.dtype
    last = w.shape[0] - 1
    index = torch.tensor([last // 3, 0, last, last // 3, last // 2])
    y = embedding.embedding(one.bank.to(DEVICE), None, index.to(DEVICE), one.spec)
    close(y, w[index], dtype, "rows")
    dy = torch.randn(5, w.shape[1]).to(dtype)
    dense = torch.zeros(w.shape, dtype=torch.float64).index_add_(0, index, dy.double())
    dw = embedding.embedding_bank_grad(dy.to(DEVICE), index.to(DEVICE), None, one.spec, dtype)
    close(dw, one.pack(dense), dtype, "dw")


def check_unpack_and_pack(one: Layer) -> None:
    """The weight itself, rounded once, and the adjoint."""
    dtype = one.dtype
    got = unpack.unpack(one.bank.to(DEVICE), None, one.spec)
    close(got, one.weight.to(dtype).double(), dtype, "unpack")
    dense = torch.randn(one.weight.shape).to(dtype)
    packed = unpack.pack(dense.to(DEVICE), None, one.spec, dtype)
    close(packed, one.pack(dense), dtype, "pack")
