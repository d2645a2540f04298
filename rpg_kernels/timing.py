"""A quick look at layer shapes of your own: a virtual weight beside torch's dense layer.

``rpg-kernels bench 4096x1024 --batch 1,16`` prints it. Dense and virtual are sampled in turn in one
process, so that both see the same machine; the same layer runs again and again, so what fits into
the caches stays there. The full suite, with correctness, memory and layers that come from memory,
is ``python -m benchmarks.harness`` in a source checkout, which shares the figures made here.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

from rpg_kernels import _checks, explain
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.doctor.machine import cpu_name
from rpg_kernels.nn.linear import Linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORWARD, FULL = PASSES = ("forward", "forward+backward")
_ROUNDS = (5, 200)  # at least and at most
_SAMPLE = 2e-3  # seconds that the calls of one sample take together, at least
HINT = """\
A quick look: one layer again and again, its data in the caches where it fits; ±: the middle 80 %.
The full suite: `python -m benchmarks.harness` in a source checkout, see docs/benchmarks.md."""


@dataclass(frozen=True)
class Figure:
    """Samples of one clock in short: seconds of a call."""

    median_s: float
    q10_s: float
    q90_s: float
    samples: int

    @property
    def spread(self) -> float:
        """What the middle 80 % of the samples spread over, relative to the median."""
        return (self.q90_s - self.q10_s) / self.median_s if self.median_s else 0.0

    def __str__(self) -> str:
        return f"{seconds(self.median_s)} ±{self.spread / 2:.0%}"


def figure(samples: Sequence[float]) -> Figure:
    """Median, 10 % and 90 % quantiles, with linear interpolation between samples.

    Example:
        >>> figure([3.0, 1.0, 2.0]), str(figure([2e-3]))
        (Figure(median_s=2.0, q10_s=1.2, q90_s=2.8, samples=3), '2 ms ±0%')
    """
    several = [*samples] if len(samples) > 1 else [*samples] * 2
    deciles = statistics.quantiles(several, n=10, method="inclusive")
    return Figure(statistics.median(samples), deciles[0], deciles[-1], len(samples))


def seconds(value: float) -> str:
    """A time with a unit and three digits.

    Example:
        >>> seconds(0.0123), seconds(4.2e-5), seconds(2)
        ('12.3 ms', '42 us', '2 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def count(text: str, argument: str = "dof") -> int:
    """A number as people write it.

    Args:
        text: such as ``"45K"``.
        argument: what it is, for the error.

    Raises:
        ValueError: not a positive whole number, or one followed by K or M.

    Example:
        >>> count("45K"), count("2M"), count("12")
        (45000, 2000000, 12)
    """
    factor = {"K": 1_000, "M": 1_000_000}.get(text[-1:].upper(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdecimal() or int(digits) < 1:
        raise _checks.fail(argument, repr(text), "a number such as 45000, 45K or 2M")
    return int(digits) * factor


def shape(text: str) -> tuple[int, int]:
    """A weight's rows (outputs) and columns (inputs).

    Raises:
        ValueError: not two positive whole numbers around an x.

    Example:
        >>> shape("4096x1024")
        (4096, 1024)
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if not found:
        raise _checks.fail("shape", repr(text), "ROWSxCOLUMNS of a weight, such as 4096x1024")
    return int(found[1]), int(found[2])


def device(name: str | None) -> torch.device:
    """The device of a name; None is for CUDA where there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.

    Example:
        >>> device("cpu")
        device(type='cpu')
    """
    usable = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if usable else "cpu")
    try:
        found = torch.device(name)
        right = found.type == "cpu" or (
            found.type == "cuda" and (found.index or 0) < torch.cuda.device_count()
        )
    except RuntimeError:
        right = False
    if not right:
        wanted = "cpu or cuda" if usable else "cpu, as torch sees no CUDA device"
        raise _checks.fail("device", repr(name), wanted)
    return found


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as lines of text: the first column to the left, the others to the right.

    Example:
        >>> aligned([("a", "bc"), ("def", "g")])
        ['a    bc', 'def   g']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for first, *rest in rows
    ]


def compare(
    weight: tuple[int, int], batch: int, bank: ParameterBank, time_s: float = 1.0
) -> Iterator[tuple[str, Figure, Figure, str]]:
    """Time one layer: (pass, torch's dense layer, ours, the back end of our forward).

    Args:
        weight: rows and columns.
        batch: rows of x, ``[batch, columns]``.
        bank: what the virtual weight reads; x and the dense weight have its dtype and device.
        time_s: to sample for, in all; some samples are always taken.

    Raises:
        ValueError: a number is out of range, or the layer cannot run here, for want of memory.

    Example:
        >>> [(kind, ours.samples) for kind, _, ours, _ in compare((8, 16), 2, ParameterBank(64), 0)]
        [('forward', 5), ('forward+backward', 5)]
    """
    _checks.integer("batch", batch, 1, _checks.INT32_MAX)
    rows, columns = weight
    place: dict[str, Any] = {"device": bank.weight.device, "dtype": bank.weight.dtype}
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    try:
        ours = Linear(columns, rows, bias=False, bank=bank)
        dense = nn.Linear(columns, rows, bias=False, **place)
        x = torch.randn(batch, columns, requires_grad=True, **place)
        dy = torch.randn(batch, rows, **place)
        for i, (layer, trained) in enumerate(((dense, dense.weight), (ours, bank.weight))):
            calls[FORWARD, i] = partial(torch.no_grad()(layer), x)
            calls[FULL, i] = partial(_forward_and_backward, layer, x, trained, dy)
        found = _sampled(calls, time_s)
        backend = explain(ours, x).backend
    except RuntimeError as error:
        wanted = f"a layer that runs here ({_first_line(error)})"
        raise _checks.fail("shape", f"{rows}x{columns}, batch {batch}", wanted) from error
    for kind in PASSES:
        yield kind, figure(found[kind, 0]), figure(found[kind, 1]), backend


def _first_line(error: RuntimeError) -> str:
    """Without the C++ frames that torch adds."""
    return str(error).strip().partition("\n")[0]


def _forward_and_backward(layer: nn.Module, x: Tensor, trained: Tensor, dy: Tensor) -> object:
    return torch.autograd.grad(layer(x), (x, trained), dy)


def _sampled(
    calls: dict[tuple[str, int], Callable[[], object]], time_s: float
) -> dict[tuple[str, int], list[float]]:
    """Seconds of a call, sampled in turn; torch's ``timer`` waits for the GPU."""
    often = {}
    for key, call in calls.items():
        call()  # warms up, and compiles what there is to compile
        begin = timer()
        call()
        often[key] = max(1, min(1000, int(_SAMPLE / max(timer() - begin, 1e-7))))
    found: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    start = timer()
    for number in range(_ROUNDS[1]):
        if number >= _ROUNDS[0] and timer() - start > time_s:
            break
        for key, call in calls.items():
            begin = timer()
            for _ in range(often[key]):
                call()
            found[key].append((timer() - begin) / often[key])
    return found


def run(
    shapes: Sequence[str],
    batches: Sequence[str],
    dtype: str = "fp32",
    dof: str = "2M",
    laps: int | None = None,
    device_name: str | None = None,
) -> Iterator[str]:
    """Lines for a terminal from the options of ``rpg-kernels bench``, written as there.

    Raises:
        TypeError, ValueError: an option is out of range or nothing that can be, or there is no
            such device.
    """
    weights = [shape(text) for text in shapes]
    sizes = [count(text, "batch") for text in batches]
    place = device(device_name)
    kind = DTYPES[_checks.choice("dtype", dtype, tuple(DTYPES))]
    try:
        bank = ParameterBank(count(dof), laps=laps, device=place, dtype=kind)
    except RuntimeError as error:
        raise _checks.fail(
            "dof", repr(dof), f"a bank that fits here ({_first_line(error)})"
        ) from error
    on_gpu = place.type == "cuda"
    name = torch.cuda.get_device_name(place) if on_gpu else cpu_name()
    yield f"{name}, {torch.get_num_threads()} threads; torch {torch.__version__}; {dtype}"
    yield f"bank: {bank.extra_repr()}"
    head = ("weight", "batch", "pass", "dense", "rpg-kernels", "of dense", "back end")
    rows = [
        (f"{weight[0]}x{weight[1]}", str(batch), kind, str(dense), str(ours),
         f"{ours.median_s / dense.median_s:.3g}", backend)
        for weight in weights
        for batch in sizes
        for kind, dense, ours, backend in compare(weight, batch, bank)
    ]  # fmt: skip
    yield from aligned([head, *rows])
    yield HINT
