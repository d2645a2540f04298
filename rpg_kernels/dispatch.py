"""The dispatch table: which implementation runs an operator, and why.

A line of the table says for which operator, device and dtype a back end is used; the first that
applies wins. A forced back end (``rpg.backend``, RPG_KERNELS_BACKEND) that cannot run raises.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rpg_kernels import _checks, settings
from rpg_kernels.triton.config import unsupported

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


@dataclass(frozen=True)
class Rule:
    """One line of the table: a back end, where it applies, and the reason to print."""

    backend: str
    applies: Callable[[str, torch.device, torch.dtype], bool]
    reason: str


RULES = (
    Rule(
        "reference",
        lambda op, device, dtype: True,
        "plain PyTorch, unpacked tile by tile within the scratch limit",
    ),
    # Only when asked for: no GPU has run these kernels yet, and on CPU tensors it is Triton's
    # interpreter that runs them.
    Rule(
        "triton",
        lambda op, device, dtype: not why_not("triton", op, device, dtype),
        "fused Triton kernels, weights unpacked inside the tiles of the product",
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
    return "" if backend == "reference" else "this version has no such back end"


def _reason(rule: Rule, op: str, device: torch.device, dtype: torch.dtype) -> str:
    """A rule's reason; where a GPU tensor falls to the reference, why Triton did not take it."""
    if rule.backend == "reference" and device.type == "cuda":
        missing = why_not("triton", op, device, dtype) or (
            "the Triton kernels have not run on a GPU yet, so they are used when asked for: "
            'rpg.backend("triton")'
        )
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


@lru_cache(maxsize=1024)
def decide(op: str, device: torch.device, dtype: torch.dtype, backend: str) -> Rule:
    """The rule that an operator call falls under.

    Args:
        op: operator name.
        device, dtype: of the call's first tensor.
        backend: a forced back end, or "".

    Raises:
        RuntimeError: the forced back end cannot run this call.
    """
    for rule in RULES:
        if backend in ("", rule.backend) and rule.applies(op, device, dtype):
            return rule
    able = ", ".join(sorted({r.backend for r in RULES if r.applies(op, device, dtype)}))
    raise RuntimeError(
        f"backend: got {backend!r} for {op} on {device} in {dtype}, which cannot run: "
        f"{why_not(backend, op, device, dtype)}; wanted one of: {able}"
    )


@lru_cache(maxsize=1024)
def implementation(
    op: str, device: torch.device, dtype: torch.dtype, backend: str
) -> Callable[..., Tensor]:
    """The function that runs an operator call; same arguments as the operator's, less backend."""
    rule = decide(op, device, dtype, backend)
    module = importlib.import_module(f"rpg_kernels.{rule.backend}.{OPERATORS[op]}")
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
    dtype = _checks.tensor("x", x).dtype
    if op == "embedding":
        dtype = cast("VirtualLayer", module).virtual_weight.dtype
    elif (
        torch.amp.is_autocast_available(x.device.type)
        and torch.is_autocast_enabled(x.device.type)
        and dtype != torch.float64
    ):
        dtype = torch.get_autocast_dtype(x.device.type)
    rule = decide(op, x.device, dtype, settings.forced_backend())
    limit = settings.scratch_bytes(x.device.type)
    reason = _reason(rule, op, x.device, dtype)
    return Explanation(op, rule.backend, reason, str(x.device), str(dtype), limit)
