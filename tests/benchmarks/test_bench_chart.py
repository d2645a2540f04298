"""Charts: what is in them, the same bytes every time, and a digest that notices every change."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET

import pytest

from benchmarks.harness import chart
from benchmarks.harness.chart import Chart, Point, Series

pytest.importorskip("matplotlib")

LINES = Chart(
    "title & more",
    "degrees <x>",
    "y",
    [
        Series("one", [Point(1e3, 2.0, 1.5, 2.5), Point(1e5, 4.0)]),
        Series("other", [Point(2e3, 3.0)], "dashed", "square"),
    ],
    [(1e3, "1K"), (1e5, "100K")],
    log_x=True,
)
ROWS = Chart(
    "t", "times", "",
    [Series("dense", [Point(1.0, 0), Point(1.0, 1)], "none", "triangle", "text"),
     Series("ours", [Point(0.1, 1)], "none", "circle", "blue")],
    rows=("a & b <c>", "d $x$"), log_x=True,
)  # fmt: skip
NAME = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> set[str]:
    return {element.text or "" for element in ET.fromstring(svg).iter(f"{NAME}text")}


@pytest.mark.parametrize("theme", chart.THEMES)
def test_what_is_drawn(theme: str) -> None:
    lines, rows = LINES.svg(theme), ROWS.svg(theme)
    assert texts(lines) >= {"title & more", "degrees <x>", "y", "one", "other", "1K", "100K"}
    assert texts(rows) >= {"t", "times", "dense", "ours", "a & b <c>", "d $x$", "0.1", "1"}
    for name in ("blue", "text", "grid"):
        light, dark = chart.COLOURS[name]
        shown, hidden = (light, dark) if theme == "light" else (dark, light)
        assert shown in rows
        assert hidden not in rows


def test_marks_are_where_their_values_are() -> None:
    tree = ET.fromstring(ROWS.svg("light"))
    ticks = {
        text.text: float(text.attrib["x"])
        for text in tree.iter(f"{NAME}text")
        if text.text in ("0.1", "1")
    }
    blue, _ = chart.COLOURS["blue"]
    places = [
        float(use.attrib["x"])
        for use in tree.iter(f"{NAME}use")
        if f"fill: {blue}" in use.attrib.get("style", "")
    ]
    assert places[0] == pytest.approx(ticks["0.1"])
    assert ticks["0.1"] < ticks["1"]


def test_the_same_bytes_whatever_the_users_settings_are() -> None:
    import matplotlib

    first = LINES.svg("dark")
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": None, "axes.grid": False}):
        assert LINES.svg("dark") == first
    assert not re.search(r"dc:date|[Mm]atplotlib v", first)


def test_a_single_point_and_equal_values_make_a_chart() -> None:
    for log in (False, True):
        series = [Series("x", [Point(1.0, 0.0)])]
        ET.fromstring(Chart("", "", "", series, rows=("r",), log_x=log).svg("light"))
        ET.fromstring(Chart("", "", "", series, log_x=log).svg("light"))


def test_the_digest_is_of_data_look_and_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    made = LINES.svg("light")
    assert LINES.drawn(made, "light")
    assert not LINES.drawn(made, "dark")
    assert not LINES.drawn(made.replace("</svg>", " </svg>"), "light")
    assert not LINES.drawn("", "light")
    near = Point(1e3 * (1 + 1e-12), 2.0, 1.5, 2.5), Point(1e5, 4.0)
    far = Point(1e3 * (1 + 1e-4), 2.0, 1.5, 2.5), Point(1e5, 4.0)
    for points, same in ((near, True), (far, False)):
        series = [dataclasses.replace(LINES.series[0], points=[*points]), LINES.series[1]]
        assert dataclasses.replace(LINES, series=series).drawn(made, "light") is same
    monkeypatch.setattr(chart, "__file__", __file__)  # other code draws
    assert not LINES.drawn(made, "light")
