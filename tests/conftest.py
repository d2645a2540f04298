"""Settings for every test: threads, seeds, and what becomes of a test that needs a GPU."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings

NO_GPU = "no CUDA device"

# The tests' tensors are small: more threads only add their own start-up to each operator.
torch.set_num_threads(1)

# The same examples in every run, and no deadline: the first call of an operator may compile.
settings.register_profile("rpg_kernels", derandomize=True, deadline=None)
settings.load_profile("rpg_kernels")


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if torch.cuda.is_available():
        ran = sum(
            "gpu" in report.keywords
            for outcome in ("passed", "failed")
            for report in terminalreporter.getreports(outcome)
        )
        terminalreporter.write_line(f"gpu: {ran} ran on {torch.cuda.get_device_name()}")
    else:
        skipped = terminalreporter.getreports("skipped")
        count = sum(NO_GPU in str(report.longrepr) for report in skipped)
        terminalreporter.write_line(f"gpu: {count} skipped, {NO_GPU}")
