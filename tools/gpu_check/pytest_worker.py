"""A pytest plugin: this session runs the tests that its pool deals, and answers each at once.

    GPU_CHECK_RECORDS=FD python -m pytest -p tools.gpu_check.pytest_worker FILE ...

It selects the tests that are marked ``gpu``, and all of a folder ``cases``, whose files choose the
device by themselves. A file that cannot be collected is said of, and keeps no other from running.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tools.gpu_check.pool import LOST
from tools.gpu_check.worker import Channel, gpu_lost

_TEXT = 4000  # of a failure that is kept, from its end
_CHANNEL = Channel()  # now, before pytest takes standard input away
_problems: list[dict[str, Any]] = []
_reports: list[pytest.TestReport] = []


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave those that need a GPU."""
    items[:] = [
        item for item in items if item.get_closest_marker("gpu") or item.path.parent.name == "cases"
    ]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Remember what could not be collected, and why."""
    if report.outcome != "passed":
        outcome, message = collection_problem(report)
        _problems.append({"item": report.nodeid, "outcome": outcome, "message": message})


def collection_problem(report: pytest.CollectReport) -> tuple[str, str]:
    """("skipped" where a package is missing, else "failed", why)."""
    text = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    missing = re.search(r"ModuleNotFoundError: No module named '([^']+)'", text)
    if report.outcome == "skipped":
        return "skipped", text
    if missing and not _ours(missing[1]):
        return "skipped", f"missing package {missing[1]}"
    return "failed", f"cannot be collected: {text.strip()[-_TEXT:]}"


def _ours(module: str) -> bool:
    """Whether a module is one of this checkout: then it is no package that could be installed."""
    name = module.split(".")[0]
    places = (Path.cwd(), *Path.cwd().glob("tests/**/"))
    return any((place / name).is_dir() or (place / f"{name}.py").exists() for place in places)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    """Run what is dealt. Nobody knows what comes next, so fixtures end with their test."""
    known = {item.nodeid: item for item in session.items}
    _CHANNEL.send({"ready": list(known), "records": _problems})
    for name in _CHANNEL.items():
        _reports.clear()
        item = known[name]
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        record = result(_reports)
        lost = gpu_lost()
        if lost:
            message = record["message"] if record["outcome"] == "failed" else lost
            record |= {LOST: True, "outcome": "failed", "message": message}
        _CHANNEL.send({"item": name, **record})
        if lost:
            os._exit(1)  # an orderly end would call the driver, which can only fail, and may hang
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the reports of the test that runs."""
    _reports.append(report)


def result(reports: list[pytest.TestReport]) -> dict[str, Any]:
    """One record of a test's phases."""
    seconds = round(sum(report.duration for report in reports), 3)
    record: dict[str, Any] = {"outcome": "passed", "seconds": seconds, "message": ""}
    for report in reports:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = str(crash.message if crash else report.longrepr).strip()
            text = report.longreprtext
            record |= {"outcome": "failed", "message": message[:500], "text": text[-_TEXT:]}
            break
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            xfailed = getattr(report, "wasxfail", None)
            record |= {"outcome": "skipped", "message": str(xfailed or reason)[:500]}
    return record
