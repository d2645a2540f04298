"""A back end proves itself before it is trusted: with back ends that fail in every way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import back_ends_on_trial as trials
import brute_force as brute
import pytest
import torch

import rpg_kernels as rpg
from rpg_kernels.backends import dispatch, proving, registry
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.proving import trial, trial_process, trial_run, trust, verdicts

CPU = torch.device("cpu")
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


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(verdicts.ENVIRONMENT_CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv("BACK_ENDS_ON_TRIAL", "1")
    monkeypatch.setattr("rpg_kernels.settings._PROVE", "1")
    monkeypatch.setattr(trials.OnTrial, "wanted", True)
    monkeypatch.setattr(trials.OnTrial, "ran", [])
    trust.forget()
    yield tmp_path / "cache"
    trials.unregister()
    trust.forget()


@pytest.fixture
def layer() -> rpg.nn.Linear:
    bank = brute.bank_of(640, torch.float32, granularity=16)
    return rpg.nn.Linear(20, 9, bias=False, bank=bank)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials in this process."""
    monkeypatch.setattr("rpg_kernels.settings._PROVE", "here")


def lines(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("proved-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


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
    identity, kept = lines(own_cache)
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
    with rpg.backend("reference"):
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


def test_where_no_other_process_can_be_started_it_is_made_here(
    layer: rpg.nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials.register("right")
    for broken in ("/nowhere/python", "", "/bin/false"):
        trust.forget()
        monkeypatch.setenv(verdicts.ENVIRONMENT_CACHE, f"/tmp/none-{os.getpid()}/{len(broken)}")
        trial_process.of(CPU).close()
        monkeypatch.setattr(sys, "executable", broken)
        trials.OnTrial.ran.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer(torch.randn(3, 20))
        assert len(trials.OnTrial.ran) == 2, broken


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


OPERANDS = {
    "linear": lambda w, t: (torch.randn(5, 3, 20), w, t, torch.randn(9)),
    "linear_input_grad": lambda w, t: (torch.randn(15, 9), w, t),
    "linear_bank_grad": lambda w, t: (torch.randn(15, 9), torch.randn(15, 20), t),
    "embedding": lambda w, t: (w, t, torch.tensor([[8, 0], [3, 3]])),
    "embedding_bank_grad": lambda w, t: (torch.randn(2, 2, 20), torch.tensor([[8, 0], [3, 3]]), t),
    "unpack": lambda w, t: (w, t),
    "pack": lambda w, t: (torch.randn(9, 20), t),
}


def calls(table: bool = False) -> Iterator[Call]:
    """One of each operator."""
    bank = (
        brute.table_bank(50, 500, torch.float32)
        if table
        else brute.bank_of(640, torch.float32, granularity=16)
    )
    w, t = bank.weight.detach(), bank.table if table else None
    matrix, kernel = bank.place((9, 20)).spec, bank.place((6, 4, 3, 2)).spec
    for op, made in OPERANDS.items():
        operands = [*made(w, t), matrix]
        if op.endswith("bank_grad") or op == "pack":
            operands.append(torch.float32)
        yield Call(op, operands[0], matrix, operands=operands)
    x, dy = torch.randn(2, 8, 7, 6), torch.randn(2, 6, 4, 5)
    geometry = ([2, 1], [1, 0], [1, 1], 2)
    for op, operands in (
        ("conv2d", [x, w, t, None, kernel, *geometry]),
        ("conv2d_input_grad", [dy, w, t, [2, 8, 7, 6], kernel, *geometry]),
        ("conv2d_bank_grad", [dy, x, t, kernel, *geometry, torch.float32]),
    ):
        yield Call(op, operands[0], kernel, geometry=geometry, operands=operands)


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


@pytest.mark.parametrize("kind", ["a file", "full"])
def test_a_folder_that_cannot_be_written_costs_a_sentence(
    kind: str, layer: rpg.nn.Linear, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv(verdicts.ENVIRONMENT_CACHE, str(tmp_path / "file" / "below"))
    else:
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(verdicts, "_append", mock.Mock(side_effect=full))
    trials.register("right")
    with pytest.warns(UserWarning, match="could not be kept in .* RPG_KERNELS_CACHE names"):
        layer(torch.randn(3, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(30, 20))  # said once
    assert rpg.explain(layer, torch.randn(3, 20)).backend == "right"


def test_what_is_no_verdict_in_the_file_is_passed_over(layer: rpg.nn.Linear, here: None) -> None:
    trials.register("right")
    x = torch.randn(3, 20)
    layer(x)
    book = trust._book(CPU)
    good = book.path.read_bytes()
    for spoiled in (
        good + b'{"key": 3, "wrong": "", "about": ""}\nnot json\n\xff\xfe\n[]\n{"key": "cut',
        b"\x00" * 100 + b"\n" + good,
    ):
        book.path.write_bytes(spoiled)
        trust.forget()
        trials.OnTrial.ran.clear()
        layer(x)
        assert len(trials.OnTrial.ran) == 1
        assert [record["wrong"] for record in proving.said(CPU)] == [""]
    book.path.write_bytes(good[: len(good) // 2])
    trust.forget()
    layer(x)
    assert len(trials.OnTrial.ran) == 3


def test_other_versions_do_not_count(
    layer: rpg.nn.Linear, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials.register("right")
    x = torch.randn(3, 20)
    for change in ("torch", "sources", "triton", "driver"):
        layer(x)
        before = verdicts.identity("cpu", 0)
        changed = {**before, change: "another"}
        monkeypatch.setattr(verdicts, "identity", lambda *_, changed=changed: changed)
        trust.forget()
        trials.OnTrial.ran.clear()
        layer(x)
        assert len(trials.OnTrial.ran) == 2, change


def test_what_a_verdict_holds_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of any of these is another identity."""
    gpu = mock.Mock(major=9, minor=0, multi_processor_count=132)
    gpu.name = "a GPU"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)

    def identity() -> dict[str, Any]:
        return verdicts.identity.__wrapped__("cuda", 0)

    seen = [identity()]
    for where, name, other in (
        (torch, "__version__", "another"),
        (verdicts, "__version__", "another"),
        (verdicts, "_version", lambda package: f"another {package}"),
        (verdicts, "sources", lambda: "others"),
        (verdicts, "_build", lambda: "another"),
        (verdicts, "_driver", lambda: "another"),
        (gpu, "name", "another"),
        (gpu, "minor", 3),
        (gpu, "multi_processor_count", 1),
    ):
        monkeypatch.setattr(where, name, other)
        assert identity() not in seen, name
        seen.append(identity())


def test_two_processes_make_one_trial(tmp_path: Path, own_cache: Path) -> None:
    """The second waits for the first, and takes its verdict."""
    code = (
        "import torch, back_ends_on_trial as trials, rpg_kernels as rpg\n"
        "trials.OnTrial.wanted = True; trials.register('right')\n"
        "bank = rpg.ParameterBank(640, 16)\n"
        "layer = rpg.nn.Linear(20, 9, bias=False, bank=bank)\n"
        "print('ready', flush=True); input()\n"
        "layer(torch.randn(3, 20)); print(len(trials.OnTrial.ran))\n"
    )
    environment = {
        **os.environ,
        "RPG_KERNELS_PROVE": "here",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "BACK_ENDS_ON_TRIAL": "",
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)  # type: ignore[call-overload]
        for _ in range(2)
    ]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    made = [int(process.communicate()[0]) for process in running]
    assert sorted(made) == [1, 2]
    assert len(lines(own_cache)) == 2


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


def test_a_process_that_ended_while_idle_is_started_again(layer: rpg.nn.Linear) -> None:
    process = trial_process.of(CPU)
    made = trial.made(trials.ALL["right"], next(calls()))
    assert process.verdict(made) == ("", True)
    first = process._process
    assert process.verdict(made) == ("", True)
    assert process._process is first
    assert first is not None
    first.kill()
    first.wait()
    assert process.verdict(made) == ("", True)
    assert process._process is not first
    process.close()


def test_prove_up_front(
    layer: rpg.nn.Linear, here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = layer.virtual_weight.bank
    model = torch.nn.Sequential(
        rpg.nn.Conv2d(3, 4, 3, bank=bank), torch.nn.Flatten(), rpg.nn.Linear(64, 5, bank=bank)
    )
    trials.register("right")
    x = torch.randn(2, 3, 6, 6)
    for inputs, images in (((x,), 1), ((), 2)):
        trust.forget()
        said = rpg.prove(model, *inputs, batches=(1, 16))
        products = {"", "_input_grad", "_bank_grad"}
        assert {e.op for e in said} == {f"{o}{p}" for o in ("linear", "conv2d") for p in products}
        assert len(said) == 6 * images
        assert {e.backend for e in said} == {"right"}
        assert all("proved here" in e.reason for e in said)
        trials.OnTrial.ran.clear()
    model(x).sum().backward()
    assert model.training
    assert {line.split()[1] for line in trials.OnTrial.ran} >= {"conv2d", "linear"}
    assert "proving" in capsys.readouterr().err
    for wrong, error in (((3, {}), TypeError), ((model, {"batches": [0]}), ValueError)):
        with pytest.raises(error, match=r"model: got a int|batches: got 0"):
            rpg.prove(wrong[0], **wrong[1])  # type: ignore[arg-type]
    with rpg.backend("right"), pytest.raises(RuntimeError, match="a forced one is not tested"):
        rpg.prove(model)


def test_a_bad_one_is_found_up_front(layer: rpg.nn.Linear, here: None) -> None:
    trials.register("wrong", "right")
    with pytest.warns(UserWarning, match="back end wrong failed"):
        said = rpg.prove(layer, batches=[2], backward=False, progress=False)
    assert [e.backend for e in said] == ["right"]
    assert "wrong failed its test" in said[0].reason


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


def test_what_has_to_prove_itself() -> None:
    must = {backend.name for backend in registry.backends() if backend.must_prove}
    assert must == {"cuda", "triton"}
    x = torch.randn(2, 20)
    for backend in registry.backends():
        assert dispatch.proving.state(backend, Call("linear", x)) == "not asked"


def test_the_doctor_shows_the_verdicts(
    layer: rpg.nn.Linear, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rpg_kernels.doctor import environment, report

    trials.register("wrong", "right")
    with pytest.warns(UserWarning, match="back end wrong failed"):
        layer(torch.randn(3, 20))
    part = environment.proved()
    assert part["folder"] == os.environ[verdicts.ENVIRONMENT_CACHE]
    about = "linear in float32, weight 9x20, on cpu"
    right, wrong = sorted(part["verdicts"], key=lambda kept: kept["about"])
    assert (right["about"], right["wrong"]) == (f"right: {about}", "")
    assert wrong["about"] == f"wrong: {about}"
    text = report.section("proved", part, "")
    assert f"cpu                  right: {about}: passed" in text
    assert f"wrong: {about}: FAILED: 1 of 27 results are wrong" in text
    record = {"ok": True, "self_tests": [], "failures": {}, "proved": part}
    assert "1 kinds of calls are kept from a back end" in report.conclusion(record)
    monkeypatch.setattr("rpg_kernels.settings._PROVE", "yes")
    with pytest.raises(ValueError, match="RPG_KERNELS_PROVE: got 'yes'"):
        environment.proved()


def of_linear(x: torch.Tensor) -> Call:
    (call,) = [call for call in calls() if call.op == "linear"]
    return call._replace(x=x, operands=[x, *call.operands[1:]])


def test_nothing_is_tried_for_an_embedding_of_no_indices(here: None) -> None:
    bank = brute.bank_of(640, torch.float32, granularity=16)
    trials.register("imprecise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rpg.nn.Embedding(9, 20, bank=bank)(torch.zeros(0, 3, dtype=torch.int64))
    assert trials.OnTrial.ran == ["imprecise embedding 40"]


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


def test_an_interrupted_trial_is_not_taken_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    process = trial_process.of(CPU)
    right, wrong = (trial.made(trials.ALL[way], next(calls())) for way in ("right", "wrong"))
    assert process.verdict(right) == ("", True)
    with monkeypatch.context() as patch:
        patch.setattr(process, "_answer", mock.Mock(side_effect=[{}, KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            process.verdict(wrong)
    assert process._process is None
    assert process.verdict(right) == ("", True)
    process.close()


def test_the_process_finds_modules_where_this_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in its current folder, and past what is no string; what imports print is no answer."""
    (tmp_path / "queue.py").write_text("raise RuntimeError('not this one')\n")
    monkeypatch.setattr(sys, "path", [tmp_path / "none", *sys.path])
    monkeypatch.chdir(tmp_path)
    process = trial_process.TrialProcess("cpu")
    assert process.verdict(trial.made(trials.ALL["right"], next(calls()))) == ("", True)
    process.close()
    said: queue.Queue[Any] = queue.Queue()
    printed = ["welcome\n", "3\n", "{}\n", '{"state": "ready"}\n']
    trial_process._listen(mock.Mock(stdout=printed), said)
    assert [said.get(), said.get()] == [{"state": "ready"}, None]


def test_without_a_temporary_folder_it_is_made_here(
    layer: rpg.nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials.register("right")
    trial_process.of(CPU).close()
    none = mock.Mock(side_effect=FileNotFoundError("No usable temporary directory found"))
    monkeypatch.setattr(trial_process.tempfile, "TemporaryFile", none)
    layer(torch.randn(3, 20))
    assert len(trials.OnTrial.ran) == 2


def test_a_process_that_is_stopped_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verdicts, "WAIT", 0.2)
    book = verdicts.Book(CPU)
    with book.alone(), verdicts.Book(CPU).alone():
        pass
    lock = book.path.with_suffix(".lock").open("ab")
    with book.alone():
        child = os.fork()
        if not child:  # it keeps the file open, as a data loader's worker does
            time.sleep(60)
            os._exit(0)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_forked_process_has_a_process_of_its_own(layer: rpg.nn.Linear) -> None:
    """Closing its parent's would wait for a thread that it has not."""
    made = trial.made(trials.ALL["right"], next(calls()))
    assert trial_process.of(CPU).verdict(made) == ("", True)
    with trust._lock:  # as if another thread tried something
        child = os.fork()
    if not child:
        with trust._lock:
            here = trial_process.of(CPU).verdict(made)
            trial_process.of(CPU).close()
        os._exit(here != ("", True))
    until = time.monotonic() + 60
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("it hangs")
    assert status == 0
    assert trial_process.of(CPU).verdict(made) == ("", True)


def test_the_process_ends_by_itself_in_a_trial_without_end() -> None:
    """Once the one that asked was killed nobody else ends it."""
    program = trial_process._PROGRAM.replace(
        "trial_run.main(", "trial_run.LONGEST = 1; trial_run.main("
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, "cpu", *trial_process._paths()],
        input=trial.made(trials.ALL["hanging"], next(calls())).to_json() + "\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stdout.splitlines() == ['{"state": "ready"}', '{"state": "begun"}']
    assert "Timeout" in ended.stderr


def test_prove_without_a_standard_error(
    layer: rpg.nn.Linear, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials.register("right")
    monkeypatch.setattr(sys, "stderr", None)
    assert len(rpg.prove(layer, batches=(b for b in (1, 2)))) == 6  # type: ignore[arg-type]


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_back_ends_of_this_gpu_prove_themselves(dtype: torch.dtype) -> None:
    """In another process; a failure's message is in what explain says."""
    bank = rpg.ParameterBank(131_072, window=256, laps=4, device="cuda", dtype=dtype)
    model = torch.nn.ModuleList(
        [
            rpg.nn.Linear(256, 1024, bank=bank),
            rpg.nn.Conv2d(64, 64, 3, padding=1, bank=bank),
            rpg.nn.Embedding(100, 256, bank=bank),
        ]
    )
    said = rpg.prove(model, batches=(1, 16, 256), progress=False)
    assert {e.backend for e in said} >= {"triton"}
    for explained in said:
        assert "failed its test" not in explained.reason, explained
