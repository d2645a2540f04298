"""Trials: small calls, exact inputs, results that may be rounded and no more."""

from __future__ import annotations

import errno
import re
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar
from unittest import mock

import back_ends_on_trial as trials
import pytest
import torch
from calls_to_prove import CPU, STORED, calls, calls_of_stored, of_linear

import rpg_kernels as rpg
from rpg_kernels._stored import StoredValues
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.proving import trial, trial_run, trust


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("way", ["right", "wrong"])
def test_trials_of_every_operator(way: str, table: bool) -> None:
    backend = trials.ALL[way]
    trials.register(way)
    for call in calls(table):
        made = trial.Trial.from_json(trial.made(backend, call).to_json())
        assert made == trial.made(backend, call)
        assert bool(trial_run.run(made)) is (way == "wrong"), call.op
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            operands = [
                o.to(dtype) if isinstance(o, torch.Tensor) and o.is_floating_point() else o
                for o in call.operands
            ]
            if isinstance(operands[-1], torch.dtype):
                operands[-1] = dtype
            low = call._replace(x=operands[0], operands=operands)
            assert bool(trial_run.run(trial.made(backend, low))) is (way == "wrong"), call.op


@pytest.mark.parametrize("form", list(STORED))
def test_trials_of_banks_in_fewer_bytes(form: str) -> None:
    """They are made with such banks, and stand for no others."""
    trials.register("right", "wrong")
    keys = set()
    for call in calls_of_stored(form):
        made = trial.made(trials.ALL["right"], call)
        assert trial.Trial.from_json(made.to_json()) == made
        at = trial.ROLES[call.op].index("bank")
        bank, given = trial_run._operands(made, CPU)[at], call.operands[at]
        assert isinstance(bank, StoredValues)
        assert bank.activations == given.activations
        assert {name: (part.dtype, part.shape) for name, part in bank.parts().items()} == {
            name: (part.dtype, part.shape) for name, part in given.parts().items()
        }
        dense = bank.dense()
        assert torch.equal(dense * 8, (dense * 8).round())
        assert 0.5 <= float(dense.abs().max()) <= 1
        assert int(dense.any(1).sum()) >= len(bank.codes) - 2
        assert not trial_run.run(made), call.op
        assert trial_run.run(trial.made(trials.ALL["wrong"], call)), call.op
        other = next(f for f in STORED if f != form)
        plain = [c for c in (*calls(), *calls_of_stored(other)) if c.op == call.op]
        keys |= {made.key, *(trial.made(trials.ALL["right"], c).key for c in plain)}
        in_process = {trust._call_key(trials.ALL["right"], c) for c in (call, *plain)}
        assert len(in_process) == 3
    assert len(keys) == 3 * 6


def test_a_trial_of_a_large_call_is_small() -> None:
    """And configured as if it were large."""
    from rpg_kernels.backends.triton import config

    bank = rpg.ParameterBank(640_000, granularity=64, device="meta")
    weight = bank.place((50_007, 4096))
    x, dy = (torch.empty(4, 1001, n, device="meta") for n in (4096, 50_007))
    backend = trials.ALL["right"]
    for op, operands in (
        ("linear", [x, bank.weight, None, torch.empty(50_007, device="meta"), weight.spec]),
        ("linear_input_grad", [dy, bank.weight, None, weight.spec]),
        ("linear_bank_grad", [dy, x, None, weight.spec, torch.float32]),
    ):
        made = trial.made(backend, Call(op, operands[0], weight.spec, operands=operands))
        kept = 384 + 4004 % 128
        rows = 4096 * 1024 // 1024 // 1024 * 1024 + 50_007 % 1024
        assert made.batch == (4004, kept)
        sizes = {"linear": (4096,), "linear_input_grad": (rows,), "linear_bank_grad": (rows, 4096)}
        shapes = [o["shape"] for o in made.operands if isinstance(o, dict) and o["role"] == "x"]
        assert shapes == [[kept, size] for size in sizes[op]]
        for operand in made.operands:
            if isinstance(operand, dict) and operand["role"] == "bias":
                assert operand["shape"] == [rows]
        assert (
            made.key
            == trial.made(
                backend, Call(op, operands[0][:3], weight.spec, operands=_halved(operands))
            ).key
        )
    from fractions import Fraction

    how = (512, 512, 64, torch.float16)
    with config.as_if(Fraction(4004, 420)):
        small = config.choose("linear", 420, *how)
        assert config.whole(7) == 67
    assert small == config.choose("linear", 4004, *how)
    assert small != config.choose("linear", 16, *how)
    # A weight of which rows are cut, too: with its few rows tiles would be smaller.
    rows, columns = made.rows[1], how[1:]
    real = config.choose("linear", 16, 50_007, *columns)
    with config.as_if(Fraction(1), made.parts[1]):
        assert config.choose("linear", 16, rows, *columns) == real
        assert config.whole_weight(rows) == 50_007
    assert config.choose("linear", 16, rows, *columns) != real


def _halved(operands: list[Any]) -> list[Any]:
    return [o[:3] if isinstance(o, torch.Tensor) and o.dim() == 3 else o for o in operands]


def test_inputs_are_exact_and_surrounded_by_nan() -> None:
    trials.register("right")
    (call,) = [call for call in calls() if call.op == "linear"]
    made = trial.made(trials.ALL["right"], call)
    x, bank, *_ = trial_run._operands(made, CPU)
    assert x.mul(2048).frac().abs().sum() == 0
    assert x.mul(4).frac().abs().sum() > 0
    assert bank.mul(8).frac().abs().sum() == 0
    memory = x.as_strided((x.storage_offset() + x.numel() + 64,), (1,), 0)
    assert memory.isnan().sum() == 128
    shifted = torch.randn(101)[1:].view(5, 20)
    made = trial.made(
        trials.ALL["right"],
        Call("linear", shifted, call.placement, operands=[shifted, *call.operands[1:]]),
    )
    assert trial_run._operands(made, CPU)[0].data_ptr() % 16 == shifted.data_ptr() % 16
    expanded = torch.randn(1, 20).expand(5, 20)
    made = trial.made(
        trials.ALL["right"],
        Call("linear", expanded, call.placement, operands=[expanded, *call.operands[1:]]),
    )
    assert trial_run._operands(made, CPU)[0].stride() == (0, 1)
    assert trial_run.run(made) == ""


def test_a_table_reads_every_part_of_the_bank_with_both_signs() -> None:
    (call,) = [call for call in calls(table=True) if call.op == "linear"]
    table = trial_run._operands(trial.made(trials.ALL["right"], call), CPU)[2]
    assert table.dtype == torch.int32
    assert 0.3 < float((table < 0).float().mean()) < 0.7
    slots = table & 0x7FFFFFFF
    assert int(slots.min()) >= 0
    assert int(slots.max()) < 50
    assert slots.unique().numel() > 40


def test_a_result_may_be_rounded_and_no_more() -> None:
    exact = torch.ones(8, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        eps = torch.finfo(dtype).eps
        assert trial_run.difference((exact + 2 * eps).to(dtype), exact, dtype) == ""
        assert "8 of 8 results are wrong" in trial_run.difference(
            (exact + 4 * eps).to(dtype), exact, dtype
        )


def test_settings_travel_and_return(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        trials.ALL["right"],
        "spoil",
        lambda y: (
            seen.append(
                (torch.are_deterministic_algorithms_enabled(), rpg.settings.scratch_bytes("cpu"))
            ),
            y,
        )[1],
    )
    parts, switches = [], []
    rehearsing = mock.Mock(side_effect=lambda *of: (parts.append(of), nullcontext())[1])
    monkeypatch.setattr(trials.ALL["right"], "rehearsing", rehearsing)
    monkeypatch.setattr(trial_run, "_set_precision", switches.append)
    trials.register("right")
    call = next(calls())
    torch.use_deterministic_algorithms(True)
    try:
        made = trial.made(trials.ALL["right"], call)
    finally:
        torch.use_deterministic_algorithms(False)
    before = (trial.precision(), rpg.settings.scratch_bytes("cpu"))
    with rpg.scratch_limit(1 << 20):
        trial_run.run(made)
        assert rpg.settings.scratch_bytes("cpu") == 1 << 20
    assert seen == [(True, 4 << 20)]
    assert parts == [(1, 1)]
    assert switches == [made.conditions["precision"], before[0]]
    assert not torch.are_deterministic_algorithms_enabled()
    assert (trial.precision(), rpg.settings.scratch_bytes("cpu")) == before


def test_tensors_expanded_over_memory_with_gaps() -> None:
    """More memory lies between the first and the last element than there are elements."""
    x = torch.randn(1, 500)[:, ::25].expand(3, 20)
    made = trial.made(trials.ALL["right"], of_linear(x))
    trials.register("right")
    assert trial_run._operands(made, CPU)[0].stride() == (0, 25)
    assert trial_run.run(made) == ""


def test_products_of_matrices_must_be_exact_although_convolutions_may_use_tf32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As torch has it by default."""
    trials.register("imprecise")
    for matrices, found in (("none", True), ("tf32", False)):
        monkeypatch.setattr(trial, "precision", lambda matrices=matrices: [matrices, "tf32"])
        for call in calls():
            made = trial.made(trials.ALL["imprecise"], call)
            made.conditions["precision"] = made.conditions["precision"][:]
            x = next(o for o in trial_run._operands(made, CPU) if isinstance(o, torch.Tensor))
            fine = bool(x.mul(8).frac().abs().sum() > 0)
            data = call.op not in ("embedding", "unpack") and not call.op.startswith("conv2d")
            assert fine is (found and data), call.op


def test_a_library_that_rounds_every_product_is_right_with_lent_kernels() -> None:
    """Products in 16 bits whose sum is asked for in fp32, or which nearly cancel."""
    trials.register("right")
    for call in calls():
        if not call.op.endswith("bank_grad") or call.op.startswith("embedding"):
            continue
        for dtype in (torch.bfloat16, torch.float16):
            operands = [
                o.to(dtype) if isinstance(o, torch.Tensor) and o.is_floating_point() else o
                for o in call.operands
            ]
            rows = 40 if call.op.startswith("linear") else 1
            operands[:2] = (o.repeat(rows, *[1] * (o.dim() - 1)) for o in operands[:2])
            low = call._replace(x=operands[0], operands=operands)
            made = replace(trial.made(trials.ALL["right"], low), label="right's, lent")
            assert trial_run.run(made) == "", (call.op, dtype)


def test_the_reference_has_scratch_enough_and_any_default_device(
    layer: rpg.nn.Linear, here: None
) -> None:
    """In the calling process, too."""
    made = trial.made(trials.ALL["right"], of_linear(torch.randn(3, 20)))
    trials.register("right")
    torch.set_default_device("meta")
    try:
        with rpg.scratch_limit(0):
            exact = trial_run._exact(made, trial_run._operands(made, CPU))
    finally:
        torch.set_default_device(None)
    assert exact.shape == (3, 9)


def test_switches_are_set_only_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was set no longer follows torch's general switch."""

    class Switch:
        said: ClassVar[list[str]] = []
        fp32_precision = property(lambda self: "none", lambda self, value: self.said.append(value))

    monkeypatch.setattr(trial_run, "precision_switches", lambda: (Switch(), Switch()))
    trial_run._set_precision(["none", "tf32"])
    assert Switch.said == ["tf32"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA error: out of memory"), "there was no memory for the test: CUDA error"),
        (RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED"), "there was no memory for the test"),
        (OSError(errno.ENOSPC, "No space left on device"), "it raised OSError: .* No space left"),
    ],
)
@pytest.mark.parametrize("where", ["_prepared", "_made"])
def test_what_is_not_the_back_ends_fault_does_not_last(
    error: Exception, said: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trial.made(trials.ALL["right"], next(calls()))
    trials.register("right")
    monkeypatch.setattr(trial_run, where, mock.Mock(side_effect=error))
    answer, ended = trial_run.attempt(made)
    assert ended
    assert not answer["lasting"]
    said = said.replace("it raised", "the test could not be prepared:" * (where == "_prepared"))
    assert re.search(said, answer["wrong"])
    monkeypatch.setattr(trial_run, where, mock.Mock(side_effect=RuntimeError("illegal access")))
    assert trial_run.attempt(made)[0]["lasting"] is (where == "_made")
