"""Charts of accuracy as SVG, written out by hand: the same bytes on every machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from benchmarks.harness.plot import THEMES

# Okabe and Ito's colours, in the shades that show on both backgrounds; "" is the text's colour.
COLOURS = {"light": ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "", "#59636e")}
COLOURS["dark"] = ("#56b4e9", "#e69f00", "#2fbf91", "#cc79a7", "#f0e442", "", "#9198a1")
SHAPES = {
    "circle": "",
    "square": "-4.5,-4.5 4.5,-4.5 4.5,4.5 -4.5,4.5",
    "triangle": "0,-5.5 5.5,4.5 -5.5,4.5",
    "diamond": "0,-6 6,0 0,6 -6,0",
}
_LEFT, _TOP, _WIDTH, _HEIGHT, _LEGEND, _BOTTOM = 62, 40, 500, 320, 260, 52
_FONT = 'font-family="system-ui, \'Segoe UI\', Helvetica, Arial, sans-serif" font-size="13"'


@dataclass(frozen=True)
class Point:
    """A place, its standard error (None: not known) and what it is."""

    x: float
    y: float
    error: float | None = None
    about: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one look; ``line`` is "none", "solid" or "dashed", ``mark`` a shape or ""."""

    label: str
    points: Sequence[Point]
    line: str = "solid"
    mark: str = "circle"


def svg(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    theme: str,
    x_ticks: Sequence[tuple[float, str]],
    log_x: bool = False,
) -> str:
    """A whole chart on a transparent background.

    Args:
        title: above it.
        x_label, y_label: of the axes.
        series: at least one with a point; in the order of the legend.
        theme: ``"light"`` or ``"dark"``.
        x_ticks: places and names.
        log_x: whether x is drawn by its logarithm.
    """
    colours = THEMES[theme]
    points = [point for one in series for point in one.points]
    low, high, step = _range(
        [p.y - (p.error or 0) for p in points] + [p.y + (p.error or 0) for p in points]
    )
    places = [_place(x, log_x) for x in (*(p.x for p in points), *(x for x, _ in x_ticks))]
    first, last = min(places), max(places)
    margin = 0.04 * (last - first) or 1.0
    first, last = first - margin, last + margin

    def at_x(value: float) -> float:
        return _LEFT + (_place(value, log_x) - first) / (last - first) * _WIDTH

    def at_y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * _HEIGHT

    bottom, width = _TOP + _HEIGHT, _LEFT + _WIDTH + _LEGEND
    height = bottom + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" {_FONT} fill="{colours["text"]}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<text x="{_LEFT}" y="20" font-weight="600">{escape(title)}</text>',
    ]
    for number in range(round((high - low) / step) + 1):
        value = low + number * step
        y = at_y(value)
        parts.append(_rule(_LEFT, y, _LEFT + _WIDTH, y, colours["grid"]))
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4.5:.1f}" text-anchor="end">{value:g}</text>')
    for value, name in x_ticks:
        x = at_x(value)
        parts.append(_rule(x, _TOP, x, bottom, colours["grid"]))
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(name)}</text>'
        )
    middle = _TOP + _HEIGHT / 2
    parts.append(
        f'<text x="{_LEFT + _WIDTH / 2:.1f}" y="{bottom + 40}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    parts.append(
        f'<text transform="translate(16 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for number, one in enumerate(series):
        palette = COLOURS[theme]
        colour = palette[number % len(palette)] or colours["text"]
        parts += _drawn(one, [(at_x(p.x), at_y(p.y)) for p in one.points], colour)
        for point in one.points:
            if point.error:
                x, up, down = at_x(point.x), *(at_y(point.y + s * point.error) for s in (1, -1))
                parts.append(_rule(x, up, x, down, colour))
        y = _TOP + 12 + 22 * number
        at = _LEFT + _WIDTH + 22
        key = Series(one.label, [Point(0, 0)] * 2, one.line, "")
        parts += _drawn(key, [(at - 11, y), (at + 11, y)], colour)
        if one.mark:
            parts.append(_mark(one.mark, at, y, colour, one.label))
        parts.append(f'<text x="{at + 18}" y="{y + 4.5}">{escape(one.label)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _drawn(series: Series, places: Sequence[tuple[float, float]], colour: str) -> list[str]:
    parts = []
    if series.line != "none" and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashes = ' stroke-dasharray="5 4"' if series.line == "dashed" else ""
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>'
        )
    if series.mark:
        for point, (x, y) in zip(series.points, places, strict=True):
            parts.append(_mark(series.mark, x, y, colour, point.about or series.label))
    return parts


def _mark(shape: str, x: float, y: float, colour: str, about: str) -> str:
    tip = f"<title>{escape(about)}</title>"
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}">{tip}</circle>'
    return (
        f'<polygon transform="translate({x:.1f} {y:.1f})" points="{SHAPES[shape]}" '
        f'fill="{colour}">{tip}</polygon>'
    )


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _place(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    """Lowest and highest tick around the values, and the step between ticks: 1, 2 or 5 times 10^n.

    Example:
        >>> _range([61.3, 72.9])
        (60.0, 74.0, 2.0)
    """
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 1, high + 1
    rough = (high - low) / 7
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(math.log(rough / (m * power))))
    return math.floor(low / step) * step, math.ceil(high / step) * step, step
