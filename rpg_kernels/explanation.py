"""What would run a layer, and why: the layer's own forward, up to the operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rpg_kernels import _checks
from rpg_kernels._wrappers import unwrap
from rpg_kernels.backends import dispatch
from rpg_kernels.backends.call import Call
from rpg_kernels.ops import _library as lib


def explain(module: nn.Module, x: Tensor) -> dispatch.Explanation:
    """What would run ``module(x)``: a record with ``.backend`` and ``.reason``.

    Nothing is computed, but a padding that is not the operator's. A forced back end is taken into
    account, and so is autocast.

    Args:
        module: an rpg layer (``rpg.nn.Linear``, ``Conv2d``, ``Embedding``, ...).
        x: an input of the layer; indices need not be in range.

    Raises:
        TypeError: module is not an rpg layer.
        TypeError, ValueError: what the layer says of x's type, shape, dtype or device.
        RuntimeError: the forced back end cannot run this call.

    Example:
        >>> import rpg_kernels as rpg
        >>> layer = rpg.nn.Linear(8, 8, bank=rpg.ParameterBank(dof=64))
        >>> rpg.explain(layer, torch.randn(2, 8)).backend
        'reference'
    """
    module = unwrap(module) if isinstance(module, nn.Module) else module
    if not isinstance(getattr(module, "rpg_operator", None), str):
        got = type(module).__name__
        raise TypeError(f"module: got {got}, wanted an rpg layer (rpg.nn.Linear, Conv2d, ...)")
    return dispatch.explain(reached(module, _checks.tensor("x", x)))


class _ReachedError(Exception):
    """An operator was called."""

    def __init__(self, op: str, arguments: Sequence[Any]) -> None:
        super().__init__(op)
        self.op, self.arguments = op, arguments


class _UpToOperator(TorchDispatchMode):
    """Raises in place of an operator of this package; by then autocast has cast its arguments."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == lib.NAMESPACE:
            raise _ReachedError(func.name().partition("::")[2], args)
        return func(*args, **(kwargs or {}))


def reached(module: nn.Module, x: Tensor) -> Call:
    """The operator call of ``module(x)``, checked."""
    try:
        with torch.no_grad(), _UpToOperator():  # type: ignore[no-untyped-call]
            module.forward(x)
    except _ReachedError as reached:
        op, (*operands, forced) = reached.op, reached.arguments
    else:
        raise TypeError(f"module: got a {type(module).__name__} that calls no rpg operator")
    lib.CHECKS[op](*operands)
    return lib.call(op, operands, forced)
