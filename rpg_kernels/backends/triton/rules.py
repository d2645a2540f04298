"""What the Triton kernels can run, and when they are taken."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import cast

import torch

from rpg_kernels.backends.call import Call
from rpg_kernels.backends.reference.rules import fits
from rpg_kernels.backends.registry import Backend, TileKernels
from rpg_kernels.law.placement import parse

OPERATORS = (
    "linear",
    "linear_input_grad",
    "linear_bank_grad",
    "conv2d",
    "conv2d_input_grad",
    "conv2d_bank_grad",
    "embedding",
    "embedding_bank_grad",
    "unpack",
    "pack",
)
# Rows of the batch from which unpacking once is predicted to cost less than signing every element
# in every tile: docs/kernels.md has the arithmetic. Signs of whole vectors cost no register pass,
# so there the fused kernels are predicted to win at every size. The bank gradient signs its result
# once, whatever the batch.
ELEMENT_SIGNS_FROM = 2048
_SIGNED = ("linear", "linear_input_grad", "conv2d", "conv2d_input_grad")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET asks for the interpreter, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def unsupported_kind(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why no call of a kind can run here, or "".

    Triton is not imported to answer this.

    Args:
        op: operator name.
        device, dtype: of the call's first tensor.

    Example:
        >>> unsupported_kind("nothing", torch.device("cuda"), torch.float16)
        'the Triton back end has no kernel for nothing'
    """
    if op not in OPERATORS:
        return f"the Triton back end has no kernel for {op}"
    if dtype not in _DTYPES:
        return f"the Triton kernels compute in float32, bfloat16 and float16, not in {dtype}"
    if not _installed():
        return "triton is not installed"
    if interpreted():
        if device.type != "cpu":
            return "TRITON_INTERPRET=1 runs the Triton kernels on CPU tensors only"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes wrongly in bfloat16, without a warning"
        return ""
    if device.type != "cuda" or torch.version.cuda is None:
        return "the Triton kernels need a CUDA device, or TRITON_INTERPRET=1"
    if _capability(device) < _CAPABILITY:
        return "the Triton kernels need a GPU of compute capability 8.0 or later"
    return ""


def unsupported_weight(placement: str) -> str:
    """Why a weight cannot be read here, or "".

    Example:
        >>> from rpg_kernels import Generator
        >>> from rpg_kernels.law.placement import Placement
        >>> p = Placement(Generator(100, 8, "vector"), 0, 0, (6, 16), 1.0)
        >>> unsupported_weight(p.narrow(0, 1, 2).to_json())
        ''
        >>> unsupported_weight(p.select(0, [0, 2]).to_json())
        'the Triton kernels read ranges of rows and columns, not chosen ones'
    """
    p = parse(placement)
    if p.rows_chosen is None and p.columns_chosen is None:
        return ""
    return "the Triton kernels read ranges of rows and columns, not chosen ones"


def unpacked_once(call: Call) -> bool:
    """Whether unpacking within scratch, then the library's product, is predicted to be faster."""
    if call.op not in _SIGNED or not call.placement or call.rows < ELEMENT_SIGNS_FROM:
        return False
    p = parse(call.placement)
    signs = getattr(p.generator, "reflect", "element")  # a table has a sign for each element
    return signs == "element" and fits(p, call.dtype, call.device)


def _tiles(call: Call) -> list[object]:
    """Of a call's rows, or of its indices; those of a convolution's gradients are about as many."""
    config = importlib.import_module(f"{__package__}.config")
    p = parse(call.placement)
    batch, groups = call.rows, call.groups
    if call.op.startswith("embedding"):
        batch = call.operands[1 if call.op == "embedding_bank_grad" else 2].numel()
    rows, columns = p.selected_shape[0] // groups, p.block_columns.length
    times = groups * (p.matrix.runs if call.op == "conv2d_bank_grad" else 1)
    target = config.gpu(call.device)
    given = (call.op, batch, rows, columns, p.matrix.block, call.dtype, target, times)
    return [config.choose(*given, crowded) for crowded in (False, True)]


class Triton(Backend):
    """Fused kernels for CUDA tensors; in Triton's interpreter for CPU tensors, in tests."""

    name = "triton"
    summary = "fused Triton kernels, weights unpacked inside the tiles of the product"
    device_types = ("cuda",)
    must_prove = True

    def unsupported(self, call: Call) -> str:
        """See ``unsupported_kind`` and ``unsupported_weight``; banks are read as stored."""
        kind = unsupported_kind(call.op, call.device, call.dtype)
        return kind or (unsupported_weight(call.placement) if call.placement else "")

    def preferred(self, call: Call) -> bool:
        """Unless unpacking once is predicted to be faster; never in the interpreter."""
        return not interpreted() and not unpacked_once(call)

    def explain(self, call: Call) -> str:
        """Why the call was left, on a CUDA device."""
        if self.takes(call):
            return self.summary
        if call.device.type != "cuda":
            return ""
        return self.unsupported(call) or (
            "with a sign per element unpacking once is predicted to be faster than fused kernels "
            f"from batch {ELEMENT_SIGNS_FROM}"
        )

    def configuration(self, call: Call) -> str:
        """The tiles that ``config.choose`` gives, where registers are crowded and where not."""
        return str(_tiles(call))

    def rehearsing(
        self, times: Fraction, rows: Fraction
    ) -> contextlib.AbstractContextManager[object]:
        """See ``config.as_if``."""
        config = importlib.import_module(f"{__package__}.config")
        made: contextlib.AbstractContextManager[object] = config.as_if(times, rows)
        return made

    def compile_ahead(self, calls: Sequence[Callable[[], object]]) -> None:
        """See ``ahead.compiled``."""
        if not interpreted():
            importlib.import_module(f"{__package__}.ahead").compiled(calls)

    def tile_kernels(self, call: Call) -> TileKernels | None:
        """Those of ``unpack`` and ``pack``."""
        if interpreted() or self.unsupported(call):
            return None
        return cast(TileKernels, importlib.import_module(f"{__package__}.unpack"))
