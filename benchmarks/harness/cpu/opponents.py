"""Dense layers, every way that torch and what is installed beside it can run them.

Ours is held against the fastest of these at each point. In bf16 that may be an fp32 weight: on a
processor without bf16 instructions torch's own bf16 product is several times slower than its fp32
product, so a ratio against it would say more of the processor than of the kernel.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.cpu.grid import FORWARD

Call = Callable[[int], tuple[Tensor, ...]]
_PART_ROWS, _PART_BATCH = 256, 64  # of a weight and a batch on which dense layers are tried first
_HOPELESS, _SHORT = 4, 0.05  # times as slow as the fastest; seconds of a trial to be repeated
HIGHEST, MEDIUM = "highest", "medium"  # of fp32 products, see torch.set_float32_matmul_precision


@dataclass(frozen=True)
class Job:
    """Something to time.

    Args:
        name: what it is.
        call: runs layer i of ``copies``; gives y, of training also dx and the weight's or bank's
            gradient.
        copies: layers to run in turn.
        precision: of fp32 products.
        exact: whether fp32 is computed as fp32.
    """

    name: str
    call: Call
    copies: int
    precision: str = HIGHEST
    exact: bool = False


@contextlib.contextmanager
def running(job: Job) -> Iterator[None]:
    """A context to call a job in: with its precision of fp32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(job.precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Dense:
    """Dense layers of one shape, and what goes through them.

    Args:
        weights: one for each layer.
        x: ``[batch, K]``, of the same dtype.
        dy: ``[batch, N]``.
    """

    weights: list[Tensor]
    x: Tensor
    dy: Tensor


def jobs(dense: Dense, what: str) -> tuple[list[Job], dict[str, str]]:
    """Everything worth timing here, and why the rest is not, by name.

    What is far behind on a part of the layer is not tried on all of it: in bf16 torch may take a
    minute for a gradient that takes it a second in fp32.
    """
    part = Dense(
        [dense.weights[0][:_PART_ROWS].clone()],
        dense.x[:_PART_BATCH].clone(),
        dense.dy[:_PART_BATCH, :_PART_ROWS].clone(),
    )
    tried, missing = _made(part, what)
    times = {job.name: _seconds(job) for job in tried}
    slow = {name for name, time_ in times.items() if time_ > _HOPELESS * min(times.values())}
    why = f"on a part of the layer over {_HOPELESS} times as slow as the fastest"
    found, _ = _made(dense, what, {*missing, *slow})
    return found, missing | dict.fromkeys(sorted(slow), why)


def _made(
    dense: Dense, what: str, without: Set[str] = frozenset()
) -> tuple[list[Job], dict[str, str]]:
    found: list[Job] = []
    missing: dict[str, str] = {}
    for name, make, precision in _forward(dense) if what == FORWARD else _training(dense):
        if name in without:
            continue
        exact = precision == HIGHEST and "bf16" not in name and dense.x.dtype == torch.float32
        try:
            found.append(Job(name, make(), len(dense.weights), precision, exact))
        except (RuntimeError, AttributeError, ImportError) as error:
            missing[name] = str(error).splitlines()[0]
    return found, missing


def _seconds(job: Job) -> float:
    """Of a call; of the best of three where they are short."""
    best = math.inf
    with running(job):
        for _ in range(3):
            begin = time.process_time()
            job.call(0)
            best = min(best, time.process_time() - begin)
            if best > _SHORT:
                break
    return best


Way = tuple[str, Callable[[], Call], str]


def _forward(dense: Dense) -> Iterator[Way]:
    wide = _fp32(dense)
    if dense.x.dtype == torch.bfloat16:
        yield "torch bf16", partial(_cast, _eager, dense, dense), HIGHEST
        yield "oneDNN packed bf16", partial(_onednn, dense), HIGHEST
    else:
        yield "oneDNN packed fp32", partial(_onednn, dense), HIGHEST
        yield "torch fp32, medium", partial(_cast, _eager, dense, dense), MEDIUM
    yield "torch fp32", partial(_cast, _eager, dense, wide), HIGHEST
    yield "MKL packed fp32", partial(_cast, _mkl, dense, wide), HIGHEST
    yield "zentorch packed", partial(_zentorch, dense), HIGHEST


def _training(dense: Dense) -> Iterator[Way]:
    wide = _fp32(dense)
    if dense.x.dtype == torch.bfloat16:
        yield "torch bf16", partial(_autograd, dense), HIGHEST
        yield "torch bf16, own buffers", partial(_products, dense, dense), HIGHEST
    else:
        yield "torch fp32", partial(_autograd, dense), HIGHEST
        yield "torch fp32, own buffers, medium", partial(_products, dense, dense), MEDIUM
    yield "torch fp32, own buffers", partial(_products, dense, wide), HIGHEST


def _fp32(dense: Dense) -> Dense:
    """The same layers in fp32; the very same where they are already."""
    return Dense([w.float() for w in dense.weights], dense.x.float(), dense.dy.float())


def _eager(dense: Dense) -> Callable[[int, Tensor], Tensor]:
    weights = dense.weights
    return lambda i, x: F.linear(x, weights[i])


def _onednn(dense: Dense) -> Call:
    """A weight in the layout that oneDNN chooses for this batch."""
    x, ops = dense.x, torch.ops.mkldnn
    packed = [ops._reorder_linear_weight(w, len(x)) for w in dense.weights]
    return lambda i: (ops._linear_pointwise(x, packed[i], None, "none", [], ""),)


def _mkl(dense: Dense) -> Callable[[int, Tensor], Tensor]:
    """A weight in the layout that MKL chooses for this batch."""
    weights, batch, ops = dense.weights, len(dense.x), torch.ops.mkl
    packed = [ops._mkl_reorder_linear_weight(w, batch) for w in weights]
    return lambda i, x: ops._mkl_linear(x, packed[i], weights[i], None, batch)


def _zentorch(dense: Dense) -> Call:
    """AMD's plugin, where somebody installed it."""
    if importlib.util.find_spec("zentorch") is None:
        raise ImportError("not installed")
    importlib.import_module("zentorch")
    x, ops = dense.x, torch.ops.zentorch
    packed = [ops.zentorch_weight_prepack_for_linear(w) for w in dense.weights]
    return lambda i: (ops.zentorch_linear_unary(x, packed[i], None, is_weight_prepacked=True),)


def _cast(
    make: Callable[[Dense], Callable[[int, Tensor], Tensor]], dense: Dense, held: Dense
) -> Call:
    """A product with weights as they are held, of x as it is: casts of x and y are timed."""
    run, x, dtype, wide = make(held), dense.x, dense.x.dtype, held.x.dtype
    return lambda i: (run(i, x.to(wide)).to(dtype),)


def _autograd(dense: Dense) -> Call:
    """As a training step does it; each call allocates the weight's gradient."""
    x = dense.x.detach().requires_grad_()
    weights = [w.detach().requires_grad_() for w in dense.weights]

    def call(i: int) -> tuple[Tensor, ...]:
        y = F.linear(x, weights[i])
        return (y.detach(), *torch.autograd.grad(y, (x, weights[i]), dense.dy))

    return call


def _products(dense: Dense, held: Dense) -> Call:
    """The three products of a training step, gradients of weights in memory that is kept: without
    the time of the system that hands out pages, which autograd's fresh gradients need."""
    gradients = [torch.zeros_like(w) for w in held.weights]
    x, dy, dtype, wide = dense.x, dense.dy, dense.x.dtype, held.x.dtype

    def call(i: int) -> tuple[Tensor, ...]:
        x_, dy_, weight = x.to(wide), dy.to(wide), held.weights[i]
        y = F.linear(x_, weight).to(dtype)
        dx = torch.mm(dy_, weight).to(dtype)
        return y, dx, torch.mm(dy_.t(), x_, out=gradients[i])

    return call
