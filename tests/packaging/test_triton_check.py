"""`make triton-check` as far as it needs neither ttsem nor minutes: what it runs, its verdict."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tools.triton_check import __main__ as command
from tools.triton_check.mutants import MUTANTS, Mutant, plant

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / command.CASES


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_every_mutant_can_be_planted(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, ROOT, tmp_path)
    changed = [
        path.name
        for path in (tmp_path / "rpg_kernels").rglob("*.py")
        if path.read_bytes() != (ROOT / path.relative_to(tmp_path)).read_bytes()
    ]
    assert changed == [mutant.file]
    compile((tmp_path / "rpg_kernels/backends/triton" / mutant.file).read_text(), "", "exec")
    assert f"def {mutant.test.split()[0]}(" in (CASES / mutant.cases).read_text("utf-8")


def test_a_mutant_without_its_text_is_refused(tmp_path: Path) -> None:
    lost = Mutant("", "law.py", "not in this file", "", "law.py", "", "")
    with pytest.raises(ValueError, match=r"law\.py has 0 times: not in this file"):
        plant(lost, ROOT, tmp_path)


def test_cases_are_found_by_themselves() -> None:
    left_out = {path.name for path in CASES.glob("*.py")} - set(command.files())
    assert left_out == {path.name for path in CASES.glob("aot*.py")} | {"surroundings.py"}


class Process:
    """In place of subprocess.run: writes results, and ends."""

    def __init__(self, results: str, code: int, output: str) -> None:
        self.results, self.code, self.output = results, code, output

    def __call__(self, words: list[Any], **how: Any) -> subprocess.CompletedProcess[str]:
        if self.results:
            Path(words[words.index("--results") + 1]).write_text(self.results)
        return subprocess.CompletedProcess(words, self.code, self.output)


PASSED, FAILED = '{"passed": 3, "hints": 5}', '{"passed": 2, "failed": 1}'


@pytest.mark.parametrize(
    ("results", "code", "failed"),
    [
        (PASSED, 0, 0),
        (FAILED, 1, 1),
        (PASSED, 3, 1),  # pytest broke after some tests
        ('{"skipped": 3}', 0, 1),  # nothing was checked
        ("", -6, 1),  # nothing was written
    ],
)
def test_what_breaks_counts_as_a_failure(
    results: str, code: int, failed: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(subprocess, "run", Process(results, code, "what was printed"))
    assert command.main(["law.py", "--jobs", "1"]) == failed
    printed = capsys.readouterr().out
    assert f", {failed} failed, " in printed.splitlines()[-1]
    assert ("what was printed" in printed) is bool(failed)


@pytest.mark.parametrize(
    ("results", "code", "output", "caught"),
    [
        (FAILED, 1, "KernelFault: writes 4 element(s) past the end of the tensor passed as x", 1),
        (FAILED, 1, "ImportError: what the mutant is not about", 0),
        (PASSED, 0, "", 0),
    ],
)
def test_mutants_are_to_be_seen_as_what_they_are(
    results: str, code: int, output: str, caught: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(command, "MUTANTS", MUTANTS[:1])
    monkeypatch.setattr(subprocess, "run", Process(results, code, output))
    assert command.main(["mutants", "--jobs", "1"]) == 1 - caught
    assert f"; {caught} of 1 mutants caught; " in capsys.readouterr().out.splitlines()[-1]


def test_names_that_are_no_cases_are_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        command.main(["surroundings.py"])
    assert "names: got surroundings.py, wanted some of " in capsys.readouterr().err
