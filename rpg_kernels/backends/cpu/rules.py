"""Which compiled CPU kernels run a call, and when they are taken."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor

from rpg_kernels import native, settings
from rpg_kernels._tensors import LOW_PRECISION
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.cpu import factored, unit_conv2d
from rpg_kernels.backends.cpu.lanes import Family
from rpg_kernels.backends.cpu.tiles import TILES
from rpg_kernels.backends.cpu.units import UNITS
from rpg_kernels.backends.registry import Backend
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import parse
from rpg_kernels.law.unit import UnitLaw

PRODUCTS = ("linear", "linear_input_grad", "linear_bank_grad", *unit_conv2d.OPERATORS)
LOOKUPS = ("embedding", "embedding_bank_grad")  # read rows of any weight of a law, block by block


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
    if op not in PRODUCTS:
        return f"the CPU kernels have no {op}"
    if dtype != torch.float32 and dtype not in LOW_PRECISION:
        return f"the CPU kernels compute in float32, bfloat16 and float16, not in {dtype}"
    return "" if native.available() else native.why_not()


def unsupported_lookup(placement: str) -> str:
    """Why rows of a weight cannot be looked up here, or ""."""
    p = parse(placement)
    if p.rows_chosen is not None or p.columns_chosen is not None:
        return "the CPU kernels look up ranges of rows and columns, not chosen ones"
    if isinstance(p.generator, Generator):
        return ""
    return "the CPU kernels read weights of a packing law, not of a table"


@lru_cache(maxsize=4096)
def unsupported_weight(op: str, placement: str) -> str:
    """Why a product with a weight cannot run here, or "".

    Example:
        >>> from rpg_kernels.law.placement import Placement
        >>> p = Placement(Generator(100, 4, "vector"), 0, 0, (6, 16), 1.0)
        >>> unsupported_weight("linear", p.to_json())
        'the CPU kernels gather blocks of 16 to 128 elements, not of 4'
    """
    p = parse(placement)
    if not isinstance(p.generator, Generator):
        return "the CPU kernels read weights of a packing law, not of a table"
    if p.generator.reflect == "element":
        return "the CPU kernels have one sign for a slot use, not one for each element"
    if p.selected_shape != p.shape:
        return "the CPU kernels read whole weights, not a part"
    if op.startswith("conv2d"):
        if isinstance(p.law, UnitLaw) or op != "conv2d":
            return unit_conv2d.unsupported(op, placement)
        return factored.unsupported(op, placement)
    return UNITS.unsupported(op, placement) and TILES.unsupported(op, placement)


def unsupported_groups(groups: int) -> str:
    """Why a convolution of so many groups cannot run here, or "".

    Example:
        >>> unsupported_groups(2)
        'the CPU kernels convolve all channels together, not in 2 groups'
    """
    if groups == 1:
        return ""
    return f"the CPU kernels convolve all channels together, not in {groups} groups"


def check_weight(op: str, placement: str, groups: int = 1) -> None:
    """Refuse what no kernel here reads.

    Raises:
        RuntimeError: it says why.
    """
    reason = unsupported_weight(op, placement) or unsupported_groups(groups)
    if reason:
        raise RuntimeError(f"backend: got 'cpu' for {op}, which cannot run: {reason}")


def family(op: str, dtype: torch.dtype, batch: int, placement: str) -> Family | None:
    """The kernels that run a product here, if any do; None: those of ``factored``.

    Args:
        op: operator name, or "linear_grads"; no convolution of law 3.
        dtype: of the activations.
        batch: rows of x; of an image its pixels.
        placement: of the weight.
    """
    limit = settings.scratch_bytes("cpu")
    return _family(op, dtype, batch, placement, limit, native.threads())


@lru_cache(maxsize=4096)
def _family(
    op: str, dtype: torch.dtype, batch: int, placement: str, limit: int, threads: int
) -> Family | None:
    """``limit`` and ``threads`` are what ``Family.steps`` looks up."""
    if op.startswith("conv2d"):
        return None
    able = [f for f in (UNITS, TILES) if not f.unsupported(op, placement)]
    fitting = [f for f in able if f.steps(op, placement, batch)]
    has_factors = not factored.unsupported(op, placement)
    if has_factors and (not fitting or factored.faster(op, dtype, batch, placement)):
        return None
    for taken in fitting:
        if taken.suits(op, dtype, batch, placement):
            return taken
    return (fitting or able)[0]


def faster(
    op: str,
    dtype: torch.dtype,
    batch: int,
    placement: str,
    groups: int = 1,
    bank_dtype: torch.dtype | None = None,
) -> bool:
    """Whether a call is faster here than in the reference (measured: docs/cpu.md).

    Args:
        op, dtype, batch, placement: as for ``family``.
        groups: of a convolution.
        bank_dtype: of the bank that a forward reads; None where it is not known.
    """
    if op in LOOKUPS:
        return not unsupported_lookup(placement)
    if unsupported_weight(op, placement) or unsupported_groups(groups) or batch == 0:
        return False
    taken = family(op, dtype, batch, placement)
    if taken is None:
        return factored.faster(op, dtype, batch, placement)
    fits = taken.steps(op, placement, batch) is not None
    return fits and taken.faster(op, dtype, batch, placement, bank_dtype)


def convolves_units(op: str, placement: str) -> bool:
    """Whether a call is a convolution of law 3."""
    return op.startswith("conv2d") and isinstance(parse(placement).law, UnitLaw)


def what(call: Call) -> str:
    """What these kernels do in a call that they can run.

    Raises:
        RuntimeError: too little scratch.
    """
    op, dtype, batch, placement = call.op, call.dtype, call.rows, call.placement
    if op in LOOKUPS:
        return "rows written where they are wanted, without scratch"
    if convolves_units(op, placement):
        unit_conv2d.check_call(call)
        return UNITS.what(placement)
    taken = family(op, dtype, batch, placement)
    if taken is None:
        return factored.what(op, batch, placement)
    taken.check(op, placement, batch)
    return taken.what(placement)


def _function(module: str, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    found = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return cast(Callable[..., tuple[Tensor, Tensor]], found)


class Cpu(Backend):
    """The compiled kernels for CPU tensors."""

    name = "cpu"
    summary = "compiled CPU kernels"
    device_types = ("cpu",)

    def unsupported(self, call: Call) -> str:
        """See ``unsupported_kind`` and ``unsupported_weight``."""
        if call.stored is not None:
            return (
                f"the compiled CPU kernels read float banks, not one stored as {call.stored.form}"
            )
        reason = unsupported_kind(call.op, call.device, call.dtype)
        if reason or not call.placement:
            return reason
        if call.op in LOOKUPS:
            return unsupported_lookup(call.placement)
        reason = unsupported_weight(call.op, call.placement) or unsupported_groups(call.groups)
        if reason or not convolves_units(call.op, call.placement):
            return reason
        return unit_conv2d.unsupported_stride(call.placement, call.stride)

    def preferred(self, call: Call) -> bool:
        """See ``faster``; not of any weight."""
        if not call.placement:
            return False
        if convolves_units(call.op, call.placement):
            return unit_conv2d.faster(call)
        bank_dtype = None if call.bank is None else call.bank.dtype
        return faster(call.op, call.dtype, call.rows, call.placement, call.groups, bank_dtype)

    def multiplications(self, call: Call) -> int | None:
        """See ``multiplications.of_row``."""
        if call.op not in PRODUCTS:
            return None
        if not call.rows:
            return None
        if convolves_units(call.op, call.placement):
            return call.rows * unit_conv2d.multiplications(call.placement)
        taken = family(call.op, call.dtype, call.rows, call.placement)
        if taken is None:
            of_row = factored.multiplications_of_row(call.op, call.placement, call.rows)
            return None if of_row is None else call.rows * of_row
        return call.rows * taken.multiplications(call.op, call.placement)

    def adds(self, call: Call) -> bool:
        """Of products; not of float64, which these kernels do not take."""
        return call.op in ("linear_bank_grad", "conv2d_bank_grad")

    def both_grads(self, call: Call) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """``linear_grads`` or ``conv2d_grads`` where the same kernels make both.

        It takes more scratch than the two one after the other, which may be all that fits."""
        if convolves_units(call.op, call.placement):
            return _function("conv2d", "conv2d_grads") if unit_conv2d.both_fit(call) else None
        if call.op != "linear_input_grad":
            return None
        of_call = partial(family, dtype=call.dtype, batch=call.rows, placement=call.placement)
        taken = of_call("linear_input_grad")
        if taken is None or of_call("linear_bank_grad") is not taken:
            return None
        if taken.steps("linear_grads", call.placement, call.rows) is None:
            return None
        return _function("linear", "linear_grads")

    def explain(self, call: Call) -> str:
        """How many rows share a product, or why the call was left."""
        if self.takes(call):
            return f"{self.summary}; {what(call)}"
        if call.device.type != "cpu" or not call.x.numel():
            return ""
        return self.unsupported(call) or (
            "the CPU kernels would be slower, or have too little scratch"
        )
