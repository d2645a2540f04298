"""The scratch limit, judged by the profiler's memory events."""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

import brute_force as brute
import pytest
import torch
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels.backends.cpu import rules
from rpg_kernels.backends.reference import tiles

op = torch.ops.rpg_kernels
REFLECT = ("element", "vector", "none")
KINDS = [
    *(((64, f"{reflect} laps"), torch.float32) for reflect in REFLECT[1:]),
    ((8, "element laps"), torch.float64),
    *(((64, reflect), torch.float32) for reflect in REFLECT),
    ((8, "element"), torch.float32),
    ((1, "element"), torch.float32),
    ((1, "table"), torch.float32),
    ((64, "vector"), torch.float64),
    ((64, "element"), torch.bfloat16),
    ((8, "vector"), torch.float16),
]
BOOKKEEPING = 2048  # bytes of block numbers and the like
# What oneDNN allocates for a product on CPU, whatever the size of the weight: it packs operands in
# bfloat16, and pads the channels of a convolution to its own blocks.
ONEDNN = {torch.bfloat16: 192 << 10, torch.float16: 32 << 10, torch.float32: 32 << 10}
LANES, LINE = 16, 16  # rows that the compiled CPU kernels make of one; floats of a cache line


@dataclass(frozen=True)
class Call:
    """A call of an operator; ``small`` bytes are its operands and result beside the weight."""

    name: str
    run: Callable[[], Tensor]
    small: int = 0
    product: torch.dtype = torch.float64

    def check(self, limit: int) -> Tensor:
        """Run within the limit, and look at the memory."""
        largest, most, result = measure(self.run)
        allowed = limit + BOOKKEEPING + self.small
        if result.dtype in brute.LOW and self.name in ("pack", "embedding_bank_grad"):
            allowed += 4 * result.numel()  # summed in fp32
        if self.product == torch.bfloat16 or "conv2d" in self.name:
            allowed += ONEDNN.get(self.product, 0)
        beyond = most - result.nbytes
        assert beyond <= allowed, f"{self.name}: {beyond} bytes at once, limit {limit}"
        assert largest <= max(allowed, result.nbytes), f"{self.name}: {largest} bytes in one"
        return result


def measure(call: Callable[[], Tensor]) -> tuple[int, int, Tensor]:
    """(largest single allocation, most bytes alive at once, result) of a call."""
    call()  # what torch allocates once and keeps
    gc.disable()  # so that no tensor of an earlier test is freed while this one is watched
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profiler:
            result = call()
    finally:
        gc.enable()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    largest = alive = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        alive += size
        largest, most = max(largest, size), max(most, alive)
    assert alive == result.nbytes, f"{alive - result.nbytes} bytes beyond the result are kept"
    return largest, most, result


def place(
    shape: tuple[int, ...], kind: tuple[int, str], dtype: torch.dtype
) -> tuple[rpg.VirtualWeight, Tensor]:
    """(weight, its bank's values)."""
    granularity, reflect = kind
    if reflect == "table":
        bank = brute.table_bank(1000, torch.Size(shape).numel(), dtype)
    else:
        mode, _, law = reflect.partition(" ")
        options = {"granularity": granularity, "reflect": mode}
        bank = brute.bank_of(8192 if law else 1024, dtype, **options, laps=2 if law else None)
    return bank.place(shape, scale=0.7), bank.weight.detach()


def operators(
    weight: rpg.VirtualWeight,
    values: Tensor,
    dtype: torch.dtype,
    groups: int = 1,
    backend: str = "",
) -> list[Call]:
    """Every operator that a weight of this shape has, with operands much smaller than it."""
    table, spec, shape = weight.bank.table, weight.spec, weight.shape
    bank_dtype = values.dtype
    dense = torch.randn(shape).to(dtype)
    calls = [Call("pack", lambda: op.pack(dense, table, spec, bank_dtype, backend))]
    if dtype == bank_dtype:
        calls.append(Call("unpack", lambda: op.unpack(values, table, spec, backend)))
    if len(shape) == 2:
        x, dy = torch.randn(1, shape[1]).to(dtype), torch.randn(1, shape[0]).to(dtype)
        runs = {
            "linear": lambda: op.linear(x, values, table, dy[0], spec, backend),
            "linear_input_grad": lambda: op.linear_input_grad(dy, values, table, spec, backend),
            "linear_bank_grad": lambda: op.linear_bank_grad(
                dy, x, table, spec, bank_dtype, backend
            ),
        }
        index = torch.arange(0, shape[0], 4)
        rows = torch.randn(index.numel(), shape[1]).to(dtype)
        if dtype == bank_dtype:
            lookup = Call("embedding", lambda: op.embedding(values, table, index, spec, backend))
            grad = Call(
                "embedding_bank_grad",
                lambda: op.embedding_bank_grad(rows, index, table, spec, dtype, backend),
            )
            calls += [lookup, grad]
    else:
        how = (spec, [1, 1], [0, 0], [1, 1], groups)
        x = torch.randn(1, shape[1] * groups, *shape[2:]).to(dtype)
        dy = torch.randn(1, shape[0], 1, 1).to(dtype)
        runs = {
            "conv2d": lambda: op.conv2d(x, values, table, dy.view(-1), *how, backend),
            "conv2d_input_grad": lambda: op.conv2d_input_grad(
                dy, values, table, x.shape, *how, backend
            ),
            "conv2d_bank_grad": lambda: op.conv2d_bank_grad(
                dy, x, table, *how, bank_dtype, backend
            ),
        }
    copies = max(
        2 * max(4, dtype.itemsize) * (x.numel() + dy.numel()), copied_in_lanes(weight, dtype)
    )
    summed = 4 * values.numel() if bank_dtype in brute.LOW else 0
    for name, run in runs.items():
        extra = summed if name.endswith("bank_grad") else 0
        calls.append(Call(name, run, copies + extra, dtype))
    return calls


def copied_in_lanes(weight: rpg.VirtualWeight, dtype: torch.dtype) -> int:
    """Bytes that compiled CPU kernels copy of activations of one row, which are not scratch.

    They take a vector of rows in fp32, x and dx in whole blocks and dy in both orders, with a
    cache line behind each block and row.
    """
    if rules.unsupported_kind("linear", torch.device("cpu"), dtype):
        return 0
    if len(weight.shape) != 2 or rules.unsupported_weight("linear", weight.spec):
        return 0
    matrix = weight.placement.matrix
    of_x = LANES * matrix.blocks * (matrix.block + LINE)
    return 4 * (of_x + (LANES + LINE) * (matrix.rows + LINE))


@pytest.mark.parametrize("mode", ["", " laps"])
@pytest.mark.parametrize("shape", [(400, 500), (300, 9, 3, 3)])
@pytest.mark.parametrize("reflect", REFLECT)
def test_the_law_takes_a_quarter_of_the_limit(
    reflect: str, shape: tuple[int, ...], mode: str
) -> None:
    """In PyTorch, where slots and signs of some positions are worked out at a time."""
    weight, _ = place(shape, (64, reflect + mode), torch.float32)
    p = weight.placement
    blocks = torch.zeros(1 << 12, p.matrix.block)

    def evaluate() -> Tensor:
        for _, n, b in tiles._position_groups(p, blocks.device, None):
            _, negative = tiles._read(p, None, n, b)
            tiles._reflect_(blocks[: n.numel()], negative, 1.0)
        return torch.empty(0)

    for limit in (1 << 17, 1 << 19):
        with rpg.scratch_limit(limit):
            _, most, _ = measure(evaluate)
        assert limit // 16 < most <= limit // 4


@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=str)
def test_matrix_stays_within_the_limit(kind: tuple[int, str], dtype: torch.dtype) -> None:
    limit = 1 << (14 if kind[0] == 1 else 15)
    weight, values = place((5 * limit // 4 // (500 * dtype.itemsize), 500), kind, dtype)
    with rpg.scratch_limit(limit):
        for call in operators(weight, values, dtype):
            call.check(limit)


@pytest.mark.parametrize(
    ("reflect", "dtype"),
    [*itertools.product(REFLECT, [torch.float64]), *(("vector", dtype) for dtype in brute.ALL[1:])],
)
def test_kernel_stays_within_the_limit(reflect: str, dtype: torch.dtype) -> None:
    for shape, groups in (((16, 36, 3, 3), 2), ((60, 80, 1, 1), 1), ((40, 3, 5, 5), 1)):
        weight, values = place(shape, (16, reflect), dtype)
        limit = max(1 << 14, weight.numel() * values.element_size() * 4 // 5)
        with rpg.scratch_limit(limit):
            for call in operators(weight, values, dtype, groups):
                call.check(limit)


@pytest.mark.parametrize(
    ("reflect", "dtype"), [("element", torch.float16), ("vector", torch.bfloat16)]
)
def test_fp32_bank_with_low_precision_operands(reflect: str, dtype: torch.dtype) -> None:
    limit = 1 << 15
    for shape in ((30, 500), (8, 60, 3, 3)):
        weight, values = place(shape, (16, reflect), torch.float32)
        with rpg.scratch_limit(limit):
            for call in operators(weight, values, dtype):
                call.check(limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_limit_holds_for_weights_much_larger_than_it(dtype: torch.dtype) -> None:
    for shape in ((2048, 2048), (600, 512, 3, 3)):
        weight, values = place(shape, (64, "vector"), dtype)
        for call in operators(weight, values, dtype):
            if call.name not in ("pack", "unpack", "embedding", "embedding_bank_grad"):
                call.check(4 << 20)


@pytest.mark.parametrize("kind", [(16, "element"), (1, "table")], ids=str)
@pytest.mark.parametrize("limit", [40_000, 1 << 17])
@pytest.mark.parametrize("shape", [(60, 900), (40, 300, 3, 3)], ids=str)
def test_chosen_rows_and_columns_keep_within_the_limit(
    shape: tuple[int, ...], limit: int, kind: tuple[int, str]
) -> None:
    weight, values = place(shape, kind, torch.float32)
    part = weight.select(0, range(1, shape[0], 3)).select(1, [*range(0, 90, 2), *range(200, 290)])
    for call in operators(part, values, torch.float32, backend="reference"):
        wanted = call.run()
        with rpg.scratch_limit(limit):
            got = call.check(limit)
        tolerance = 20 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", [(16, "element"), (1, "table")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 90), (2, 12, 3, 3), (4, 1, 3, 3)], ids=str)
def test_too_small_a_limit_says_what_is_needed_and_that_works(
    shape: tuple[int, ...], dtype: torch.dtype, kind: tuple[int, str]
) -> None:
    weight, values = place(shape, kind, dtype)
    part = weight.narrow(1, 5, shape[1] - 7) if shape[1] > 5 else weight
    for call in operators(part, values, dtype, backend="reference"):
        wanted = call.run()
        needed = refused(call, 0)
        assert refused(call, needed // 2) == needed
        with rpg.scratch_limit(needed):
            got = call.check(needed)
        tolerance = 20 * torch.finfo(dtype).eps * float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def refused(call: Call, limit: int) -> int:
    """The number of bytes that the error asks for."""
    with rpg.scratch_limit(limit), pytest.raises(RuntimeError) as error:
        call.run()
    found = re.match(r"scratch_limit: got (\d+) bytes, wanted at least (\d+)", str(error.value))
    assert found is not None, str(error.value)
    assert int(found[1]) == limit
    return int(found[2])


def test_forward_and_backward_through_autograd() -> None:
    """What is alive after the forward is the output; the backward adds the two gradients."""
    limit = 1 << 16
    weight, _ = place((300, 500), (16, "vector"), torch.float32)
    x, dy = torch.randn(2, 500, requires_grad=True), torch.randn(2, 300)
    small = 8 * (x.numel() + dy.numel())
    with rpg.scratch_limit(limit):
        y = Call("forward", lambda: rpg.functional.linear(x, weight), small).check(limit)

        def gradients() -> Tensor:
            grads = torch.autograd.grad(y, (x, weight.bank.weight), dy, retain_graph=True)
            return torch.cat([grad.flatten() for grad in grads])

        largest, most, result = measure(gradients)
    assert largest <= limit
    assert most <= limit + 2 * result.nbytes + small + BOOKKEEPING


def test_limits_are_kept_per_device_and_restored() -> None:
    weight, _ = place((9, 20), (16, "vector"), torch.float32)
    with rpg.scratch_limit(0, "cuda"):
        weight.unpack()
        with rpg.scratch_limit(0, "cpu"), pytest.raises(RuntimeError, match="scratch_limit: got 0"):
            weight.unpack()
        weight.unpack()
    restore = rpg.scratch_limit(0)
    with pytest.raises(RuntimeError, match="scratch_limit"):
        weight.unpack()
    with restore:
        pass
    weight.unpack()
