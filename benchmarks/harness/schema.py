"""The format of result files: one JSON object, described, checked and documented from one table.

Every field is there in every file; ``null`` says that something was not measured or does not
apply. ``docs/benchmarks.md`` shows the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.cases import DTYPES, PASSES
from benchmarks.harness.gate import INPUT_GRAD, OUTPUT, PARAMETER_GRAD
from benchmarks.harness.timing import COLD, WARM
from rpg_kernels import _checks
from rpg_kernels.law.ring import REFLECT

SCHEMA, VERSION = "rpg-kernels/bench", 1
OK, WRONG, OUT_OF_MEMORY, SKIPPED, FAILED, DOES_NOT_APPLY = STATUSES = (
    "ok",
    "wrong",
    "out of memory",
    "skipped",
    "failed",
    "does not apply",
)
NOT_RUN = (SKIPPED, DOES_NOT_APPLY)  # for want of memory, or because it cannot compute the case


@dataclass(frozen=True)
class Field:
    """One field: its kind, what it means, and for a nested one what it holds.

    Kinds: ``text``, ``int``, ``number``, ``bool``, ``object`` (the fields of ``inside``), ``map``
    (from one of ``choices``, or from any text, to what ``inside`` describes under ``"*"``),
    ``list`` (of what ``inside`` describes under ``"*"``).
    """

    kind: str
    about: str
    inside: Mapping[str, Field] | None = None
    choices: tuple[str, ...] = ()
    nullable: bool = False


def text(about: str, *choices: str, nullable: bool = False) -> Field:
    """Text, one of the choices where there are some."""
    return Field("text", about, None, choices, nullable)


def integer(about: str, nullable: bool = False) -> Field:
    """A whole number from 0."""
    return Field("int", about, nullable=nullable)


def number(about: str, nullable: bool = False) -> Field:
    """A finite number from 0."""
    return Field("number", about, nullable=nullable)


ENVIRONMENT = {
    "device": text("what was measured on", "cpu", "cuda"),
    "device_name": text("processor or GPU, as the system names it"),
    "cores": integer("of the processor; 0: unknown"),
    "threads": integer("that torch used on the CPU"),
    "cache_bytes": integer("last-level cache of the device"),
    "memory_bytes": integer("of the device; 0: unknown"),
    "multiprocessors": integer("of a GPU", nullable=True),
    "capability": text("compute capability of a GPU", nullable=True),
    "platform": text("operating system"),
    "python": text("version"),
    "torch": text("version"),
    "cuda": text("version that torch was built for", nullable=True),
    "triton": text("version, where installed", nullable=True),
    "rpg_kernels": text("version"),
    "commit": text("of the checkout, `-dirty` with changes; null outside one", nullable=True),
    "sources": text("first 16 hex digits of a SHA-256 over the package's Python, C++ and CUDA"),
    "native": text("instruction set and compiler of the native module, or why it is not in use"),
    "settings": Field("map", "environment variables RPG_KERNELS_*", {"*": text("")}),
}
OPTIONS = {
    "suite": text("`quick`, `full`, or null when cases were chosen", nullable=True),
    "seconds": number("time budget for the samples of one case"),
    "seed": integer("of bank, inputs and the order of samples"),
    "memory_limit": integer("bytes that one implementation was allowed to expect"),
}
_FIGURE = {
    "median_s": number("seconds of a call, median of the samples"),
    "q10_s": number("10 % quantile"),
    "q90_s": number("90 % quantile"),
    "samples": integer("how many; each is the mean of some calls"),
}
_RATE = {
    "bank_bytes": integer("of the bank that was gathered from"),
    "slot_bytes": integer("gathered at a time"),
    "bytes_per_s": number("gathered"),
}
CEILINGS = {
    "copy_bytes_per_s": number("copying large buffers: bytes read plus bytes written"),
    "matrix_per_s": Field(
        "map", "operations per second of a large product, by dtype", {"*": number("")}
    ),
    "gather": Field("list", "random gathers", {"*": Field("object", "", _RATE)}),
}
LOAD = {
    "before": number("load average of one minute before the run"),
    "busy": Field("list", "why the times are to be doubted; empty: no reason", {"*": text("")}),
}
_ACCURACY = {
    "error": number("largest absolute error against float64; null: not finite", nullable=True),
    "allowed": number("the most that passes"),
}
_RELATIVE = {
    name: number("")
    for name in ("forward_peak", "full_peak", "full_largest", "saved", "persistent")
}
_MEMORY = {
    "forward_peak": integer("bytes that a forward has allocated at most, result counted"),
    "full_peak": integer("the same of forward and backward, gradients counted"),
    "full_largest": integer("largest single allocation of forward and backward"),
    "saved": integer("bytes saved for the backward, x and trained tensors left out"),
    "parameters": integer("bytes of the trained tensors"),
    "gradients": integer("bytes of their gradients"),
    "optimizer": integer("bytes of Adam's state"),
    "tables": integer("bytes of index and sign tables"),
    "persistent": integer("the four together: what stays between two steps"),
    "per_virtual_weight": Field(
        "object", "peaks, `saved` and `persistent` over virtual weights", _RELATIVE
    ),
    "per_dof": Field(
        "object", "the same over the bank's DoF; null for a dense weight", _RELATIVE, nullable=True
    ),
}
_FLOOR = {
    "bytes": integer("read and written at least once"),
    "gathered_bytes": integer("gathered from the bank"),
    "operations": integer("floating-point"),
    "floor_s": number("the longest of the three at the ceilings"),
    "bound": text("which that is", "copy", "gather", "matrix"),
    "percent": number("floor over cold median; null: not timed", nullable=True),
}
RESULT = {
    "case": text("`model.layer/batch`"),
    "op": text("operator", "linear", "conv2d", "embedding"),
    "weight_shape": Field("list", "torch's shape of the weight", {"*": integer("")}),
    "input_shape": Field("list", "of x", {"*": integer("")}),
    "virtual_weights": integer("P of this layer"),
    "batch": integer("images or tokens"),
    "dtype": text("of x and weight; `amp`: bf16 x, fp32 bank", *DTYPES),
    "dof": integer("degrees of freedom asked for; the bank rounds down to whole slots"),
    "granularity": integer("elements of a slot"),
    "reflect": text("signs", *REFLECT),
    "window": integer(
        "slots of a window; null: the law's choice, or the whole ring", nullable=True
    ),
    "laps": integer("uses of a slot in a unit; null: the whole ring", nullable=True),
    "impl": text("implementation"),
    "chosen": Field("bool", "ours, and what the dispatch table chooses for the forward"),
    "status": text("how it went", *STATUSES),
    "reason": text("why, unless ok; for ok, a note", nullable=True),
    "copies": integer("layers that ran in turn when cold"),
    "cold_bytes": integer(
        "that pass between two uses of one layer: x, y and the weights of all layers (of an "
        "embedding the rows looked up), as if they were stored"
    ),
    "accuracy": Field(
        "map",
        "by quantity",
        {"*": Field("object", "", _ACCURACY)},
        (OUTPUT, INPUT_GRAD, PARAMETER_GRAD),
    ),
    "times": Field(
        "map",
        "by pass, then state (cold, warm), then clock (process, wall; graph, eager)",
        {
            "*": Field(
                "map",
                "",
                {"*": Field("map", "", {"*": Field("object", "", _FIGURE)})},
                (COLD, WARM),
            )
        },
        PASSES,
    ),
    "memory": Field("object", "of one layer", _MEMORY, nullable=True),
    "floors": Field("map", "roofline by pass", {"*": Field("object", "", _FLOOR)}, PASSES),
}
FILE = {
    "schema": text("the name of this format", SCHEMA),
    "version": integer("of this format"),
    "complete": Field("bool", "false: interrupted, what was finished is here"),
    "created": text("ISO 8601, UTC, when the run began"),
    "command": text("command line"),
    "headline": text("the clock to quote", "process", "wall", "graph", "eager"),
    "environment": Field("object", "machine and versions", ENVIRONMENT),
    "options": Field("object", "of the run", OPTIONS),
    "ceilings": Field("object", "rates measured in this run", CEILINGS, nullable=True),
    "load": Field("object", "what else the machine did", LOAD),
    "results": Field(
        "list", "one for each case and implementation", {"*": Field("object", "", RESULT)}
    ),
}


def validate(record: object, fields: Mapping[str, Field] = FILE) -> dict[str, Any]:
    """The record itself, when it keeps to the format.

    Args:
        record: to check.
        fields: of the format; one has to be ``schema``, its name.

    Raises:
        ValueError: it does not; the message names the first field that is wrong.
    """
    (name,) = fields["schema"].choices
    if not isinstance(record, dict) or record.get("schema") != name:
        raise ValueError(f"schema: got no {name!r}, wanted a result file of benchmarks.harness")
    if record.get("version") != VERSION:
        raise ValueError(
            f"version: got {record.get('version')!r}, wanted {VERSION}: the file was written by "
            "another version of rpg-kernels; read it with that one, or measure again"
        )
    _check("file", record, Field("object", "", fields))
    return record


def load(path: Path, fields: Mapping[str, Field] = FILE) -> dict[str, Any]:
    """Read and validate a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, of another version, or has a wrong field; the file is named.
    """
    try:
        return validate(_with_windows(json.loads(path.read_text(encoding="utf-8"))), fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _with_windows(record: Any) -> Any:
    """A file of before rows said which windows they have: they had none."""
    if isinstance(record, dict) and record.get("schema") == SCHEMA:
        rows = record.get("results")
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict):
                row.setdefault("window", None)
                row.setdefault("laps", None)
    return record


def _check(where: str, value: object, field: Field) -> None:
    if value is None and field.nullable:
        return
    inside = field.inside or {}
    if field.kind == "object":
        _wanted(where, value, isinstance(value, dict), "an object")
        assert isinstance(value, dict)
        for name in (*inside, *value):
            if (name in inside) != (name in value):
                raise _checks.fail(where, f"keys {sorted(value)}", f"keys {sorted(inside)}")
        for name, part in inside.items():
            _check(f"{where}.{name}", value[name], part)
    elif field.kind == "map":
        _wanted(where, value, isinstance(value, dict), "an object")
        assert isinstance(value, dict)
        for name, part in value.items():
            if field.choices and name not in field.choices:
                raise _checks.fail(where, repr(name), f"keys of {list(field.choices)}")
            _check(f"{where}.{name}", part, inside["*"])
    elif field.kind == "list":
        _wanted(where, value, isinstance(value, list), "a list")
        assert isinstance(value, list)
        for i, part in enumerate(value):
            _check(f"{where}[{i}]", part, inside["*"])
    else:
        _scalar(where, value, field)


def _scalar(where: str, value: object, field: Field) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    right = {
        "text": isinstance(value, str) and (not field.choices or value in field.choices),
        "int": number and isinstance(value, int) and value >= 0,
        "number": number and isinstance(value, int | float) and math.isfinite(value) and value >= 0,
        "bool": isinstance(value, bool),
    }[field.kind]
    choices = f" of {list(field.choices)}" if field.choices else ""
    _wanted(where, value, right, f"{field.kind}{choices}")


def _wanted(where: str, value: object, right: bool, wanted: str) -> None:
    if not right:
        raise _checks.fail(where, repr(value)[:80], wanted)


def describe(fields: Mapping[str, Field] = FILE) -> Iterator[tuple[str, str, str]]:
    """(field, kind, meaning) of every field, depth first: what the documentation shows."""
    yield from _describe("", fields)


def _describe(prefix: str, fields: Mapping[str, Field]) -> Iterator[tuple[str, str, str]]:
    for name, field in fields.items():
        label = f"{prefix}{name}"
        if field.about:
            choices = ": " + ", ".join(f"`{c}`" for c in field.choices) if field.choices else ""
            yield label, field.kind + (" or null" if field.nullable else ""), field.about + choices
        inside, suffix = field.inside, {"list": "[]", "map": ".*"}.get(field.kind, "")
        while inside and set(inside) == {"*"}:  # what a list or map holds
            held = inside["*"]
            inside, more = held.inside, {"list": "[]", "map": ".*"}.get(held.kind, "")
            suffix += more
        if inside:
            yield from _describe(f"{label}{suffix}.", inside)
