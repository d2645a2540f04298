"""Result files as text: for a terminal, and the cells that reports share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.harness.cases import PASSES, bank_of
from benchmarks.harness.schema import OK, WRONG
from benchmarks.harness.timing import COLD, quoted
from rpg_kernels.timing import aligned, seconds

NOT_MEASURED = "not measured"
_RED, _PLAIN = "\x1b[31m", "\x1b[0m"
_HEAD = (
    "implementation",
    "forward",
    "backward",
    "full",
    "x dense",
    "warm",
    "% floor",
    "peak MB",
    "largest MB",
    "saved B/P",
    "stays B/P",
    "stays B/D",
)
LEGEND = """\
forward, backward, full: cold median of a call on the {clock} clock, and the middle 80 % around it.
x dense: full, relative to dense. warm: full with the layer's data in the cache, where that differs.
% floor: of full, against the roofline measured in this run. peak, largest: allocated in full.
saved: for the backward, beyond x and trained tensors. stays: weights, gradients, Adam and tables;
B/P bytes per virtual weight, B/D per degree of freedom. A result that is wrong gets no figure."""


def ratio(value: float | None, of: float | None) -> str:
    """One time over another; "" where either is missing.

    Example:
        >>> ratio(1.0, 3.0), ratio(1.0, 400.0), ratio(None, 1.0)
        ('0.33', '0.0025', '')
    """
    if not value or not of:
        return ""
    return f"{value / of:.2f}" if value > 0.1 * of else f"{value / of:.2g}"


def median(row: Mapping[str, Any], kind: str, state: str, clock: str) -> float | None:
    """Seconds of a call, or None where it was not measured."""
    found = quoted(row["times"].get(kind, {}).get(state, {}), clock)
    return None if found is None else float(found["median_s"])


def comparable(row: Mapping[str, Any], kind: str, state: str, clock: str) -> float | None:
    """As median, but only of the headline's clock: figures of two clocks make no ratio."""
    found = row["times"].get(kind, {}).get(state, {}).get(clock)
    return None if found is None else float(found["median_s"])


def setting(row: Mapping[str, Any]) -> str:
    """Bank and dtype of a row, as ``Case.setting``."""
    return bank_of(row)


def by_case(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Rows grouped by (case, setting), in the file's order."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], setting(row)), []).append(row)
    return groups


def dense_of(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The dense row among those of a case."""
    return next((row for row in rows if row["impl"] == "dense"), None)


def text(record: Mapping[str, Any], colour: bool = False) -> str:
    """The whole file for a terminal.

    Args:
        record: a valid result file.
        colour: what is wrong in red.
    """
    clock = record["headline"]
    lines = list(heading(record))
    for (case, bank), rows in by_case(record["results"]).items():
        lines += ["", f"{case}  {bank}"]
        dense = dense_of(rows)
        body = [_HEAD, *(_cells(row, dense, clock) for row in rows)]
        full = [cells for cells in body if len(cells) > 2]
        ready, width = iter(aligned(full)), max(len(cells[0]) for cells in full)
        for row, cells in zip([None, *rows], body, strict=True):
            line = "  " + (next(ready) if len(cells) > 2 else f"{cells[0]:{width}}  {cells[1]}")
            wrong = row is not None and row["status"] == WRONG
            lines.append(f"{_RED}{line}{_PLAIN}" if wrong and colour else line.rstrip())
            if row is not None and len(cells) > 2 and row["reason"]:
                lines.append(f"  {'':{width}}  {row['reason']}")
    return "\n".join([*lines, "", LEGEND.format(clock=clock)])


def heading(record: Mapping[str, Any]) -> Iterator[str]:
    """Machine, versions, commit, and what is to be doubted."""
    e = record["environment"]
    threads = f", {e['threads']} thread{'s' * (e['threads'] > 1)}" if e["device"] == "cpu" else ""
    commit = (e["commit"] or "unknown")[:12]
    changes = " with changes" if (e["commit"] or "").endswith("-dirty") else ""
    yield f"{e['device_name']}{threads}; torch {e['torch']}; commit {commit}{changes}"
    if e["native"].startswith("not in use"):
        yield f"The native module was {e['native']}"
    if not record["complete"]:
        yield "INTERRUPTED: only what was finished is here"
    for reason in record["load"]["busy"]:
        yield f"BUSY MACHINE: {reason}; doubt the times"


def _cells(row: Mapping[str, Any], dense: Mapping[str, Any] | None, clock: str) -> tuple[str, ...]:
    """A line of the table; a name and a reason when there is no figure at all."""
    name = row["impl"] + (" *" if row["chosen"] else "")
    if not row["times"] and row["memory"] is None:
        return name, f"{row['status'].upper()}: {row['reason'] or NOT_MEASURED}"
    full = comparable(row, "full", COLD, clock)
    of_dense = comparable(dense, "full", COLD, clock) if dense else None
    warm = median(row, "full", "warm", clock)
    percent = row["floors"].get("full", {}).get("percent")
    memory = row["memory"] or {}
    return (
        name,
        *(_spread(row, kind, clock) for kind in PASSES),
        ratio(full, of_dense),
        seconds(warm) if warm else "",
        f"{percent:.0f}" if percent else "",
        *(f"{memory[key] / 1e6:.2f}" if memory else "" for key in ("full_peak", "full_largest")),
        *(
            f"{memory[of][key]:.2f}" if memory.get(of) else ""
            for of, key in (
                ("per_virtual_weight", "saved"),
                ("per_virtual_weight", "persistent"),
                ("per_dof", "persistent"),
            )
        ),
    )


def _spread(row: Mapping[str, Any], kind: str, clock: str) -> str:
    found = quoted(row["times"].get(kind, {}).get(COLD, {}), clock)
    if found is None:
        return row["status"] if row["status"] != OK else ""
    spread = (found["q90_s"] - found["q10_s"]) / found["median_s"]
    return f"{seconds(found['median_s'])} ±{spread / 2:.0%}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown; all columns but the first to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
