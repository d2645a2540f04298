"""Tables of what the CPU suites measured, for README and docs/cpu.md (see ``bench.report``)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import schema as format_
from benchmarks.harness import table
from benchmarks.harness.cpu import decoder, rounds, run, schema
from benchmarks.harness.cpu.grid import BANKS, DTYPES, WHATS, Bank
from benchmarks.harness.machine import BUSY_SPREAD
from benchmarks.harness.table import NOT_MEASURED
from rpg_kernels import timing

_HEADLINE = BANKS[0]
Row = Mapping[str, Any]


def newest(results: Path, load: Callable[[Path], Any]) -> list[tuple[Path, Any]]:
    """For each number of threads, the complete file of a format that was begun last."""
    found: dict[int, tuple[Path, Any]] = {}
    for path in sorted(results.glob("*.json")):
        record = load(path)
        if not record or not record["complete"]:
            continue
        threads = record["environment"]["threads"]
        if threads not in found or record["created"] > found[threads][1]["created"]:
            found[threads] = path, record
    return [found[threads] for threads in sorted(found)]


def heading(path: Path, record: Any) -> Iterator[str]:
    """Machine, versions, where every figure is, and what is to be doubted."""
    first, *remarks = table.heading(record)
    link = f"[result file]({{up}}benchmarks/results/{path.name})"
    isa = record["environment"]["native"]
    yield f"{first}; kernels: {isa}; {record['clock']} time; {record['created'][:10]} ({link})."
    for remark in remarks:
        yield f"{remark}."


def measured(record: Any) -> Iterator[str]:
    """What kind of processor it is, what else it did, and what was not kept."""
    if record["lacks"]:
        yield f"A processor without {', '.join(record['lacks'])}."
    waits = [row["wait"] for row in record["results"] if row["wait"]]
    if waits and record["clock"] == "process":
        yield (
            f"Load average {record['load']['before']:.1f} when it began, wall time "
            f"{statistics.median(waits):.2f} times process time."
        )
    yield (
        "Ratios are of samples taken in turn; a row is kept where the standard error of the median "
        f"is at most {rounds.QUIET:.0%} of it."
    )
    if record["disturbed"]:
        names = f": {'; '.join(record['disturbed'])}" if len(record["disturbed"]) < 20 else ""
        yield f"Not kept: {len(record['disturbed'])} rows{names}."
    yield ""


def _kept(record: Any) -> list[Row]:
    """Rows with a figure, or that are wrong."""
    return [row for row in record["results"] if row["ratio"] or row["status"] != format_.OK]


def _shape(row: Row) -> str:
    return "x".join(map(str, row["weight_shape"]))


def times(ratio: float) -> str:
    """A ratio, with two digits where ours is slower.

    Example:
        >>> times(2.34), times(0.514)
        ('2.3x', '0.51x')
    """
    return f"{ratio:.1f}x" if ratio >= 0.995 else f"{ratio:.2f}x"


def speed(results: Path) -> list[str]:
    """The README's table: the headline's bank and dtype, a line for each layer and pass."""
    found = newest(results, run.load)
    if not found:
        return [NOT_MEASURED]
    path, record = found[0]
    lines: dict[tuple[str, str], dict[int, Row]] = {}
    for row in _kept(record):
        if row["dtype"] == DTYPES[0] and Bank(row["dof"], row["laps"]) == _HEADLINE:
            lines.setdefault((_shape(row), row["what"]), {})[row["batch"]] = row
    batches = sorted({batch for held in lines.values() for batch in held})
    rows = [
        (f"{shape}, {what}", *(_cell(held.get(batch)) for batch in batches))
        for (shape, what), held in lines.items()
    ]
    head = (f"{DTYPES[0]}, {_HEADLINE}: batch", *map(str, batches))
    return [*heading(path, record), *measured(record), *table.markdown(head, rows)]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] != format_.OK:
        return str(row["status"])
    return f"{timing.seconds(row['ours_s'])} ({times(row['ratio']['median'])})"


def layers(results: Path) -> list[str]:
    """Everything that was measured, for each number of threads."""
    text: list[str] = []
    for path, record in newest(results, run.load):
        text += [*layers_of(path, record), ""]
    return text[:-1] or [NOT_MEASURED]


def layers_of(path: Path, record: Any) -> list[str]:
    """The tables of one file, one for each layer and dtype: wins and losses alike."""
    text = [*heading(path, record), *measured(record)]
    kept = _kept(record)
    order = {what: i for i, what in enumerate(WHATS)}
    head = ("pass, batch", "bank", "ours", "fastest dense", "takes", "ratio", "quartiles",
            "ours of roof", "dense of roof")  # fmt: skip
    for layer, dtype in dict.fromkeys((row["layer"], row["dtype"]) for row in kept):
        rows = [row for row in kept if (row["layer"], row["dtype"]) == (layer, dtype)]
        rows.sort(key=lambda row: (order[row["what"]], row["batch"]))
        text += [f"{layer}, {_shape(rows[0])}, {dtype}:", ""]
        text += [*table.markdown(head, map(_cells, rows)), ""]
    missing = {name: why for row in kept for name, why in row["dense_missing"].items()}
    text += [f"Not among dense layers: {name} ({why})." for name, why in missing.items()]
    return text if missing else text[:-1]


def _cells(row: Row) -> tuple[str, ...]:
    named = (f"{row['what']}, {row['batch']}", str(Bank(row["dof"], row["laps"])))
    if row["status"] != format_.OK:
        return (*named, str(row["status"]), *[""] * 6)
    ratio = row["ratio"]
    return (
        *named,
        timing.seconds(row["ours_s"]),
        row["dense"],
        timing.seconds(row["dense_s"]),
        times(ratio["median"]),
        f"{ratio['q25']:.2f} to {ratio['q75']:.2f}",
        f"{max(row['roof'].values()) / row['ours_s']:.0%}",
        f"{max(row['dense_roof'].values()) / row['dense_s']:.0%}",
    )


def roofline(results: Path) -> list[str]:
    """Measured rates, and the least time that they give the headline's bank and a dense layer."""
    text: list[str] = []
    for path, record in newest(results, run.load):
        threads = record["environment"]["threads"]
        rates = ", ".join(
            f"{rate['level']} {rate['read_bytes_per_s'] / 1e9:.0f} and "
            f"{rate['update_bytes_per_s'] / 1e9:.0f}"
            for rate in record["rates"]
        )
        products = ", ".join(f"{n} {r / 1e9:.0f}" for n, r in record["matrix_per_s"].items())
        text += [
            *heading(path, record),
            f"GB/s of {threads} thread{'s' * (threads > 1)} reading, and reading and writing: "
            f"{rates or NOT_MEASURED}. Products in cache, 10^9 operations per second: {products}.",
            "",
            *table.markdown(
                ("layer", "dense: least", "waits for", "measured", "ours: least", "waits for",
                 "measured"),
                [_roof(row) for row in record["results"]
                 if row["ratio"] and Bank(row["dof"], row["laps"]) == _HEADLINE],
            ),
            "",
        ]  # fmt: skip
    return text[:-1] or [NOT_MEASURED]


def _roof(row: Row) -> tuple[str, ...]:
    cells = [f"{_shape(row)} {row['dtype']}, {row['what']}, batch {row['batch']}"]
    for roof, seconds in (("dense_roof", "dense_s"), ("roof", "ours_s")):
        bound = max(row[roof], key=row[roof].__getitem__)
        cells += [timing.seconds(row[roof][bound]), bound, timing.seconds(row[seconds])]
    return tuple(cells)


def tokens(results: Path) -> list[str]:
    """Tokens per second of the decoder, of a run that nothing disturbed."""
    quiet = [(path, r) for path, r in newest(results, decoder.load) if not r["load"]["busy"]]
    return tokens_of(*quiet[0]) if quiet else [NOT_MEASURED]


def tokens_of(path: Path, record: Any) -> list[str]:
    """The table of one file."""
    dense = {r["dtype"]: r for r in record["results"] if r["network"] == decoder.DENSE}
    rows = []
    for row in record["results"]:
        apart = decoder.spread(row)
        doubt = f" ±{apart / 2:.0%}" if apart > BUSY_SPREAD else ""
        rows.append(
            (
                f"{row['network']}, {row['dtype']}",
                f"{1 / row['median_s']:.1f}{doubt}",
                f"{dense[row['dtype']]['median_s'] / row['median_s']:.2f}",
                f"{row['linear_bytes'] / 1e6:.1f} MB",
                f"{row['weight_bytes'] / 1e6:.1f} MB",
                f"{row['error']:.1g}" if row["network"] != decoder.DENSE else "",
                "yes" if row["same_tokens"] else "no",
            )
        )
    head = ("network", "tokens per second", "of dense", "linear layers", "all parameters",
            "logits differ by", "same tokens")  # fmt: skip
    m, o = record["model"], record["options"]
    read = f"windows {m['window']} x {m['laps']}" if m["window"] else f"{m['laps']} laps"
    about = (
        f"Decoder of width {m['width']}, {m['layers']} layers, {m['heads']} heads, SwiGLU "
        f"{m['hidden']}, vocabulary {m['vocabulary']}: {m['virtual_weights'] / 1e6:.0f}M virtual "
        f"weights on a bank of {m['dof'] / 1e6:.0f}M, {read}; "
        f"batch 1, {o['tokens']} tokens after {o['prompt']}, median of {o['series']} series."
    )
    return [*heading(path, record), "", about, "", *table.markdown(head, rows)]


def _format(results: Path) -> list[str]:
    """The formats of the result files."""
    text: list[str] = []
    for fields in (schema.LAYERS_FILE, schema.DECODER_FILE, schema.NETWORKS_FILE):
        rows = [
            (f"`{name}`", kind, about)
            for name, kind, about in format_.describe(fields)
            if not name.startswith("environment.")
        ]
        lines = table.markdown(("field", "kind", "meaning"), rows)
        text += [lines[0], "|---|---|---|", *lines[2:], ""]
    return text[:-1]


TABLES = {
    "cpu-speed": speed,
    "cpu-layers": layers,
    "cpu-roofline": roofline,
    "cpu-decoder": tokens,
    "cpu-schema": _format,
}
