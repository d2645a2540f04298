"""The format of the result files of suite ``rivals``."""

from __future__ import annotations

from benchmarks.harness.cpu import schema as cpu
from benchmarks.harness.rivals.contender import FORWARD, KINDS, TRAINING
from benchmarks.harness.schema import (
    ENVIRONMENT,
    LOAD,
    STATUSES,
    Field,
    integer,
    number,
    text,
)

RIVALS = "rpg-kernels/cpu-rivals"
VERSION = 1


def _list(about: str, inside: Field) -> Field:
    return Field("list", about, {"*": inside})


_LAYERS = cpu.LAYERS_FILE
_SECONDS = number("")
ROW = {
    "point": text("that it belongs to"),
    "layer": text("`model.layer`"),
    "weight_shape": _list("torch's shape of the weight", integer("")),
    "what": text("`training` is the forward and all gradients", FORWARD, TRAINING),
    "batch": integer("rows of x"),
    "family": text("the package"),
    "name": text("the way to run the layer"),
    "kind": text("what is stored of a weight, of ours of an element of the bank", *KINDS),
    "ours": Field("bool", "whether it reads a bank"),
    "status": text("how it went", *STATUSES),
    "reason": text("why, unless ok", nullable=True),
    "error": number("of y, in training of all results, relative to the norm of what is exact in "
                    "float64 for the weight before it is rounded; null: not finite", nullable=True),
    "allowed": number("the most that passes"),
    "parameters": integer("numbers that are stored for the layer; of ours the bank's"),
    "nbytes": integer("of the layer's weights and scales; of ours of the bank"),
    "resident": integer("by which the process grew, for a layer; of ours for all on the bank"),
    "flushed": _list("seconds of a call when nothing is in a cache, one a round", _SECONDS),
    "following": _list("seconds of a call that follows other layers, one a round", _SECONDS),
}  # fmt: skip
TOKENS = {
    "name": text("the bank, and what its elements are"),
    "ours_s": _list("seconds of a token: the mean of each series", _SECONDS),
    "roof_s": _list("seconds in which the four-bit weights of a dense network are read, measured "
                    "beside each series", _SECONDS),
    "nbytes": integer("of the bank"),
    "error": number("of the logits against fp32 on the bank before it was rounded, relative to "
                    "the largest; null: not finite", nullable=True),
    "allowed": number("the most that passes"),
}  # fmt: skip
FILE = {
    "schema": text("the name of this format", RIVALS),
    "version": integer("of this format"),
    "complete": Field("bool", "false: interrupted, what was finished is here"),
    "created": text("ISO 8601, UTC, when the run began"),
    "command": text("command line"),
    "clock": text("that times were read on", "process", "wall"),
    "environment": Field("object", "as in the other suites", ENVIRONMENT),
    "load": Field("object", "what else the machine did", LOAD),
    "options": Field(
        "object",
        "of the run",
        {
            "points": _list("that were asked for", text("")),
            "families": _list("that were asked for", text("")),
            "dofs": _list("sizes of banks that were asked for; empty: all", integer("")),
            "seconds": number("for the samples of a point"),
            "seed": integer("of values and of the order of samples"),
        },
    ),
    "lacks": _LAYERS["lacks"],
    "rates": _LAYERS["rates"],
    "versions": Field("map", "of the packages", {"*": text("")}),
    "flush_bytes": integer("read between two turns"),
    "skipped": Field("map", "families that are left out, and why", {"*": text("")}),
    "disturbed": Field(
        "map", "points whose ratios did not settle, and by how much", {"*": number("")}
    ),
    "results": _list("one for each point and way", Field("object", "", ROW)),
    "model": Field("map", "sizes of the decoder", {"*": integer("")}),
    "tokens": _list("one for each bank of the decoder", Field("object", "", TOKENS)),
}
