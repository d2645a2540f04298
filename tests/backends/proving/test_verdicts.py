"""Verdicts: what they hold for, and folders that are full, spoiled, or used by others."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import back_ends_on_trial as trials
import pytest
import torch
from calls_to_prove import CPU, kept_lines

import rpg_kernels as rpg
from rpg_kernels.backends import proving
from rpg_kernels.backends.proving import trust, verdicts


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
    assert len(kept_lines(own_cache)) == 2


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
