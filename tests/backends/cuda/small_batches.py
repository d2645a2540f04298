"""Cases of the CUDA kernels for small batches, for the back ends cuda and simt."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import brute_force as brute
import pytest
import torch
from torch import Tensor

from rpg_kernels import native
from rpg_kernels.backends.cuda import rules
from rpg_kernels.bank.virtual_weight import VirtualWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# None, or (window, laps)
WINDOWS = [None, (64, 1), (64, 4), (64, 8), (128, 3), (256, 2), (512, 2)]
ROWS = [1, 7, 64, 100, 130, 256, 300, 600]
COLUMNS = [32, 60, 64, 65, 110, 128, 200]
BATCHES = [1, 2, 8, 9, 16, 17, 40]
WINDOW, RING, GATHERED = 0, 1, 2  # Plan.fill
op = torch.ops.rpg_kernels

HAS_SIMT = native.available() and hasattr(native.module(), "simt")
needs_simt = pytest.mark.skipif(not HAS_SIMT, reason="needs a development build, `make test`")


@dataclass
class Problem:
    """A call of every operator, and the weight in a bank of other layers."""

    weight: VirtualWeight
    bank: Tensor
    x: Tensor
    dy: Tensor
    bias: Tensor | None
    backend: str

    @property
    def operators(self) -> list[str]:
        """Those that run this weight."""
        able = [name for name in rules.PRODUCTS if not self.refused(name)]
        assert able[:2] == ["linear", "linear_input_grad"]
        return able

    def refused(self, name: str) -> str:
        return rules.unsupported_weight(name, self.weight.spec)

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    def run(self, name: str) -> Tensor:
        """The result of an operator, from uninitialised memory that holds NaNs."""
        spec, x, dy = self.weight.spec, self.x, self.dy
        with uninitialised_is_nan():
            if name == "linear":
                return op.linear(x, self.bank, None, self.bias, spec, self.backend)
            if name == "linear_input_grad":
                return op.linear_input_grad(dy, self.bank, None, spec, self.backend)
            return op.linear_bank_grad(dy, x, None, spec, self.bank.dtype, self.backend)

    def exact(self) -> dict[str, Tensor]:
        """In float64 on the CPU, from the weight that the reference unpacks."""
        bank = self.bank.cpu().double().requires_grad_()
        dense = op.unpack(bank, None, self.weight.spec, "reference")
        x = self.x.cpu().double().requires_grad_()
        bias = None if self.bias is None else self.bias.cpu().double()
        y = torch.nn.functional.linear(x, dense, bias)
        dx, dw = torch.autograd.grad(y, (x, bank), self.dy.cpu().double())
        return {"linear": y.detach(), "linear_input_grad": dx, "linear_bank_grad": dw}

    def check(self) -> None:
        """Every operator that there is."""
        exact = self.exact()
        for name in self.operators:
            dtype = self.bank.dtype if name == "linear_bank_grad" else self.x.dtype
            close(self.run(name), exact[name], dtype, self.x.dtype)

    def fill(self, name: str = "linear") -> int:
        launches = rules.check(
            name, self.weight.spec, self.x.device, self.x.dtype, self.batch, self.bank
        )
        return int(launches[0][1].fill)


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype, product: torch.dtype) -> None:
    """Rounded once to its dtype; a bank of another dtype than the product's was rounded too."""
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    assert got.isfinite().all()
    unit = max(torch.finfo(dtype).eps, torch.finfo(product).eps / 4)
    size = wanted.abs().max().clamp(min=1e-6)
    assert (got.cpu().double() - wanted).abs().max() <= (4 * unit + 4e-6) * size


def check_moves(problem: Problem) -> None:
    """unpack, rounded once, and pack of the problem's weight."""
    spec, bank, dtype = problem.weight.spec, problem.bank, problem.bank.dtype
    wanted = op.unpack(bank.cpu().double(), None, spec, "reference")
    with uninitialised_is_nan():
        for ring in (bank, surrounded(bank, 1)):  # the second begins at no multiple of 16 bytes
            close(op.unpack(ring, None, spec, problem.backend), wanted, dtype, dtype)
    dense = surrounded(torch.randn(problem.weight.shape).to(bank.device, problem.x.dtype), 1)
    wanted = op.pack(dense.cpu().double(), None, spec, torch.float64, "reference")
    with uninitialised_is_nan():
        got = op.pack(dense, None, spec, dtype, problem.backend)
    close(got, wanted, dtype, torch.float32)


@contextlib.contextmanager
def uninitialised_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def surrounded(values: Tensor, offset: int) -> Tensor:
    """The values ``offset`` elements behind an aligned address, between NaNs."""
    memory = values.new_full((values.numel() + offset + 64,), float("nan"))
    inside = memory[offset : offset + values.numel()].view(values.shape)
    inside.copy_(values)
    return inside


def made(
    shape: tuple[int, int],
    backend: str,
    *,
    slots: int = 704,
    granularity: int = 64,
    window: tuple[int, int] | None = None,
    reflect: str = "vector",
    dtype: torch.dtype = torch.float32,
    bank_dtype: torch.dtype | None = None,
    batch: int = 3,
    bias: bool = False,
    before: int = 100,
    scale: float = 0.5,
    seed: int = 0,
    offset: int = 8,
) -> Problem:
    """A layer behind another of ``before`` rows, so that it begins in the middle of a window."""
    device = torch.device("cuda" if backend == "cuda" else "cpu")
    bank = brute.unit_bank(
        slots * granularity,
        granularity,
        reflect,
        window=window and window[0],
        laps=window and window[1],
        seed=seed,
        init_std=1.0,
        device=device,
        dtype=bank_dtype or dtype,
    )
    if before:
        bank.place((before, 64))
    weight = bank.place(shape, scale=scale)
    x, dy = (torch.randn(batch, size).to(device, dtype) for size in reversed(shape))
    b = surrounded(torch.randn(shape[0]).to(device, dtype), 3) if bias else None
    ring = surrounded(bank.weight.detach(), 16)  # always aligned
    return Problem(weight, ring, surrounded(x, offset), surrounded(dy, offset), b, backend)


def drawn(rng: random.Random, backend: str, window: tuple[int, int] | None) -> Problem:
    """Any shape; of its kind, blocks of 32 or 64 elements."""
    while True:
        dtype = rng.choice(DTYPES)
        problem = made(
            (rng.choice(ROWS), rng.choice(COLUMNS)),
            backend,
            slots=rng.choice([301 if window is None or window[0] < 512 else 513, 704]),
            granularity=rng.choice([32, 64, 128]),
            window=window,
            reflect=rng.choice(["vector", "vector", "none", "element"]),
            dtype=dtype,
            bank_dtype=rng.choice([dtype, dtype, torch.float32]),
            batch=rng.choice(BATCHES),
            bias=rng.random() < 0.5,
            before=rng.choice([0, 1, 3, 64, 200]),
            scale=rng.choice([0.5, -1.25]),
            seed=rng.randrange(100),
            offset=rng.choice([0, 1, 8]),
        )
        if not problem.refused("linear"):
            return problem


def of_fill(fill: int, backend: str, **options: object) -> Problem:
    """A layer whose blocks come by windows, from a whole ring, or one by one."""
    options = {"batch": 3, "bias": True, **options}
    if fill == WINDOW:
        problem = made((600, 200), backend, window=(64, 4), **options)  # type: ignore[arg-type]
    elif fill == RING:
        problem = made((300, 200), backend, slots=130, **options)  # type: ignore[arg-type]
    else:
        problem = made((130, 200), backend, reflect="element", **options)  # type: ignore[arg-type]
    assert problem.fill() == fill
    return problem
