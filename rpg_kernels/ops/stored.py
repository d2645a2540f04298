"""Twins of the operators that read a bank, for banks whose values are kept in fewer bytes.

``linear_stored`` and so on take, in place of the bank and of its table, the parts of
``StoredValues``: codes int8 or float8_e4m3fn ``[rows, granularity]`` (or the values themselves),
scales float32 ``[rows]`` or None, places int32 ``[slots]`` or None, the dtype that they stand for,
and what products do with activations. Nobody calls them by name: an operator that is given stored
values becomes its twin below autograd, so that graphs hold plain tensors. They have no derivatives:
stored values are never trained, and the gradient of x is an operator of its own, which has a twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rpg_kernels import _checks
from rpg_kernels._stored import TWIN, StoredValues, check_activations
from rpg_kernels.ops import _library as lib

READERS = ("linear", "linear_input_grad", "conv2d", "conv2d_input_grad", "embedding", "unpack")
CODES = (torch.int8, torch.float8_e4m3fn)
_BANK = "Tensor bank, Tensor? table"
_PARTS = "Tensor codes, Tensor? scales, Tensor? places, ScalarType dtype, str activations"


def _values(
    codes: Tensor,
    scales: Tensor | None,
    places: Tensor | None,
    dtype: torch.dtype,
    activations: str,
) -> StoredValues:
    """The parts as one tensor, after their kinds and lengths were checked.

    What places hold is not looked at, which would cost a pass over all slots in every call; it is
    checked where it comes from files and state dicts (``check_parts``). The compiled CPU kernels
    take a place that is no row as a slot of zeros.

    Raises:
        TypeError, ValueError: parts that do not belong together.
    """
    check_activations(activations)
    if codes.dim() != 2 or not codes.is_contiguous():
        got = f"shape {list(codes.shape)}, strides {codes.stride()}"
        raise _checks.fail("codes", got, "a contiguous tensor [rows, granularity]")
    quantised = scales is not None
    if codes.dtype not in (CODES if quantised else (dtype,)):
        wanted = "int8 or float8_e4m3fn" if quantised else f"{dtype}, as there are no scales"
        raise TypeError(f"codes: got {codes.dtype}, wanted {wanted}")
    for name, part, kind in (("scales", scales, torch.float32), ("places", places, torch.int32)):
        if part is None:
            continue
        if part.dtype != kind or part.dim() != 1 or not part.is_contiguous():
            got = f"{part.dtype} {list(part.shape)}"
            raise _checks.fail(name, got, f"a contiguous {kind} tensor of one dimension")
        lib.check_device(name, part, codes.device)
    if scales is not None and len(scales) != len(codes):
        raise _checks.fail("scales", f"{len(scales)} of them", f"{len(codes)}, as codes has rows")
    return StoredValues(codes, scales, places, dtype, activations)


def _define(name: str) -> None:
    schema = str(getattr(torch.ops.rpg_kernels, name).default._schema).partition("::")[2]
    at = schema[: schema.index(_BANK)].count(",")

    def of_bank(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            values = _values(*args[at : at + 5])
            return function(*args[:at], values, None, *args[at + 5 :])

        return run

    twin = name + TWIN
    lib.LIBRARY.define(
        schema.replace(name, twin, 1).replace(_BANK, _PARTS), tags=(torch.Tag.pt2_compliant_tag,)
    )
    lib.LIBRARY.impl(twin, of_bank(lib.RUNS[name]), "CompositeExplicitAutograd")
    trace = of_bank(lib.TRACES[name])
    torch.library.register_fake(f"{lib.NAMESPACE}::{twin}", trace, lib=lib.LIBRARY)


def register() -> None:
    """Define the twins, once the operators are there."""
    for name in READERS:
        _define(name)
