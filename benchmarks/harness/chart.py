"""Charts, drawn by matplotlib: SVG for a light and a dark page, or panels of a figure.

A picture carries a digest of what it was drawn from, of this file and of itself. So whether one is
as it would be drawn can be told without drawing, on machines with other fonts, another matplotlib
or none.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpg_kernels._extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THEMES = ("light", "dark")
# Okabe and Ito's colours, in the shades that show on either background.
COLOURS = {
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#e69f00"),
    "green": ("#009e73", "#2fbf91"),
    "pink": ("#cc79a7", "#cc79a7"),
    "yellow": ("#b58900", "#f0e442"),
    "text": ("#1f2328", "#f0f6fc"),
    "grey": ("#59636e", "#9198a1"),
    "grid": ("#d1d9e0", "#3d444d"),
}
_CYCLE = ("blue", "orange", "green", "pink", "yellow", "text", "grey")
MARKS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "": "None"}
_LINES = {"none": "none", "solid": "-", "dashed": "--"}
_WIDTH, _HEIGHT, _ROW, _AROUND = 8.2, 4.1, 0.27, 1.15  # inches


@dataclass(frozen=True)
class Point:
    """A place, and between what its value lies; None: not known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one look.

    Args:
        label: in the legend.
        points: in the order of the line.
        line: ``"none"``, ``"solid"`` or ``"dashed"``.
        mark: a key of MARKS.
        colour: a key of COLOURS; "" takes one by the place in the chart.
    """

    label: str
    points: Sequence[Point]
    line: str = "solid"
    mark: str = "circle"
    colour: str = ""


@dataclass(frozen=True)
class Chart:
    """What is drawn.

    Args:
        title, x_label, y_label: "" for none.
        series: at least one with a point, in the order of the legend.
        x_ticks: places and names; none lets matplotlib choose.
        rows: names of y = 0, 1, ... from top to bottom, for a chart whose rows are cases; a line
            then marks x = 1.
        log_x, log_y: whether an axis is logarithmic.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_ticks: Sequence[tuple[float, str]] = ()
    rows: Sequence[str] = ()
    log_x: bool = False
    log_y: bool = False

    def svg(self, theme: str) -> str:
        """The whole picture, on a transparent background.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        style = require("matplotlib.style", "matplotlib", "a chart")
        figure_module = require("matplotlib.figure", "matplotlib", "a chart")
        height = _AROUND + _ROW * len(self.rows) if self.rows else _HEIGHT
        written = io.StringIO()
        with style.context(["default", _style(theme)]):  # whatever the user's settings are
            figure = figure_module.Figure(figsize=(_WIDTH, height), layout="constrained")
            axes = figure.subplots()
            self.draw(axes, theme)
            axes.set_title(self.title, loc="left", fontweight="bold", pad=26 if self.rows else 8)
            legend: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
            if self.rows:
                legend = {"loc": "lower left", "bbox_to_anchor": (-0.01, 0.99), "ncols": 4}
            axes.legend(frameon=False, borderaxespad=0, **legend)
            metadata = {"Date": None, "Creator": None, "Title": self.title}
            figure.savefig(written, format="svg", metadata=metadata)
        body = written.getvalue()
        return f"{body}{self._mark(theme, body)}\n"

    def drawn(self, text: str, theme: str) -> bool:
        """Whether ``text`` is this picture, as ``svg`` made it, perhaps on another machine."""
        body, _, mark = text.rstrip("\n").rpartition("\n")
        return self._mark(theme, f"{body}\n") == mark

    def _mark(self, theme: str, body: str) -> str:
        # To six digits: the last ones differ between mathematical libraries.
        data = re.sub(r"\d+\.\d+(e-?\d+)?", lambda number: f"{float(number[0]):.6g}", repr(self))
        parts = (Path(__file__).read_text("utf-8"), data, theme, body)
        return f"<!-- {hashlib.sha256(chr(0).join(parts).encode()).hexdigest()} -->"

    def draw(self, axes: Axes, theme: str) -> None:
        """Draw everything but title and legend."""
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        for number, one in enumerate(self.series):
            known = [p for p in one.points if p.low is not None and p.high is not None]
            look: dict[str, Any] = {
                "color": _colour(one.colour or _CYCLE[number % len(_CYCLE)], theme), "zorder": 3,
            }  # fmt: skip
            axes.plot(
                [p.x for p in one.points], [p.y for p in one.points], label=one.label,
                marker=MARKS[one.mark], linestyle=_LINES[one.line], markersize=6.5, **look,
            )  # fmt: skip
            axes.vlines(
                [p.x for p in known], [p.low or 0.0 for p in known], [p.high or 0.0 for p in known],
                linewidth=1.3, **look,
            )  # fmt: skip
        if self.log_x:
            axes.set_xscale("log")
        if self.log_y:
            axes.set_yscale("log")
        for axis, log, ticks in (
            (axes.xaxis, self.log_x, self.x_ticks),
            (axes.yaxis, self.log_y, [*enumerate(self.rows)]),
        ):
            if ticks:
                axis.set_ticks([place for place, _ in ticks], [name for _, name in ticks])
                axis.set_minor_locator(NullLocator())
            elif log:
                low, high = axis.get_view_interval()
                axis.set_major_locator(
                    LogLocator(subs=(1.0, 2.0, 5.0) if high < 30 * low else (1.0,))
                )
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_locator(NullLocator())
        if self.rows:
            axes.axvline(1.0, color=_colour("grey", theme), linewidth=1.2)
            axes.set_ylim(len(self.rows) - 0.5, -0.5)
        axes.set_xlabel(self.x_label)
        axes.set_ylabel(self.y_label)


def _colour(name: str, theme: str) -> str:
    return COLOURS[name][THEMES.index(theme)]


def _style(theme: str) -> dict[str, Any]:
    """What differs from matplotlib's defaults."""
    text, grid = _colour("text", theme), _colour("grid", theme)
    return {
        # The font that comes with matplotlib decides where things are; others may show them.
        "font.family": ["sans-serif"],
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
        "font.size": 10,
        "axes.titlesize": 11,
        "figure.facecolor": "none",
        "figure.constrained_layout.w_pad": 0.08,
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "svg.fonttype": "none",
        "text.parse_math": False,
        "svg.hashsalt": "rpg-kernels",
        "text.color": text,
        "axes.labelcolor": text,
        "xtick.color": text,
        "ytick.color": text,
        "axes.edgecolor": grid,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": grid,
        "grid.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }
