"""The published format against a forward written out weight by weight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import rpg_kernels as rpg
from rpg_kernels.interop.official import from_tables

DOF = 50
SHAPES = [(6, 5, 3, 3), (4, 6, 1, 1), (7, 4), (3, 2, 2, 3)]
MULTIPLIERS = [1.5, 0.25, 3.0, 1.0]


def published() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A ring, and an index and a sign for every weight."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(DOF, generator=generator)
    indices = [torch.randint(DOF, shape, generator=generator) for shape in SHAPES]
    signs = [torch.randint(2, shape, generator=generator) * 2 - 1 for shape in SHAPES]
    return w, indices, signs


def materialised(w: Tensor, index: Tensor, sign: Tensor, multiplier: float) -> Tensor:
    """What the published code computes, each weight on its own."""
    rows = [
        w[int(position)] * float(plus_or_minus) * multiplier
        for position, plus_or_minus in zip(index.flatten(), sign.flatten(), strict=True)
    ]
    return torch.stack(rows).view(index.shape)


def apply(weight: Any, x: Tensor, functional: Any) -> Tensor:
    if len(weight.shape) == 2:
        return functional.linear(x, weight)  # type: ignore[no-any-return]
    return functional.conv2d(x, weight, None, 1, 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("layer", range(len(SHAPES)))
def test_outputs_and_gradients_are_those_of_the_published_forward(layer: int) -> None:
    w, indices, signs = published()
    bank, weights = from_tables(w, indices, signs, SHAPES, MULTIPLIERS)
    shape = SHAPES[layer]
    x = torch.randn((2, shape[1]) if len(shape) == 2 else (2, shape[1], 7, 6), requires_grad=True)

    ring = w.double().requires_grad_()
    expected_weight = materialised(ring, indices[layer], signs[layer], MULTIPLIERS[layer])
    x64 = x.detach().double().requires_grad_()
    expected = apply(expected_weight, x64, F)
    upstream = torch.randn(expected.shape)
    (expected * upstream.double()).sum().backward()

    output = apply(weights[layer], x, rpg.functional)
    (output * upstream).sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(output, expected.float(), **close)
    assert x.grad is not None
    assert x64.grad is not None
    torch.testing.assert_close(x.grad, x64.grad.float(), **close)
    assert bank.weight.grad is not None
    assert ring.grad is not None
    torch.testing.assert_close(bank.weight.grad.view(-1), ring.grad.float(), **close)


def test_all_layers_unpack_to_the_published_weights() -> None:
    w, indices, signs = published()
    bank, weights = from_tables(w, indices, signs, SHAPES, MULTIPLIERS)
    assert len(weights) == len(SHAPES)
    assert bank.granularity == 1
    assert bank.dof == DOF
    assert bank.table is not None
    assert bank.table.dtype == torch.int32
    assert bank.table.numel() == sum(math.prod(shape) for shape in SHAPES)
    for i, weight in enumerate(weights):
        assert tuple(weight.shape) == SHAPES[i]
        expected = materialised(w, indices[i], signs[i], MULTIPLIERS[i])
        torch.testing.assert_close(weight.unpack(), expected, rtol=1e-6, atol=0)


INTEGERS = (np.int64, np.int32, np.int16, np.uint8, np.uint16, np.uint32, np.uint64)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("flat", [False, True])
def test_numpy_arrays_of_any_integer_dtype(dtype: type, flat: bool) -> None:
    w, indices, signs = published()
    layout = (lambda a: a.reshape(-1)) if flat else (lambda a: a)
    arrays = [layout(index.numpy().astype(dtype)) for index in indices]
    minus_or_plus = [layout(sign.numpy().astype(np.int8)) for sign in signs]
    arrays[0].setflags(write=False)
    _, weights = from_tables(w.numpy(), arrays, minus_or_plus, SHAPES, np.array(MULTIPLIERS))
    _, expected = from_tables(w, indices, signs, SHAPES, MULTIPLIERS)
    for one, other in zip(weights, expected, strict=True):
        assert torch.equal(one.unpack(), other.unpack())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_signs_of_any_dtype(dtype: torch.dtype) -> None:
    w, indices, signs = published()
    _, weights = from_tables(w, indices, [s.to(dtype) for s in signs], SHAPES, MULTIPLIERS)
    _, expected = from_tables(w, indices, signs, SHAPES, MULTIPLIERS)
    assert torch.equal(weights[0].unpack(), expected[0].unpack())


def test_dtype_of_the_ring_is_kept_and_the_ring_is_copied() -> None:
    w, indices, signs = published()
    w = w.double()
    bank, weights = from_tables(w, indices, signs, SHAPES, MULTIPLIERS)
    assert bank.weight.dtype == torch.float64
    before = weights[2].unpack().clone()
    w.zero_()
    assert torch.equal(weights[2].unpack(), before)


def replaced(values: list[Tensor], value: Tensor) -> list[Tensor]:
    return [values[0], value, *values[2:]]


def bad_arguments() -> list[Any]:
    w, indices, signs = published()
    good = {
        "w": w,
        "indices": indices,
        "signs": signs,
        "shapes": SHAPES,
        "multipliers": MULTIPLIERS,
    }
    index, sign = indices[1], signs[1]
    too_high, negative, zero = index.clone(), index.clone(), sign.clone()
    too_high[2, 3], negative[0, 0], zero[1, 1] = DOF, -1, 0
    cases = [
        ("w", w.int(), TypeError, r"w: got dtype torch.int32, wanted a floating"),
        ("w", w.view(5, 10), ValueError, r"w: got shape \[5, 10\], wanted \[dof\]"),
        ("w", w[:0], ValueError, r"w: got shape \[0\]"),
        ("w", "ring", TypeError, r"w: got str"),
        ("w", torch.empty(2**31, device="meta"), ValueError, r"w: got shape \[2147483648\]"),
        ("indices", replaced(indices, too_high), ValueError, r"indices\[1\]: got positions \d+ to"),
        ("indices", replaced(indices, negative), ValueError, r"indices\[1\]: got positions -1 to"),
        ("indices", replaced(indices, index.float()), TypeError, r"indices\[1\]: got dtype"),
        ("indices", replaced(indices, index.bool()), TypeError, r"indices\[1\]: got dtype"),
        ("indices", replaced(indices, index[:3]), ValueError, r"indices\[1\]: got shape \[3, 6"),
        ("indices", indices[:3], ValueError, r"signs: got 4 layers, wanted 3"),
        ("indices", [], ValueError, r"indices: got 0 layers, wanted at least one"),
        ("signs", replaced(signs, zero), ValueError, r"signs\[1\]: got 0.0, wanted \+1 and -1"),
        ("signs", replaced(signs, sign * 0.5), ValueError, r"signs\[1\]: got -?0.5"),
        ("signs", replaced(signs, sign > 0), TypeError, r"signs\[1\]: got dtype torch.bool"),
        ("signs", replaced(signs, sign * math.nan), ValueError, r"signs\[1\]: got nan"),
        ("signs", replaced(signs, sign[0]), ValueError, r"signs\[1\]: got shape"),
        ("shapes", SHAPES[:-1], ValueError, r"shapes: got 3 layers, wanted 4"),
        ("shapes", [(270,), *SHAPES[1:]], ValueError, r"shapes\[0\]: got \(270,\), wanted"),
        ("shapes", [(6, 0, 3, 3), *SHAPES[1:]], ValueError, r"shapes\[0\]: got \(6, 0, 3, 3\)"),
        ("shapes", [270, *SHAPES[1:]], TypeError, r"shapes\[0\]: got 270, wanted a sequence"),
        ("multipliers", [1.0, 2.0], ValueError, r"multipliers: got 2 layers, wanted 4"),
        ("multipliers", [1, 0, 1, 1], ValueError, r"multipliers\[1\]: got 0.0, wanted a finite"),
        ("multipliers", [1, math.inf, 1, 1], ValueError, r"multipliers\[1\]: got inf"),
        ("multipliers", [1, "x", 1, 1], TypeError, r"multipliers\[1\]: got 'x', wanted a number"),
    ]
    return [({**good, name: value}, kind, message) for name, value, kind, message in cases]


@pytest.mark.parametrize(("arguments", "kind", "message"), bad_arguments())
def test_bad_input(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        from_tables(**arguments)
