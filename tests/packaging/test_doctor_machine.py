"""Which sources, commit and processor the doctor, the demo and the benchmarks name."""

from __future__ import annotations

import platform
import re
import shutil
from pathlib import Path

import pytest

from rpg_kernels import _sources
from rpg_kernels.doctor import machine


def test_the_digest_of_the_sources_changes_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(_sources, "_PACKAGE", package)
    digests = []
    for name, text in (("a.py", "1"), ("a.py", "1"), ("a.py", "2"), ("b.py", "2")):
        shutil.rmtree(package)
        package.mkdir()
        (package / name).write_text(text)
        digests.append(_sources.sources())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_the_digest_is_over_the_package() -> None:
    assert _sources._PACKAGE.name == "rpg_kernels"


def test_the_commit_is_one_or_none() -> None:
    commit = machine.commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)


@pytest.mark.parametrize(("text", "name"), [("x : 1\nmodel name : A 1\n", "A 1"), ("", None)])
def test_the_processor_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str | None
) -> None:
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "cpuinfo")
    if text:
        (tmp_path / "cpuinfo").write_text(text)
    assert machine.cpu_name() == (name or platform.processor() or platform.machine())
