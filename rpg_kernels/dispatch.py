"""The dispatch table: which implementation runs an operator, and why.

A line of the table says for which operator, device and dtype a back end is used; the first that
applies wins. A forced back end (``rpg.backend``, RPG_KERNELS_BACKEND) that cannot run raises.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from rpg_kernels import _checks, settings
from rpg_kernels.cpu import config as cpu
from rpg_kernels.cuda import config as cuda
from rpg_kernels.placement import parse
from rpg_kernels.triton.config import interpreted, unsupported
from rpg_kernels.vendor import config as vendor

if TYPE_CHECKING:
    from torch import nn

    from rpg_kernels.nn import VirtualLayer

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
        batch: rows of the product, see ``size_of``.
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
        "compiled CPU kernels, products of slots shared by the rows that read them",
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


def _reason(rule: Rule, op: str, device: torch.device, dtype: torch.dtype) -> str:
    """A rule's reason; where a GPU tensor falls to the reference, why Triton did not take it."""
    if rule.backend == "cpu" and op in cpu.LOOKUPS:
        return "compiled CPU kernels, rows written where they are wanted, without scratch"
    missing = why_not("triton", op, device, dtype)
    if rule.backend == "reference" and device.type == "cuda" and missing:
        return f"{rule.reason}; {missing}"
    return rule.reason


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


def size_of(
    op: str,
    x: Tensor,
    placement: str,
    dtype: torch.dtype | None = None,
    bank: Tensor | None = None,
) -> Size:
    """What beside its kind decides where a call runs.

    Rows are those of x, or pixels of all images, rounded down to a power of two, since only
    whether there are many matters; 0 where there is no product, and where the scratch limit does
    not allow for a sixteenth of the weight, since many small parts cost more than they gain. On
    the CPU 0 too where the compiled kernels would lose, which depends on the weight, and 1 for
    rows that they look up.

    Args:
        op: operator name.
        x: the operator's first tensor.
        placement: of the weight. A table counts as reflecting each element.
        dtype: that x will be cast to; None for its own.
        bank: that the operator reads.

    Example:
        >>> from rpg_kernels.generator import Generator
        >>> from rpg_kernels.placement import Placement
        >>> spec = Placement(Generator(100, 8, "vector"), 0, 0, (6, 7), 1.0).to_json()
        >>> size_of("linear", torch.empty(3, 5, 7, device="meta"), spec)
        Size(batch=8, reflect='vector', small=False)
    """
    p = parse(placement)
    dtype = dtype or x.dtype
    reflect = getattr(p.generator, "reflect", "element")
    small = x.device.type == "cuda" and cuda.preferred(op, x, dtype, placement, bank)
    if op in cpu.LOOKUPS and x.device.type == "cpu":
        able = not cpu.unsupported(op, x.device, dtype)
        return Size(int(able and cpu.preferred(op, dtype, 1, placement)), reflect)
    if not op.startswith(("linear", "conv2d")) or not x.numel():
        return Size(0, reflect, small)
    rows = x.numel() // x.shape[-3 if op.startswith("conv2d") else -1]
    if x.device.type == "cpu":
        able = not cpu.unsupported(op, x.device, dtype)
        wins = able and cpu.preferred(op, dtype, rows, placement, _groups(op, x, placement))
        return Size(1 << rows.bit_length() - 1 if wins else 0, reflect)
    line = p.numel // min(16, *p.selected_shape[:2]) * x.element_size()
    if line > settings.scratch_bytes(x.device.type):
        return Size(0, reflect, small)
    return Size(1 << rows.bit_length() - 1, reflect, small)


def _groups(op: str, x: Tensor, placement: str) -> int:
    """Groups of a convolution of x; 1 of anything else."""
    return x.shape[-3] // parse(placement).selected_shape[1] if op == "conv2d" else 1


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
    module = importlib.import_module(f"rpg_kernels.{package}.{OPERATORS[op]}")
    function: Callable[..., Tensor] = getattr(module, op)
    return function


def explain(module: nn.Module, x: Tensor) -> Explanation:
    """What would run ``module(x)``: a record with ``.backend`` and ``.reason``.

    Nothing is computed. A forced back end is taken into account, and so is autocast.

    Args:
        module: an rpg layer (``rpg.nn.Linear``, ``Conv2d``, ``Embedding``).
        x: an input of the layer.

    Raises:
        TypeError: module is not an rpg layer.
        RuntimeError: the forced back end cannot run this call.

    Example:
        >>> import rpg_kernels as rpg
        >>> layer = rpg.nn.Linear(8, 8, bank=rpg.ParameterBank(dof=64))
        >>> rpg.explain(layer, torch.randn(2, 8)).backend
        'reference'
    """
    op: Any = getattr(module, "rpg_operator", None)
    if not isinstance(op, str):
        got = type(module).__name__
        raise TypeError(f"module: got {got}, wanted an rpg layer (rpg.nn.Linear, Conv2d, ...)")
    weight = cast("VirtualLayer", module).virtual_weight
    dtype = _checks.tensor("x", x).dtype
    if op == "embedding":
        dtype = weight.dtype
    elif (
        torch.amp.is_autocast_available(x.device.type)
        and torch.is_autocast_enabled(x.device.type)
        and dtype != torch.float64
    ):
        dtype = torch.get_autocast_dtype(x.device.type)
    bank = weight.bank.weight
    size = size_of(op, x, weight.spec, dtype, bank)
    forced = settings.forced_backend()
    rule = decide(op, x.device, dtype, forced, *size)
    limit = settings.scratch_bytes(x.device.type)
    reason = _reason(rule, op, x.device, dtype)
    if (
        rule.backend == "reference"
        and not forced
        and x.numel()
        and x.device.type == "cpu"
        and op in (*cpu.OPERATORS, *cpu.LOOKUPS)
    ):
        groups = _groups(op, x, weight.spec)
        reason += f"; {cpu.why_reference(op, dtype, weight.spec, groups)}"
    if x.device.type == "cuda" and op in cuda.PRODUCTS and not forced and not size.small:
        reason += f"; {cuda.why_others(op, x, dtype, weight.spec, bank)}"
    if (rule.package or rule.backend) == "cuda" and forced and x.numel():
        cuda.check(op, weight.spec, x.device, dtype, x.numel() // x.shape[-1], bank)
    if rule.backend == "vendor" and not forced:
        reason += "; with a sign per element predicted to be faster than fused kernels from batch "
        reason += str(vendor.ELEMENT_SIGNS_FROM)
    return Explanation(op, rule.backend, reason, str(x.device), str(dtype), limit)
