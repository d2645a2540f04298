"""The dispatch table: which implementation runs an operator, and why.

A line of the table says for which operator, device and dtype a back end is used; the first that
applies wins. A forced back end (``rpg.backend``, RPG_KERNELS_BACKEND) that cannot run raises.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rpg_kernels import settings
from rpg_kernels.backends.cpu import rules as cpu
from rpg_kernels.backends.cuda import rules as cuda
from rpg_kernels.backends.triton.rules import interpreted, unsupported
from rpg_kernels.backends.vendor import rules as vendor
from rpg_kernels.law.geometry import conv_output
from rpg_kernels.law.placement import parse

OPERATORS = {
    "linear": "linear",
    "linear_input_grad": "linear",
    "linear_bank_grad": "linear",
    "conv2d": "conv2d",
    "conv2d_input_grad": "conv2d",
    "conv2d_bank_grad": "conv2d",
    "embedding": "embedding",
    "embedding_bank_grad": "embedding",
    "unpack": "unpack",
    "pack": "unpack",
}  # operator -> file of that name in every back end


class Size(NamedTuple):
    """What beside its kind decides where a call runs.

    Args:
        batch: rows of the product, rounded, see ``size_of``.
        reflect: of the weight's generator; of a table "element".
        small: the CUDA kernels, which are for small batches, are predicted to win.
    """

    batch: int = 0
    reflect: str = ""
    small: bool = False


def _always(op: str, size: Size) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """One line of the table: a back end, where it applies, the reason to print, when, of the
    calls that it could run, it is taken without being forced, and its package's name."""

    backend: str
    applies: Callable[[str, torch.device, torch.dtype], bool]
    reason: str
    when: Callable[[str, Size], bool] = _always
    package: str = ""  # the back end's own name


RULES = (
    Rule(
        "cuda",
        lambda op, device, dtype: not why_not("cuda", op, device, dtype),
        "compiled CUDA kernels; for small batches, products of slots shared by the rows that read "
        "them",
        lambda op, size: size.small,
    ),
    Rule(
        "vendor",
        lambda op, device, dtype: not why_not("vendor", op, device, dtype),
        "unpacked by a kernel within the scratch limit, multiplied by the vendor's library",
        lambda op, size: vendor.preferred(op, size.batch, size.reflect) and not interpreted(),
    ),
    Rule(
        "triton",
        lambda op, device, dtype: not why_not("triton", op, device, dtype),
        "fused Triton kernels, weights unpacked inside the tiles of the product",
        lambda op, size: not interpreted(),  # which is for tests, not for speed
    ),
    Rule(
        "cpu",
        lambda op, device, dtype: not why_not("cpu", op, device, dtype),
        "compiled CPU kernels",
        lambda op, size: size.batch > 0,
    ),
    Rule(
        "simt",
        lambda op, device, dtype: not why_not("simt", op, device, dtype),
        "the CUDA kernels' sources on the CPU, a thread at a time: for tests",
        lambda op, size: False,
        package="cuda",
    ),
    Rule(
        "reference",
        lambda op, device, dtype: True,
        "plain PyTorch, unpacked tile by tile within the scratch limit",
    ),
)


def why_not(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a back end cannot run an operator call, or "" when it can.

    Example:
        >>> why_not("triton", "embedding", torch.device("cuda"), torch.float64)
        'the Triton kernels compute in float32, bfloat16 and float16, not in torch.float64'
    """
    if backend == "triton":
        return unsupported(op, device, dtype)
    if backend == "vendor":
        return vendor.unsupported(op, device, dtype)
    if backend == "cpu":
        return cpu.unsupported(op, device, dtype)
    if backend in ("cuda", "simt"):
        return cuda.unsupported(op, device, dtype, backend)
    return "" if backend == "reference" else "this version has no such back end"


@dataclass(frozen=True)
class Explanation:
    """What would run, and why. Printable."""

    op: str
    backend: str
    reason: str
    device: str
    dtype: str
    scratch_limit: int

    def __str__(self) -> str:
        return (
            f"{self.op} on {self.device} in {self.dtype}: {self.backend} ({self.reason}; "
            f"scratch limit {self.scratch_limit} bytes)"
        )


@lru_cache(maxsize=4096)
def decide(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    batch: int = 0,
    reflect: str = "",
    small: bool = False,
) -> Rule:
    """The rule that an operator call falls under.

    Args:
        op: operator name.
        device, dtype: of the call's first tensor.
        backend: a forced back end, or "".
        batch, reflect, small: see ``Size``.

    Raises:
        RuntimeError: the forced back end cannot run this call.
    """
    size = Size(batch, reflect, small)
    for rule in RULES:
        chosen = rule.backend == backend or (not backend and rule.when(op, size))
        if chosen and rule.applies(op, device, dtype):
            return rule
    able = ", ".join(sorted({r.backend for r in RULES if r.applies(op, device, dtype)}))
    raise RuntimeError(
        f"backend: got {backend!r} for {op} on {device} in {dtype}, which cannot run: "
        f"{why_not(backend, op, device, dtype)}; wanted one of: {able}"
    )


class Call(NamedTuple):
    """What of an operator call decides where it runs.

    Args:
        op: operator name.
        x: the operator's first tensor.
        placement: of the weight.
        bank: that the operator reads beside x; None where it reads none, or x is the bank.
        geometry: what follows the placement; of conv2d stride, padding, dilation and groups.
    """

    op: str
    x: Tensor
    placement: str
    bank: Tensor | None = None
    geometry: Sequence[Any] = ()

    @property
    def rows(self) -> int:
        """Rows of the product: rows of x, or output pixels of all images."""
        x = self.x
        if self.op == "conv2d":
            kernel = parse(self.placement).selected_shape[2:]
            return len(x) * math.prod(conv_output(x.shape[2:], kernel, *self.geometry[:3]))
        return x.numel() // x.shape[-3 if self.op.startswith("conv2d") else -1]

    @property
    def groups(self) -> int:
        """Groups of a convolution's forward; 1 of anything else."""
        return self.geometry[3] if self.op == "conv2d" else 1


def size_of(call: Call) -> Size:
    """What beside its kind decides where a call runs.

    Rows of the product are rounded down to a power of two, since only whether there are many
    matters; 0 where there is no product, and where the scratch limit does not allow for a sixteenth
    of the weight, since many small parts cost more than they gain. On the CPU 0 too where the
    compiled kernels would lose, which depends on the weight, and 1 for rows that they look up. A
    table counts as reflecting each element.

    Example:
        >>> from rpg_kernels.law.generator import Generator
        >>> from rpg_kernels.law.placement import Placement
        >>> spec = Placement(Generator(100, 8, "vector"), 0, 0, (6, 7), 1.0).to_json()
        >>> size_of(Call("linear", torch.empty(3, 5, 7, device="meta"), spec))
        Size(batch=8, reflect='vector', small=False)
    """
    op, x, placement, bank, _ = call
    p = parse(placement)
    reflect = getattr(p.generator, "reflect", "element")
    small = x.device.type == "cuda" and cuda.preferred(op, x, x.dtype, placement, bank)
    if op in cpu.LOOKUPS and x.device.type == "cpu":
        able = not cpu.unsupported(op, x.device, x.dtype)
        return Size(int(able and cpu.preferred(op, x.dtype, 1, placement)), reflect)
    if not op.startswith(("linear", "conv2d")) or not x.numel():
        return Size(0, reflect, small)
    rows = call.rows
    if x.device.type == "cpu":
        able = not cpu.unsupported(op, x.device, x.dtype)
        wins = able and cpu.preferred(op, x.dtype, rows, placement, call.groups)
        return Size(1 << rows.bit_length() - 1 if wins else 0, reflect)
    line = p.numel // min(16, *p.selected_shape[:2]) * x.element_size()
    if line > settings.scratch_bytes(x.device.type):
        return Size(0, reflect, small)
    return Size(1 << rows.bit_length() - 1, reflect, small)


@lru_cache(maxsize=4096)
def implementation(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    batch: int = 0,
    reflect: str = "",
    small: bool = False,
) -> Callable[..., Tensor]:
    """The function that runs an operator call; same arguments as the operator's, less backend."""
    rule = decide(op, device, dtype, backend, batch, reflect, small)
    package = rule.package or rule.backend
    module = importlib.import_module(f"rpg_kernels.backends.{package}.{OPERATORS[op]}")
    function: Callable[..., Tensor] = getattr(module, op)
    return function
