"""``python -m tools.reports.glossary`` draws docs/images/glossary_*.svg: the unit law's words.

Every coloured position is one of a small layer, asked of ``UnitLaw``. A test compares the files
byte by byte; matplotlib is that of ``constraints-dev.txt``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.path import Path as Outline
from matplotlib.transforms import AffineDeltaTransform

from rpg_kernels.law.unit import OCTET, UnitLaw
from tools.reports.cuda_sass import ROOT

IMAGES = ROOT / "docs" / "images"
THEMES = {
    "light": {"text": "#1f2328", "faint": "#59636e", "paper": "#ffffff"},
    "dark": {"text": "#f0f6fc", "faint": "#9198a1", "paper": "#0d1117"},
}
HUES = ("#0087d4", "#d55e00", "#009e73")  # a window each
BLOCK = 8  # elements
WINDOW = 64  # slots
LAW = UnitLaw(
    0, 0, 128, 4, BLOCK, 192, 0, "vector", True, laps=2, window=WINDOW, runs=1, taps=1
)  # fmt: skip
TILE = (0, 64, 1, 3)  # rows and columns, from and to
SHOWN = 20, 2  # row and block of the position that is drawn element by element
Colour = tuple[float, float, float]


def shade(window: int, place: int, paper: str) -> Colour:
    """The window's hue, stronger with the place in the window."""
    full, ground = to_rgb(HUES[window]), to_rgb(paper)
    weight = 0.2 + 0.8 * place / (WINDOW - 1)
    red, green, blue = (weight * f + (1 - weight) * g for f, g in zip(full, ground, strict=True))
    return red, green, blue


def picture(theme: str) -> str:
    """The whole drawing as SVG, on a transparent ground."""
    colours = THEMES[theme]
    settings: Any = {
        "svg.hashsalt": "glossary",
        "svg.fonttype": "none",
        "font.size": 9,
        "font.family": "sans-serif",
        "text.color": colours["text"],
    }
    slots = LAW.slot(torch.arange(LAW.rows)[:, None], torch.arange(LAW.blocks)).tolist()
    with mpl.rc_context(settings):
        figure = Figure(figsize=(11.8, 6.2))
        _ring(_axes(figure, (0.0, 0.3, 0.31, 0.62), (-1.45, 1.45), (-1.45, 1.45)), colours)
        _block(_axes(figure, (0.02, 0.0, 0.6, 0.22), (-1, 22), (-1.2, 5)), colours, slots)
        _unit(_axes(figure, (0.3, 0.27, 0.38, 0.7), (-14, 68), (-34, 40)), colours, slots)
        _matrix(_axes(figure, (0.675, 0.02, 0.325, 0.95), (-2.1, 6.8), (142, -14)), colours, slots)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def _axes(figure: Figure, box: Any, x: tuple[float, float], y: tuple[float, float]) -> Any:
    axes = figure.add_axes(box)
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    return axes


def _rectangles(
    axes: Any,
    corners: Sequence[tuple[float, float]],
    size: tuple[float, float],
    faces: list[Colour],
) -> None:
    """Rectangles of one size; one outline for all of them keeps the file small."""
    outline = Outline(Outline.unit_rectangle().vertices * size)
    axes.add_collection(
        PathCollection(
            [outline],
            facecolors=faces,
            edgecolors="none",
            offsets=corners,
            offset_transform=AffineDeltaTransform(axes.transData),
            transform=axes.transData,
            clip_on=False,
        )
    )


def _bracket(
    axes: Any, x: tuple[float, float], y: tuple[float, float], text: str, colour: str, **how: Any
) -> None:
    """A line along one side of something, and what it is."""
    axes.plot(x, y, color=colour, linewidth=1.2, solid_capstyle="butt")
    centre = sum(x) / 2, sum(y) / 2
    axes.annotate(text, centre, textcoords="offset points", color=colour, **how)


def _ring(axes: Any, colours: dict[str, str]) -> None:
    """The bank: slots once around, a hue for each window."""
    axes.set_aspect("equal")
    turn = 2 * math.pi / LAW.slots
    for slot in range(LAW.slots):
        face = shade(*divmod(slot, WINDOW), colours["paper"])
        corners = [
            (radius * math.sin(angle), radius * math.cos(angle))
            for radius, angle in (
                (0.76, slot * turn),
                (1, slot * turn),
                (1, (slot + 1) * turn),
                (0.76, (slot + 1) * turn),
            )
        ]
        axes.add_patch(Polygon(corners, facecolor=face, clip_on=False))
    for window, (x, y) in enumerate([(1.0, 0.9), (0, -1.2), (-1.0, 0.9)]):
        axes.text(x, y, f"window {window}", color=HUES[window], ha="center", weight="bold")
    axes.text(0, 0.12, "ring", ha="center", weight="bold", fontsize=11)
    about = f"the bank:\n{LAW.slots} slots of\n{BLOCK} elements"
    axes.text(0, 0.02, about, ha="center", va="top", color=colours["faint"])


def _unit(axes: Any, colours: dict[str, str], slots: list[list[int]]) -> None:
    """A window, and the rows of the unit that reads it: column 0."""
    read = [row[0] for row in slots]
    window = read[0] // WINDOW
    base, hue = window * WINDOW, HUES[window]
    places = [slot - base for slot in read]
    assert sorted(places) == sorted([*range(WINDOW)] * LAW.laps), "each slot is read in each lap"
    bars = [(f"window {window}", [*range(WINDOW)], 26)]
    for part in range(LAW.laps):
        bars.append(("rows", places[part * WINDOW : (part + 1) * WINDOW], 0 - 17 * part))
    for name, shown, y in bars:
        faces = [shade(window, place, colours["paper"]) for place in shown]
        _rectangles(axes, [(x, y) for x in range(len(faces))], (1, 6), faces)
        axes.text(-1, y + 3, name, color=hue, ha="right", va="center", weight="bold")
    count = WINDOW
    axes.text(64, 33, f"{count} slots, places 0 to {count - 1}", ha="right", color=colours["faint"])
    for row in range(OCTET):
        axes.plot(
            (row + 0.5, read[row] - base + 0.5), (6, 26), color=colours["text"], linewidth=0.7
        )
    _bracket(
        axes,
        (0, OCTET),
        (-1, -1),
        "octet",
        colours["text"],
        xytext=(0, -9),
        ha="center",
        va="center",
    )
    for part in range(LAW.laps):
        rows = f"rows {part * count} to {(part + 1) * count - 1} of column 0"
        axes.text(64, 7 - 17 * part, rows, ha="right", color=colours["faint"])
    about = f"unit: its rows read each slot of one window {LAW.laps} times"
    axes.text(32, -25, about, ha="center")
    about = "8 rows, an octet, read 8 neighbouring slots"
    axes.text(32, -30.5, about, ha="center", color=colours["faint"])


def _matrix(axes: Any, colours: dict[str, str], slots: list[list[int]]) -> None:
    """The virtual matrix, a rectangle for each block, in the colour of the slot that it reads."""
    corners = [(b, n) for n in range(LAW.rows) for b in range(LAW.blocks)]
    faces = [shade(*divmod(slot, WINDOW), colours["paper"]) for row in slots for slot in row]
    _rectangles(axes, corners, (0.93, 1), faces)
    for b, slot in enumerate(slots[0]):
        axes.text(b + 0.46, -1.5, str(b), ha="center", color=HUES[slot // WINDOW])
    axes.text(-0.2, -1.5, "column", ha="right")
    axes.text(2, -8, "virtual matrix", ha="center", weight="bold", fontsize=11)
    axes.text(
        2, 137, f"{LAW.rows} rows, {LAW.blocks} blocks each", ha="center", color=colours["faint"]
    )
    low, high, left, right = TILE
    axes.add_patch(
        Rectangle(
            (left - 0.035, low),
            right - left,
            high - low,
            fill=False,
            edgecolor=colours["text"],
            linewidth=2,
        )
    )
    middle = (low + high) / 2
    axes.plot((4.1, right), (middle, middle), color=colours["text"], linewidth=0.8)
    axes.text(4.15, middle, "tile: rows and\ncolumns that are\nworked on\nat once", va="center")
    axes.text(
        4.15,
        96,
        "here a unit is\na whole column;\na permutation\ngives units\ntheir windows",
        va="center",
        color=colours["faint"],
    )
    hue = HUES[slots[0][0] // WINDOW]
    _bracket(
        axes, (-1.35, -1.35), (0, LAW.rows), "unit", hue, xytext=(-4, 0), ha="right", va="center"
    )


def _block(axes: Any, colours: dict[str, str], slots: list[list[int]]) -> None:
    """One block of the matrix: the elements of its slot, with its sign."""
    n, b = SHOWN
    slot = slots[n][b]
    negative = bool(LAW.negative(torch.tensor(n), torch.tensor(b))[0])
    face = shade(*divmod(slot, WINDOW), colours["paper"])
    corners = [(8 + e, y) for y in (0, 3) for e in range(BLOCK)]
    _rectangles(axes, corners, (0.92, 1.2), [face] * len(corners))
    axes.text(7.6, 3.2, f"slot {slot} of the bank", ha="right")
    axes.text(7.6, 0.2, f"block {b} of row {n}", ha="right")
    axes.annotate(
        "", (11.95, 1.35), (11.95, 2.9), arrowprops={"arrowstyle": "->", "color": colours["text"]}
    )
    axes.text(12.3, 1.8, "sign " + ("−" if negative else "+") + ", times the layer's scale")
    axes.text(16.3, 3.2, f"{BLOCK} elements", color=colours["faint"])
    axes.text(16.3, 0.2, f"{BLOCK} virtual weights", color=colours["faint"])


def path(theme: str) -> Path:
    """Where a drawing lies."""
    return IMAGES / f"glossary_{theme}.svg"


def main() -> None:
    """Write both."""
    for theme in THEMES:
        path(theme).write_text(picture(theme), "utf-8")


if __name__ == "__main__":
    main()
