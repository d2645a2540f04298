"""RPG.blk, one generator for each stage, beside one for all and other ways of sharing."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.paper import classification
from benchmarks.paper.classification import BLK, HALF, HASHED, UNSIGNED, task
from benchmarks.paper.experiment import Experiment, Row

DEPTH = 34
VANILLA = f"ResNet-{DEPTH}, vanilla"


def _row(kind: str, dof: int, label: str, paper: float | None, laps: int | None = None) -> Row:
    settings = {"depth": DEPTH, "kind": kind, "dof": dof, "laps": laps}
    given = {name: value for name, value in settings.items() if value is not None}
    return Row(f"ResNet-{DEPTH}, {label}", given, _paper(paper))


def _theirs(name: str, paper: float | None) -> Row:
    """A row of the classification, whose runs count here."""
    row = next(row for row in classification.ROWS if row.name == name)
    return replace(row, paper=_paper(paper), unshared="")


def _paper(value: float | None) -> dict[str, float]:
    return {} if value is None else {"test_accuracy": value}


EXPERIMENT = Experiment(
    name="blocks",
    title="RPG.blk: a generator for each stage",
    rows=(
        _theirs("ResNet-34, RPG 10.6M", 78.9),
        _row(BLK, HALF[DEPTH], "RPG.blk 10.6M", 78.5, 2),
        _row(HASHED, HALF[DEPTH], "HashedNet 10.6M", 75.6),
        _row(UNSIGNED, HALF[DEPTH], "random weight sharing 10.6M", 74.9),
        _theirs("ResNet-34, RPG 2M", None),
        _row(BLK, 2_000_000, "RPG.blk 2M", None, 4),
        _theirs("ResNet-18, vanilla", 77.5),
        _theirs(VANILLA, 79.1),
    ),
    metrics=classification.EXPERIMENT.metrics,
    unshared=VANILLA,
    task=task,
    paper_data="CIFAR-100 at 11M degrees of freedom",
    quoted=(
        Row("ResNet-34, Lego 11M", {}, _paper(78.4)),
        Row("ResNet-34, Deep Compression 11M", {}, _paper(72.2)),
    ),
    also=("classification",),
    text="""\
The paper's table for CIFAR-100 at 11M degrees of freedom, with networks, data and recipe of
[classification](paper_classification.md), whose runs count here where rows are the same. RPG.blk
has a bank for each of the four stages, whose sizes are in proportion to the stages' weights. In
HashedNet and random weight sharing every weight reads an independent element of one bank, with and
without a sign of its own. At 2M, where sharing bites more, the paper has no numbers.
""",
)
