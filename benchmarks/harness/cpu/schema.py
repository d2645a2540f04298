"""The formats of the CPU suites' result files, described and checked as ``bench.schema`` does."""

from __future__ import annotations

from benchmarks.harness.cpu.bandwidth import LEVELS
from benchmarks.harness.cpu.grid import DTYPES, WHATS
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

LAYERS, DECODER = "rpg-kernels/cpu-linear", "rpg-kernels/cpu-decoder"
NETWORKS = "rpg-kernels/cpu-networks"
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
_RATIO = {
    "q25": number("quartile"),
    "median": number("above 1 ours is faster"),
    "q75": number("quartile"),
    "rounds": integer("that both ran in"),
}
ROW = {
    "layer": text("`model.layer`"),
    "weight_shape": _list("torch's shape of the weight", integer("")),
    "dtype": text("of x, weight and bank", *DTYPES),
    "batch": integer("rows of x"),
    "what": text("`training` is the forward and both gradients", *WHATS),
    "dof": integer("degrees of freedom asked for"),
    "laps": integer("times that a slot is read close together; null for a ring", nullable=True),
    "backend": text("that ran it: `cpu`, `reference`, or both, forward first"),
    "status": text("how it went", *STATUSES),
    "reason": text(f"why, unless {OK}", nullable=True),
    "error": number("largest absolute error against float64; null: not finite", nullable=True),
    "allowed": number("the most that passes"),
    "copies": integer("layers that ran in turn"),
    "rounds": integer("of samples, everything of a point in turn"),
    "ours_s": number("seconds of a call, the median; null: not measured", nullable=True),
    "reference_s": number(
        "the same on the reference, which may have been left early; null: not measured",
        nullable=True,
    ),
    "dense": text("the fastest dense layer", nullable=True),
    "dense_s": number("seconds of its call, the median", nullable=True),
    "ratio": Field(
        "object", "dense over ours, by round: what lies in the middle", _RATIO, nullable=True
    ),
    "dense_all": Field(
        "map", "seconds of every dense layer; those far behind were left early", {"*": number("")}
    ),
    "dense_missing": Field(
        "map", "dense layers that did not run or were wrong, and why", {"*": text("")}
    ),
    "wait": number("wall time over process time, the median", nullable=True),
    "roof": Field(
        "map",
        "least seconds of a call of ours by what it waits for: arithmetic, a level",
        {"*": number("")},
    ),
    "dense_roof": Field("map", "the same of a dense layer", {"*": number("")}),
}
LAYERS_FILE = {
    **_head(LAYERS),
    "options": Field(
        "object",
        "of the run",
        {
            "points": _list("that were asked for", text("")),
            "seconds": number("for the samples of a point"),
            "seed": integer("of values and of the order of samples"),
        },
    ),
    "lacks": _list("instruction sets that the processor has not", text("")),
    "rates": _list(
        "the best of all runs; empty without the native module", Field("object", "", _RATE)
    ),
    "matrix_per_s": Field(
        "map", "operations per second of a product in cache, by dtype, the best", {"*": number("")}
    ),
    "disturbed": Field(
        "map", "rows that kept no figure, and the spread of their ratio", {"*": number("")}
    ),
    "results": _list("one for each point and bank", Field("object", "", ROW)),
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

_MEMORY = {
    "state": integer("between steps: parameters, gradients, the optimiser's, buffers"),
    "saved_beyond_activations": integer("for the backward: tables, and copies of weights"),
    "peak": integer("the most that is allocated at once in a step"),
}
NETWORKS_FILE = {
    **_head(NETWORKS),
    "options": LAYERS_FILE["options"],
    "lacks": LAYERS_FILE["lacks"],
    "disturbed": LAYERS_FILE["disturbed"],
    "missing": Field("map", "cases that could not be measured, and why", {"*": text("")}),
    "results": _list(
        "one for each point and network beside the dense one",
        Field(
            "object",
            "",
            {
                "point": text("that it belongs to"),
                "case": text("network, or convolution"),
                "dtype": text("of a layer; of a network that of autocast", *DTYPES),
                "batch": integer("samples"),
                "what": text("`inference` is that of a network, `forward` of a layer"),
                "network": text("", "rpg-kernels", "published"),
                "dof": integer("degrees of freedom asked for"),
                "laps": ROW["laps"],
                "unit": text("that seconds are counted in", "images", "tokens"),
                "units": integer("of a call"),
                "status": ROW["status"],
                "error": number("relative to the largest output; null: not finite", nullable=True),
                "way": text("dtype and layout, the fastest", nullable=True),
                "seconds": number("of a call, the median", nullable=True),
                "dense": text("the fastest dense way", nullable=True),
                "dense_seconds": number("of its call, the median", nullable=True),
                "ratio": ROW["ratio"],
                "wait": ROW["wait"],
                "all": Field(
                    "map",
                    "seconds of every way of the point; those far behind were left early",
                    {"*": number("")},
                ),
                "memory": Field("object", "bytes of training", _MEMORY, nullable=True),
                "dense_memory": Field("object", "the same, dense", _MEMORY, nullable=True),
            },
        ),
    ),
}  # fmt: skip
