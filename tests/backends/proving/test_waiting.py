"""What is said while back ends are tested, and compiled ahead for it."""

from __future__ import annotations

import io
import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import back_ends_on_trial as trials
import pytest
import torch
from calls_to_prove import CPU

import rpg_kernels as rpg
from rpg_kernels.backends.proving import trial_process, waiting


class Terminal(io.StringIO):
    """Says when something was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        count = super().write(text)
        self.written.set()
        return count


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    made = Terminal()
    # Not sys.stderr itself, which pytest sets again when a test begins.
    monkeypatch.setattr(waiting, "sys", SimpleNamespace(stderr=made))
    monkeypatch.setattr(waiting, "_waited", 0.0)
    monkeypatch.setattr(waiting, "_number", 0)
    return made


def test_a_line_that_comes_late_and_is_wiped(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rpg_kernels")
    with waiting.line("testing one"):
        pass
    assert terminal.getvalue() == ""  # it was quick
    monkeypatch.setattr(waiting, "_waited", 2.999)  # by calls before this one
    with waiting.line("testing two"):
        assert terminal.written.wait(20)
        text = terminal.getvalue()
    assert text == "rpg-kernels: testing two (2 so far, 3 s; once on this machine)"
    assert terminal.getvalue() == text + "\r" + " " * len(text) + "\r"
    assert [record.getMessage().partition(" took ")[0] for record in caplog.records] == [
        "testing one",
        "testing two",
    ]


def test_nothing_is_written_where_nobody_reads(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "FROM", 0.0)
    with waiting.hidden(), waiting.line("testing"):
        assert not terminal.written.wait(0.1)
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    with waiting.line("testing"):
        assert not terminal.written.wait(0.1)
    monkeypatch.setattr(waiting, "sys", SimpleNamespace(stderr=None))
    with waiting.line("testing"):
        pass


def test_a_line_fits_the_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """What wraps could not be wiped."""
    monkeypatch.setattr(waiting, "FROM", 0.0)
    with waiting.line("testing " + "a" * 200):
        assert terminal.written.wait(20)
    assert len(terminal.getvalue()) == 79 + 1 + 79 + 1
    assert waiting._width(SimpleNamespace(fileno=lambda: -1)) == 79


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_a_terminal_that_is_gone_breaks_nothing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    monkeypatch.setattr(waiting, "FROM", 0.0)

    def gone(*_: object) -> int:
        terminal.written.set()
        raise kind("gone")

    monkeypatch.setattr(terminal, "write", gone)
    with waiting.line("testing"):
        assert terminal.written.wait(20)
    for stream in (SimpleNamespace(write=print), SimpleNamespace(isatty=gone)):
        monkeypatch.setattr(waiting, "sys", SimpleNamespace(stderr=stream))
        with waiting.line("testing"):
            pass
    monkeypatch.setattr(waiting, "sys", SimpleNamespace(stderr=terminal))


def test_no_thread_to_be_had_breaks_nothing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_: threading.Timer) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", none_left)
    with waiting.line("testing"):
        pass
    assert terminal.getvalue() == ""


def test_trials_are_announced(
    layer: rpg.nn.Linear, here: None, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "FROM", 0.0)
    trials.register("right")
    spoil = trials.ALL["right"].spoil

    def slow(y: torch.Tensor) -> torch.Tensor:
        assert terminal.written.wait(20)
        return spoil(y)

    monkeypatch.setattr(trials.ALL["right"], "spoil", slow)
    with torch.no_grad():
        layer(torch.randn(3, 20))
    assert "testing right: linear in float32, weight 9x20, on cpu (1 so far" in terminal.getvalue()


def test_prove_compiles_ahead_in_the_process_of_trials(
    layer: rpg.nn.Linear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "compiled"
    monkeypatch.setenv("COMPILED_AHEAD", str(file))
    trial_process.of(CPU).close()
    trials.register("right")
    said = rpg.prove(layer, batches=(1, 16), progress=False)
    assert {one.backend for one in said} == {"right"}
    assert file.read_text("utf-8") == "x" * 6
    assert trials.OnTrial.ran == []  # nothing of it was made in this process
    trial_process.of(CPU).close()


def test_one_whose_compilation_ends_the_process_is_found_by_its_trial(
    layer: rpg.nn.Linear,
) -> None:
    trials.register("crashing")
    with pytest.warns(UserWarning, match="back end crashing failed"):
        (said,) = rpg.prove(layer, batches=[2], backward=False, progress=False)
    assert said.backend != "crashing"
    assert trials.OnTrial.ran == []
    trial_process.of(CPU).close()
