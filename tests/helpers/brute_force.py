"""Virtual weights written out entry by entry: the definition that the package is tested against.

Slow and obvious on purpose. Only the packing law's slots and signs come from the package; blocks,
taps, padding, the ring, segments and selections are worked out anew, entry by entry, in Python.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels.law.placement import Placement
from rpg_kernels.law.ring import LayerLaw
from rpg_kernels.law.unit import UnitLaw

LOW = (torch.bfloat16, torch.float16)
ALL = (torch.float64, torch.float32, *LOW)

# Weights that exercise every rule of the geometry at a small size.
MATRICES = [(1, 1), (1, 64), (7, 1), (13, 31), (5, 130), (64, 48), (3, 257), (30, 20), (2, 9)]
KERNELS = [
    (6, 16, 1, 1),  # 1x1
    (5, 64, 3, 3),
    (4, 8, 5, 3),
    (9, 1, 3, 3),  # depthwise
    (6, 1, 5, 3),
    (4, 3, 7, 7),  # 3-channel stem
    (8, 2, 3, 3),  # grouped
    (3, 5, 3, 3),
    (3, 7, 3, 3),
    (3, 12, 3, 3),
    (3, 20, 2, 3),
    (2, 52, 3, 3),
    (1, 1, 1, 1),
]


def largest_block(length: int, granularity: int) -> int:
    """The largest divisor of the granularity that pads ``length`` by at most a quarter."""
    fitting = []
    for block in range(1, granularity + 1):
        if granularity % block == 0:
            padding = 0
            while (length + padding) % block:
                padding += 1
            if padding <= length / 4:
                fitting.append(block)
    return max(fitting)


def row_layout(
    shape: Sequence[int], granularity: int
) -> tuple[int, int, dict[tuple[int, int], tuple[int, int]]]:
    """How one row of a weight is cut into blocks.

    Returns:
        (elements per block, blocks per row, {(in-channel, tap): (block number, element)}).
    """
    channels, taps = shape[1], math.prod(shape[2:])
    runs = [[(channel, tap) for channel in range(channels)] for tap in range(taps)]
    of_row = largest_block(channels * taps, granularity)
    if channels < of_row and channels < 8 and taps > 1:
        runs = [[entry for run in runs for entry in run]]
    block = largest_block(len(runs[0]), granularity)
    layout = {}
    number = element = 0
    for run in runs:
        for entry in run:
            layout[entry] = (number, element)
            element += 1
            if element == block:
                number, element = number + 1, 0
        if element:  # the rest of the run's last block is padding
            number, element = number + 1, 0
    return block, number, layout


def layer_law(p: Placement) -> tuple[LayerLaw, dict[tuple[int, int], tuple[int, int]]]:
    """The packing law of a placed weight, and its row layout."""
    g = p.generator
    block, blocks, layout = row_layout(p.shape, g.granularity)
    assert p.start % block == 0
    fields = {
        "seed": g.seed,
        "layer": p.layer,
        "rows": p.shape[0],
        "blocks": blocks,
        "granularity": block,
        "slots": g.slots * g.granularity // block,
        "start": p.start // block,
        "reflect": g.reflect,
        "permute": g.permute,
    }
    if g.laps is None:
        return LayerLaw(**fields), layout
    fields["start"] //= 8  # octets of slots
    runs = math.prod(p.shape[2:])
    if runs > 1 and layout[0, 1][1] > 0:  # taps are packed into one run
        runs = 1
    more = {"laps": g.laps, "window": g.window, "runs": runs, "taps": p.taps}
    return UnitLaw(**fields, **more), layout


@lru_cache(maxsize=512)
def _full(p: Placement) -> tuple[Tensor, Tensor]:
    law, layout = layer_law(p)
    taps = list(itertools.product(*(range(size) for size in p.shape[2:])))
    index = torch.empty(p.shape, dtype=torch.int64)
    sign = torch.empty(p.shape, dtype=torch.float64)
    all_rows, all_blocks = torch.arange(law.rows)[:, None], torch.arange(law.blocks)
    slots = law.slot(all_rows, all_blocks).tolist()
    negative = law.negative(all_rows, all_blocks).tolist()
    for n in range(p.shape[0]):
        for (channel, tap), (b, element) in layout.items():
            where = (n, channel, *taps[tap])
            index[where] = slots[n][b] * law.granularity + element
            sign[where] = -1.0 if negative[n][b][element] else 1.0
    return index, sign


def _from_table(p: Placement, table: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.empty(p.shape, dtype=torch.int64)
    sign = torch.empty(p.shape, dtype=torch.float64)
    entries = iter(table.tolist()[p.start :])
    for n in range(p.shape[0]):
        for tap in itertools.product(*(range(size) for size in p.shape[2:])):
            for channel in range(p.shape[1]):
                entry = next(entries)
                sign[(n, channel, *tap)] = -1.0 if entry < 0 else 1.0
                index[(n, channel, *tap)] = entry + 2**31 if entry < 0 else entry
    return index, sign


def index_and_sign(weight: rpg.VirtualWeight) -> tuple[Tensor, Tensor]:
    """For each virtual weight, in torch's layout: the bank element it reads, and +1 or -1."""
    p = weight.placement
    whole = Placement(p.generator, p.layer, p.start, p.shape, p.scale, taps=p.taps)
    table = weight.bank.table
    index, sign = _full(whole) if table is None else _from_table(whole, table)
    part = torch.meshgrid(*(selected_along(p, dim) for dim in (0, 1)), indexing="ij")
    return index[part], sign[part]


def selected_along(p: Placement, dim: int) -> Tensor:
    """The selected rows or columns, from what the placement says as JSON."""
    record = json.loads(p.to_json())[("rows", "columns")[dim]]
    runs = record["chosen"] if isinstance(record, dict) else record
    numbers: list[int] = []
    for offset, length in zip(runs[::2], runs[1::2], strict=True):
        numbers += range(offset, offset + length)
    return torch.tensor(numbers)


def generating_matrix(weight: rpg.VirtualWeight) -> Tensor:
    """G itself, dense, float64 ``[virtual weights, dof]``."""
    index, sign = index_and_sign(weight)
    matrix = torch.zeros(index.numel(), weight.bank.dof, dtype=torch.float64)
    for row, (column, value) in enumerate(
        zip(index.flatten().tolist(), sign.flatten().tolist(), strict=True)
    ):
        matrix[row, column] = value
    return matrix


def ring(bank: rpg.ParameterBank) -> Tensor:
    """The bank's elements as a flat float64 leaf that wants a gradient."""
    return bank.weight.detach().double().reshape(-1).clone().requires_grad_()


def unpack(weight: rpg.VirtualWeight, elements: Tensor) -> Tensor:
    """scale · G · w from flat float64 elements, differentiable by torch alone."""
    index, sign = index_and_sign(weight)
    return weight.scale * (sign * elements[index])


def pack(weight: rpg.VirtualWeight, dense: Tensor) -> Tensor:
    """scale · Gᵀ · dŴ in float64, ``[slots, granularity]``."""
    index, sign = index_and_sign(weight)
    flat = torch.zeros(weight.bank.dof, dtype=torch.float64)
    flat.index_add_(0, index.flatten(), (sign * dense.double()).flatten())
    return weight.scale * flat.view(weight.bank.slots, weight.bank.granularity)


def bank_of(dof: int, dtype: torch.dtype = torch.float64, **arguments: object) -> rpg.ParameterBank:
    """A bank with values of order 1."""
    return rpg.ParameterBank(dof, init_std=1.0, dtype=dtype, **arguments)  # type: ignore[arg-type]


def unit_bank(
    dof: int,
    granularity: int = 64,
    reflect: str = "vector",
    permute: bool = True,
    window: int | None = None,
    laps: int | None = None,
    seed: int = 0,
    **made: object,
) -> rpg.ParameterBank:
    """A bank of law 3, with any windows, or of law 1 without laps."""
    generator = rpg.Generator(dof // granularity, granularity, reflect, permute, window, laps, seed)
    return rpg.ParameterBank.from_generator(generator, **made)  # type: ignore[arg-type]


def table_bank(dof: int, entries: int, dtype: torch.dtype = torch.float64) -> rpg.ParameterBank:
    """A bank with a random explicit table, every sign and the last element among its entries."""
    index = torch.randint(dof, (entries,))
    index[0] = dof - 1
    negative = torch.randint(2, (entries,))
    table = (index - negative * 2**31).to(torch.int32)
    return rpg.ParameterBank.from_table(torch.randn(dof, dtype=dtype), table)


def assert_exact(got: Tensor, wanted: Tensor, what: str = "") -> None:
    """Equal up to the order of float64 sums."""
    assert got.dtype == torch.float64
    torch.testing.assert_close(
        got, wanted, rtol=1e-11, atol=1e-11, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def assert_accurate(got: Tensor, exact: Tensor, torchs: Tensor, what: str) -> None:
    """At most twice the error that torch makes in the same dtype with a dense weight."""
    assert exact.dtype == torch.float64
    assert got.shape == exact.shape, what
    ours = float((got.double() - exact).abs().max())
    allowed = 2 * float((torchs.double() - exact).abs().max())
    allowed += 2 * torch.finfo(torch.float32).eps * max(1.0, float(exact.abs().max()))
    assert ours <= allowed, f"{what}: error {ours:.3g}, allowed {allowed:.3g}"


def scratch_limits(call: Callable[[], object]) -> list[int]:
    """The smallest limit that a call accepts, where tiles are parts of rows, and larger ones."""
    with rpg.scratch_limit(0), pytest.raises(RuntimeError, match="wanted at least") as error:
        call()
    least = int(str(error.value).split("at least ")[1].split()[0])
    return [least, least + 999, 3 * least, 1 << 22]
