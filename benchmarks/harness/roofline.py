"""The least time that a case could take: bytes and operations over rates measured in the same run.

Three ceilings: copying large buffers (bytes read plus bytes written), gathering slots at random
from a bank of the case's size, and a large matrix product. A floor is the longest of the three
times. The gather ceiling is the best that torch's own operators reach, so a kernel may beat it,
as a convolution algorithm that saves multiplications may beat the operation count; the percentage
is then above 100.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.cases import Case

_REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """Rates of a device: bytes and floating-point operations per second.

    Args:
        copy: of large buffers, bytes read plus bytes written.
        matrix: by dtype name ("float32"), of a large product.
        gather: by (bytes of the bank, bytes of a slot), bytes gathered.
    """

    copy: float
    matrix: dict[str, float]
    gather: dict[tuple[int, int], float]


@dataclass(frozen=True)
class Floor:
    """What a pass must move and compute, and the time that the ceilings allow for it."""

    bytes: int
    gathered_bytes: int
    operations: int
    seconds: float
    bound: str  # "copy", "gather" or "matrix"


def gather_key(case: Case) -> tuple[int, int]:
    """(bytes of the bank, bytes of a slot) of a case, under which its gather rate is kept."""
    return case.bank_bytes, case.granularity * case.bank_dtype.itemsize


def measure(cases: Sequence[Case], device: torch.device, cache_bytes: int) -> Ceilings:
    """Measure what these cases need; a few seconds.

    Args:
        cases: for the dtypes, bank sizes and granularities.
        device: where, with torch's present number of threads.
        cache_bytes: of the last-level cache; the copied buffers are four times that, and more.
    """
    gather = {}
    for case in cases:
        if gather_key(case) not in gather:
            gather[gather_key(case)] = _gather_rate(case, device)
    dtypes = dict.fromkeys(case.x_dtype for case in cases)
    return Ceilings(
        _copy_rate(device, cache_bytes),
        {str(dtype).removeprefix("torch."): matrix_rate(device, dtype) for dtype in dtypes},
        gather,
    )


def floor(case: Case, kind: str, dense: bool, ceilings: Ceilings) -> Floor:
    """The floor of a pass.

    Args:
        case: what is computed.
        kind: ``"forward"``, ``"backward"`` or ``"full"``.
        dense: with a stored weight, each byte of it read once; otherwise with a bank, read once
            and then gathered from, once for each virtual weight.
        ceilings: of the device.
    """
    moved = gathered = operations = 0
    for one in ("forward", "backward") if kind == "full" else (kind,):
        forward = one == "forward"
        moved += (_dense_bytes if dense else _bank_bytes)(case, forward)
        gathered += 0 if dense else _gathered(case) * (1 if forward or case.rows_only else 2)
        operations += case.operations * (1 if forward else 2)
    rate = ceilings.matrix[str(case.x_dtype).removeprefix("torch.")]
    times = {
        "copy": moved / ceilings.copy,
        "gather": gathered / ceilings.gather[gather_key(case)],
        "matrix": operations / rate,
    }
    bound = max(times, key=lambda name: times[name])
    return Floor(moved, gathered, operations, times[bound], bound)


def _activations(case: Case, forward: bool) -> int:
    """x and y; x, dy and dx in a backward. Tokens have no gradient."""
    x = case.input_bytes
    return x + case.output_bytes + (0 if forward or case.rows_only else x)


def _dense_bytes(case: Case, forward: bool) -> int:
    """Activations, the weight, and in a backward its whole gradient."""
    if case.rows_only:
        return _activations(case, forward) + (case.output_bytes if forward else case.weight_bytes)
    return _activations(case, forward) + case.weight_bytes * (1 if forward else 2)


def _bank_bytes(case: Case, forward: bool) -> int:
    """Activations, the bank (what a layer can reach of it), and in a backward its gradient."""
    reached = min(case.bank_bytes, _gathered(case))
    if forward:
        return _activations(case, forward) + reached
    return _activations(case, forward) + case.bank_bytes + (0 if case.rows_only else reached)


def _gathered(case: Case) -> int:
    return case.output_bytes if case.rows_only else case.weight_bytes


def _copy_rate(device: torch.device, cache_bytes: int) -> float:
    size = max(4 * cache_bytes, (1 << 30) if device.type == "cuda" else (1 << 27))
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The better of a matmul and, on a CPU, a 1x1 convolution: two libraries stand behind them."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    rate = 2 * n**3 / _seconds(lambda: a @ b, device)
    if device.type == "cpu":
        images = torch.randn(32, 256, 16, 16).to(dtype, memory_format=torch.channels_last)
        filters = torch.randn(256, 256, 1, 1).to(dtype)
        seconds = _seconds(lambda: F.conv2d(images, filters), device)
        rate = max(rate, 2 * 32 * 256 * 256 * 256 / seconds)
    return rate


def _gather_rate(case: Case, device: torch.device) -> float:
    """The better of copying slots and of summing them up, which writes next to nothing."""
    granularity, dtype = case.granularity, case.bank_dtype
    slots = max(1, case.dof // granularity)
    bank = torch.randn(slots, granularity, device=device).to(dtype)
    total = (1 << 30) if device.type == "cuda" else (1 << 24)
    line = granularity * dtype.itemsize
    index = torch.randint(slots, (max(32, total // line // 32 * 32),), device=device)
    few = index[: max(32, min(index.numel(), (1 << 18) // line // 32 * 32))]
    if device.type == "cuda":
        few = index
    out = torch.empty(few.numel(), granularity, device=device, dtype=dtype)

    def copied() -> Tensor:
        return torch.index_select(bank, 0, few, out=out)

    rates = [few.numel() * line / _seconds(copied, device)]
    if granularity > 1:
        bags = index.view(-1, 32)
        seconds = _seconds(lambda: F.embedding_bag(bags, bank, mode="sum"), device)
        rates.append(index.numel() * line / seconds)
    return max(rates)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The shortest time of a call, after two to warm up: a ceiling is the best there is."""
    on_gpu = device.type == "cuda"
    # Process time adds up threads, see ``timing``.
    alone = not on_gpu and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    samples = []
    for _ in range(_REPEATS + 2):
        if on_gpu:
            torch.cuda.synchronize()
        begin = clock()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        samples.append(clock() - begin)
    return min(samples[2:])
