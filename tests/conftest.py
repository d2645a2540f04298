"""Settings for every test: threads, seeds, and what becomes of a test that needs a GPU."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings

NO_GPU = "no CUDA device"
GPU_TESTS = pytest.StashKey[set[str]]()

# The tests' tensors are small: more threads only add their own start-up to each operator.
torch.set_num_threads(1)

# The same examples in every run, and no deadline: the first call of an operator may compile.
settings.register_profile("rpg_kernels", derandomize=True, deadline=None)
settings.load_profile("rpg_kernels")


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    config.stash[GPU_TESTS] = {item.nodeid for item in gpu_tests}
    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if torch.cuda.is_available():
        ran = sum(
            report.nodeid in config.stash[GPU_TESTS]
            for outcome in ("passed", "failed")
            for report in terminalreporter.getreports(outcome)
        )
        terminalreporter.write_line(f"gpu: {ran} ran on {torch.cuda.get_device_name()}")
    else:
        skipped = terminalreporter.getreports("skipped")
        count = sum(NO_GPU in str(report.longrepr) for report in skipped)
        terminalreporter.write_line(f"gpu: {count} skipped, {NO_GPU}")
