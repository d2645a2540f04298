"""What the compiled CPU kernels run of the unit law, when they are taken, and in which steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rpg_kernels import native, settings
from rpg_kernels._tensors import LOW_PRECISION
from rpg_kernels.law.placement import Placement, parse
from rpg_kernels.law.unit import OCTET, UnitLaw

BLOCKS = (16, 32, 64, 128)
PRODUCTS = ("linear", "linear_input_grad", "linear_bank_grad", "linear_grads")
FEW = 4  # rows of x up to which the bank is read as it is stored
FEW_BLOCK = 32  # that this takes
# Up to so many rows of x the bank's traffic decides; beyond them sharing must pay for additions,
# and in 16 bits for dense products that are faster than fp32 ones where the processor has them.
SMALL_BATCH, GAIN, LOW_GAIN = 32, 1.5, 1.5
_MOST_LANES, _LEAST_LANES = 64, 16


def unsupported(op: str, placement: str) -> str:
    """Why a product with a weight of the unit law cannot run here, or "".

    Example:
        >>> from rpg_kernels.law.generator import Generator
        >>> p = Placement(Generator(100, 8, "vector", laps=2), 0, 0, (6, 16), 1.0)
        >>> unsupported("linear", p.to_json())
        'the CPU kernels of law 3 read blocks of 16 to 128 elements, not of 8'
    """
    p = parse(placement)
    if op not in PRODUCTS:
        return f"the CPU kernels have no {op} of law 3"
    if p.matrix.block not in BLOCKS:
        return (
            f"the CPU kernels of law 3 read blocks of 16 to 128 elements, not of {p.matrix.block}"
        )
    if p.law.rows_per_band < p.law.rows:
        return "the CPU kernels of law 3 read weights of at most 2^31 blocks"
    return ""


@dataclass(frozen=True)
class Units:
    """How a call goes through its batch, and the memory that it takes.

    Args:
        lanes: rows of the batch at a time.
        threads: that share it.
        workspace: bytes in all.
        scratch: of them, what the scratch limit counts: all but copies of activations.
    """

    lanes: int
    threads: int
    workspace: int
    scratch: int


def units(op: str, placement: str, batch: int) -> Units | None:
    """The steps of a call: the most lanes that the scratch limit allows; None where none do."""
    limit = settings.scratch_bytes("cpu")
    choices = _choices(op, placement, batch, native.threads())
    return next((step for step in choices if step.scratch <= limit), None)


def smallest(op: str, placement: str, batch: int) -> int:
    """Scratch in bytes of the smallest steps."""
    return min(step.scratch for step in _choices(op, placement, batch, native.threads()))


@lru_cache(maxsize=4096)
def _choices(op: str, placement: str, batch: int, threads: int) -> tuple[Units, ...]:
    """From the most lanes to the least, then with fewer threads."""
    p, batch = parse(placement), max(batch, 1)  # of an empty batch, what one row takes
    law = native.layer_law(p.law)
    out = []
    while True:
        for lanes in _lanes(op, p, batch):
            if op == "linear":
                total, activations = law.unit_linear_workspace(batch, p.shape[1], threads, lanes)
            else:
                wanted = (op != "linear_bank_grad", op != "linear_input_grad")
                size = (batch, p.shape[1], threads, lanes, *wanted)
                total, activations = law.unit_linear_grads_workspace(*size)
            out.append(Units(lanes, threads, total, total - activations))
        if threads == 1:
            return tuple(out)
        threads = -(-threads // 2)


def _lanes(op: str, p: Placement, batch: int) -> list[int]:
    if op == "linear" and batch <= FEW and p.matrix.block % FEW_BLOCK == 0:
        return [1 << (batch - 1).bit_length()]
    most = min(_MOST_LANES, max(_LEAST_LANES, 1 << (batch - 1).bit_length()))
    return [most >> i for i in range((most // _LEAST_LANES).bit_length())]


@lru_cache(maxsize=4096)
def reads(placement: str) -> float:
    """How many rows share the product of a slot, on average over the windows of a layer.

    Example:
        >>> from rpg_kernels.law.generator import Generator
        >>> g = Generator(1024, 64, "vector", laps=4)
        >>> reads(Placement(g, 0, 0, (4096, 64), 1.0).to_json())
        4.0
    """
    law = parse(placement).law
    assert isinstance(law, UnitLaw)
    return law.rows * law.blocks / (OCTET * octets_read(law, torch.arange(law.columns)))


def octets_read(law: UnitLaw, columns: Tensor) -> int:
    """Octets of the ring that units of some columns read, each as often as it is in a window."""
    groups = law.groups(0)
    column, group = columns.repeat_interleave(groups), torch.arange(groups).repeat(len(columns))
    first, size = law.unit(column, group, 0)
    before = first % law.laps  # a layer begins with an octet's first use
    return int((before + size + law.laps - 1).div(law.laps, rounding_mode="floor").sum())


@lru_cache(maxsize=4096)
def multiplications(op: str, placement: str) -> int:
    """For one row of the batch; the padding of blocks and of vectors of the batch is not counted.

    Forward all slots of a window are multiplied; backward those that are read, which are others
    only where the rows are no multiple of 8: this is not counted either.

    Example:
        >>> from rpg_kernels.law.generator import Generator
        >>> g = Generator(1024, 64, "vector", laps=4)
        >>> multiplications("linear", Placement(g, 0, 0, (4096, 64), 1.0).to_json())
        65536
    """
    p = parse(placement)
    law = p.law
    assert isinstance(law, UnitLaw)
    of_last = p.shape[1] - (law.blocks - 1) * law.granularity
    whole = octets_read(law, torch.arange(law.columns - 1))
    last = octets_read(law, torch.tensor([law.columns - 1]))
    return OCTET * (whole * law.granularity + last * of_last)


def faster(op: str, dtype: torch.dtype, batch: int, placement: str) -> bool:
    """Whether a call is faster here than in the reference, which unpacks the weight."""
    shared = reads(placement)
    if units(op, placement, batch) is None:
        return False
    if batch <= SMALL_BATCH:
        return True
    return shared >= (LOW_GAIN if dtype in LOW_PRECISION else GAIN)


def check(op: str, placement: str, batch: int) -> Units:
    """The steps of a call.

    Raises:
        RuntimeError: the weight cannot be read here, or the scratch limit is too small.
    """
    reason = unsupported(op, placement)
    if reason:
        raise RuntimeError(f"backend: got 'cpu' for {op}, which cannot run: {reason}")
    step = units(op, placement, batch)
    if step is None:
        raise RuntimeError(
            f"scratch_limit: got {settings.scratch_bytes('cpu')} bytes, wanted at least "
            f"{smallest(op, placement, batch)} for the cpu back end of a virtual weight "
            f"{list(parse(placement).shape)}"
        )
    return step
