"""Tables of what suite ``networks`` measured (see ``benchmarks.harness.report``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import schema as format_
from benchmarks.harness import table
from benchmarks.harness.cpu import networks_run
from benchmarks.harness.cpu.grid import Bank
from benchmarks.harness.cpu.report import heading, measured, newest, times
from benchmarks.harness.table import NOT_MEASURED
from rpg_kernels import timing

Row = Mapping[str, Any]
_RATIO = ("fastest dense", "takes", "ratio", "quartiles")
_NETWORKS = ("network, batch", "bank", "takes", "per second", *_RATIO)
_LAYERS = ("convolution, batch", "bank", "takes", *_RATIO)


def tables(results: Path) -> list[str]:
    """Everything that was measured, for each number of threads."""
    text: list[str] = []
    for path, record in newest(results, networks_run.load):
        text += [*tables_of(path, record), ""]
    return text[:-1] or [NOT_MEASURED]


def tables_of(path: Path, record: Any) -> list[str]:
    """The tables of one file: networks, and single convolutions."""
    text = [*heading(path, record), *measured(record)]
    # What was disturbed and measured again comes last in the file.
    points = record["options"]["points"]
    rows = sorted(record["results"], key=lambda row: points.index(row["point"]))
    layers = [row for row in rows if row["case"].startswith("conv")]
    whole = [row for row in rows if row not in layers]
    if whole:
        text += [*table.markdown(_NETWORKS, map(_network, whole)), ""]
    weighed = [row for row in whole if row["memory"]]
    if weighed:
        text += [*_memory(weighed), ""]
    if layers:
        text += [*table.markdown(_LAYERS, map(_layer, layers)), ""]
    text += [f"Not measured: {name} ({why})." for name, why in record["missing"].items()]
    return text if record["missing"] else text[:-1]


def _bank(row: Row) -> str:
    bank = Bank(row["dof"], row["laps"])
    return str(bank) if row["network"] == networks_run.OURS else f"published, {bank}"


def _start(row: Row) -> tuple[str, ...]:
    return f"{row['case']}, {row['dtype']}, {row['what']}, {row['batch']}", _bank(row)


def _network(row: Row) -> tuple[str, ...]:
    if row["status"] != format_.OK:
        return (*_start(row), str(row["status"]), *[""] * 5)
    rate = f"{row['units'] / row['seconds']:.4g} {row['unit']}"
    return (*_start(row), timing.seconds(row["seconds"]), rate, *_ratio(row))


def _layer(row: Row) -> tuple[str, ...]:
    if row["status"] != format_.OK:
        return (*_start(row), str(row["status"]), *[""] * 4)
    return (*_start(row), timing.seconds(row["seconds"]), *_ratio(row))


def _ratio(row: Row) -> tuple[str, ...]:
    ratio = row["ratio"]
    return (
        row["dense"],
        timing.seconds(row["dense_seconds"]),
        times(ratio["median"]),
        f"{ratio['q25']:.2f} to {ratio['q75']:.2f}",
    )


def _memory(rows: Iterable[Row]) -> Iterator[str]:
    """Bytes of training beside the dense network's."""
    head = ("training, batch", "bank", "state", "of dense", "saved beyond activations",
            "most in a step", "of dense")  # fmt: skip
    cells = []
    for row in rows:
        ours, dense = row["memory"], row["dense_memory"]
        cells.append(
            (
                f"{row['case']}, {row['dtype']}, {row['batch']}",
                _bank(row),
                f"{ours['state'] / 1e6:.1f} MB",
                f"{ours['state'] / dense['state']:.2f}",
                f"{ours['saved_beyond_activations'] / 1e6:.2f} MB",
                f"{ours['peak'] / 1e6:.0f} MB",
                f"{ours['peak'] / dense['peak']:.2f}",
            )
        )
    yield from table.markdown(head, cells)


TABLES = {"cpu-networks": tables}
