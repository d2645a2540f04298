"""Bad arguments of the functions, operators and settings: what is refused, and in what words.

Generators, banks and virtual weights refuse theirs in tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brute_force as brute
import pytest
import torch
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels import functional, settings
from rpg_kernels.bank.scales import layer_std

op = torch.ops.rpg_kernels
F32, F64 = torch.float32, torch.float64
NAMED = r": got .*, wanted "
TYPE = (TypeError, ValueError)  # a wrong type in a place that takes several forms


def matrix(dtype: torch.dtype = F32) -> rpg.VirtualWeight:
    return brute.bank_of(640, dtype, granularity=16).place((9, 20))


def kernel() -> rpg.VirtualWeight:
    return brute.bank_of(640, F32, granularity=16).place((4, 3, 3, 3))


def meta() -> rpg.VirtualWeight:
    return brute.bank_of(640, F32, granularity=16, device="meta").place((9, 20))


def refused(call: Callable[[], object], argument: str, error: Any) -> None:
    """The error names the argument, what was got and what was wanted."""
    with pytest.raises(error, match=rf"^{argument}: got .*wanted |for argument '{argument}'"):
        call()


X, IMAGE = torch.randn(2, 20), torch.randn(2, 3, 6, 7)
LINEAR: dict[str, tuple[str, Any, Callable[[], object]]] = {
    "x of rank 0": ("x", ValueError, lambda: functional.linear(torch.tensor(1.0), matrix())),
    "x too wide": ("x", ValueError, lambda: functional.linear(torch.randn(2, 21), matrix())),
    "x transposed": ("x", ValueError, lambda: functional.linear(X.t(), matrix())),
    "x in float64": ("x", TypeError, lambda: functional.linear(X.double(), matrix())),
    "x of ints": ("x", TypeError, lambda: functional.linear(X.long(), matrix())),
    "x in float16 on a float64 bank": (
        "x",
        TypeError,
        lambda: functional.linear(X.half(), matrix(F64)),
    ),
    "x in float16 on a bfloat16 bank": (
        "x",
        TypeError,
        lambda: functional.linear(X.half(), matrix(torch.bfloat16)),
    ),
    "x elsewhere": ("x", ValueError, lambda: functional.linear(X.to("meta"), matrix())),
    "bank elsewhere": ("x", ValueError, lambda: functional.linear(X, meta())),
    "x a list": ("x", Exception, lambda: functional.linear([1.0], matrix())),  # type: ignore[arg-type]
    "bias too long": ("bias", ValueError, lambda: functional.linear(X, matrix(), torch.ones(10))),
    "bias of rank 2": (
        "bias",
        ValueError,
        lambda: functional.linear(X, matrix(), torch.ones(1, 9)),
    ),
    "bias in float64": (
        "bias",
        TypeError,
        lambda: functional.linear(X, matrix(), torch.ones(9, dtype=F64)),
    ),
    "bias elsewhere": (
        "bias",
        ValueError,
        lambda: functional.linear(X, matrix(), torch.ones(9, device="meta")),
    ),
    "weight a tensor": ("weight", TypeError, lambda: functional.linear(X, torch.ones(9, 20))),  # type: ignore[arg-type]
    "weight None": ("weight", TypeError, lambda: functional.linear(X, None)),  # type: ignore[arg-type]
    "weight a bank": ("weight", TypeError, lambda: functional.linear(X, matrix().bank)),  # type: ignore[arg-type]
    "weight of rank 4": ("weight", ValueError, lambda: functional.linear(X, kernel())),
}


def conv(**how: Any) -> Callable[[], object]:
    x, bias = how.pop("x", IMAGE), how.pop("bias", None)
    return lambda: functional.conv2d(x, how.pop("weight", None) or kernel(), bias, **how)


CONV2D: dict[str, tuple[str, Any, Callable[[], object]]] = {
    "x of rank 2": ("x", ValueError, conv(x=torch.randn(3, 6))),
    "x of rank 5": ("x", ValueError, conv(x=torch.randn(1, 2, 3, 6, 7))),
    "x of too many channels": ("x", ValueError, conv(x=torch.randn(2, 4, 6, 7))),
    "x too small": ("x", ValueError, conv(x=torch.randn(2, 3, 2, 7))),
    "x too small for a dilated kernel": ("x", ValueError, conv(dilation=(1, 4))),
    "x in float64": ("x", TypeError, conv(x=IMAGE.double())),
    "x elsewhere": ("x", ValueError, conv(x=IMAGE.to("meta"))),
    "x a list": ("x", TypeError, conv(x=[1.0])),
    "weight of rank 2": ("weight", ValueError, conv(weight=matrix())),
    "weight a tensor": ("weight", TypeError, conv(weight=torch.ones(4, 3, 3, 3).tolist())),
    "bias too long": ("bias", ValueError, conv(bias=torch.ones(5))),
    "bias in float64": ("bias", TypeError, conv(bias=torch.ones(4, dtype=F64))),
    "stride 0": ("stride", ValueError, conv(stride=0)),
    "stride negative": ("stride", ValueError, conv(stride=(1, -1))),
    "stride of three": ("stride", ValueError, conv(stride=(1, 1, 1))),
    "stride of none": ("stride", ValueError, conv(stride=())),
    "stride a float": ("stride", TYPE, conv(stride=1.5)),
    "stride a pair of floats": ("stride", TYPE, conv(stride=(1.0, 1.0))),
    "stride a bool": ("stride", TYPE, conv(stride=True)),
    "stride text": ("stride", TYPE, conv(stride="ab")),
    "stride None": ("stride", TYPE, conv(stride=None)),
    "padding negative": ("padding", ValueError, conv(padding=-1)),
    "padding a float": ("padding", TYPE, conv(padding=0.5)),
    "padding a bool": ("padding", TYPE, conv(padding=(True, False))),
    "padding misspelt": ("padding", ValueError, conv(padding="sane")),
    "padding same with a stride": ("stride", ValueError, conv(padding="same", stride=2)),
    "dilation 0": ("dilation", ValueError, conv(dilation=0)),
    "dilation a float": ("dilation", TYPE, conv(dilation=2.0)),
    "groups 0": ("groups", ValueError, conv(groups=0)),
    "groups negative": ("groups", ValueError, conv(groups=-1)),
    "groups that do not divide": ("groups", ValueError, conv(groups=3)),
    "groups that do not fit x": ("x", ValueError, conv(groups=2)),
    "groups a float": ("groups", TypeError, conv(groups=1.0)),
    "groups a bool": ("groups", TypeError, conv(groups=True)),
}
INDEX = torch.tensor([1, 2])
EMBEDDING: dict[str, tuple[str, Any, Callable[[], object]]] = {
    "indices of floats": (
        "indices",
        TypeError,
        lambda: functional.embedding(INDEX.float(), matrix()),
    ),
    "indices of bools": (
        "indices",
        TypeError,
        lambda: functional.embedding(INDEX.bool(), matrix()),
    ),
    "indices in int8": (
        "indices",
        TypeError,
        lambda: functional.embedding(INDEX.to(torch.int8), matrix()),
    ),
    "indices elsewhere": (
        "indices",
        ValueError,
        lambda: functional.embedding(INDEX.to("meta"), matrix()),
    ),
    "index negative": (
        "indices",
        IndexError,
        lambda: functional.embedding(-INDEX, matrix()),
    ),
    "index too large": ("indices", IndexError, lambda: functional.embedding(INDEX + 7, matrix())),
    "indices a list": ("indices", Exception, lambda: functional.embedding([1], matrix())),  # type: ignore[arg-type]
    "weight of rank 4": ("weight", ValueError, lambda: functional.embedding(INDEX, kernel())),
    "weight a tensor": (
        "weight",
        TypeError,
        lambda: functional.embedding(INDEX, torch.ones(9, 20)),  # type: ignore[arg-type]
    ),
    **{
        f"padding_idx {value!r}": (
            "padding_idx",
            error,
            lambda value=value: functional.embedding(INDEX, matrix(), value),
        )
        for value, error in (
            (9, ValueError),
            (-10, ValueError),
            (1.0, TypeError),
            (True, TypeError),
        )
    },
}
DENSE = torch.randn(9, 20)
PACK: dict[str, tuple[str, Any, Callable[[], object]]] = {
    "dense of another shape": ("dense", ValueError, lambda: matrix().pack(DENSE.t())),
    "dense of rank 1": ("dense", ValueError, lambda: matrix().pack(DENSE.flatten())),
    "dense in float64": ("dense", TypeError, lambda: matrix().pack(DENSE.double())),
    "dense in float32 for float16": (
        "dense",
        TypeError,
        lambda: matrix(torch.float16).pack(DENSE),
    ),
    "dense of ints": ("dense", TypeError, lambda: matrix().pack(DENSE.long())),
    "dense elsewhere": ("dense", ValueError, lambda: matrix().pack(DENSE.to("meta"))),
    "dense a list": ("dense", TypeError, lambda: matrix().pack([1.0])),  # type: ignore[arg-type]
    "weight None": ("weight", TypeError, lambda: functional.pack(DENSE, None)),  # type: ignore[arg-type]
    "unpack of a tensor": ("weight", TypeError, lambda: functional.unpack(DENSE)),  # type: ignore[arg-type]
}
CASES = {
    f"{group}: {name}": case
    for group, cases in (
        ("linear", LINEAR),
        ("conv2d", CONV2D),
        ("embedding", EMBEDDING),
        ("pack", PACK),
    )
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_argument_that_is_refused(name: str) -> None:
    argument, error, call = CASES[name]
    refused(call, argument, error)


def operator_calls() -> dict[str, tuple[str, Any, Callable[[], object]]]:
    """Calls of the registered operators that the functions above never make."""
    w, k, table = matrix(), kernel(), torch.zeros(180, dtype=torch.int32)
    t = brute.table_bank(50, 180, F32).place((9, 20))
    bank, elements, spec = w.bank.weight.detach(), t.bank.weight.detach(), w.spec
    dy, geometry = torch.randn(2, 9), ([1, 1], [0, 0], [1, 1], 1)
    size = [2, 3, 6, 7]
    out = torch.randn(2, 4, 4, 5)
    plain = k.bank.weight.detach()
    return {
        "bank of another size": (
            "bank",
            ValueError,
            lambda: op.linear(X, bank[:-1], None, None, spec, ""),
        ),
        "bank flat": ("bank", ValueError, lambda: op.unpack(bank.flatten(), None, spec, "")),
        "bank of ints": ("bank", TypeError, lambda: op.unpack(bank.long(), None, spec, "")),
        "bank transposed": (
            "bank",
            ValueError,
            lambda: op.embedding(bank.t(), None, INDEX, spec, ""),
        ),
        "table beside a law": ("table", ValueError, lambda: op.unpack(bank, table, spec, "")),
        "no table": ("table", ValueError, lambda: op.unpack(elements, None, t.spec, "")),
        "table too short": (
            "table",
            ValueError,
            lambda: op.linear(X, elements, table[1:], None, t.spec, ""),
        ),
        "table of int64": (
            "table",
            ValueError,
            lambda: op.unpack(elements, table.long(), t.spec, ""),
        ),
        "table elsewhere": (
            "table",
            ValueError,
            lambda: op.unpack(elements, table.to("meta"), t.spec, ""),
        ),
        "placement not JSON": ("placement", ValueError, lambda: op.unpack(bank, None, "{", "")),
        "back end unknown": ("backend", RuntimeError, lambda: op.unpack(bank, None, spec, "x")),
        "dy of another width": (
            "dy",
            ValueError,
            lambda: op.linear_input_grad(X, bank, None, spec, ""),
        ),
        "dy of another batch": (
            "dy",
            ValueError,
            lambda: op.linear_bank_grad(dy[:1], X, None, spec, F32, ""),
        ),
        "dy and x in two dtypes": (
            "x",
            TypeError,
            lambda: op.linear_bank_grad(dy.half(), X, None, spec, F32, ""),
        ),
        "gradient asked for in another dtype": (
            "dy",
            TypeError,
            lambda: op.linear_bank_grad(dy, X, None, spec, torch.float16, ""),
        ),
        "gradient asked for as ints": (
            "dtype",
            TypeError,
            lambda: op.linear_bank_grad(dy, X, None, spec, torch.int32, ""),
        ),
        "dy of another image size": (
            "dy",
            ValueError,
            lambda: op.conv2d_input_grad(out, plain, None, [2, 3, 6, 8], k.spec, *geometry, ""),
        ),
        "input size of another rank": (
            "input_size",
            ValueError,
            lambda: op.conv2d_input_grad(out, plain, None, size[1:], k.spec, *geometry, ""),
        ),
        "bank gradient of another image": (
            "dy",
            ValueError,
            lambda: op.conv2d_bank_grad(out, IMAGE[..., 1:], None, k.spec, *geometry, F32, ""),
        ),
        "lookup gradient of another shape": (
            "dy",
            ValueError,
            lambda: op.embedding_bank_grad(torch.ones(3, 20), INDEX, None, spec, F32, ""),
        ),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_operator_argument_that_is_refused(name: str) -> None:
    argument, error, call = operator_calls()[name]
    refused(call, argument, error)


@pytest.mark.parametrize("name", ["linear: x too wide", "linear: x in float64", "conv2d: stride 0"])
def test_refused_while_tracing_as_well(name: str) -> None:
    argument, error, call = CASES[name]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        refused(call, argument, error)


def test_bank_replaced_by_one_of_another_size() -> None:
    weight = matrix()
    weight.bank.weight = torch.nn.Parameter(torch.zeros(40, 32))
    calls: list[Callable[[], Tensor]] = [
        weight.unpack,
        lambda: functional.linear(X, weight),
        lambda: functional.embedding(INDEX, weight),
    ]
    for call in calls:
        refused(call, "bank", ValueError)


SETTINGS: list[tuple[str, Any, Callable[[], object]]] = [
    ("limit", ValueError, lambda: rpg.scratch_limit(-1)),
    ("limit", TypeError, lambda: rpg.scratch_limit(True)),
    ("limit", TypeError, lambda: rpg.scratch_limit(1e6)),  # type: ignore[arg-type]
    ("limit", TypeError, lambda: rpg.scratch_limit("1 MiB")),  # type: ignore[arg-type]
    ("limit", TypeError, lambda: rpg.scratch_limit(None)),  # type: ignore[arg-type]
    ("device_type", ValueError, lambda: rpg.scratch_limit(0, "tpu")),
    ("device_type", ValueError, lambda: rpg.scratch_limit(0, torch.device("cpu"))),  # type: ignore[arg-type]
    ("name", ValueError, lambda: rpg.backend("cudnn")),
    ("name", ValueError, lambda: rpg.backend("")),
    ("name", ValueError, lambda: rpg.backend(None)),  # type: ignore[arg-type]
    ("name", ValueError, lambda: rpg.backend("Reference")),
    ("scale", ValueError, lambda: layer_std("fan_inn", (3, 4))),
    ("scale", ValueError, lambda: layer_std(None, (3, 4))),  # type: ignore[arg-type]
    (
        "weight",
        ValueError,
        lambda: layer_std("match", (1, 1), weight=torch.full((1, 1), torch.nan)),
    ),
]


@pytest.mark.parametrize("case", range(len(SETTINGS)))
def test_setting_that_is_refused(case: int) -> None:
    before = (settings.forced_backend(), *map(settings.scratch_bytes, ("cpu", "cuda")))
    argument, error, call = SETTINGS[case]
    refused(call, argument, error)
    assert (settings.forced_backend(), *map(settings.scratch_bytes, ("cpu", "cuda"))) == before


def test_explain_without_a_tensor() -> None:
    layer = rpg.nn.Linear(20, 9, bank=rpg.ParameterBank(640))
    with pytest.raises(TypeError, match=rf"^x{NAMED}"):
        rpg.explain(layer, [1.0])  # type: ignore[arg-type]


def test_table_that_is_not_contiguous() -> None:
    bank = brute.table_bank(50, entries=6 * 10, dtype=torch.float32)
    weight = bank.place((6, 10))
    assert bank.table is not None
    table = bank.table.repeat_interleave(2)[::2]
    with pytest.raises(ValueError, match=r"table: got strides \(2,\), wanted a contiguous table"):
        torch.ops.rpg_kernels.linear(
            torch.randn(3, 10), bank.weight, table, None, weight.spec, "reference"
        )
