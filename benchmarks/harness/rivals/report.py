"""Tables of what suite ``rivals`` measured (see ``benchmarks.harness.report``)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import schema as format_
from benchmarks.harness import table
from benchmarks.harness.cpu.grid import Bank
from benchmarks.harness.cpu.report import heading, newest, times
from benchmarks.harness.cpu.run import levels_of
from benchmarks.harness.rivals import run
from benchmarks.harness.rivals.contender import FORWARD, TRAINING
from benchmarks.harness.rivals.families.ours import ROUNDED, STORED
from benchmarks.harness.rivals.tokens import BITS
from benchmarks.harness.table import NOT_MEASURED
from rpg_kernels import timing

Row = Mapping[str, Any]
_FOLLOWING, _FLUSHED = "following", "flushed"
_DOUBT = 0.25  # half of the middle of the samples over their median, above which it is shown
_LARGE = "llama-3-8b.gate_proj"
_FOUR, _SIXTEEN = Bank(2_000_000, 4), Bank(2_000_000, 16)
_FASTEST, _ROOF, _FOUR_BITS = (
    "the fastest rival",
    "the roof of four bits",
    "the fastest of four bits",
)
# Which bank shall be how much faster than what, on the large layer.
_AIMS = (
    (1, _FOUR, _FOUR_BITS, 1.0),
    (1, _SIXTEEN, _ROOF, 1.0),
    (32, _FOUR, _FASTEST, 2.0),
    (512, _FOUR, _FASTEST, 2.0),
)


def _files(make: Callable[[Any], list[str]]) -> Callable[[Path], list[str]]:
    """The tables of every number of threads that was measured."""

    def tables(results: Path) -> list[str]:
        text: list[str] = []
        for path, record in newest(results, run.load):
            text += [*heading(path, record), *about(record), "", *make(record), ""]
        return text[:-1] or [NOT_MEASURED]

    return tables


def tables_of(path: Path, record: Any) -> list[str]:
    """All tables of one file."""
    text = [*heading(path, record), *about(record), ""]
    for make in (aims, layers, training, decoder):
        text += [*make(record), ""]
    return text[:-1]


def about(record: Any) -> Iterator[str]:
    """Caches, packages, what was left out and what is to be doubted."""
    cache = record["environment"]["cache_bytes"]
    memory = [rate for rate in record["rates"] if rate["level"] == "memory"]
    rate = f"{memory[0]['read_bytes_per_s'] / 1e9:.1f} GB/s" if memory else NOT_MEASURED
    yield (
        f"Last-level cache {cache / 1e6:.0f} MB, {record['flush_bytes'] / 1e6:.0f} MB read between "
        f"turns; memory read at {rate}; load average {record['load']['before']:.1f} at the start."
    )
    if record["lacks"]:
        yield f"A processor without {', '.join(record['lacks'])}."
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    yield f"Packages: {packages or 'none beside torch'}."
    yield from record["skipped"].values()
    if record["disturbed"]:
        yield f"Did not settle: {'; '.join(record['disturbed'])}."


def roof(record: Any, row: Row) -> float | None:
    """Seconds in which four bits a weight, and scales, are read from memory."""
    memory = [level for level in levels_of(record) if level.name == "memory"]
    rows, columns = row["weight_shape"]
    return rows * columns * BITS / 8 / memory[0].read if memory else None


def aims(record: Any) -> list[str]:
    """What the int8 bank shall reach on the large layer, and what it does."""
    cells = []
    for batch, bank, beside, wanted in _AIMS:
        rows = [
            row for row in record["results"]
            if (row["layer"], row["what"], row["batch"]) == (_LARGE, FORWARD, batch)
        ]  # fmt: skip
        for of in (STORED, ROUNDED):
            what = f"{bank}, {of}, batch {batch}"
            aim = f"{wanted:g}x {beside}"
            own = [row for row in rows if row["name"] == f"{bank}, {of}" and row[_FOLLOWING]]
            found = _beside(record, rows, beside)
            if not own or not found:
                cells.append((what, aim, "", "", "", NOT_MEASURED))
                continue
            name, seconds = found
            times_ = seconds / _median(own[0], _FOLLOWING)
            verdict = f"{times(times_)}, {'reached' if times_ >= wanted else 'missed'}"
            cells.append((what, aim, name, timing.seconds(seconds), _cell(own[0]), verdict))
    head = ("14336x4096, bank", "aim", "beside", "takes", "ours", "ratio")
    return table.markdown(head, cells)


def _beside(record: Any, rows: Sequence[Row], beside: str) -> tuple[str, float] | None:
    """The name and the seconds of what a row of aims is held against."""
    if beside == _ROOF:
        seconds = roof(record, rows[0]) if rows else None
        return None if seconds is None else ("roof", seconds)
    four = [row for row in rows if row["kind"] == "int4"]
    best = run.fastest(four if beside == _FOUR_BITS else rows)
    return None if best is None else (best["name"], _median(best, _FOLLOWING))


def layers(record: Any) -> list[str]:
    """For each layer: ratios of ours, then times of everything, following and flushed."""
    return _each(record, FORWARD, _layer)


def training(record: Any) -> list[str]:
    """The same of training, with the numbers that are trained."""
    return _each(record, TRAINING, _trained)


def _each(record: Any, what: str, make: Callable[[Any, Sequence[Row]], Iterator[str]]) -> list[str]:
    rows = [row for row in record["results"] if row["what"] == what]
    text: list[str] = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        of_layer = [row for row in rows if row["layer"] == layer]
        shape = "x".join(map(str, of_layer[0]["weight_shape"]))
        text += [f"**{shape}** ({layer}), {what}", "", *make(record, of_layer), ""]
    return text[:-1] or [NOT_MEASURED]


def _layer(record: Any, rows: Sequence[Row]) -> Iterator[str]:
    yield from _ratios(record, rows)
    yield ""
    yield "A call that follows another layer's:"
    yield ""
    yield from _times(rows, _FOLLOWING)
    yield ""
    yield "A call when nothing is in a cache:"
    yield ""
    yield from _times(rows, _FLUSHED)
    yield from _unable(rows)


def _trained(record: Any, rows: Sequence[Row]) -> Iterator[str]:
    yield from _ratios(record, rows)
    yield ""
    yield from _times(rows, _FOLLOWING)
    yield from _unable(rows)


def _batches(rows: Sequence[Row]) -> list[int]:
    return sorted({row["batch"] for row in rows})


def _ratios(record: Any, rows: Sequence[Row]) -> Iterator[str]:
    """How many times faster ours is than the fastest rival, which stands in the first line."""
    batches = _batches(rows)
    by_batch = {b: [row for row in rows if row["batch"] == b] for b in batches}
    best = {batch: run.fastest(of_batch) for batch, of_batch in by_batch.items()}
    lines = [["fastest rival", *(of["name"] if of else NOT_MEASURED for of in best.values())]]
    least = roof(record, rows[0])
    if rows[0]["what"] == FORWARD and least:
        lines.append(["it beside the roof of four bits", *_roofs(best.values(), least)])
    for name in dict.fromkeys(row["name"] for row in rows if row["ours"]):
        cells = []
        for batch, of_batch in by_batch.items():
            own = next((r for r in of_batch if r["name"] == name and r[_FOLLOWING]), None)
            rival = best[batch]
            found = run.ratio(rival, own) if own and rival else None
            cells.append(times(found.median) if found else "")
        lines.append([name, *cells])
    yield from table.markdown(("faster than the fastest rival", *map(_batch, batches)), lines)


def _roofs(best: Any, least: float) -> Iterator[str]:
    for of in best:
        yield times(least / _median(of, _FOLLOWING)) if of else ""


def _times(rows: Sequence[Row], state: str) -> Iterator[str]:
    """Seconds of everything that ran, by batch, with bytes and errors."""
    batches = _batches(rows)
    cells = []
    for name in dict.fromkeys(row["name"] for row in rows):
        by_batch = {row["batch"]: row for row in rows if row["name"] == name}
        ran = [row for row in by_batch.values() if row["status"] == format_.OK]
        if not ran:
            continue
        first = ran[0]
        cells.append(
            (
                f"**{name}**" if first["ours"] else name,
                f"{first['parameters'] / 1e6:.2f}M",
                f"{first['nbytes'] / 1e6:.1f} MB",
                f"{first['resident'] / 1e6:.1f} MB",
                f"{max(row['error'] for row in ran):.1e}",
                *(_cell(by_batch[b], state) if b in by_batch else "" for b in batches),
            )
        )
    head = ("way", "numbers", "bytes", "resident", "error", *map(_batch, batches))
    yield from table.markdown(head, cells)


def _batch(batch: int) -> str:
    return f"batch {batch}"


def _cell(row: Row, state: str = _FOLLOWING) -> str:
    """A median, with ± where samples lie apart; else why there is none."""
    if not row[state]:
        return str(row["status"]) if row["status"] != format_.OK else ""
    samples = sorted(row[state])
    text = timing.seconds(_median(row, state))
    inner = samples[len(samples) // 10 : len(samples) - len(samples) // 10]
    apart = (inner[-1] - inner[0]) / 2 / _median(row, state)
    return f"{text} ±{apart:.0%}" if apart > _DOUBT else text


def _median(row: Row, state: str) -> float:
    return float(statistics.median(row[state]))


def _unable(rows: Sequence[Row]) -> Iterator[str]:
    """What did not run or was wrong, once for each reason."""
    bad = [row for row in rows if row["status"] != format_.OK]
    said = dict.fromkeys((row["name"], row["status"], row["reason"]) for row in bad)
    if said:
        yield ""
    for name, status, reason in said:
        yield f"Not timed: {name}: {status}, {reason}."


def decoder(record: Any) -> list[str]:
    """Tokens per second beside the roof of a dense decoder of four bits."""
    if not record["tokens"]:
        return [NOT_MEASURED]
    m = record["model"]
    text = [
        f"Decoder of width {m['width']}, {m['layers']} layers, SwiGLU {m['hidden']}, vocabulary "
        f"{m['vocabulary']}: {m['virtual_weights'] / 1e6:.0f}M virtual weights, "
        f"{m['roof_bytes'] / 1e6:.0f} MB at {BITS} bits; batch 1, {m['tokens']} tokens after "
        f"{m['prompt']}.",
        "",
    ]
    # The best rate of all that were measured: what disturbs one of them only lowers it.
    read = [level.read for level in levels_of(record) if level.name == "memory"]
    rates = [m["roof_bytes"] / rate for rate in read]
    least = min(rates + [seconds for row in record["tokens"] for seconds in row["roof_s"]])
    cells = []
    for row in record["tokens"]:
        ours = statistics.median(row["ours_s"])
        by_series = [least / seconds for seconds in row["ours_s"]]
        error = "not finite" if row["error"] is None else f"{row['error']:.1e}"
        cells.append(
            (
                row["name"],
                f"{row['nbytes'] / 1e6:.1f} MB",
                f"{1 / ours:.1f}",
                f"{1 / least:.1f}",
                times(statistics.median(by_series)),
                f"{min(by_series):.2f} to {max(by_series):.2f}",
                error,
            )
        )
    head = ("bank", "bytes", "tokens per second", "roof of four bits", "ratio", "all series",
            "logits differ by")  # fmt: skip
    return text + table.markdown(head, cells)


TABLES = {
    "rivals-aims": _files(aims),
    "rivals-layers": _files(layers),
    "rivals-training": _files(training),
    "rivals-decoder": _files(decoder),
}
