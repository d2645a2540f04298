"""The table of docs/architectures.md is what its code counts."""

from __future__ import annotations

from tools.reports import architectures
from tools.reports.pages import replaced


def test_the_table_is_up_to_date() -> None:
    written = architectures.PAGE.read_text("utf-8")
    wanted = replaced(written, "architectures", architectures.table())
    command = "PYTHONPATH=tests/helpers python -m tools.reports.architectures"
    assert wanted == written, f"run {command}"
