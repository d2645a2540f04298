"""One line for people, and data for the report, from what a part wrote or printed.

Files of one JSON object a line are read as far as they were written, so a part that ran out of
time is summarised as one that did not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.gpu_check.pool import records
from tools.gpu_check.running import last_line

Summary = tuple[str, Any]
_NAMED = 3  # of what is bad, in the line for people
_KEPT = 200  # of what is bad, in the report


def said(output: str, out: Path) -> Summary:
    """The last line that a part printed."""
    return last_line(output), None


def json_lines(output: str) -> list[dict[str, Any]]:
    """The JSON objects among the lines of an output."""
    found = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # cut off in the middle
    return found


def machine(output: str, out: Path) -> Summary:
    """The machine: its GPU and versions."""
    data = json_lines(output)[-1]
    e = data["environment"]
    return f"{e['device_name']}, torch {e['torch']}, triton {e['triton']}, CUDA {e['cuda']}", data


def build(output: str, out: Path) -> Summary:
    """What the native module is, and whether it was built now."""
    data = json_lines(output)[-1]
    return data["said"], data


def of_file(name: str, good: Sequence[str]) -> Any:
    """A summary of the records of a file: how many of each outcome, and what is not good."""

    def summarise(output: str, out: Path) -> Summary:
        found = list(records(out / name))
        if not found:
            return last_line(output), None
        return outcomes(found, good)

    return summarise


def outcomes(found: Iterable[Mapping[str, Any]], good: Sequence[str]) -> Summary:
    """Counts of outcomes, what is bad and why, and how many items nobody came to.

    Example:
        >>> found = [{"planned": 3}, {"item": "a", "outcome": "passed"},
        ...          {"item": "b", "outcome": "crashed", "message": "exit status -11"}]
        >>> outcomes(found, ["passed"])[0]
        '1 passed, 1 crashed, 1 not run; b: exit status -11'
    """
    found = list(found)
    ended = [record for record in found if "outcome" in record]
    counts = dict(Counter(str(record["outcome"]) for record in ended))
    planned, answered = 0, set[str]()
    for record in found:
        if "planned" in record:  # files that could not be collected were named before
            planned, answered = record["planned"], set()
        elif "item" in record:
            answered.add(record["item"])
    if planned > len(answered):
        counts["not run"] = planned - len(answered)
    bad = [
        {"item": record.get("item", "a worker"), **_why(record)}
        for record in ended
        if record["outcome"] not in good
    ]
    line = ", ".join(f"{n} {name}" for name, n in counts.items()) or "nothing was found out"
    named = [f"{each['item']}: {each['message']}"[:160] for each in bad[:_NAMED]]
    reasons = Counter(str(r.get("message", "")) for r in ended if r["outcome"] == "skipped")
    return "; ".join([line, *named]), {"counts": counts, "bad": bad[:_KEPT], "skipped": reasons}


def _why(record: Mapping[str, Any]) -> dict[str, str]:
    message = " ".join(str(record.get("message", "")).split())
    return {"outcome": record["outcome"], "message": message[:500]}


def figures(output: str, out: Path) -> Summary:
    """What the microbenchmarks measured."""
    found = json_lines(output)
    return (f"{len(found)} figures" if found else last_line(output)), found


def benchmark(output: str, out: Path) -> Summary:
    """Status counts and times of a benchmark, as far as it came."""
    path = out / "bench.json"
    if not path.exists():
        return last_line(output), None
    record = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for row in record["results"]:
        for kind in ("forward", "full"):
            clocks = row["times"].get(kind, {}).get("cold", {})
            if clocks:
                figure = clocks.get(record["headline"]) or next(iter(clocks.values()))
                lines.append(
                    {
                        "name": f"{row['case']} {_bank(row)} {row['impl']} {kind}",
                        "value": figure["median_s"] * 1e6,
                        "unit": "us",
                    }
                )
    counts = Counter(row["status"] for row in record["results"])
    line = ", ".join(f"{n} {status}" for status, n in counts.items()) or "no case was finished"
    line += "" if record["complete"] else "; not all cases had time"
    bad = [f"{each['outcome']}: {each['message']}"[:160] for each in json_lines(output)]
    return "; ".join([line, *bad[:_NAMED]]), lines


def _bank(row: Mapping[str, Any]) -> str:
    windows = f" w{row['window']}x{row['laps']}" if row.get("window") else ""
    return f"{row['dof']} g{row['granularity']} {row['reflect']}{windows}"


def table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """The table that comes last: figures, then a line for each part."""
    width = max(len(name) for name in report)
    lines = []
    for name in ("micro", "bench"):
        for figure in (report.get(name) or {}).get("data") or []:
            lines.append(f"  {figure['name']:64} {figure['value']:10.4g} {figure['unit']}")
    for name, part in report.items():
        lines.append(
            f"{name:{width}}  {part['status']:13} {part['seconds']:6.1f} s  {part['summary']}"
        )
    return "\n".join(lines)
