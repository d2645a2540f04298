"""Process-wide settings: the scratch limit, the forced back end, and where back ends are tried.

They are plain module state on purpose: torch.compile guards on it, and the threads that run
backward passes see it. A context variable does neither.
"""

from __future__ import annotations

import os
from types import TracebackType

from rpg_kernels import _checks

ENVIRONMENT_BACKEND = "RPG_KERNELS_BACKEND"
ENVIRONMENT_PROVE = "RPG_KERNELS_PROVE"

_MIB = 1 << 20
_scratch_bytes = {"cpu": 4 * _MIB, "cuda": 16 * _MIB}
_forced = ""
_ENVIRONMENT = os.environ.get(ENVIRONMENT_BACKEND, "")
_PROVE = os.environ.get(ENVIRONMENT_PROVE) or "1"


class Restore:
    """What a setter returns. Ignore it and the setting stays; at the end of a ``with`` block the
    earlier setting returns."""

    def __init__(self, undo: dict[str, int] | str) -> None:
        self._undo = undo

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _forced
        if isinstance(self._undo, str):
            _forced = self._undo
        else:
            _scratch_bytes.update(self._undo)


def scratch_limit(limit: int, device_type: str | None = None) -> Restore:
    """Set how many bytes one operator call may use and free again before it returns.

    The default is 4 MiB on CPU and 16 MiB on CUDA. 0 forbids scratch; an operator that cannot
    run within the limit raises and says how much it needs. Not scratch are inputs and results, the
    fp32 accumulator of a bank gradient, a copy of the bank in the dtype of a product (at most 4
    bytes per degree of freedom in 16 bits; none when scratch is forbidden), copies of activations
    (in another dtype or memory format, or in pieces), and what the library packs for itself. The
    back end ``cuda`` counts its copy of the bank. The setting is process-wide.

    Args:
        limit: bytes, at least 0.
        device_type: ``"cpu"`` or ``"cuda"``; None sets both.

    Returns:
        A context manager that restores the earlier setting; ignore it to keep the new one.

    Raises:
        TypeError, ValueError: the limit is not an int of at least 0, or an unknown device type.

    Example:
        >>> with scratch_limit(1 << 20):
        ...     scratch_bytes("cpu")
        1048576
        >>> scratch_bytes("cpu")
        4194304
    """
    _checks.integer("limit", limit, 0, 2**62, " bytes")
    if device_type is not None:
        _checks.choice("device_type", device_type, tuple(_scratch_bytes))
    kinds = tuple(_scratch_bytes) if device_type is None else (device_type,)
    undo = {kind: _scratch_bytes[kind] for kind in kinds}
    _scratch_bytes.update(dict.fromkeys(kinds, limit))
    return Restore(undo)


def scratch_bytes(device_type: str) -> int:
    """The scratch limit in force for a device type; other accelerators use the CUDA limit."""
    return _scratch_bytes["cpu" if device_type == "cpu" else "cuda"]


def force_backend(name: str) -> Restore:
    """What ``rpg.backend`` does with a name that it has checked."""
    global _forced
    undo = _forced
    _forced = name
    return Restore(undo)


def forced_backend() -> str:
    """The name of the back end in force, or "" when each call chooses.

    A name from the environment may be unknown: the first operator says so.
    """
    name = _forced or _ENVIRONMENT
    return "" if name == "auto" else name


def from_environment(name: str) -> bool:
    """Whether a forced back end's name is what RPG_KERNELS_BACKEND holds."""
    return not _forced and name == _ENVIRONMENT


def proving() -> str:
    """Whether back ends must prove themselves: "1", in a process of its own; "here", in this one;
    "0", they need not. RPG_KERNELS_PROVE holds it, 1 by default.

    Raises:
        ValueError: the variable holds something else; said at the first call that asks.
    """
    if _PROVE not in ("0", "1", "here"):
        raise _checks.fail(ENVIRONMENT_PROVE, repr(_PROVE), "0, 1 or here")
    return _PROVE
