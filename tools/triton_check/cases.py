"""Files of cases in one pytest, below ttsem, in this process.

    python -m tools.triton_check.cases --results FILE [--no-races] FILES [-- WORDS FOR PYTEST]

Run in the root of a checkout, whose kernels and cases are meant.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from ttsem import sanitize

from tools.triton_check.checks import Launches
from tools.triton_check.counts import Counts

# A test's name, and why ttsem cannot run it.
NOT_HERE = {
    "test_through_dispatch_and_autograd": "ttsem's tensors are of the CPU inside of an operator",
    "test_through_autograd_with_every_kind_of_layer": "as above",
}


class Outcomes:
    """A plugin of pytest that counts outcomes and leaves out what cannot run here."""

    def __init__(self) -> None:
        self.of: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        for item in items:
            if item.originalname in NOT_HERE:
                item.add_marker(pytest.mark.skip(reason=NOT_HERE[item.originalname]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that passes says so once, in its call; everything else is said where it happens.
        if report.when == "call" or report.outcome != "passed":
            self.of[report.outcome] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.of["failed"] += report.failed


def run(files: Sequence[str], races: bool, words: Sequence[str]) -> tuple[int, Counts]:
    """pytest's exit status, and what came of the files."""
    outcomes, launches = Outcomes(), Launches()
    with sanitize.session(races="raise" if races else "off") as session, launches.judging():
        status = pytest.main(
            ["-q", "--tb=short", "-p", "no:cacheprovider", *words, *files], plugins=[outcomes]
        )
    return int(status), Counts(
        passed=outcomes.of["passed"],
        failed=outcomes.of["failed"],
        skipped=outcomes.of["skipped"],
        launches=session.launches,
        kernels=launches.kernels,
        turned=launches.turned,
        hints=launches.hints,
        unchecked=session.races_unchecked,
    )


def main() -> int:
    """pytest's exit status; the counts are in the file of results."""
    parser = argparse.ArgumentParser(prog="cases")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--no-races", action="store_true", help="do not look for races")
    parser.add_argument("files", nargs="+")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at])
    status, counts = run(args.files, not args.no_races, sys.argv[at + 1 :])
    args.results.write_text(json.dumps(asdict(counts)), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
