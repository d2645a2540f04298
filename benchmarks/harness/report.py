"""Writes the tables and plots of README and documentation from result files.

    python -m benchmarks.harness.report [--root DIR] [--check]

A Markdown file asks for a table with a pair of marks, and everything between them is replaced::

    <!-- report:speed -->
    <!-- /report -->

``--check`` changes nothing, and fails when something is not as it would be written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import cases, headline, older, schema, table
from benchmarks.harness.chart import THEMES, Chart, Point, Series
from benchmarks.harness.cpu import networks_report
from benchmarks.harness.cpu import report as cpu_tables
from benchmarks.harness.machine import BUSY_SPREAD
from benchmarks.harness.rivals import report as rivals_report
from benchmarks.harness.table import NOT_MEASURED
from benchmarks.harness.timing import COLD
from rpg_kernels import _checks
from rpg_kernels.cli import said
from rpg_kernels.timing import seconds

RESULTS, IMAGES = Path("benchmarks/results"), Path("docs/images")
PAGES = ("README.md", "docs/*.md", "docs/results/*.md")
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
PLOTS = {
    "speed": ("Forward and backward of one layer", "time relative to dense"),
    "memory": ("Allocated in forward and backward", "peak relative to the dense weight's bytes"),
}
# Implementation -> colour and mark: told apart with any colour vision.
LOOKS = {
    "dense": ("text", "triangle"),
    "published": ("orange", "square"),
    "unpack": ("pink", "diamond"),
    "rpg-kernels": ("blue", "circle"),
}
_SHOWN = ("dense", "published", "unpack")
_OURS = "rpg-kernels"
_MARK = re.compile(r"<!-- (/?)report(?::([\w-]+))? -->")
Record = dict[str, Any]
Group = dict[str, Mapping[str, Any]]  # rows of a case by name


def newest(root: Path) -> dict[str, tuple[Path, Record]]:
    """By device, the result file of the harness that was begun last, complete ones only.

    Raises:
        ValueError: a file is no JSON, or one of the harness does not keep to the format.
    """
    found: dict[str, tuple[Path, Record]] = {}
    for path in sorted((root / RESULTS).glob("*.json")):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not isinstance(held, dict) or held.get("schema") != schema.SCHEMA:
            continue  # of an older script
        record = schema.load(path)
        device = record["environment"]["device"]
        if record["complete"] and (
            device not in found or record["created"] > found[device][1]["created"]
        ):
            found[device] = (path, record)
    return found


def _per_device(root: Path, make: Callable[[Record], list[str]]) -> Iterator[str]:
    """A table for each device: where its figures come from, and what ``make`` makes of them."""
    found = newest(root)
    for number, (device, label) in enumerate(DEVICES.items()):
        if number:
            yield ""
        if device not in found:
            yield f"{label}: {NOT_MEASURED}."
            continue
        path, record = found[device]
        first, *remarks = table.heading(record)
        link = f"[result file]({{up}}{path.relative_to(root)})"
        yield f"{label}: {first}; {record['created'][:10]} ({link})."
        for remark in remarks:
            yield f"{remark}."
        yield ""
        yield from make(record)


def _speed(root: Path) -> list[str]:
    """Forward and backward of every case, cold."""

    def make(record: Record) -> list[str]:
        clock = record["headline"]
        head = ("case", "bank", *_SHOWN, _OURS, "of dense", "of published")
        rows = []
        for case, bank, group in _groups(record):
            times = {n: table.comparable(row, "full", COLD, clock) for n, row in group.items()}
            ours = times.get(_OURS)
            cells = [_time(group.get(name), clock) for name in (*_SHOWN, _OURS)]
            of = [times.get(name) for name in ("dense", "published")]
            rows.append((case, bank, *cells, *(table.ratio(ours, t) for t in of)))
        return table.markdown(head, rows)

    return list(_per_device(root, make))


def _memory(root: Path) -> list[str]:
    """Bytes that a call allocates and saves, and that stay, by implementation."""

    def make(record: Record) -> list[str]:
        head = (
            "case",
            "bank",
            *(f"peak, {name}" for name in ("dense", "published", _OURS)),
            *(f"saved per weight, {name}" for name in ("published", _OURS)),
            f"stays per DoF, {_OURS}",
        )
        rows = []
        for case, bank, group in _groups(record):

            def cell(name: str, key: str, of: str = "", group: Group = group) -> str:
                memory = group[name]["memory"] if name in group else None
                if of:
                    memory = memory and memory[of]
                if not memory:
                    return NOT_MEASURED
                return f"{memory[key]:.2f} B" if of else f"{memory[key] / 1e6:.2f} MB"

            rows.append(
                (
                    case,
                    bank,
                    *(cell(name, "full_peak") for name in ("dense", "published", _OURS)),
                    *(cell(name, "saved", "per_virtual_weight") for name in ("published", _OURS)),
                    cell(_OURS, "persistent", "per_dof"),
                )
            )
        return table.markdown(head, rows)

    return list(_per_device(root, make))


def _groups(record: Record) -> Iterator[tuple[str, str, Group]]:
    """(case, bank, rows by name); what the dispatch table chooses of ours goes by our name."""
    for (case, bank), rows in table.by_case(record["results"]).items():
        yield case, bank, {_OURS if row["chosen"] else row["impl"]: row for row in rows}


def _time(row: Mapping[str, Any] | None, clock: str) -> str:
    if row is None:
        return NOT_MEASURED
    found = table.median(row, "full", COLD, clock)
    if found is not None:
        return seconds(found) + _doubt(row, clock)
    return row["status"] if row["status"] not in (schema.OK, *schema.NOT_RUN) else NOT_MEASURED


def _doubt(row: Mapping[str, Any], clock: str) -> str:
    """The spread of a figure where that is large, and the clock where it is another."""
    figures = row["times"]["full"][COLD]
    if clock not in figures:
        return f" ({next(iter(figures))})"
    spread = (figures[clock]["q90_s"] - figures[clock]["q10_s"]) / figures[clock]["median_s"]
    return f" ±{spread / 2:.0%}" if spread > BUSY_SPREAD else ""


def _plots(root: Path) -> list[str]:
    """Pictures of what was measured, for a light and a dark page."""
    lines: list[str] = []
    found = newest(root)
    for device, label in DEVICES.items():
        if device not in found:
            lines += [f"{label}: {NOT_MEASURED}.", ""]
            continue
        for name, (title, axis) in PLOTS.items():
            light, dark = (f"{{up}}{IMAGES}/{_image(name, device, theme)}" for theme in THEMES)
            lines += [
                "<picture>",
                f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">',
                f'<img alt="{title}: {axis}, {label}" src="{light}">',
                "</picture>",
                "",
            ]
    return lines[:-1]


def _image(name: str, device: str, theme: str) -> str:
    return f"bench_{name}_{device}_{theme}.svg"


def images(root: Path) -> dict[Path, tuple[Chart, str]]:
    """By path, every plot that the result files give and its theme."""
    return {
        root / IMAGES / _image(name, device, theme): (_chart(title, axis, values), theme)
        for device, (_, record) in newest(root).items()
        for name, (title, axis) in PLOTS.items()
        for theme in THEMES
        if (values := {"speed": _relative_times, "memory": _relative_peaks}[name](record))
    }


def _chart(title: str, axis: str, rows: Mapping[str, Mapping[str, float]]) -> Chart:
    series = []
    for name, (colour, mark) in LOOKS.items():
        points = [Point(of[name], row) for row, of in enumerate(rows.values()) if name in of]
        if points:
            series.append(Series(name, points, "none", mark, colour))
    return Chart(title, axis, "", series, rows=tuple(rows), log_x=True)


def _relative_times(record: Record) -> dict[str, dict[str, float]]:
    """By case, and then by implementation."""
    rows = {}
    for case, bank, group in _groups(record):
        times = {
            name: table.comparable(row, "full", COLD, record["headline"])
            for name, row in group.items()
            if name in LOOKS
        }
        dense = times.get("dense")
        if dense:
            rows[f"{case} {_brief(bank)}"] = {name: t / dense for name, t in times.items() if t}
    return rows


def _relative_peaks(record: Record) -> dict[str, dict[str, float]]:
    """By case, and then by implementation."""
    rows = {}
    for case, bank, group in _groups(record):
        item = next(iter(group.values()))
        size = item["virtual_weights"] * cases.DTYPES[item["dtype"]][1].itemsize
        values = {
            name: row["memory"]["full_peak"] / size
            for name, row in group.items()
            if name in LOOKS and row["memory"] and row["memory"]["full_peak"]
        }
        if values:
            rows[f"{case} {_brief(bank)}"] = values
    return rows


def _brief(bank: str) -> str:
    """DoF, granularity, the sign mode's first letter, and windows where there are some."""
    dof, granularity, reflect, _, *windows = bank.split()
    return " ".join((dof, granularity, reflect[0], *windows))


def _schema(root: Path) -> list[str]:
    """The format of result files."""
    rows = ((f"`{name}`", kind, about) for name, kind, about in schema.describe())
    return [
        "| field | kind | meaning |",
        "|---|---|---|",
        *("| " + " | ".join(r) + " |" for r in rows),
    ]


def _cases(root: Path) -> list[str]:
    """The layers that can be measured."""
    rows = [
        (
            "<br>".join(f"`{name}`" for name in layer.names),
            layer.op,
            " x ".join(map(str, layer.weight)),
            ", ".join(map(str, cases.BATCHES[layer.op])),
        )
        for layer in cases.LAYERS
    ]
    return table.markdown(("layer", "operator", "weight", "images or tokens"), rows)


BLOCKS: dict[str, Callable[[Path], list[str]]] = {
    "speed": _speed,
    "memory": _memory,
    "plots": _plots,
    "schema": _schema,
    "cases": _cases,
    **{
        name: lambda root, make=make: make(root / RESULTS)  # type: ignore[misc]
        for tables in (cpu_tables, networks_report, rivals_report, headline, older)
        for name, make in tables.TABLES.items()
    },
}


def page(text: str, root: Path, depth: int = 0) -> str:
    """A Markdown page with everything between its marks written anew.

    Args:
        text: the page.
        root: of the checkout.
        depth: folders between root and page, for links.

    Raises:
        ValueError: an unknown table, with those that exist; a mark without its partner.
    """
    if not any(_MARK.fullmatch(line.strip()) for line in text.splitlines()):
        return text
    lines: list[str] = []
    inside: str | None = None
    for line in text.splitlines():
        mark = _MARK.fullmatch(line.strip())
        if mark is None:
            if inside is None:
                lines.append(line)
            continue
        closing, name = mark[1] == "/", mark[2]
        if closing == (inside is None) or (not closing and name is None):
            raise ValueError(f"marks: got {line.strip()!r}, wanted a pair around each table")
        lines.append(line)
        inside = None if closing else _checks.choice("report", name, tuple(BLOCKS))
        if inside is not None:
            # Blank lines, so that what stands between them is Markdown again.
            made = BLOCKS[inside](root)
            lines += ["", *(row.replace("{up}", "../" * depth) for row in made), ""]
    if inside is not None:
        raise ValueError(f"marks: got no <!-- /report --> after report:{inside}, wanted one")
    return "\n".join(lines) + "\n"


def stale(root: Path) -> dict[Path, Callable[[], str]]:
    """Files that are not as they would be written, with what makes what they should hold."""
    found = stale_charts(images(root))
    for pattern in PAGES:
        for path in sorted(root.glob(pattern)):
            depth = len(path.relative_to(root).parts) - 1
            before = path.read_text(encoding="utf-8")
            text = page(before, root, depth)
            if text != before:
                found[path] = partial(str, text)
    return found


def stale_charts(charts: Mapping[Path, tuple[Chart, str]]) -> dict[Path, Callable[[], str]]:
    """Those of the pictures that are not there or are others, with what draws them."""
    return {
        path: partial(chart.svg, theme)
        for path, (chart, theme) in charts.items()
        if not path.exists() or not chart.drawn(path.read_text(encoding="utf-8"), theme)
    }


def write(files: Mapping[Path, Callable[[], str]], check: bool) -> int:
    """Write what is stale, or with ``check`` only say so; the exit status."""
    for path, make in files.items():
        print(f"{path}: {'stale' if check else 'written'}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(make(), encoding="utf-8")
    if check and files:
        print("without --check they are written anew", file=sys.stderr)
    return int(check and bool(files))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 when ``--check`` finds something stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="of the checkout")
    parser.add_argument("--check", action="store_true", help="change nothing, fail when stale")
    args = parser.parse_args(arguments)
    return said("report", lambda: write(stale(args.root), args.check))


if __name__ == "__main__":
    sys.exit(main())
