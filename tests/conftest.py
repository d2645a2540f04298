"""Settings for every test: threads, seeds, and what becomes of a test that needs a GPU."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import settings

NO_GPU = "no CUDA device"

# Files that take long, the longest first: one that begins last keeps all other processes waiting.
LONG = (
    "test_install_release.py",
    "test_triton.py",
    "test_simt_linear.py",
    "test_install.py",
    "test_sanitizers.py",
    "test_build_failures.py",
    "test_cuda_sources.py",
    "test_ops_compile.py",
    "test_shared_banks.py",
    "test_native.py",
    "test_native_window.py",
    "test_scratch.py",
    "test_law_statistics.py",
)
# Their tests share nothing, so each may run in another process; those of other files stay together.
APART = ("test_triton.py",)

# The tests' tensors are small: more threads only add their own start-up to each operator.
torch.set_num_threads(1)

# The same examples in every run, and no deadline: the first call of an operator may compile.
settings.register_profile("rpg_kernels", derandomize=True, deadline=None)
settings.load_profile("rpg_kernels")


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files at a time, as --dist=loadfile, but for those of APART."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return nodeid if file.endswith(APART) else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda i: LONG.index(i.path.name) if i.path.name in LONG else len(LONG))
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
