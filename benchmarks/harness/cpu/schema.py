"""The formats of the CPU suites' result files, described and checked as ``bench.schema`` does."""

from __future__ import annotations

from benchmarks.harness.cpu.bandwidth import LEVELS
from benchmarks.harness.cpu.grid import DTYPES, IMPLS, SUITES
from benchmarks.harness.schema import (
    ENVIRONMENT,
    LOAD,
    OK,
    STATUSES,
    Field,
    integer,
    number,
    text,
)

LAYERS, DECODER = "rpg-kernels/cpu-layers", "rpg-kernels/cpu-decoder"
VERSION = 1


def _list(about: str, inside: Field) -> Field:
    return Field("list", about, {"*": inside})


def _head(schema: str) -> dict[str, Field]:
    """What both formats begin with."""
    return {
        "schema": text("the name of this format", schema),
        "version": integer("of this format"),
        "complete": Field("bool", "false: interrupted, what was finished is here"),
        "created": text("ISO 8601, UTC, when the run began"),
        "command": text("command line"),
        "clock": text("that times were read on", "process", "wall"),
        "environment": Field("object", "as in the other suites", ENVIRONMENT),
        "load": Field("object", "what else the machine did", LOAD),
    }


_RATE = {
    "level": text("cache, or memory", *LEVELS),
    "capacity": integer("bytes of one thread's data that it holds; of memory 0"),
    "read_bytes_per_s": number("read by all threads"),
    "update_bytes_per_s": number("read and written by all threads, both counted"),
}
_TRAFFIC = {
    "read": Field("map", "bytes, by level", {"*": integer("")}, LEVELS),
    "update": Field(
        "map", "bytes read and written, both counted, by level", {"*": integer("")}, LEVELS
    ),
    "operations": integer("multiplications and additions"),
    "dtype": text("of the products"),
}
ROW = {
    "layer": text("`model.layer`"),
    "op": text("operator", "linear", "conv2d"),
    "weight_shape": _list("torch's shape of the weight", integer("")),
    "batch": integer("rows of x, or images"),
    "dtype": text("of x, weight and bank", *DTYPES),
    "impl": text("implementation", *IMPLS),
    "dof": integer("degrees of freedom asked for; null of a dense weight", nullable=True),
    "window": integer(
        "slots of a window; null where the law chooses them, and for a whole ring", nullable=True
    ),
    "laps": integer("times that a slot is read close together; null for a ring", nullable=True),
    "backend": text("that ran it: `torch`, `cpu` or `reference`"),
    "status": text("how it went", *STATUSES),
    "reason": text(f"why, unless {OK}", nullable=True),
    "error": number("largest absolute error against float64", nullable=True),
    "allowed": number("the most that passes", nullable=True),
    "copies": integer("layers that ran in turn"),
    "series_s": _list("seconds of a call: the median of each series, in order", number("")),
    "median_s": number("median of the series; null: not measured", nullable=True),
    "samples": integer("in all series; each is the mean of some calls"),
    "wait": number("wall time over process time, the median", nullable=True),
    "traffic": Field(
        "object", "what a call must do at least; null: not counted", _TRAFFIC, nullable=True
    ),
}
LAYERS_FILE = {
    **_head(LAYERS),
    "options": Field(
        "object",
        "of the run",
        {
            "suite": text("its name", *SUITES),
            "part": _list("groups, where not all of the suite was asked for", text("")),
            "series": integer("passes over everything"),
            "seconds": number("for the samples of a group in a series"),
            "seed": integer("of values and of the order of samples"),
        },
    ),
    "rates": _list(
        "the best of all series; empty without the native module", Field("object", "", _RATE)
    ),
    "matrix_per_s": Field(
        "map", "operations per second of a large product, by dtype, the best", {"*": number("")}
    ),
    "done": _list("groups and series that are finished: `NAME DTYPE SERIES`", text("")),
    "results": _list("one for each implementation, bank and batch", Field("object", "", ROW)),
}  # fmt: skip
DECODER_FILE = {
    **_head(DECODER),
    "options": Field(
        "object",
        "of the run",
        {
            "prompt": integer("tokens before the first that is generated"),
            "tokens": integer("generated in each series, one at a time"),
            "series": integer("of each network, in turn"),
            "seed": integer("of weights and prompt"),
        },
    ),
    "model": Field(
        "object",
        "the network",
        {
            **{
                name: integer("")
                for name in ("vocabulary", "width", "layers", "heads", "kv_heads", "hidden")
            },
            "virtual_weights": integer("of the linear layers that are shared"),
            "dof": integer("of the bank"),
            "window": integer("slots of a window; null where the law chooses them", nullable=True),
            "laps": integer("times that a slot is read close together"),
        },
    ),
    "results": _list(
        "one for each network and dtype",
        Field(
            "object",
            "",
            {
                "network": text("", "dense", "rpg-kernels"),
                "dtype": text("of everything", *DTYPES),
                "weight_bytes": integer("of all parameters"),
                "linear_bytes": integer("of them in linear layers: weights, or the bank"),
                "series_s": _list("seconds of a token: the mean of each series", number("")),
                "median_s": number("median of the series"),
                "error": number("largest difference of the logits from the dense network's, "
                                "relative to their largest"),
                "same_tokens": Field("bool", "as the dense network generates"),
            },
        ),
    ),
}  # fmt: skip
