"""Tables and plots of a results file; nothing is written that no run produced."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accuracy import records, steps, summary
from benchmarks.accuracy.records import Record
from benchmarks.accuracy.rows import (
    DENSE,
    GRANULARITIES,
    HASHED,
    LAW,
    REFLECT,
    UNSIGNED,
    law_name,
)
from benchmarks.accuracy.running import RESULTS, ROOT, default_name
from benchmarks.accuracy.summary import ENOUGH, Summary
from benchmarks.harness.chart import THEMES, Chart, Point, Series
from benchmarks.harness.report import stale_charts, write
from benchmarks.harness.table import NOT_MEASURED, markdown

Found = Mapping[str, Summary]
# What a reader of the README chooses between; the page beside the results has every row.
CHOICES = ("dense", "rpg 17x g1 element", "rpg 17x g64 vector", "hashed 17x", "unsigned 17x",
           "narrow 17x", "rpg 4x g1 element", "rpg 4x g64 vector", "narrow 4x", "hashed 4x",
           "unsigned 4x")  # fmt: skip
# How a bank is trained.
TRAINED = ("rpg 17x g64 vector", *(f"rpg 17x g64 vector, {setting}" for setting in (
           "init_std 1", "bank lr x 0.3", "bank lr x 3", "bank decay 0", "bank decay x 10",
           "scale fan_in", "lr x 0.5", "lr x 2")), "dense", "dense, lr x 0.5",
           "dense, lr x 2")  # fmt: skip
# What laps cost, in float32.
SHARED = tuple(f"rpg {size}x g64 vector{laps}" for size, laps in (
         (4, ""), (4, ", 4 laps"), (17, ""), (17, ", 4 laps"), (17, ", 9 laps"),
         (17, ", 16 laps")))  # fmt: skip
# Results file -> page of the repository -> the rows that stand between its marks.
DOCS = ROOT / "docs"
PAGES = {
    "accuracy_cifar10": {
        DOCS / "results" / "accuracy.md": CHOICES,
        DOCS / "training.md": TRAINED,
    },
    "accuracy_cifar10_fp32": {DOCS / "results" / "laps.md": SHARED},
}
MARKS = ("<!-- accuracy -->", "<!-- /accuracy -->")
CURVES = ("dense", "rpg 4x g64 vector", "rpg 17x g1 element", "rpg 17x g64 vector",
          "hashed 17x", "unsigned 17x", "narrow 17x")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of ``report``."""
    default = RESULTS / default_name("small", "cifar10")
    parser.add_argument("--results", type=Path, default=default, help="default: CIFAR-10's")
    parser.add_argument(
        "--images", type=Path, default=ROOT / "docs" / "images", help="folder for the plots"
    )
    parser.add_argument("--check", action="store_true", help="change nothing, fail when stale")


def main(args: argparse.Namespace) -> int:
    """Write the page beside the results file and the plots; the exit status.

    Raises:
        ValueError: there are no runs, or the file is damaged.
    """
    runs = records.read(args.results)
    if not runs:
        raise ValueError(f"results: got {args.results} without runs, wanted a file that has some")
    page = "\n".join(tables(runs))
    texts = {args.results.with_suffix(".md"): page + "\n"}
    if args.results.resolve().parent == RESULTS:
        found = summary.summaries(runs)
        for path, names in PAGES.get(args.results.stem, {}).items():
            texts[path] = between_marks(path.read_text(encoding="utf-8"), names, found)
    drawn = plots(runs, args.results.stem, steps.read(args.results))
    stale = stale_charts({args.images / name: plot for name, plot in drawn.items()})
    for path, text in texts.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale[path] = partial(str, text)
    if not args.check:
        print(page)
    return write(stale, args.check)


def tables(runs: Sequence[Record]) -> list[str]:
    """Everything as Markdown: where it comes from, all rows, the design table, the fit."""
    found = summary.summaries(runs)
    compressions = sorted({s.compression for s in _design(found)}, reverse=True)
    lines = [*heading(runs), "", *all_rows(found)]
    for compression in compressions:
        lines += ["", f"Granularity and signs at {compression:g}x:", ""]
        lines += design(found, compression)
    return [*lines, "", *fit(found)]


def between_marks(text: str, names: Sequence[str], found: Found) -> str:
    """A page with those of the named rows that have runs between its marks.

    Raises:
        ValueError: the page has no marks.
    """
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise ValueError(f"page: got one without {' and '.join(MARKS)}, wanted one with both")
    rows = all_rows({name: found[name] for name in names if name in found}, found)
    return "\n".join([before + MARKS[0], "", *rows, "", MARKS[1] + after])


def heading(runs: Sequence[Record]) -> list[str]:
    """Data set, recipe and machine, and how far seeds spread."""
    first = runs[0]
    recipe, data = first["recipe"], first["data"]
    machines = sorted(
        {
            f"{e['device_name']}, {e['threads']} thread{'s' * (e['threads'] > 1)}, "
            f"torch {e['torch']}"
            for e in (run["environment"] for run in runs)
        }
    )
    pooled = summary.spread(summary.summaries(runs))
    lines = [
        f"{data['name']}: {data['train_images']:,} training and {data['test_images']:,} test "
        f"images; {recipe['network']} ResNet, {recipe['epochs']} epochs, batch "
        f"{recipe['batch_size']}, SGD with Nesterov momentum {recipe['momentum']:g}, one-cycle "
        f"learning rate up to {recipe['lr']:g}, weight decay {recipe['weight_decay']:g}, "
        f"{'flips and crops' if recipe['augment'] else 'no augmentation'}, "
        f"{'bf16 autocast' if recipe['bfloat16'] else 'fp32'}. "
        f"{len(runs)} runs on {'; '.join(machines)}.",
        "",
        "Test accuracy in per cent: mean over seeds ± its standard error. A difference is taken "
        "seed by seed.",
    ]
    if pooled:
        lines[-1] += (
            f" The standard deviation between seeds, pooled over all rows, is {pooled[0]:.2f} "
            f"points ({pooled[1]} degrees of freedom): by chance alone, two rows of {ENOUGH} seeds "
            f"differ by about {pooled[0] * math.sqrt(2 / ENOUGH):.2f}."
        )
    return lines


def all_rows(shown: Found, found: Found | None = None) -> list[str]:
    """One line for each row that is shown, compared with those that were found.

    Differences are from the paper's map of the same size, or from the whole ring where that has
    too few seeds.
    """
    found = shown if found is None else found
    maps = [summary.element_wise(one, found) for one in shown.values()]
    has_map = any(one is not None and one.accuracy.count >= ENOUGH for one in maps)
    other, name = (
        (summary.element_wise, "element-wise") if has_map else (summary.whole_ring, "whole ring")
    )
    head = (
        "network", "degrees of freedom", "test accuracy", "seeds",
        f"minus {name} of this size", "training loss",
    )  # fmt: skip
    rows = []
    for one in shown.values():
        difference = summary.against(one, other(one, found))
        losses = [run["training_loss"] for run in one.runs.values()]
        loss = None if None in losses else summary.estimate(losses).mean
        count = one.accuracy.count
        rows.append(
            (
                one.row,
                f"{one.dof:,}",
                str(one.accuracy),
                f"{count}" if count >= ENOUGH else f"{count}, too few",
                "" if difference is None else _signed(difference),
                "not finite" if loss is None else f"{loss:.3f}",
            )
        )
    return markdown(head, rows)


def design(found: Found, compression: float) -> list[str]:
    """Granularity down, reflect across."""
    rows = []
    for granularity in GRANULARITIES:
        cells = [_design_cell(found, compression, granularity, reflect) for reflect in REFLECT]
        rows.append((f"{granularity}", *cells))
    return markdown(("granularity", *REFLECT), rows)


def fit(found: Found) -> list[str]:
    """The power law, with what it stands on."""
    rows = summary.sweep(found)
    law = summary.power_law(rows)
    if law is None:
        return [f"Power law: {NOT_MEASURED}; it takes three sizes, there are {len(rows)}."]
    few = [s.row for s in rows if s.accuracy.count < ENOUGH]
    sizes = ", ".join(f"{size:,}" for size in law.sizes)
    return [
        f"Power law: test error = {law.factor:.4g} · DoF^({law.exponent:.4f} ± {law.error:.4f}), "
        f"R² {law.determination:.3f}, through {sizes} degrees of freedom at granularity 64 with a "
        f"sign per slot{f'; fewer than {ENOUGH} seeds: ' + ', '.join(few) if few else ''}."
    ]


def plots(
    runs: Sequence[Record], stem: str, timed: Mapping[str, Any] | None = None
) -> dict[str, tuple[Chart, str]]:
    """By file name, every plot that the runs give and its theme: a light and a dark page.

    Where steps were ``timed``, accuracy is drawn against seconds and nothing else.
    """
    found = summary.summaries(runs)
    if timed is not None:
        return {
            f"{stem}_seconds_{theme}.svg": (steps.chart(found, timed), theme) for theme in THEMES
        }
    drawn = {"dof": _against_dof(found), "curves": _curves(found)}
    for compression in sorted({s.compression for s in _design(found)}, reverse=True):
        drawn[f"design_{compression:g}x"] = _designs(found, compression)
    return {
        f"{stem}_{name}_{theme}.svg": (chart, theme)
        for name, chart in drawn.items()
        for theme in THEMES
        if chart.series
    }


def _against_dof(found: Found) -> Chart:
    sweep = summary.sweep(found)
    series = [
        _series("granularity 64, signs per slot", sweep, "circle"),
        _series(
            "granularity 1, signs per element",
            _plain(found, LAW, granularity=1, reflect="element"),
            "diamond",
        ),
        _series("HashedNet-style", _plain(found, HASHED), "square"),
        _series("unsigned random", _plain(found, UNSIGNED), "square"),
        _series("dense, and narrowed", _plain(found, DENSE), "triangle", "dashed"),
    ]
    law = summary.power_law(sweep)
    if law:
        steps = [law.sizes[0] * (law.sizes[-1] / law.sizes[0]) ** (i / 40) for i in range(41)]
        curve = [Point(dof, law.accuracy(dof)) for dof in steps]
        series.append(Series(f"error = a · DoF^{law.exponent:.3f}", curve, mark=""))
    sizes = [point.x for one in series for point in one.points]
    return Chart(
        "Test accuracy against degrees of freedom",
        "degrees of freedom of the block convolutions",
        "test accuracy (%)",
        [one for one in series if one.points],
        size_ticks(sizes),
        log_x=True,
    )


_SIZES = [
    (m * 10.0**p, f"{m}{'0' * (p % 3)}{'KM'[p // 3 - 1]}") for p in range(3, 8) for m in (1, 2, 5)
]


def size_ticks(sizes: Sequence[float]) -> list[tuple[float, str]]:
    """Places and names on a logarithmic axis of degrees of freedom.

    Example:
        >>> size_ticks([45_000, 210_000])
        [(50000.0, '50K'), (100000.0, '100K'), (200000.0, '200K')]
    """
    if not sizes:
        return []
    return [(x, name) for x, name in _SIZES if min(sizes) / 1.3 <= x <= max(sizes) * 1.3]


def _curves(found: Found) -> Chart:
    shown = [found[name] for name in CURVES if name in found]
    label = ""
    if shown:
        run = shown[0].any
        count = min(run["epoch_test_images"], run["data"]["test_images"])
        label = f"accuracy on {count:,} test images (%)"
    series = [
        Series(one.row, [Point(i, y) for i, y in enumerate(one.curve, 1)], mark="") for one in shown
    ]
    epochs = range(1, 1 + max((len(one.points) for one in series), default=0))
    ticks = [(float(i), str(i)) for i in epochs]
    return Chart("Convergence, means over seeds", "epoch", label, series, ticks)


def _designs(found: Found, compression: float) -> Chart:
    series = []
    for number, (reflect, mark) in enumerate(
        zip(REFLECT, ("circle", "square", "diamond"), strict=True)
    ):
        names = [(g, law_name(compression, g, reflect)) for g in GRANULARITIES]
        # Side by side, so that error bars can be told apart.
        shift = 1.06 ** (number - 1)
        points = [_point(found[name], g * shift) for g, name in names if name in found]
        series.append(Series(f"signs: {reflect}", points, "dashed", mark))
    return Chart(
        f"Granularity and signs at {compression:g}x compression",
        "granularity",
        "test accuracy (%)",
        [one for one in series if one.points],
        [(float(g), str(g)) for g in GRANULARITIES],
        log_x=True,
    )


def _design(found: Found) -> list[Summary]:
    """Rows of the design table: nothing but size, granularity and reflect is set."""
    names = {"map", "compression", "granularity", "reflect"}
    rows = [s for s in found.values() if s.settings["map"] == LAW and set(s.settings) <= names]
    tabled = {s.compression for s in rows if "granularity" in s.settings}
    return [s for s in rows if s.compression in tabled]


def _design_cell(found: Found, compression: float, granularity: int, reflect: str) -> str:
    if granularity == 1 and reflect == "vector":
        return "as element"
    one = found.get(law_name(compression, granularity, reflect))
    if one is None:
        return NOT_MEASURED
    return f"{one.accuracy} (n = {one.accuracy.count})"


def _plain(found: Found, kind: str, **settings: object) -> list[Summary]:
    """Rows of a map trained as all are, smallest first."""
    rows = []
    for one in found.values():
        rest = {k: v for k, v in one.settings.items() if k not in ("map", "compression")}
        if one.settings["map"] == kind and rest == settings:
            rows.append(one)
    return sorted(rows, key=lambda s: s.dof)


def _series(label: str, rows: Sequence[Summary], mark: str, line: str = "none") -> Series:
    return Series(label, [_point(one, one.dof) for one in rows], line, mark)


def _point(one: Summary, x: float) -> Point:
    mean, error = one.accuracy.mean, one.accuracy.error
    if error is None:
        return Point(float(x), mean)
    return Point(float(x), mean, mean - error, mean + error)


def _signed(value: summary.Estimate) -> str:
    return f"{'+' if value.mean >= 0 else ''}{value}"
