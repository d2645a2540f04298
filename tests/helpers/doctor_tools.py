"""Runs the doctor as the command line does; replaces parts of what it looks at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rpg_kernels import cli


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status and standard output."""
    status = cli.main(["doctor", *arguments])
    return status, capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status, out = run(capsys, "--json")
    return status, json.loads(out)


def failing(record: dict[str, Any]) -> set[str]:
    return {test["test"] for test in record["self_tests"] if not test["passed"]}


def tool(path: Path, script: str) -> Path:
    """A program that is a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path
