"""Plots as SVG, written out by hand: small files that are the same on every machine.

One row for each case, one mark for each implementation, on a logarithmic axis. Colours can be told
apart with any colour vision, and the marks differ in shape as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

THEMES = {
    "light": {"text": "#1f2328", "grid": "#d1d9e0", "one": "#59636e", "dense": "#1f2328"},
    "dark": {"text": "#f0f6fc", "grid": "#3d444d", "one": "#9198a1", "dense": "#f0f6fc"},
}
# Okabe and Ito's colours, in the shades that show on both backgrounds.
MARKS = {
    "dense": ("", "triangle"),
    "published": ("#d55e00", "square"),
    "unpack": ("#cc79a7", "diamond"),
    "rpg-kernels": ("#0072b2", "circle"),
}
_DARK_OURS = "#56b4e9"
_ROW, _LEFT, _WIDTH, _TOP, _BOTTOM, _RIGHT = 26, 330, 380, 62, 44, 24
_FONT = 'font-family="system-ui, \'Segoe UI\', Helvetica, Arial, sans-serif" font-size="13"'


@dataclass(frozen=True)
class Row:
    """One case: its label, and a value above 0 for each implementation that has one."""

    label: str
    values: Mapping[str, float]


def svg(title: str, axis: str, rows: Sequence[Row], theme: str) -> str:
    """A whole plot.

    Args:
        title: above it.
        axis: what the values are; a line marks the value 1.
        rows: from top to bottom, at least one with at least one value.
        theme: ``"light"`` or ``"dark"``; the background is left transparent.
    """
    colours = THEMES[theme]
    everything = [value for row in rows for value in row.values.values()]
    low = 10 ** math.floor(math.log10(min(*everything, 1.0)) + 1e-9)
    high = 10 ** math.ceil(math.log10(max(*everything, 1.0)) - 1e-9)
    if low == high:
        low, high = low / 10, high * 10
    scale = _WIDTH / math.log10(high / low)

    def x(value: float) -> float:
        return _LEFT + math.log10(value / low) * scale

    height = _TOP + _ROW * len(rows) + _BOTTOM
    bottom = _TOP + _ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + _RIGHT}" '
        f'height="{height}" viewBox="0 0 {_LEFT + _WIDTH + _RIGHT} {height}" {_FONT} '
        f'fill="{colours["text"]}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<text x="{_LEFT}" y="20" font-weight="600">{escape(title)}</text>',
    ]
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at, value = x(10.0**power), 10.0**power
        colour = colours["one" if power == 0 else "grid"]
        parts.append(
            f'<line x1="{at:.1f}" y1="{_TOP - 6}" x2="{at:.1f}" y2="{bottom}" stroke="{colour}"/>'
        )
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>')
    parts.append(
        f'<text x="{_LEFT + _WIDTH / 2:.1f}" y="{bottom + 37}" text-anchor="middle">'
        f"{escape(axis)}</text>"
    )
    parts += _legend(rows, colours, theme)
    for number, row in enumerate(rows):
        y = _TOP + _ROW * (number + 0.5)
        parts.append(
            f'<text x="{_LEFT - 12}" y="{y + 4.5:.1f}" text-anchor="end">{escape(row.label)}</text>'
        )
        for name, value in row.values.items():
            parts.append(_mark(name, x(value), y, colours, theme, f"{row.label}: {value:.3g}"))
    return "\n".join([*parts, "</svg>", ""])


def _legend(rows: Sequence[Row], colours: Mapping[str, str], theme: str) -> list[str]:
    parts, at = [], float(_LEFT)
    for name in MARKS:
        if any(name in row.values for row in rows):
            parts.append(_mark(name, at + 6, 38, colours, theme, name))
            parts.append(f'<text x="{at + 18:.1f}" y="42.5">{escape(name)}</text>')
            at += 34 + 7.2 * len(name)
    return parts


def _mark(name: str, x: float, y: float, colours: Mapping[str, str], theme: str, about: str) -> str:
    colour, shape = MARKS[name]
    colour = colour or colours["dense"]
    if name == "rpg-kernels" and theme == "dark":
        colour = _DARK_OURS
    tip = f"<title>{escape(f'{name}, {about}' if name not in about else about)}</title>"
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{colour}">{tip}</circle>'
    corners = {
        "square": ((-5, -5), (5, -5), (5, 5), (-5, 5)),
        "diamond": ((0, -6.5), (6.5, 0), (0, 6.5), (-6.5, 0)),
        "triangle": ((0, -6), (6, 5), (-6, 5)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{colour}">{tip}</polygon>'
