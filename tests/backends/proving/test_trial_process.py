"""The process that trials are made in, and what may happen to it."""

from __future__ import annotations

import os
import queue
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
from calls_to_prove import CPU, calls

import rpg_kernels as rpg
from rpg_kernels.backends.proving import trial, trial_process, trust, verdicts


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
