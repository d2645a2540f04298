"""Tables of what the CPU suites measured, for README and docs/cpu.md (see ``bench.report``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import schema as format_
from benchmarks.harness import table
from benchmarks.harness.cpu import decoder, run, schema, traffic
from benchmarks.harness.cpu.bandwidth import LEVELS
from benchmarks.harness.cpu.grid import DENSE, DTYPES, OURS, REFERENCE, Bank
from benchmarks.harness.machine import BUSY_SPREAD
from benchmarks.harness.table import NOT_MEASURED
from rpg_kernels import timing

_SPEED_LAYERS = ("llama-3-8b.gate_proj", "llama-3-8b.q_proj")
_SPEED_BANKS = ((200_000, None), (200_000, 4), (20_000_000, 4))  # (dof, laps)
_SPEED_BATCHES = (1, 4, 8, 16)
_ROOF_BANKS = (*_SPEED_BANKS, (20_000_000, 16))
_ROOF_BATCHES = (1, 16)
Row = Mapping[str, Any]
Line = tuple[str, Bank | None]  # implementation and bank of a line of a table


def _newest(results: Path, load: Callable[[Path], Any]) -> tuple[Path, Any] | None:
    """The complete file of a format that was begun last."""
    found = [(path, load(path)) for path in sorted(results.glob("*.json"))]
    complete = [(path, record) for path, record in found if record and record["complete"]]
    return max(complete, key=lambda one: one[1]["created"], default=None)


def _heading(path: Path, record: Any) -> Iterator[str]:
    """Machine, versions, where every figure is, and what is to be doubted."""
    first, *remarks = table.heading(record)
    link = f"[result file]({{up}}benchmarks/results/{path.name})"
    isa = record["environment"]["native"]
    yield f"{first}; kernels: {isa}; {record['clock']} time; {record['created'][:10]} ({link})."
    for remark in remarks:
        yield f"{remark}."
    yield ""


def _line(row: Row) -> Line:
    bank = None if row["dof"] is None else Bank(row["dof"], row["laps"], row["window"])
    return row["impl"], bank


def _label(line: Line) -> str:
    impl, bank = line
    return f"{'' if impl == OURS else impl}{', ' * (impl == REFERENCE)}{bank or ''}"


def _tables(record: Any) -> dict[tuple[str, str], dict[Line, dict[int, Row]]]:
    """Rows by (layer, dtype), then line, then batch, in the file's order."""
    tables: dict[tuple[str, str], dict[Line, dict[int, Row]]] = {}
    for row in record["results"]:
        lines = tables.setdefault((row["layer"], row["dtype"]), {})
        lines.setdefault(_line(row), {})[row["batch"]] = row
    return tables


def _cell(row: Row | None, dense: Row | None) -> str:
    """Time, how many times faster than dense, and the spread of series where that is large."""
    if row is None:
        return ""
    if row["status"] != format_.OK or not row["median_s"]:
        return str(row["status"]) if row["status"] != format_.OK else NOT_MEASURED
    apart = run.spread(dict(row))
    doubt = f" ±{apart / 2:.0%}" if apart > BUSY_SPREAD else ""
    ratio = ""
    if dense is not None and dense is not row and dense["median_s"]:
        times = dense["median_s"] / row["median_s"]
        ratio = f" ({times:.1f}x)" if times >= 0.95 else f" ({times:.2f}x)"
    return f"{timing.seconds(row['median_s'])}{doubt}{ratio}"


def _shape(row: Row) -> str:
    return "x".join(map(str, row["weight_shape"]))


def speed(results: Path) -> list[str]:
    """The README's table: two large layers at small batches."""
    found = _newest(results, run.load)
    if found is None:
        return [NOT_MEASURED]
    path, record = found
    tables = _tables(record)
    rows = []
    for key in ((layer, dtype) for layer in _known(tables, _SPEED_LAYERS) for dtype in DTYPES):
        for line, held in tables.get(key, {}).items():
            if line[0] in (DENSE, OURS) and _among(_SPEED_BANKS, line):
                dense = tables[key].get((DENSE, None), {})
                shape = _shape(next(iter(held.values())))
                cells = (_cell(held.get(b), dense.get(b)) or NOT_MEASURED for b in _SPEED_BATCHES)
                rows.append((f"{shape}, {key[1]}", _label(line), *cells))
    head = ("linear layer", "weight", *(f"batch {batch}" for batch in _SPEED_BATCHES))
    return [*_heading(path, record), *table.markdown(head, rows)]


def _among(banks: tuple[tuple[int, int | None], ...], line: Line) -> bool:
    """Whether a line's bank is one of those, or there is none as the weight is dense."""
    _, bank = line
    return bank is None or (bank.dof, bank.laps) in banks


def _known(tables: Mapping[tuple[str, str], object], names: tuple[str, ...]) -> list[str]:
    """Those of the layers that were measured, in this order."""
    return [name for name in names if any(layer == name for layer, _ in tables)]


def layers(results: Path) -> list[str]:
    """Everything that was measured, a table for each layer and dtype."""
    found = _newest(results, run.load)
    return [NOT_MEASURED] if found is None else layers_of(*found)


def layers_of(path: Path, record: Any) -> list[str]:
    """The tables of one file."""
    text = list(_heading(path, record))
    for (layer, dtype), lines in _tables(record).items():
        batches = sorted({batch for held in lines.values() for batch in held})
        dense = lines.get((DENSE, None), {})
        first = next(iter(next(iter(lines.values())).values()))
        rows = [
            (_label(line), *(_cell(held.get(b), dense.get(b)) for b in batches))
            for line, held in lines.items()
        ]
        what = "batch" if first["op"] == "linear" else "images"
        head = (f"{layer}, {_shape(first)}, {dtype}: {what}", *map(str, batches))
        text += [*table.markdown(head, rows), ""]
    return text[:-1]


def roofline(results: Path) -> list[str]:
    """Bytes that each path moves, the time that measured rates give for them, and the time."""
    found = _newest(results, run.load)
    if found is None or not found[1]["rates"]:
        return [NOT_MEASURED]
    path, record = found
    threads = record["environment"]["threads"]
    rates = ", ".join(
        f"{rate['level']} {rate['read_bytes_per_s'] / 1e9:.0f} and "
        f"{rate['update_bytes_per_s'] / 1e9:.0f}"
        for rate in record["rates"]
    )
    products = ", ".join(f"{name} {r / 1e9:.0f}" for name, r in record["matrix_per_s"].items())
    text = [
        *_heading(path, record),
        f"GB/s of {threads} thread{'s' * (threads > 1)} reading, and reading and writing: {rates}. "
        f"Large products, 10^9 operations per second: {products}.",
        "",
    ]
    rows = []
    tables = _tables(record)
    for key in ((layer, dtype) for layer in _known(tables, _SPEED_LAYERS) for dtype in DTYPES):
        for line, held in tables.get(key, {}).items():
            for batch in _ROOF_BATCHES if _among(_ROOF_BANKS, line) else ():
                row = held.get(batch)
                if row and row["traffic"] and row["median_s"]:
                    name = f"{_shape(row)} {key[1]}, {_label(line)}, batch {batch}"
                    rows.append((name, *_roof(row, record)))
    head = ("layer", *(f"{level}, MB" for level in LEVELS), "slowest level", "arithmetic",
            "measured", "least of measured")  # fmt: skip
    return [*text, *table.markdown(head, rows)]


def _roof(row: Row, record: Any) -> Iterator[str]:
    moved = row["traffic"]
    seconds = traffic.floors(moved, run.levels_of(record), record["matrix_per_s"])
    for level in LEVELS:
        bytes_ = moved["read"].get(level, 0) + moved["update"].get(level, 0)
        yield f"{bytes_ / 1e6:.3g}" if bytes_ else ""
    bound = max(LEVELS, key=lambda level: seconds.get(level, 0.0))
    yield f"{timing.seconds(seconds[bound])} ({bound})"
    yield timing.seconds(seconds["arithmetic"])
    yield timing.seconds(row["median_s"])
    yield f"{max(seconds.values()) / row['median_s']:.0%}"


def tokens(results: Path) -> list[str]:
    """Tokens per second of the decoder."""
    found = _newest(results, decoder.load)
    return [NOT_MEASURED] if found is None else tokens_of(*found)


def tokens_of(path: Path, record: Any) -> list[str]:
    """The table of one file."""
    dense = {r["dtype"]: r for r in record["results"] if r["network"] == DENSE}
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
                f"{row['error']:.1g}" if row["network"] != DENSE else "",
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
    return [*_heading(path, record), about, "", *table.markdown(head, rows)]


def _format(results: Path) -> list[str]:
    """The formats of the result files."""
    text: list[str] = []
    for fields in (schema.LAYERS_FILE, schema.DECODER_FILE):
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
