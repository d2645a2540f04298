"""The glossary's drawing is what its code makes of the window law."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from tools.reports import glossary


@pytest.mark.parametrize("theme", glossary.THEMES)
def test_drawings_are_up_to_date(theme: str) -> None:
    written = glossary.path(theme).read_text("utf-8")
    assert glossary.picture(theme) == written, "run python -m tools.reports.glossary"
