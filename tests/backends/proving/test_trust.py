"""A back end proves itself before it is trusted: with back ends that fail in every way."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import back_ends_on_trial as trials
import brute_force as brute
import pytest
import torch
from calls_to_prove import CPU, calls, kept_lines, of_linear

import rpg_kernels as rpg
from rpg_kernels.backends import dispatch, proving, registry
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.proving import trial, trial_process, trust, verdicts

BAD = [name for name in trials.WAYS if name not in ("right", "talkative", "hanging")]


HOW = {
    "wrong": "1 of 27 results are wrong, by up to",
    "unclean": "1 of 27 results are not finite",
    "misshapen": r"the result is torch.float32 \[1, 3, 9\], wanted torch.float32 \[3, 9\]",
    "imprecise": "of 27 results are wrong",
    "of another dtype": "the result is torch.float64",
    "raising": "it raised RuntimeError: CUDA error: an illegal memory access was encountered",
    "crashing": "the process that ran it ended with signal 11: my last words",
    "leaving": "the process that ran it ended with exit status 0",
    "killed": "the process that ran it ended with signal 9",
    "hanging": "it was not done after 3 seconds",
    "without memory": "there was no memory for the test: CUDA out of memory",
}


def test_one_that_is_right_is_tried_once_and_trusted(layer: rpg.nn.Linear, own_cache: Path) -> None:
    x = torch.randn(3, 20)
    with rpg.backend("reference"):
        wanted = layer(x)
    trials.register("talkative")
    assert rpg.explain(layer, x).reason.split("; ")[1] == "to be tested when it is first needed"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer(x).equal(wanted)
        assert layer(x).equal(wanted)
    assert trials.OnTrial.ran == ["talkative linear 3"] * 2  # the trial was made elsewhere
    assert rpg.explain(layer, x).backend == "talkative"
    assert rpg.explain(layer, x).reason.split("; ")[1] == "proved here"
    identity, kept = kept_lines(own_cache)
    assert identity["identity"]["torch"] == torch.__version__
    assert kept["wrong"] == ""
    assert kept["about"] == "talkative: linear in float32, weight 9x20, on cpu"
    trust.forget()
    trial_process.of(CPU).close()
    with_process = trial_process.TrialProcess.verdict
    try:
        trial_process.TrialProcess.verdict = None  # type: ignore[method-assign, assignment]
        assert layer(x).equal(wanted)  # from the folder
    finally:
        trial_process.TrialProcess.verdict = with_process  # type: ignore[method-assign]


@pytest.mark.parametrize("way", [*BAD, "hanging"])
def test_one_that_fails_is_left_aside_with_a_warning(
    way: str, layer: rpg.nn.Linear, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The others need no process of their own.
    elsewhere = way in ("raising", "crashing", "leaving", "killed", "hanging")
    monkeypatch.setattr("rpg_kernels.settings._PROVE", "1" if elsewhere else "here")
    monkeypatch.setattr(trial_process, "LIMIT", 3 if way == "hanging" else 120)
    x = torch.randn(3, 20)
    wanted = layer(x)
    trials.register(way)
    with pytest.warns(UserWarning, match=HOW[way]) as seen:
        assert layer(x).equal(wanted)
    assert len(seen) == 1, [str(w.message) for w in seen]
    said = str(seen[0].message)
    usual = rpg.explain(layer, x).backend
    lasting = way not in ("without memory", "killed")  # which is nothing that a kernel does
    what = "failed its test" if lasting else "could not be tested"
    assert f"back end {way} {what} for linear in torch.float32 on cpu" in said
    assert f"and {usual} runs instead" in said
    assert ("rpg-kernels doctor" if lasting else "rpg.prove(model)") in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer(x).equal(wanted)
    assert len(trials.OnTrial.ran) == (not elsewhere)
    assert usual != way
    assert f"{way} failed its test: " in rpg.explain(layer, x).reason
    assert bool([*own_cache.glob("*.jsonl")]) is lasting
    with rpg.backend(way):  # a forced one is not tested
        spec = layer.virtual_weight.spec
        call = Call("linear", x, spec, forced=way, operands=(x,))
        assert proving.state(trials.ALL[way], call) == "not asked"
        assert rpg.explain(layer, x).backend == way


@pytest.mark.parametrize("way", ["wrong", "raising", "without memory", "right"])
def test_trials_in_the_same_process(
    way: str, layer: rpg.nn.Linear, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_process, "of", None)
    trials.register(way)
    x = torch.randn(3, 20)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        layer(x)
    assert len(seen) == (way != "right")
    assert (rpg.explain(layer, x).backend == way) is (way == "right")


def test_the_variable_turns_it_off_and_nonsense_is_said(
    layer: rpg.nn.Linear, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    trials.register("wrong")
    monkeypatch.setattr("rpg_kernels.settings._PROVE", "0")
    layer(torch.randn(3, 20))
    assert trials.OnTrial.ran == ["wrong linear 3"]
    assert not own_cache.exists()
    with pytest.raises(RuntimeError, match="RPG_KERNELS_PROVE: got 0, wanted 1 or here"):
        rpg.prove(layer)
    monkeypatch.setattr("rpg_kernels.settings._PROVE", "maybe")
    with pytest.raises(ValueError, match="RPG_KERNELS_PROVE: got 'maybe', wanted 0, 1 or here"):
        layer(torch.randn(3, 20))


def test_each_kind_of_call_is_tried_by_itself(layer: rpg.nn.Linear, here: None) -> None:
    trials.register("right")
    bank = layer.virtual_weight.bank
    twin = rpg.nn.Linear(20, 9, bias=False, bank=bank)  # elsewhere on the ring
    large = rpg.nn.Linear(20, 90, bias=False, bank=bank)

    def tries(call: Any) -> int:
        trials.OnTrial.ran.clear()
        call()
        return len(trials.OnTrial.ran) - 1  # one of them is the call itself

    x = torch.randn(3, 20)
    assert tries(lambda: layer(x)) == 1
    assert tries(lambda: twin(x)) == 0
    assert tries(lambda: layer(torch.randn(4, 20))) == 0  # the same configuration
    assert tries(lambda: layer(torch.randn(2, 1, 20))) == 0
    assert tries(lambda: layer(torch.randn(20))) == 0
    assert tries(lambda: layer(torch.randn(40, 20))) == 1  # another one
    assert tries(lambda: large(x)) == 1
    assert tries(lambda: layer(torch.randn(20, 3).t())) == 1  # another layout
    assert tries(lambda: layer(torch.randn(61)[1:].view(3, 20))) == 1  # another alignment
    assert tries(lambda: layer(x.half())) == 1
    with rpg.scratch_limit(1 << 30):
        assert tries(lambda: layer(x)) == 1
    assert tries(lambda: layer(torch.empty(0, 20))) == 0


def test_operators_of_a_step_are_tried_each(layer: rpg.nn.Linear, here: None) -> None:
    trials.register("right")
    layer(torch.randn(3, 20, requires_grad=True)).sum().backward()
    names = ["linear", "linear_input_grad", "linear_bank_grad"]
    ran = [line.split()[1] for line in trials.OnTrial.ran]
    assert sorted(ran) == sorted(2 * names)


def test_nothing_is_tried_for_an_embedding_of_no_indices(here: None) -> None:
    bank = brute.bank_of(640, torch.float32, granularity=16)
    trials.register("imprecise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rpg.nn.Embedding(9, 20, bank=bank)(torch.zeros(0, 3, dtype=torch.int64))
    assert trials.OnTrial.ran == ["imprecise embedding 40"]


def test_what_decides_how_operands_are_read_is_in_the_keys(here: None) -> None:
    """Rows that begin at multiples of 16 bytes or not, and the address of every operand."""
    backend = trials.ALL["right"]

    def kind(x: torch.Tensor) -> str:
        return trial.made(backend, of_linear(x)).key

    assert kind(torch.randn(3, 20)) == kind(torch.randn(5, 20)) == kind(torch.randn(3, 20))
    assert kind(torch.randn(3, 24)[:, :20]) != kind(torch.randn(3, 21)[:, :20])
    (call,) = [call for call in calls() if call.op == "linear_bank_grad"]
    dy, x, *rest = call.operands
    moved = torch.randn(x.numel() + 1)[1:].view(x.shape)
    other = call._replace(operands=[dy, moved, *rest])
    assert trial.made(backend, call).key != trial.made(backend, other).key
    assert trust._call_key(backend, call) != trust._call_key(backend, other)
    seen = [trust._call_key(backend, call)]
    torch.use_deterministic_algorithms(True)
    try:
        seen.append(trust._call_key(backend, call))
    finally:
        torch.use_deterministic_algorithms(False)
    with mock.patch.object(trial, "precision", return_value=["tf32", "tf32"]):
        seen.append(trust._call_key(backend, call))
    assert len({*seen}) == 3


def test_lent_kernels_are_proved_with_the_product(
    layer: rpg.nn.Linear, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference runs without them where they fail."""
    from rpg_kernels.backends.reference import tiles

    class Lent:
        unpack_tile = staticmethod(
            lambda bank, table, p, dtype, channels_last=False: (
                factor[0] * tiles.unpack_tile(bank, table, p).to(dtype)
            )
        )
        pack_tile = staticmethod(tiles.pack_tile)

    monkeypatch.setattr(trials.OnTrial, "wanted", False)
    monkeypatch.setattr(trials.OnTrial, "tile_kernels", lambda self, call: Lent, raising=False)
    trials.register("right")
    x = torch.randn(3, 20)
    with rpg.backend("reference"):
        wanted = layer(x)
    monkeypatch.setattr("rpg_kernels.backends.cpu.rules.Cpu.preferred", lambda *_: False)
    factor = [1.0]
    torch.testing.assert_close(layer(x), wanted)
    assert "kernel of right" in rpg.explain(layer, x).reason
    factor[0] = 2.0
    verdicts_file = trust._book(CPU).path
    verdicts_file.unlink()
    trust.forget()
    said = "reference with kernels of right failed its test"
    with pytest.warns(UserWarning, match=f"{said}.* reference without them runs instead"):
        torch.testing.assert_close(layer(x), wanted)
    assert rpg.explain(layer, x).backend == "reference"
    assert "kernel of right" not in rpg.explain(layer, x).reason
    assert f"{said}: " in rpg.explain(layer, x).reason


def test_not_while_a_graph_is_captured(
    layer: rpg.nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(trust, "_with_index", lambda device: cuda)
    monkeypatch.setattr(trust, "_book", lambda device: verdicts.Book(CPU))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    trials.register("right")
    sentence = r"right has not been tested for linear in torch.float32 .* captured; .*rpg.prove"
    with pytest.raises(RuntimeError, match=sentence):
        layer(torch.randn(3, 20))


def test_what_has_to_prove_itself() -> None:
    must = {backend.name for backend in registry.backends() if backend.must_prove}
    assert must == {"cuda", "triton"}
    x = torch.randn(2, 20)
    for backend in registry.backends():
        assert dispatch.proving.state(backend, Call("linear", x)) == "not asked"


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError("CUDA error: no kernel image is available\nmore"), True),
        (RuntimeError("scratch_limit: got 0 bytes"), False),
        (ValueError("CUDA"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_a_failed_launch_names_the_call(
    error: Exception, named: bool, layer: rpg.nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(y: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(trials.ALL["right"], "spoil", fail)
    trials.register("right")
    with rpg.backend("right"), pytest.raises(type(error)) as seen:
        layer(torch.randn(3, 20))
    said = str(seen.value)
    assert (seen.value is error) is not named
    if named:
        assert (
            "linear on cpu: the back end right could not run it: RuntimeError: CUDA error" in said
        )
        assert "no kernel image is available (operands [3, 20] torch.float32, [40, 16]" in said
        assert "rpg.backend('reference') runs the same call" in said
        assert seen.value.__cause__ is error
