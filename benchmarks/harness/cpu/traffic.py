"""The bytes that a linear layer's forward must move between the levels of memory, by path.

Each path reads and writes a few streams: the dense weight, or of ours windows, table entries,
products of slots and sums (csrc/cpu/linear.cpp says which). A stream comes from the smallest level
that holds what is used again of it, so the time of a call is at least the longest of the levels'
times at their measured rates, and that of its products at the rate of a large one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.cpu import bandwidth
from benchmarks.harness.cpu.bandwidth import Level
from benchmarks.harness.cpu.subject import Job
from rpg_kernels import settings
from rpg_kernels.backends.cpu import multiplications, rules
from rpg_kernels.law.placement import parse
from rpg_kernels.law.unit import UnitLaw
from rpg_kernels.law.window import STRIP, WindowLaw

_ENTRY_BYTES = {True: 2, False: 4}  # of a table entry, with windows and on a whole ring
_FLOAT = 4


@dataclass(frozen=True)
class Stream:
    """Bytes of a call, all threads together.

    Args:
        name: for people.
        bytes: read; or read and written, both counted.
        held: bytes that must stay somewhere between two uses, of one thread.
        update: written too.
    """

    name: str
    bytes: float
    held: int
    update: bool = False


@dataclass(frozen=True)
class Traffic:
    """What a call must do at least.

    Args:
        read: bytes by level.
        update: bytes that are read and written, by level; both counted.
        operations: multiplications and additions.
        dtype: of the products.
    """

    read: dict[str, int]
    update: dict[str, int]
    operations: int
    dtype: str


def known(job: Job) -> bool:
    """Whether the streams of what runs a job on a linear layer are counted: not those of the
    compiled kernels of law 3."""
    units = job.weight is not None and isinstance(job.weight.placement.law, UnitLaw)
    return not (units and job.backend == "cpu")


def count(job: Job, x_bytes: int, y_bytes: int, threads: int, levels: list[Level]) -> Traffic:
    """What a job on a linear layer must do.

    Args:
        job: dense, ours or the reference.
        x_bytes, y_bytes: of input and result.
        threads: that share the work.
        levels: of caches and memory; not empty.
    """
    streams = [*_streams(job, threads), Stream("x and y", x_bytes + y_bytes, x_bytes + y_bytes)]
    read: dict[str, int] = {}
    update: dict[str, int] = {}
    for stream in streams:
        moved = update if stream.update else read
        name = bandwidth.holding(levels, stream.held).name
        moved[name] = moved.get(name, 0) + int(stream.bytes)
    return Traffic(read, update, *_operations(job))


def floors(
    traffic: Mapping[str, Any], levels: list[Level], matrix: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of a call at the rates of each level and of products; the longest is its floor.

    Args:
        traffic: fields of ``Traffic``.
        levels: with their rates.
        matrix: operations per second by dtype.
    """
    times = {
        level.name: traffic["read"].get(level.name, 0) / level.read
        + traffic["update"].get(level.name, 0) / level.update
        for level in levels
    }
    times["arithmetic"] = traffic["operations"] / matrix[traffic["dtype"]]
    return times


def _operations(job: Job) -> tuple[int, str]:
    """Two for each weight and row of x, less what rows share; ours are fp32."""
    dtype, batch = job.dtype, job.point.batch
    if job.weight is None or job.backend == "reference":
        return 2 * job.weights * batch, dtype
    spec = job.weight.spec
    step = rules.steps("linear", batch, spec)
    assert step is not None  # the dispatch table chose the kernel
    shared = rules.gain("linear", spec, step.batch_tile * step.tiles)
    p = parse(spec)
    positions = p.law.rows * p.law.blocks
    products = 2 * int(positions * p.matrix.block / shared) * batch
    return products + (positions * batch if shared > 1 else 0), "float32"


def _streams(job: Job, threads: int) -> list[Stream]:
    if job.weight is None:
        return [Stream("weight", job.weight_bytes, job.weight_bytes * job.copies // threads)]
    placement = job.weight.placement
    item = job.weight.dtype.itemsize
    weights, bank = placement.numel, job.weight.bank.weight.nbytes
    if job.backend == "reference":
        tile = settings.scratch_bytes("cpu")
        return [
            Stream("bank", weights * item, bank),
            Stream("unpacked tiles", 2 * weights * item, tile // threads, update=True),
            Stream("unpacked tiles, read", weights * item, tile // threads),
        ]
    return _kernel(job.weight.spec, job.point.batch, bank, item)


def _kernel(spec: str, batch: int, bank: int, item: int) -> list[Stream]:
    """Streams of the compiled kernel, as its steps of the batch make them."""
    step = rules.steps("linear", batch, spec)
    assert step is not None  # the dispatch table chose the kernel
    p = parse(spec)
    law, block = p.law, p.matrix.block
    windows = isinstance(law, WindowLaw)
    tabulated, entry = (STRIP if windows else multiplications.RING_ROWS), _ENTRY_BYTES[windows]
    lanes = step.batch_tile * step.tiles
    passes = -(-batch // lanes)
    tiles = -(-min(batch, lanes) // step.batch_tile)
    positions = law.rows * law.blocks
    shared = rules.gain("linear", spec, lanes)
    slots = law.window if isinstance(law, WindowLaw) else law.slots
    height = min(law.rows, tabulated, multiplications.RING_SUMS // lanes)
    line = block * item
    read = passes * positions * line / shared
    # A segment's window comes from where the bank is, for the second tile from where a window fits.
    streams = [
        Stream("slots", read, bank),
        Stream("slots again", read * (tiles - 1), min(bank, slots * line)),
        Stream("entries", passes * positions * entry * (1 + tiles), tabulated * entry),
        Stream(
            "sums",
            2 * passes * tiles * positions * step.batch_tile * _FLOAT,
            height * lanes * _FLOAT,
            update=True,
        ),
    ]
    if shared > 1:
        vector = step.batch_tile * _FLOAT
        products = slots * vector * (2 if step.batch_tile == 1 else 1)
        streams.append(
            Stream("products", passes * tiles * positions * vector * (1 + 1 / shared), products)
        )
    return streams
