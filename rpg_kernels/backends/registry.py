"""Back ends and their order: the one protocol that dispatch, explain and the doctor know.

A back end is an object of a class below ``Backend``. It is registered once, see
``rpg_kernels/backends/__init__.py``; nothing else names it.
"""

from __future__ import annotations

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from rpg_kernels import settings
from rpg_kernels.backends.call import OPERATORS, Call
from rpg_kernels.law.placement import Placement


class TileKernels(Protocol):
    """Kernels for a tile of a weight, which a back end lends to the reference."""

    def unpack_tile(
        self,
        bank: Tensor,
        table: Tensor | None,
        p: Placement,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> Tensor:
        """scale · G · w of the tile p: ``[rows, columns, *kernel]`` of ``dtype``."""

    def pack_tile(self, grad: Tensor, dense: Tensor, table: Tensor | None, p: Placement) -> None:
        """grad ``[slots, granularity]`` += scale · Gᵀ · dense, for the tile p."""


class Backend(ABC):
    """What runs operator calls.

    Attributes:
        name: what users force it by.
        summary: what it is, for people.
        device_types: where it may be taken without being forced; None is everywhere. Others are
            passed over before anything else is asked, since every call of an operator asks.
        must_prove: it is tried before a call that nobody forced is given to it, and passed over
            where it failed. See ``rpg_kernels.backends.proving``. Another process tries it, which
            imports the module of the class: that has to register it.
    """

    name: str
    summary: str
    device_types: tuple[str, ...] | None = None
    must_prove: bool = False

    @abstractmethod
    def unsupported(self, call: Call) -> str:
        """Why the call cannot run here, or "". Of a call without a placement, why no call of its
        kind can. Scratch is no reason: operators say what they lack."""

    @abstractmethod
    def preferred(self, call: Call) -> bool:
        """Whether a supported call is taken here, when nobody forced a back end, before those that
        are registered later. Of a call without a placement, whether all of its kind are."""

    @abstractmethod
    def explain(self, call: Call) -> str:
        """How the call runs where this back end is forced or prefers it; otherwise why it is left
        to others, or "" where there is nothing to say.

        Raises:
            RuntimeError: what the operator would, such as too little scratch.
        """

    def operator(self, call: Call) -> Callable[..., Tensor]:
        """What runs the call; its arguments are the operator's, less the back end. By default the
        function of that name in the operator's file beside the module that defines this class."""
        function: Callable[..., Tensor] = getattr(_beside(type(self).__module__, call.op), call.op)
        return function

    def adds(self, call: Call) -> bool:
        """Whether what runs a bank gradient takes an argument ``total``, ``[slots, granularity]``
        in float32, adds to it and makes no tensor of that size."""
        return False

    def both_grads(self, call: Call) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """What makes dx and dw of a layer at once, for less than two operators: a function of (dy,
        bank, table, x, placement, dtype, total=None), before whose ``dtype`` a convolution has
        stride, padding, dilation and groups. It adds to a ``total`` instead of making dw, as in
        ``adds``. ``call`` is the input gradient's. None: there is none."""
        return None

    def multiplications(self, call: Call) -> int | None:
        """Multiplications of a weight with an activation in a call that runs here; None where they
        are those of the dense product. Padding is not counted. See ``rpg_kernels.flops``."""
        return None

    def tile_kernels(self, call: Call) -> TileKernels | None:
        """Kernels that the reference may unpack and pack this call's tiles with."""
        return None

    def on_trial(self, call: Call) -> str:
        """What of this back end has to prove itself before a call runs on it: its name, or ""."""
        return self.name if self.must_prove else ""

    def configuration(self, call: Call) -> str:
        """What decides how a call runs besides its operands' shapes, dtypes and layouts, such as
        tile sizes chosen for its batch: calls with one configuration are proved together."""
        return str(call.rows)

    def rehearsing(
        self, times: Fraction, rows: Fraction
    ) -> contextlib.AbstractContextManager[object]:
        """While a call has a small part of a batch ``times`` as large, and of a weight with
        ``rows`` times as many rows, and must be configured as if it had all of both."""
        return contextlib.nullcontext()

    def compile_ahead(self, calls: Sequence[Callable[[], object]]) -> None:  # noqa: B027  a hook
        """Compile what these calls of this back end will launch, many kernels at once, and launch
        nothing. By default nothing is made: for kernels that are compiled at their first call."""

    def untried(self, call: Call) -> Callable[..., Tensor]:
        """As ``operator``, but as if all kernels that are lent were proved: a trial runs it."""
        return self.operator(call)

    def takes(self, call: Call) -> bool:
        """Whether the call is run here: forced, or supported and preferred."""
        if call.forced:
            return call.forced == self.name
        if self.device_types is not None and call.device.type not in self.device_types:
            return False
        return not self.unsupported(call) and self.preferred(call)


@cache
def _beside(module: str, op: str) -> ModuleType:
    """The operator's file beside a module, imported when it is first needed."""
    return importlib.import_module(f"{module.rpartition('.')[0]}.{OPERATORS[op]}")


# In the order in which they are asked. Replaced and never changed, since calls on other threads may
# be going through it.
_backends: dict[str, Backend] = {}


def register(backend: Backend, before: str = "") -> None:
    """Add a back end.

    Args:
        backend: its name must be new, and no word that forces none.
        before: the back end that it is asked before; "" asks it last.

    Raises:
        ValueError: the name is taken, or ``before`` is not registered.
    """
    global _backends
    if backend.name in (*_backends, "auto", ""):
        raise ValueError(f"backend.name: got {backend.name!r}, wanted a name that is not taken")
    names = list(_backends)
    at = names.index(_known("before", before)) if before else len(names)
    ordered = [*_backends.values()]
    ordered.insert(at, backend)
    _backends = {each.name: each for each in ordered}


def unregister(name: str) -> None:
    """Take a back end out again.

    Raises:
        ValueError: it is not registered.
    """
    global _backends
    gone = _known("name", name)
    _backends = {key: backend for key, backend in _backends.items() if key != gone}


def names() -> tuple[str, ...]:
    """All registered names, in the order in which the back ends are asked."""
    return tuple(_backends)


def backends() -> Iterator[Backend]:
    """All registered back ends, in the order in which they are asked."""
    yield from _backends.values()


def find(name: str) -> Backend:
    """The back end of a name that was forced.

    Raises:
        ValueError: there is none. What is wrong in the environment is said here, at the first
            operator, and not by the import of the package.
    """
    argument = settings.ENVIRONMENT_BACKEND if settings.from_environment(name) else "backend"
    return _backends[_known(argument, name, "auto")]


def _known(argument: str, name: str, *others: str) -> str:
    if name not in _backends:
        wanted = ", ".join((*others, *_backends))
        raise ValueError(f"{argument}: got {name!r}, wanted one of {wanted}")
    return name
