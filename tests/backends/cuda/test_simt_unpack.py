"""The CUDA sources of unpack and pack, run on the CPU, against the reference in float64."""

from __future__ import annotations

import random

import brute_force as brute
import pytest
import small_batches as small
import torch
from small_batches import DTYPES

import rpg_kernels as rpg
from rpg_kernels.backends import dispatch
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.cuda import launch, rules

pytestmark = small.needs_simt

op = torch.ops.rpg_kernels


@pytest.mark.parametrize("window", [None, (64, 1), (64, 5), (256, 2), (512, 2)])
def test_any_shape_against_the_reference(
    window: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(str(window))
    for order in range(5):
        monkeypatch.setattr(launch, "simt_order", order)
        small.check_moves(small.drawn(rng, "simt", window))


@pytest.mark.parametrize("window", [None, (64, 4)])
def test_every_order_of_threads_gives_the_same_bits(
    window: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = small.made((300, 110), "simt", window=window, dtype=torch.bfloat16)
    spec, dense = problem.weight.spec, torch.randn(300, 110).bfloat16()
    first = None
    for order in (0, 1, 2, 3):
        monkeypatch.setattr(launch, "simt_order", order)
        both = (
            op.unpack(problem.bank, None, spec, "simt"),
            op.pack(dense, None, spec, torch.float32, "simt"),
        )
        first = first or both
        assert all(one.equal(other) for one, other in zip(first, both, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_nothing_but_the_result(dtype: torch.dtype) -> None:
    problem = small.made((130, 110), "simt", window=(64, 4), dtype=dtype)
    p = problem.weight.placement
    for name, source, size, wanted in (
        ("unpack", problem.bank, 130 * 110, dtype),
        ("pack", small.surrounded(torch.randn(130, 110).to(dtype), 1), 704 * 64, torch.float32),
    ):
        memory = torch.full((size + 128,), 7.0, dtype=wanted)
        memory[64:-64] = float("nan")
        launch.move(name, p, source, memory[64:-64])
        assert memory[64:-64].isfinite().all()
        assert (memory[:64] == 7).all()
        assert (memory[-64:] == 7).all()


def test_padding_may_hold_anything() -> None:
    problem = small.made((130, 110), "simt", reflect="none")
    read = op.pack(torch.ones(130, 110), None, problem.weight.spec, torch.float32, "reference")
    assert (read == 0).any()
    problem.bank[read == 0] = float("inf")
    assert op.unpack(problem.bank, None, problem.weight.spec, "simt").isfinite().all()


def test_convolutions_of_one_tap_and_strided_operands() -> None:
    bank = brute.unit_bank(64 * 300, window=64, laps=2, init_std=1.0)
    kernel = bank.place((40, 96, 1, 1))
    with rpg.backend("reference"):
        wanted = kernel.unpack()
    values = bank.weight.detach()
    assert op.unpack(values.t().contiguous().t(), None, kernel.spec, "simt").equal(wanted)
    dense = torch.randn(96, 40, 1, 1).transpose(0, 1)
    got = op.pack(dense, None, kernel.spec, torch.float32, "simt")
    torch.testing.assert_close(got, op.pack(dense, None, kernel.spec, torch.float32, "reference"))
    taps = bank.place((8, 64, 3, 3))
    with rpg.backend("simt"), pytest.raises(RuntimeError, match="read matrices, not convolutions"):
        taps.unpack()


def test_they_are_one_anothers_derivative() -> None:
    weight = brute.unit_bank(64 * 200, window=64, laps=2, init_std=1.0).place((100, 64))
    dense = torch.randn(100, 64)
    with rpg.backend("simt"):
        unpacked = weight.unpack()
    (unpacked * dense).sum().backward()
    wanted = op.pack(dense, None, weight.spec, torch.float32, "simt")
    assert weight.bank.weight.grad is not None
    assert weight.bank.weight.grad.equal(wanted)
    assert not rules.unsupported_weight("pack", weight.spec)


@pytest.mark.parametrize("name", ["unpack", "pack"])
def test_explained_where_it_is_forced(name: str) -> None:
    """Only products have a layout; explaining these two once asked for theirs."""
    problem = small.made((300, 110), "simt")
    x = problem.bank if name == "unpack" else torch.randn(300, 110)
    explained = dispatch.explain(Call(name, x, problem.weight.spec, forced="simt"))
    assert (explained.op, explained.backend) == (name, "simt")
