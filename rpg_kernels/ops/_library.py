"""What all operators share: the library, argument checks, run-time dispatch, autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from rpg_kernels import _checks
from rpg_kernels._tensors import DTYPES, LOW_PRECISION, refuse_forward_mode
from rpg_kernels.backends import dispatch
from rpg_kernels.backends.call import Call
from rpg_kernels.law.generator import TableGenerator
from rpg_kernels.law.placement import Placement

NAMESPACE = "rpg_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
AUTOCAST = ("cpu", "cuda")  # devices
CHECKS: dict[str, Callable[..., Any]] = {}  # of an operator's arguments, less the back end
RUNS: dict[str, Callable[..., Any]] = {}  # what an operator does below autograd and all modes
TRACES: dict[str, Callable[..., Any]] = {}  # what it does with fake tensors
_DEVICES = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def define(
    schema: str,
    check: Callable[..., Any],
    fake: Callable[..., Any],
    values: Callable[..., None] | None = None,
    run: Callable[..., Any] | None = None,
) -> None:
    """Define one operator: checked, then sent to the implementation that dispatch chooses.

    Args:
        schema: without namespace; its last argument is ``str backend``.
        check: called with all arguments but the back end, in tracing and before every launch.
        fake: called with the same arguments after the check; an empty result of the right
            shape, dtype and strides.
        values: a second check, of what tensors hold, made before launches only.
        run: what computes it, with all arguments, where that is made of other operators.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema[: schema.index("(")]
    CHECKS[name] = check

    def checked(*args: Any) -> Any:
        *operands, backend = args
        refuse_forward_mode()  # also in a backward pass, whose tangents would be dropped
        check(*operands)
        if values is not None:
            values(*operands)
        if run is not None:
            return run(*args)
        made = call(name, operands, backend)
        function = dispatch.implementation(made)
        try:
            return function(*operands)
        except Exception as error:
            said = dispatch.failed_launch(made, error)
            if said:
                raise RuntimeError(said) from error
            raise

    def trace(*args: Any) -> Any:
        check(*args[:-1])
        return fake(*args[:-1])

    RUNS[name], TRACES[name] = checked, trace
    LIBRARY.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", trace, lib=LIBRARY)


def call(name: str, operands: Sequence[Any], forced: str) -> Call:
    """The call of an operator with these arguments, less the back end, which may be forced."""
    at = next(i for i, argument in enumerate(operands) if isinstance(argument, str))
    reads = name.startswith(("linear", "conv2d")) and not name.endswith("bank_grad")
    bank = operands[1] if reads else None
    return Call(name, operands[0], operands[at], bank, operands[at + 1 :], forced, operands)


def differentiate(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Register an operator's derivative, itself made of operators.

    ``torch.library.register_autograd`` does the same, but refuses ``torch.func.grad`` and what is
    made of it. Its arguments are those of these two functions.
    """

    class Derivative(torch.autograd.Function):
        """The operator, with the keys that it was called with as a last argument."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            result = _below_autograd(name, args[-1], args[:-1])
            setup_context(ctx, args[:-1], result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (*backward(ctx, *grads), None)

    class Innermost(_SingleLevelFunction):
        """The same for torch.func, made as torch makes those of its own transforms."""

        @staticmethod
        def forward(*args: Any) -> Any:
            # Transforms further out are differentiated too, which the mode of `forward` forbids.
            with torch.enable_grad():
                return _below_autograd(name, args[-1], args[:-1])

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, inputs[:-1], output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return Derivative.backward(ctx, *grads)

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return _below_autograd(name, keyset, args)
        if not torch._C._are_functorch_transforms_active():
            return Derivative.apply(*args, keyset)  # type: ignore[no-untyped-call]
        # The dispatcher goes from one transform to the next by itself, as for torch's own
        # operators: here only the innermost one's tensors are differentiated.
        allowed = torch._C._functorch.get_single_level_autograd_function_allowed()
        torch._C._functorch.set_single_level_autograd_function_allowed(True)
        try:
            return Innermost.apply(*args, keyset)  # type: ignore[attr-defined]
        finally:
            torch._C._functorch.set_single_level_autograd_function_allowed(allowed)

    LIBRARY.impl(name, run, "Autograd", with_keyset=True)


def _below_autograd(name: str, keyset: torch._C.DispatchKeySet, args: Sequence[Any]) -> Any:
    keys = keyset & torch._C._after_autograd_keyset
    with torch._C._AutoDispatchBelowAutograd():
        # Where nothing looks on, the way through the dispatcher would only take time: of a small
        # product as much as the kernel.
        if keys.highestPriorityTypeId() in _DEVICES:
            return RUNS[name](*args)
        return getattr(torch.ops.rpg_kernels, name).default.redispatch(keys, *args)


def adding(
    name: str, function: Callable[..., Any], operands: Sequence[Any], *how: Any, **more: Any
) -> Any:
    """What an operator does, by a function that also adds to a sum: checked, and seen by profilers.

    Args:
        name: of the operator.
        function: called with the operands and what else there is.
        operands: of the operator, less the back end.
        how, more: what else the function takes.
    """
    refuse_forward_mode()
    CHECKS[name](*operands)
    watched = torch._C._autograd._profiler_enabled()
    shown = torch.profiler.record_function(f"{NAMESPACE}::{name}") if watched else nullcontext()
    with shown:
        return function(*operands, *how, **more)


def bank_grad(
    name: str, operands: Sequence[Any], backend: str, total: Tensor | None
) -> Tensor | None:
    """A bank gradient by its operator; None where it was added to what all layers add to.

    Args:
        name: of the operator.
        operands: its arguments, less the back end.
        backend: that is forced, or "".
        total: what is added to, see ``_bank_sums``; None: there is none.
    """
    if total is not None:
        made = call(name, operands, backend)
        chosen = dispatch.choose(made)
        if chosen.adds(made):
            adding(name, chosen.operator(made), operands, total=total)
            return None
    grad: Tensor = getattr(torch.ops.rpg_kernels, name)(*operands, backend)
    if total is None:
        return grad
    total.add_(grad)
    return None


def autocast(name: str) -> None:
    """Under autocast run in its dtype: x (argument 0) and bias are cast, the bank is not.

    Kernels read an fp32 bank in low precision themselves, so its gradient stays fp32 and no
    second bank is made.
    """
    for kind in AUTOCAST:
        key = f"Autocast{kind.upper()}"
        keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def run(
            x: Tensor,
            bank: Tensor,
            table: Tensor | None,
            bias: Tensor | None,
            *rest: Any,
            device: str = kind,
            keyset: torch._C.DispatchKeySet = keyset,
        ) -> Tensor:
            with torch._C._ExcludeDispatchKeyGuard(keyset):
                operator = getattr(torch.ops.rpg_kernels, name)
                dtype = autocast_dtype(bank, device)
                result: Tensor = operator(cast(x, dtype), bank, table, cast(bias, dtype), *rest)
                return result

        LIBRARY.impl(name, run, key)


def autocast_dtype(bank: Tensor, device: str) -> torch.dtype:
    """What a product is computed in under autocast: the bank's dtype where that is low."""
    return bank.dtype if bank.dtype in LOW_PRECISION else torch.get_autocast_dtype(device)


@overload
def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As autocast does: float64 stays."""
    if tensor is None or tensor.dtype not in (torch.float32, *LOW_PRECISION):
        return tensor
    return tensor.to(dtype)


def check_bank(argument: str, bank: Tensor, p: Placement) -> None:
    """The bank, or a tensor that stands for it: ``[slots, granularity]``, floating point."""
    g = p.generator
    wanted = (g.slots, g.granularity)
    if bank.dim() != 2 or tuple(bank.shape) != wanted:
        raise _checks.fail(argument, f"shape {list(bank.shape)}", f"shape {list(wanted)}")
    check_dtype(argument, bank.dtype)


def check_table(table: Tensor | None, p: Placement, device: torch.device) -> None:
    """The table: int32 ``[entries]`` for a TableGenerator, None for a law."""
    if not isinstance(p.generator, TableGenerator):
        if table is not None:
            raise _checks.fail("table", "a tensor", "None, since a law computes the map")
        return
    if table is None:
        raise _checks.fail("table", None, f"torch.int32 [{p.generator.entries}]")
    if table.dtype != torch.int32 or tuple(table.shape) != (p.generator.entries,):
        got = f"{table.dtype} {list(table.shape)}"
        raise _checks.fail("table", got, f"torch.int32 [{p.generator.entries}]")
    if not table.is_contiguous():
        raise _checks.fail("table", f"strides {table.stride()}", "a contiguous table")
    check_device("table", table, device)


def check_dtype(argument: str, dtype: torch.dtype) -> None:
    """One of the four floating-point dtypes that the package computes in."""
    if dtype not in DTYPES:
        raise TypeError(f"{argument}: got {dtype}, wanted float64, float32, bfloat16 or float16")


def check_operand(argument: str, tensor: Tensor, bank: Tensor) -> None:
    """x or dy: on the bank's device, in its dtype, or in low precision beside an fp32 bank."""
    if tensor.device != bank.device:
        wanted = (
            f"device {bank.device}, where the bank is (which serves the whole model; move that)"
        )
        raise _checks.fail(argument, f"device {tensor.device}", wanted)
    mixed = bank.dtype == torch.float32 and tensor.dtype in LOW_PRECISION
    if tensor.dtype != bank.dtype and not mixed:
        wanted = f"{bank.dtype}, as the bank (which serves the whole model; cast that)"
        if bank.dtype == torch.float32:
            wanted += ", or bfloat16 or float16"
        raise TypeError(f"{argument}: got {tensor.dtype}, wanted {wanted}")


def check_bias(bias: Tensor | None, x: Tensor, bank: Tensor, size: int) -> None:
    """``[N]``, on x's device, in x's or the bank's dtype."""
    if bias is None:
        return
    if tuple(bias.shape) != (size,):
        raise _checks.fail("bias", f"shape {list(bias.shape)}", f"shape [{size}]")
    check_device("bias", bias, x.device)
    if bias.dtype not in (x.dtype, bank.dtype):
        raise TypeError(f"bias: got {bias.dtype}, wanted {x.dtype} (x) or {bank.dtype} (the bank)")


def check_device(argument: str, tensor: Tensor, device: torch.device) -> None:
    """All operands of a call lie on one device."""
    if tensor.device != device:
        raise _checks.fail(argument, f"device {tensor.device}", f"device {device}")


def check_bank_grad_dtype(argument: str, dtype: torch.dtype, dy: Tensor) -> None:
    """A bank gradient is asked for in the bank's dtype, which allows that of dy."""
    check_dtype("dtype", dtype)
    if dtype != dy.dtype and not (dtype == torch.float32 and dy.dtype in LOW_PRECISION):
        raise TypeError(f"{argument}: got {dy.dtype}, wanted {dtype}, the bank's dtype")
