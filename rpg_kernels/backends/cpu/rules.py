"""What the compiled CPU kernels can run, when they are taken, and in which steps of the batch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from rpg_kernels import native, settings
from rpg_kernels._tensors import LOW_PRECISION
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.cpu import multiplications, units
from rpg_kernels.backends.cpu.multiplications import RING_ROWS, RING_SUMS
from rpg_kernels.backends.registry import Backend
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import parse
from rpg_kernels.law.unit import UnitLaw
from rpg_kernels.law.window import STRIP, WindowLaw

PRODUCTS = ("linear", "linear_input_grad", "linear_bank_grad", "conv2d")
LOOKUPS = ("embedding", "embedding_bank_grad")  # read rows of any weight of a law, block by block
BLOCKS = (32, 64)  # each takes ten seconds to compile, for every instruction set
MAX_WINDOW = 2**15  # blocks: a table's entries have 15 bits for the place

# A product of its own for every row pays up to these rows of x, in fp32 and in 16 bits; beyond
# them it is the reference's, which unpacks once for all of the batch.
DIRECT_BATCH = {"linear": (64, 16), "linear_input_grad": (16, 8), "linear_bank_grad": (8, 0)}
# With 16-bit activations dense products are several times faster than these fp32 ones.
LOW_BATCH, LOW_GAIN = 32, 4
# The reference also prepares a convolution's weight, which few pixels do not pay for.
CONV_GAIN, CONV_PIXELS = 1.5, 64
LOW_CONV_GAIN, LOW_CONV_PIXELS = 4, 1024

_ALIGNMENT = 64  # of a part's memory
_TILES = ((16, 4), (16, 2), (16, 1), (8, 1), (4, 1), (1, 1))


def unsupported_kind(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why no call of a kind can run here, or "".

    Args:
        op: operator name.
        device, dtype: of the call's first tensor.

    Example:
        >>> unsupported_kind("unpack", torch.device("cpu"), torch.float32)
        'the CPU kernels have no unpack'
    """
    if device.type != "cpu":
        return f"the CPU kernels work on CPU tensors, not on {device}"
    if op in LOOKUPS:
        return "" if native.available() else native.why_not()
    if op.startswith("conv2d_"):
        return "the CPU kernels leave the gradients of a convolution to the reference"
    if op not in PRODUCTS:
        return f"the CPU kernels have no {op}"
    if dtype != torch.float32 and dtype not in LOW_PRECISION:
        return f"the CPU kernels compute in float32, bfloat16 and float16, not in {dtype}"
    return "" if native.available() else native.why_not()


def unsupported_lookup(placement: str) -> str:
    """Why rows of a weight cannot be looked up here, or ""."""
    if isinstance(parse(placement).generator, Generator):
        return ""
    return "the CPU kernels read weights of a packing law, not of a table"


@lru_cache(maxsize=4096)
def unsupported_weight(op: str, placement: str) -> str:
    """Why a product with a weight cannot run here, or "".

    Example:
        >>> from rpg_kernels.law.placement import Placement
        >>> p = Placement(Generator(100, 8, "vector"), 0, 0, (6, 16), 1.0)
        >>> unsupported_weight("linear", p.to_json())
        'the CPU kernels read blocks of 32 or 64 elements, not of 8'
    """
    p = parse(placement)
    if not isinstance(p.generator, Generator):
        return "the CPU kernels read weights of a packing law, not of a table"
    if p.generator.reflect == "element":
        return "the CPU kernels have one sign for a slot use, not one for each element"
    if p.selected_shape != p.shape:
        return "the CPU kernels read whole weights, not a part"
    if isinstance(p.law, UnitLaw):
        return units.unsupported(op, placement)
    if p.matrix.block not in BLOCKS:
        return f"the CPU kernels read blocks of 32 or 64 elements, not of {p.matrix.block}"
    if isinstance(p.law, WindowLaw) and p.law.window > MAX_WINDOW:
        return f"the CPU kernels read windows of at most {MAX_WINDOW} blocks"
    return ""


def gain(op: str, placement: str, lanes: int) -> float:
    """Rows of a column over slots that they read: how many share a product; 1 where none do.

    Args:
        op: operator name.
        placement: of the weight.
        lanes: rows of x at a time; the forward keeps sums of so many, which bounds its columns.

    Example:
        >>> from rpg_kernels.law.placement import Placement
        >>> windows = Generator(1024, 64, "vector", window=256, laps=4)
        >>> gain("linear", Placement(windows, 0, 0, (4096, 64), 1.0).to_json(), lanes=16)
        4.0
        >>> ring = Generator(1024, 64, "vector")
        >>> gain("linear", Placement(ring, 0, 0, (4096, 64), 1.0).to_json(), lanes=1)
        4.0
    """
    law = parse(placement).law
    if isinstance(law, WindowLaw):
        height = min(STRIP, 1 << (law.rows.bit_length() - 1))
        return max(1.0, min(height / law.window, float(law.laps)))
    height = min(law.rows, RING_ROWS)
    if op in ("linear", "conv2d"):
        height = min(height, RING_SUMS // lanes)
    return max(1.0, height / law.slots)


def unsupported_groups(groups: int) -> str:
    """Why a convolution of so many groups cannot run here, or "".

    Example:
        >>> unsupported_groups(2)
        'the CPU kernels convolve all channels together, not in 2 groups'
    """
    if groups == 1:
        return ""
    return f"the CPU kernels convolve all channels together, not in {groups} groups"


def faster(op: str, dtype: torch.dtype, batch: int, placement: str, groups: int = 1) -> bool:
    """Whether a call is faster here than in the reference (measured: docs/cpu.md).

    Args:
        op: operator name.
        dtype: of the activations.
        batch: rows of x; of an image its pixels.
        placement: of the weight.
        groups: of a convolution.
    """
    if op in LOOKUPS:
        return not unsupported_lookup(placement)
    if unsupported_weight(op, placement) or unsupported_groups(groups) or batch == 0:
        return False
    if of_units(placement):
        return units.faster(op, dtype, batch, placement)
    step = steps(op, batch, placement)
    if step is None:
        return False
    shared = gain(op, placement, step.batch_tile * step.tiles)
    if op == "conv2d":
        return _convolves(dtype, batch, shared)
    low = dtype in LOW_PRECISION
    if shared == 1:
        return batch <= DIRECT_BATCH[op][low]
    return not (low and batch > LOW_BATCH and shared < LOW_GAIN)


def of_units(placement: str) -> bool:
    """Whether a weight is of the unit law."""
    return isinstance(parse(placement).law, UnitLaw)


def _convolves(dtype: torch.dtype, pixels: int, shared: float) -> bool:
    few = pixels <= CONV_PIXELS
    if dtype not in LOW_PRECISION:
        return few or shared >= CONV_GAIN
    many_laps = shared >= LOW_CONV_GAIN and pixels <= LOW_CONV_PIXELS
    return many_laps or (few and shared >= CONV_GAIN)


def what(op: str, batch: int, placement: str) -> str:
    """What these kernels do in a call that they can run.

    Args:
        op, batch, placement: as for ``faster``.
    """
    if op in LOOKUPS:
        return "rows written where they are wanted, without scratch"
    if of_units(placement):
        units.check(op, placement, batch)
        shared = units.reads(placement)
        return f"the product of a slot is shared by the rows that read it, {shared:.3g} on average"
    step = check(op, placement, batch)
    shared = gain(op, placement, step.batch_tile * step.tiles)
    if shared == 1:
        return "every row has products of its own, as no slot is read by several"
    return f"the product of a slot is shared by the rows that read it, {shared:.3g} on average"


@dataclass(frozen=True)
class Steps:
    """How a call goes through its batch, and the memory that it takes.

    Args:
        batch_tile: rows of the batch at a time: 1, 4, 8 or 16.
        tiles: that are multiplied with what is tabulated once.
        threads: parts that columns are dealt to.
        workspace: bytes in all.
        scratch: of them, what the scratch limit counts: all but copies of activations.
        parts: that the pixels of a convolution are dealt to; each has ``threads`` threads.
    """

    batch_tile: int
    tiles: int
    threads: int
    workspace: int
    scratch: int
    parts: int = 1


def steps(op: str, batch: int, placement: str) -> Steps | None:
    """The fastest steps, by a rough count, whose scratch the limit allows; or None."""
    limit = settings.scratch_bytes("cpu")
    batch = batch if op == "conv2d" else min(batch, 64)
    return _steps(op, batch, placement, limit, native.threads())


@lru_cache(maxsize=4096)
def _steps(op: str, batch: int, placement: str, limit: int, threads: int) -> Steps | None:
    able = [step for step in _choices(op, placement, threads) if step.scratch <= limit]
    return min(able, key=lambda step: _cost(op, batch, placement, step), default=None)


def _cost(op: str, batch: int, placement: str, step: Steps) -> float:
    """Time of a call, in tables: each pass makes them once, and each lane adds and multiplies."""
    lanes = step.batch_tile * step.tiles
    lane = 0.05 + 0.6 / gain(op, placement, lanes)
    if op == "conv2d":  # a part is whole tiles, and only those that are there are multiplied
        tiles = -(-batch // (step.batch_tile * step.parts))
        waits = 1 if step.threads == 1 else 3  # threads of one part meet three times a pass
        return (-(-tiles // step.tiles) * waits + tiles * step.batch_tile * lane) / step.threads
    return -(-batch // lanes) * (1 + lanes * lane) / step.threads


def smallest(op: str, placement: str) -> int:
    """Scratch in bytes of the smallest steps."""
    return min(step.scratch for step in _choices(op, placement, 1))


def _choices(op: str, placement: str, threads: int) -> list[Steps]:
    p = parse(placement)
    law: Any = native.layer_law(p.law)
    workspace = getattr(law, f"{op}_workspace")
    out = []
    while True:
        for tile, tiles in _TILES:
            if op == "conv2d":
                out += _conv2d_choices(workspace, threads, tile, tiles)
                continue
            total, activations = workspace(p.shape[1], threads, tile, tiles)
            out.append(Steps(tile, tiles, threads, total, total - activations))
        if threads == 1:
            return out
        threads = -(-threads // 2)


def _conv2d_choices(workspace: Any, threads: int, tile: int, tiles: int) -> list[Steps]:
    """Threads dealt to pixels first, since those need not wait for each other."""
    out, parts = [], threads
    while True:
        of_part, activations = workspace(threads // parts, tile, tiles)
        of_part = -(-of_part // _ALIGNMENT) * _ALIGNMENT
        total, scratch = parts * of_part, parts * (of_part - activations)
        out.append(Steps(tile, tiles, threads // parts, total, scratch, parts))
        if parts == 1:
            return out
        parts = -(-parts // 2)


def check(op: str, placement: str, batch: int, groups: int = 1) -> Steps:
    """The steps of a call.

    Raises:
        RuntimeError: the weight cannot be read here, or the scratch limit is too small.
    """
    reason = unsupported_weight(op, placement) or unsupported_groups(groups)
    if reason:
        raise RuntimeError(f"backend: got 'cpu' for {op}, which cannot run: {reason}")
    step = steps(op, batch, placement)
    if step is None:
        raise RuntimeError(
            f"scratch_limit: got {settings.scratch_bytes('cpu')} bytes, wanted at least "
            f"{smallest(op, placement)} for the cpu back end of a virtual weight "
            f"{list(parse(placement).shape)}"
        )
    return step


class Cpu(Backend):
    """The compiled kernels for CPU tensors."""

    name = "cpu"
    summary = "compiled CPU kernels"
    device_types = ("cpu",)

    def unsupported(self, call: Call) -> str:
        """See ``unsupported_kind`` and ``unsupported_weight``."""
        reason = unsupported_kind(call.op, call.device, call.dtype)
        if reason or not call.placement:
            return reason
        if call.op in LOOKUPS:
            return unsupported_lookup(call.placement)
        return unsupported_weight(call.op, call.placement) or unsupported_groups(call.groups)

    def preferred(self, call: Call) -> bool:
        """See ``faster``; not of any weight."""
        if not call.placement:
            return False
        return faster(call.op, call.dtype, call.rows, call.placement, call.groups)

    def multiplications(self, call: Call) -> int | None:
        """See ``multiplications.of_row``."""
        if call.op not in PRODUCTS:
            return None
        if not call.rows:
            return None
        if of_units(call.placement):
            return call.rows * units.multiplications(call.op, call.placement)
        step = steps(call.op, call.rows, call.placement)
        if step is None:
            return None
        lanes = step.batch_tile * step.tiles
        return call.rows * multiplications.of_row(call.op, call.placement, lanes, step.threads)

    def both_grads(self, call: Call) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """``unit_linear.linear_grads`` for linear layers of the unit law.

        It takes more scratch than the two one after the other, which may be all that fits."""
        if call.op != "linear_input_grad" or not of_units(call.placement):
            return None
        if units.units("linear_grads", call.placement, call.rows) is None:
            return None
        module = importlib.import_module(f"{__package__}.unit_linear")
        return cast(Callable[..., tuple[Tensor, Tensor]], module.linear_grads)

    def explain(self, call: Call) -> str:
        """How many rows share a product, or why the call was left."""
        if self.takes(call):
            return f"{self.summary}; {what(call.op, call.rows, call.placement)}"
        if call.device.type != "cpu" or not call.x.numel():
            return ""
        return self.unsupported(call) or (
            "the CPU kernels would be slower, or have too little scratch"
        )
