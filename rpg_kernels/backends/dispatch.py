"""The choice: which back end runs a call, and why.

The first registered back end that can run a call and prefers it does. A forced one
(``rpg.backend``, RPG_KERNELS_BACKEND) that cannot run it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg_kernels import _checks, settings
from rpg_kernels.backends import proving, registry
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.registry import Backend

# What is said of a call's back end by what is known of it, see ``proving.state``.
_PROOF = {
    "not asked": "",
    "not tried": "to be tested when it is first needed",
    "proved": "proved here",
    "refused": "",
}


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


def choose(call: Call) -> Backend:
    """The back end that runs a call.

    Raises:
        ValueError: the environment names no back end.
        RuntimeError: the forced back end cannot run this call, or is not registered (any more).
    """
    if not call.forced:
        return next(b for b in registry.backends() if b.takes(call) and not _left_aside(b, call))
    reason, of_kind = "this version has no such back end", True
    if call.forced in registry.names() or settings.from_environment(call.forced):
        forced = registry.find(call.forced)
        reason = forced.unsupported(call)
        if not reason:
            return forced
        # Where it is the weight that cannot be read, the device and the dtype are not to blame.
        of_kind = bool(forced.unsupported(call.of_any_weight()))
    kind = f" on {call.device} in {call.dtype}" if of_kind else ""
    able = ", ".join(sorted(b.name for b in registry.backends() if not b.unsupported(call)))
    raise RuntimeError(
        f"backend: got {call.forced!r} for {call.op}{kind}, which cannot run: {reason}; wanted one "
        f"of: {able}"
    )


def _left_aside(backend: Backend, call: Call) -> str:
    """What went wrong when a back end that must prove itself was tried with such a call, or ""."""
    return proving.refused(backend, call) if backend.must_prove else ""


def implementation(call: Call) -> Callable[..., Tensor]:
    """The function that runs a call; same arguments as the operator's, less the back end.

    A back end that has to prove itself is tried first, once for each kind of call.
    """
    if call.forced:
        return choose(call).operator(call)
    failed = []
    for backend in registry.backends():
        if not backend.takes(call):
            continue
        if not backend.must_prove or proving.proved(backend, call):
            break
        failed.append(backend)
    for left_aside in failed:
        proving.warn_once(left_aside, call, backend.name)
    return backend.operator(call)


def compile_ahead(calls: Sequence[Call]) -> None:
    """Compile what calls will be tested with, many kernels at once: those of the back end that each
    is given to first."""
    asked = ((next(b for b in registry.backends() if b.takes(call)), call) for call in calls)
    proving.compile_ahead([pair for pair in asked if pair[0].must_prove])


def both_grads(call: Call, other: Call) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """What makes both gradients of a layer at once, where one back end runs both and can.

    Args:
        call, other: of the input gradient and of the bank gradient.

    Raises:
        ValueError, RuntimeError: as ``choose``.
    """
    backend = choose(call)
    return backend.both_grads(call) if choose(other) is backend else None


def failed_launch(call: Call, error: Exception) -> str:
    """What to say of an exception that a kernel's compilation or launch raised; "" for others.

    Args:
        call: that raised it.
        error: of CUDA or Triton; too little memory, and what our own checks say, is nothing new.
    """
    ours = isinstance(error, ValueError | TypeError | torch.OutOfMemoryError)
    of_triton = type(error).__module__.partition(".")[0] == "triton"
    if ours or not (of_triton or (isinstance(error, RuntimeError) and "CUDA" in str(error))):
        return ""
    tensors = [f"{[*o.shape]} {o.dtype}" for o in call.operands if isinstance(o, Tensor)]
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return (
        f"{call.op} on {call.device}: the back end {choose(call).name} could not run it: "
        f"{type(error).__name__}: {first} (operands {', '.join(tensors)}; placement "
        f"{call.placement}). rpg.backend('reference') runs the same call without kernels of this "
        "package; where CUDA says that memory was accessed illegally, or that a launch failed, "
        "this process must be started again first. Please report it with what `rpg-kernels "
        "doctor` prints"
    )


def explain(call: Call) -> Explanation:
    """What would run a call, and why those that are asked before would not.

    Raises:
        ValueError, RuntimeError: as ``choose``, and what the operator would raise.
    """
    chosen = choose(call)
    said = [chosen.explain(call), _PROOF[proving.state(chosen, call)]]
    if not call.forced:
        for backend in registry.backends():
            if backend is chosen:
                break
            wrong = _left_aside(backend, call)
            said.append(
                f"{backend.name} failed its test: {wrong}" if wrong else backend.explain(call)
            )
    limit = settings.scratch_bytes(call.device.type)
    reason = "; ".join(filter(None, said))
    return Explanation(call.op, chosen.name, reason, str(call.device), str(call.dtype), limit)


def backend(name: str) -> settings.Restore:
    """Force one back end for every operator, or ``"auto"`` to choose for each call.

    A forced back end that cannot run raises. What a forward pass ran on is kept for its backward.
    ``RPG_KERNELS_BACKEND`` in the environment does the same for a whole process, and raises a
    ValueError at the first operator where it names none; a call of this function wins over it. The
    setting is process-wide.

    Args:
        name: ``"auto"``; ``"reference"``, plain PyTorch, which unpacks tile by tile within the
            scratch limit; ``"cpu"``, compiled kernels for CPU tensors; ``"triton"``, fused kernels
            only, so that no weight is ever in memory; ``"cuda"``, compiled kernels for linear
            layers and small batches on CUDA tensors; ``"simt"``, the sources of these on CPU
            tensors, a thread at a time, for tests and in development builds only.

    Returns:
        A context manager that restores the earlier setting; ignore it to keep the new one.

    Raises:
        ValueError: unknown name.

    Example:
        >>> with backend("reference"):
        ...     settings.forced_backend()
        'reference'
    """
    return settings.force_backend(_checks.choice("name", name, ("auto", *registry.names())))
