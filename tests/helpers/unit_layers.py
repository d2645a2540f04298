"""Linear layers, what kernels that take the batch in lanes make of them, and what they define."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import brute_force as brute
import pytest
import torch
from torch import Tensor

from rpg_kernels.backends.cpu import lanes_linear
from rpg_kernels.backends.cpu.lanes import Family
from rpg_kernels.backends.cpu.units import UNITS
from rpg_kernels.law.explicit import explicit_map
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import Placement
from rpg_kernels.law.unit import MAX_UNIT, alignment

GUARD, CANARY = 1 << 14, 0xA5  # bytes around a workspace, and what they hold
NAMES = ("y", "dx", "dw", "dx of both", "dw of both")
op = torch.ops.rpg_kernels


class Layer:
    """A layer, a batch for it, and a gradient of its result."""

    def __init__(
        self,
        shape: tuple[int, int],
        batch: int | tuple[int, ...],
        *,
        slots: int = 700,
        granularity: int = 64,
        law: int = 3,
        laps: int | None = 4,
        window: int | None = None,
        reflect: str = "vector",
        permute: bool = True,
        start: int = 0,
        scale: float = -0.75,
        dtype: torch.dtype = torch.float32,
        bank_dtype: torch.dtype | None = None,
        bias: bool = True,
        seed: int = 0,
    ) -> None:
        made = torch.Generator().manual_seed(seed)
        leading = (batch,) if isinstance(batch, int) else batch
        g = Generator(slots, granularity, reflect, permute, window, laps, seed, law)
        layer = seed % 50
        step = block = Placement(g, layer, 0, shape, scale).matrix.block
        if law == 3:
            assert laps is not None
            step = alignment(block, laps)
        elif law == 1:
            start %= g.dof
        self.p = Placement(g, layer, start // step * step, shape, scale)
        self.spec, self.dtype, bank_dtype = self.p.to_json(), dtype, bank_dtype or dtype
        self.bank = torch.randn(slots, granularity, generator=made).to(bank_dtype)
        self.x = torch.randn(*leading, shape[1], generator=made).to(dtype)
        self.dy = torch.randn(*leading, shape[0], generator=made).to(dtype)
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
            setattr(self, name, getattr(self, name).index_select(-1, kept))
            if dim == 0 and self.bias is not None:
                self.bias = self.bias[kept]
        self.spec = self.p.to_json()

    def __str__(self) -> str:
        g, sizes = self.p.generator, (list(self.x.shape), list(self.p.shape))
        return f"{sizes} {self.dtype} {self.bank.dtype} {torch.get_num_threads()} {g} {self.p}"

    def results(self, on: Family | str = UNITS) -> list[Tensor]:
        """In the order of NAMES, by a family of kernels, or by the operators on a back end."""
        x, dy, bank, spec, dtype = self.x, self.dy, self.bank, self.spec, self.bank.dtype
        if isinstance(on, Family):
            return [
                lanes_linear.linear(on, x, bank, self.bias, spec),
                lanes_linear.linear_input_grad(on, dy, bank, spec),
                lanes_linear.linear_bank_grad(on, dy, x, spec, dtype),
                *lanes_linear.linear_grads(on, dy, bank, x, spec, dtype),
            ]
        return [
            op.linear(x, bank, None, self.bias, spec, on),
            op.linear_input_grad(dy, bank, None, spec, on),
            op.linear_bank_grad(dy, x, None, spec, dtype, on),
            *op.linear_grads(dy, bank, None, x, spec, dtype, on),
        ]

    def defined(self, dtype: torch.dtype) -> list[Tensor]:
        """The same by torch, with a weight that is written out in ``dtype``."""
        exact = torch.promote_types(dtype, torch.float32)
        weight = (self.bank.to(exact).flatten()[self.elements] * self.sign).mul(self.p.scale)
        weight = weight.to(dtype)
        x, dy = self.x.to(dtype), self.dy.to(dtype)
        y = torch.nn.functional.linear(
            x, weight, None if self.bias is None else self.bias.to(dtype)
        )
        dense = dy.flatten(0, -2).T @ x.flatten(0, -2)
        dw = torch.zeros(self.bank.numel(), dtype=exact)
        added = (dense.to(exact) * self.sign * self.p.scale).flatten()
        dw.index_add_(0, self.index, added)
        dw = dw.view_as(self.bank).to(torch.promote_types(dtype, self.bank.dtype))
        return [y, dy @ weight, dw, dy @ weight, dw]

    def check(self, on: Family | str = UNITS) -> list[Tensor]:
        """The results, which are as exact as torch's of a written-out weight."""
        results = self.results(on)
        found = zip(
            NAMES, results, self.defined(torch.float64), self.defined(self.dtype), strict=True
        )
        for name, got, exact, torchs in found:
            what = f"{name}: {self}"
            wanted = self.bank.dtype if "dw" in name else self.dtype
            assert got.dtype == wanted, what
            assert got.isfinite().all(), what
            if got.numel():
                other = self.in_order() if name == "y" and self.dtype == torch.float32 else torchs
                less_exact = max((torchs, other), key=lambda y: float((y - exact).abs().max()))
                brute.assert_accurate(got, exact, less_exact.to(wanted), what)
        return results

    def in_order(self) -> Tensor:
        """y with products that are added one after the other: torch's order, and with it torch's
        error, depends on the processor."""
        weight = (self.bank.float().flatten()[self.elements] * self.sign).mul(self.p.scale)
        y = self.x.new_zeros(*self.x.shape[:-1], len(weight))
        for k in range(weight.shape[1]):
            y.addcmul_(self.x[..., k, None], weight[:, k])
        return y if self.bias is None else y + self.bias


def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Workspaces hold NaN, and what is around them is checked; yields their sizes in bytes.

    What is made by ``torch.empty`` and not written is NaN too.
    """
    given: list[int] = []
    memories: list[tuple[Tensor, int]] = []
    workspace = lanes_linear.workspace

    def guarded(size: int) -> Tensor:
        memory = workspace(size + 2 * GUARD).fill_(CANARY)
        memory[GUARD : GUARD + size] = 0xFF
        given.append(size)
        memories[:] = [*memories[-4:], (memory, size)]
        return memory[GUARD:]

    monkeypatch.setattr(lanes_linear, "workspace", guarded)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    threads = torch.get_num_threads()
    yield given
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before)
    for memory, size in memories:
        assert (memory[:GUARD] == CANARY).all()
        assert (memory[GUARD + size :] == CANARY).all()


def dealt(rng: random.Random, values: Sequence[Any], count: int) -> list[Any]:
    """``count`` of some values in random order, each about as often as the others."""
    out = [values[i % len(values)] for i in range(count)]
    rng.shuffle(out)
    return out


BATCHES = [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 63, 64, 65, 100, 129, 300]
ROWS = [1, 2, 7, 8, 9, 15, 63, 64, 65, 100, 129, 300, 999, 1030, 2050, 3000]
LAPS = [1, 2, 3, 4, 7, 9, 16, 64]
SLOTS = [1, 3, 7, 8, 9, 13, 31, 77, 300, 1000, 1121, 2049]
WINDOWS = [None, None, None, 8, 16, 64, 248, 1024]
BLOCKS = [16, 32, 64, 128]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


def layers(count: int, seed: int) -> Iterator[Layer]:
    """Layers of all sorts; sets torch's number of threads for each."""
    rng = random.Random(seed)
    batches, rows, laps = (dealt(rng, each, count) for each in (BATCHES, ROWS, LAPS))
    slots, windows, blocks = (dealt(rng, each, count) for each in (SLOTS, WINDOWS, BLOCKS))
    dtypes, threads = dealt(rng, DTYPES, count), dealt(rng, [1, 2, 3, 4, 5], count)
    for i in range(count):
        block, window = blocks[i], windows[i]
        if window is not None and window // 8 * laps[i] > MAX_UNIT:
            window = None
        # The last block holds all, all but a few, or not even half of a vector of 16 less.
        columns = rng.choice([1, 2, 3, 5, 6]) * block - rng.choice([0, 0, 1, 3, block // 8])
        torch.set_num_threads(threads[i])
        layer = Layer(
            (rows[i], columns),
            batches[i],
            slots=slots[i],
            granularity=rng.choice([block, 128]),
            laps=laps[i],
            window=window,
            reflect=rng.choice(["vector", "vector", "vector", "none"]),
            permute=rng.random() < 0.8,
            start=rng.choice([0, rng.randrange(10**6), rng.randrange(2**61, 2**62)]),
            scale=rng.choice([1.0, 0.5, -1.25, 0.037]),
            dtype=dtypes[i][0],
            bank_dtype=dtypes[i][1],
            bias=rng.random() < 0.6,
            seed=rng.randrange(10**6),
        )
        if layer.p.matrix.block in BLOCKS:  # of few columns a part of a slot may be enough
            yield layer
