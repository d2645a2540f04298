"""A pytest plugin that counts what the files of cases/ would compile, without a GPU.

    TRITON_INTERPRET=1 TRITON_COUNT=1 PYTHONPATH=.:tests/helpers:tests/backends/triton \\
        python -m pytest -q -p triton_count tests/backends/triton/cases/conv2d.py

Tests run as they do on a GPU, but that launches are only recorded, and comparisons of results are
left out: nothing has been computed. What else a test asserts of results may fail.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from unittest import mock

import brute_force as brute
import pytest
import torch
import triton_launches as launches

found: dict[launches.Specialisation, str] = {}


@pytest.fixture(autouse=True)
def record(request: pytest.FixtureRequest) -> Iterator[None]:
    """Launches of a test, under the test's name."""

    def note(one: launches.Specialisation) -> None:
        found.setdefault(one, f"{request.path.name}::{request.node.originalname}")

    with (
        launches.recorded(note),
        mock.patch.object(brute, "assert_accurate"),
        mock.patch.object(torch, "equal", return_value=True),
        mock.patch.object(torch.testing, "assert_close"),
    ):
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    by_test = collections.Counter(found.values())
    by_kernel = collections.Counter(one.kernel for one in found)
    for name, count in (*by_test.most_common(), *by_kernel.most_common()):
        terminalreporter.write_line(f"{count:5} {name}")
    terminalreporter.write_line(f"{len(found):5} compilations")
