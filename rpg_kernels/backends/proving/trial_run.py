"""Running a trial: ``main`` is the process that trials are made in.

The bank holds multiples of 1/8, and x, dy, dense and bias multiples of 1/4, all up to 1; the scale
is a power of two. So products and sums are exact in fp32 in any order. What is left is the rounding
of the result to its dtype, and of partial results where a library sums in 16 bits: one wrong weight
among thousands shows in every dtype. In fp32 the first of x, dy and dense holds multiples of 1/2048
instead, so that a product in less than fp32 shows too, unless torch's switches allow it; sums are
then exact up to 1024 and more, which random ones hardly reach.

Everything is surrounded by NaN, and memory that results may be made in holds NaN before.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rpg_kernels import settings
from rpg_kernels._stored import ABSENT, PARTS, StoredValues
from rpg_kernels.backends import registry
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.proving.trial import ROLES, Trial, precision_switches
from rpg_kernels.law.placement import Placement, parse

IDLE = 60.0  # seconds without a trial after which the process ends
LONGEST = 300.0  # seconds of a trial; whoever asked for it waits less
SCRATCH = 1 << 28  # bytes for the reference in float64, whatever the calling process allows
_DATA = ("x", "image", "dense")
_AROUND = 64  # elements of NaN on either side


class NotPreparedError(RuntimeError):
    """A trial's operands or exact result could not be made."""


def run(trial: Trial) -> str:
    """What is wrong with the result of a trial's back end, or "".

    Raises:
        NotPreparedError: something else than the back end raised.
        Exception: whatever the back end raises.
    """
    device = torch.device(trial.device)
    with torch.no_grad():
        try:
            backend, operands, exact = _prepared(trial, device)
        except Exception as error:
            raise NotPreparedError from error
        with _conditions(trial, device), backend.rehearsing(*trial.parts):
            got = _made(backend, trial, operands)
        dtype = _result_dtype(operands)
        lent = trial.label != trial.backend
        return difference(got, exact, dtype, operands[0].dtype if lent else None)


def _prepared(trial: Trial, device: torch.device) -> tuple[registry.Backend, list[Any], Tensor]:
    """(the back end, operands, the exact result): nothing of it is the back end's doing."""
    importlib.import_module(trial.module)
    backend = registry.find(trial.backend)
    operands = _operands(trial, device)
    exact = _exact(trial, operands)
    _poison(exact)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what went wrong before is not blamed on the back end
    return backend, operands, exact


@contextlib.contextmanager
def _conditions(trial: Trial, device: torch.device) -> Iterator[None]:
    """The real call's settings. They are not the reference's, which needs more scratch in float64,
    and for deterministic products a variable that cuBLAS reads."""
    wanted, kind = trial.conditions, "cpu" if device.type == "cpu" else "cuda"
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    switches = [switch.fp32_precision for switch in precision_switches()]
    try:
        torch.use_deterministic_algorithms(wanted["deterministic"], warn_only=warn_only)
        _set_precision(wanted["precision"])
        with settings.scratch_limit(wanted["scratch"], kind):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        _set_precision(switches)


def _set_precision(values: list[str]) -> None:
    for switch, value in zip(precision_switches(), values, strict=False):
        if switch.fp32_precision != value:  # what is set no longer follows torch's other switches
            switch.fp32_precision = value


def _made(backend: registry.Backend, trial: Trial, operands: list[Any]) -> Tensor:
    """By the back end itself; or by the reference with the kernels that it is lent."""
    result: Tensor
    if trial.label == trial.backend:
        result = getattr(torch.ops.rpg_kernels, trial.op)(*operands, trial.backend)
        return result
    roles = ROLES[trial.op]
    bank = operands[roles.index("bank")] if "bank" in roles else None
    at = roles.index("placement")
    call = Call(trial.op, operands[0], operands[at], bank, operands[at + 1 :], "", operands)
    result = backend.untried(call)(*operands)
    return result


def _exact(trial: Trial, operands: list[Any]) -> Tensor:
    """The reference's result in float64, rounded nowhere, in scratch enough for that."""
    wide = [
        torch.float64
        if isinstance(o, torch.dtype)
        else o.double()
        if isinstance(o, Tensor) and o.is_floating_point()
        else o
        for o in operands
    ]
    kind = "cpu" if trial.device == "cpu" else "cuda"
    with settings.scratch_limit(max(SCRATCH, settings.scratch_bytes(kind)), kind):
        result: Tensor = getattr(torch.ops.rpg_kernels, trial.op)(*wide, "reference")
    return result


def difference(
    got: Tensor, exact: Tensor, dtype: torch.dtype, rounded: torch.dtype | None = None
) -> str:
    """What tells a result from the exact one beyond its rounding, or "".

    Args:
        got: of the back end.
        exact: float64.
        dtype: that the result has to have.
        rounded: that partial results were rounded to, which may nearly cancel: a library that
            multiplies tiles of lent kernels does so, other back ends sum in fp32.

    Example:
        >>> exact = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        >>> difference(exact.bfloat16(), exact, torch.bfloat16)
        ''
        >>> difference(exact.bfloat16() * -1, exact, torch.bfloat16)
        '3 of 3 results are wrong, by up to 6 where the largest is 3'
    """
    if got.shape != exact.shape or got.dtype != dtype:
        wanted = f"{dtype} {[*exact.shape]}"
        return f"the result is {got.dtype} {[*got.shape]}, wanted {wanted}"
    wide = got.double()
    lost = int((~wide.isfinite()).sum())
    if lost:
        return f"{lost} of {got.numel()} results are not finite"
    apart = (wide - exact).abs()
    size, eps = exact.square().mean().sqrt(), torch.finfo(dtype).eps
    if rounded is not None:
        size, eps = exact.abs().max(), max(eps, torch.finfo(rounded).eps)
    wrong = int((apart > eps * (2 * exact.abs() + size)).sum())
    if not wrong:
        return ""
    return (
        f"{wrong} of {got.numel()} results are wrong, by up to {float(apart.max()):.3g} where the "
        f"largest is {float(exact.abs().max()):.3g}"
    )


def _result_dtype(operands: list[Any]) -> torch.dtype:
    """That which the operator was asked for, else the first tensor's."""
    asked = [o for o in operands if isinstance(o, torch.dtype)]
    dtype: torch.dtype = asked[0] if asked else operands[0].dtype
    return dtype


def _operands(trial: Trial, device: torch.device) -> list[Any]:
    p = parse(trial.operands[ROLES[trial.op].index("placement")])
    draw = torch.Generator().manual_seed(0)
    made: list[Any] = []
    # Of products of matrices the first switch decides, of convolutions both: torch allows TF32 in
    # convolutions by default, and only there.
    switches = trial.conditions["precision"][: 2 if trial.op.startswith("conv2d") else 1]
    fine = set(switches) <= {"ieee", "none"}
    for role, operand in zip(ROLES[trial.op], trial.operands, strict=True):
        if isinstance(operand, dict) and "parts" in operand:
            made.append(_stored(operand, draw, device))
        elif isinstance(operand, dict):
            steps = 8 if role == "bank" else 2048 if fine and operand["dtype"] == "float32" else 4
            fine = fine and role not in _DATA
            values = _values(role, operand, p, draw, steps)
            made.append(_surrounded(values, operand, device))
        else:
            made.append(getattr(torch, operand) if role == "dtype" else operand)
    return made


def _stored(operand: dict[str, Any], draw: torch.Generator, device: torch.device) -> StoredValues:
    """A bank in fewer bytes, whose values are multiples of 1/8 too, up to 1: codes of up to 4
    times a scale of 1/8 or of 1/4. Its rows have any order, and as many slots are left out."""
    described: dict[str, Any] = operand["parts"]
    slots, (rows, _) = operand["shape"][0], described["codes"]["shape"]
    codes = _whole(-4, 5, described["codes"]["shape"], draw).float()
    made = {"codes": codes if "scales" in described else codes / 8}
    if "scales" in described:
        made["scales"] = _whole(1, 3, [rows], draw).float() / 8
    if "places" in described:
        places = torch.full((slots,), ABSENT, device="cpu")
        here, order = (torch.randperm(n, generator=draw, device="cpu") for n in (slots, rows))
        places[here[:rows]] = order
        made["places"] = places
    lying = {name: _surrounded(part, described[name], device) for name, part in made.items()}
    dtype = getattr(torch, operand["dtype"])
    named = {name: lying.get(name) for name in PARTS}
    return StoredValues(**named, dtype=dtype, activations=operand["activations"])


def _values(
    role: str, operand: dict[str, Any], p: Placement, draw: torch.Generator, steps: int
) -> Tensor:
    shape = operand["shape"]
    if role == "indices":
        return _whole(0, p.selected_shape[0], shape, draw)
    if role == "table":  # a slot in the low bits, a sign in the highest
        slots = _whole(0, p.generator.slots, shape, draw)
        return slots - (_whole(0, 2, shape, draw) << 31)
    return _whole(-steps, steps + 1, shape, draw).float() / steps


def _whole(low: int, high: int, shape: list[int], draw: torch.Generator) -> Tensor:
    """Integers; on the CPU, whatever torch's default device is in the calling process."""
    return torch.randint(low, high, shape, generator=draw, device="cpu")


def _surrounded(values: Tensor, operand: dict[str, Any], device: torch.device) -> Tensor:
    """The values as the operand lies in memory, between NaN; integers between zeros, and those that
    are codes of a bank between the largest."""
    dtype: torch.dtype = getattr(torch, operand["dtype"])
    shape, stride = operand["shape"], operand["stride"]
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    begin = _AROUND + operand["misses"] // dtype.itemsize
    around = float("nan") if dtype.is_floating_point else 127 if dtype == torch.int8 else 0
    memory = torch.full((begin + extent + _AROUND,), around, dtype=dtype, device=device)
    inside = memory.as_strided(shape, stride, begin)
    if any(step == 0 and size > 1 for size, step in zip(shape, stride, strict=True)):
        # There may be more memory between the first and the last of them than there are values.
        some = values.flatten().repeat(-(-extent // values.numel()))[:extent]
        memory[begin : begin + extent] = some.to(device, dtype)
    else:
        inside.copy_(values)
    return inside


def _poison(exact: Tensor) -> None:
    """Leave NaN in memory that the allocator is likely to give to the results, and to scratch."""
    if exact.device.type == "cuda":
        for size in (exact.numel(), 1 << 20):
            for dtype in (torch.float32, torch.bfloat16):
                torch.full((size,), float("nan"), dtype=dtype, device=exact.device)


class _Watch:
    """Ends the process when nothing was asked for some time, and in a trial that takes too long,
    which nobody else does once the process that asked is gone."""

    def __init__(self) -> None:
        self._timer = threading.Timer(0, lambda: None)
        self._lock = threading.Lock()
        self._idle = False

    def start(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._idle = True
        self._timer = threading.Timer(IDLE, self._end)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        with self._lock:  # from here on it is too late for the timer
            self._idle = False
        self._timer.cancel()
        faulthandler.dump_traceback_later(LONGEST, exit=True)  # even where Python does not run

    def _end(self) -> None:
        with self._lock:
            if self._idle:
                os._exit(0)


def main(device: str) -> None:
    """Run the trials that standard input holds, a line each; of a list of them compile what
    they launch. Say on the real standard output what becomes of them. Ends after one that raised,
    since its CUDA context may be lost."""
    say = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def tell(**values: Any) -> None:
        say.write(json.dumps(values) + "\n")
        say.flush()

    torch.ones(1, device=device).sum().item()
    tell(state="ready")
    watch = _Watch()
    watch.start()
    for line in sys.stdin:
        watch.stop()
        tell(state="begun")
        asked = json.loads(line)
        if isinstance(asked, list):
            compile_ahead([Trial.from_json(text) for text in asked])
            tell(state="done")
            watch.start()
            continue
        answer, ended = attempt(Trial.from_json(line))
        tell(state="done", **answer)
        if ended:
            return
        watch.start()


def compile_ahead(trials: Sequence[Trial]) -> None:
    """Compile what trials of one back end will run, without running it."""
    importlib.import_module(trials[0].module)
    backend = registry.find(trials[0].backend)

    def made(trial: Trial) -> None:
        device = torch.device(trial.device)
        operands = _operands(trial, device)
        with torch.no_grad(), _conditions(trial, device), backend.rehearsing(*trial.parts):
            _made(backend, trial, operands)

    backend.compile_ahead([partial(made, trial) for trial in trials])


def attempt(trial: Trial) -> tuple[dict[str, Any], bool]:
    """(what is wrong and whether that is lasting, whether anything raised)."""
    try:
        return {"wrong": run(trial), "lasting": True}, False
    except Exception as error:
        wrong, lasting = _raised(error)
        return {"wrong": wrong, "lasting": lasting}, True


def _raised(error: BaseException) -> tuple[str, bool]:
    """(what is said of an exception, whether it would be raised again in another process)."""
    prepared = not isinstance(error, NotPreparedError)
    cause = error if prepared else error.__cause__ or error
    cause = cause.__cause__ or cause  # of an operator that named the call
    named = f"{type(cause).__name__}: {_first(cause)}"
    out = ("out of memory", "ALLOC_FAILED")  # of CUDA and of its libraries
    if isinstance(cause, MemoryError) or any(words in str(cause) for words in out):
        return f"there was no memory for the test: {_first(cause)}", False
    if not prepared:
        return f"the test could not be prepared: {named}", False
    return f"it raised {named}", not isinstance(cause, OSError)  # such as a disk that is full


def _first(error: BaseException) -> str:
    """The first line of a message that has some; CUDA's messages have many."""
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


if __name__ == "__main__":
    main(sys.argv[1])
