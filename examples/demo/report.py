"""What the demo leaves behind: a table on the screen, ``demo.json`` and ``demo.png``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.harness.chart import Chart, Point, Series
from benchmarks.harness.memory import Persistent, SavedBytes
from rpg_kernels._extras import require
from rpg_kernels.timing import aligned

# Colour, mark and line of each network of a kind: told apart with any colour vision.
LOOKS = {
    "dense": (("text", "triangle", "dashed"), ("grey", "triangle", "dashed")),
    "published": (("orange", "square", "dashed"),),
    "rpg": (
        ("pink", "diamond", "solid"),
        ("green", "circle", "solid"),
        ("blue", "circle", "solid"),
    ),
}


@dataclass
class Result:
    """One network: its sizes, its bytes, and accuracy and time for each seed.

    ``images``: that a run trains with, each as often as it is met. ``curves``: test accuracy after
    each epoch, for each seed. ``images_per_second``: of training; 0 until it is measured.
    """

    label: str
    kind: str
    width: int
    dof: int
    virtual_weights: int
    trainable: int
    images: int
    laps: int | None = None
    state: Persistent | None = None
    saved: SavedBytes | None = None
    curves: list[list[float]] = field(default_factory=list)
    images_per_second: float = 0.0
    loss: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> list[float]:
        return [curve[-1] for curve in self.curves]

    @property
    def seconds(self) -> float:
        """Of a whole training, without tests."""
        return self.images / self.images_per_second

    @property
    def mean_accuracy(self) -> float:
        return sum(self.accuracy) / len(self.accuracy)

    @property
    def training_bytes(self) -> int:
        """State, and weights that the forward copies; tables are part of the state already."""
        if self.state is None or self.saved is None:
            raise ValueError(f"{self.label}: got no measured bytes, wanted a trained network")
        return self.state.total + self.saved.weights

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Result:
        """The network of a ``record``, before its speed was measured."""
        known = {field.name: record[field.name] for field in fields(cls)}
        known |= {"state": Persistent(**known["state"]), "saved": SavedBytes(**known["saved"])}
        return cls(**known | {"images_per_second": 0.0})

    def record(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        extra: dict[str, Any] = {}
        if self.state is not None and self.saved is not None:
            beyond = self.saved.beyond_activations
            extra = {
                "state_bytes": self.state.total,
                "saved_bytes": self.saved.total,
                "saved_bytes_beyond_activations": beyond,
                "saved_bytes_beyond_activations_per_virtual_weight": beyond / self.virtual_weights,
                "training_bytes": self.training_bytes,
            }
        if self.curves:
            extra["accuracy"] = self.accuracy
        if self.images_per_second:
            extra["seconds"] = self.seconds
        return {**asdict(self), **extra}


def table(results: Sequence[Result]) -> str:
    """The results as text, one network a line."""
    head = [
        "network", "DoF", "virtual weights", "trainable", "state MB", "saved MB",
        "beyond act. MB", "accuracy %", "time s", "images/s",
    ]  # fmt: skip
    rows = [head]
    for result in results:
        if result.state is None or result.saved is None:
            continue
        spread = max(result.accuracy) - min(result.accuracy)
        rows.append(
            [
                result.label,
                f"{result.dof:,}",
                f"{result.virtual_weights:,}",
                f"{result.trainable:,}",
                f"{result.state.total / 1e6:.2f}",
                f"{result.saved.total / 1e6:.2f}",
                f"{result.saved.beyond_activations / 1e6:.2f}",
                f"{result.mean_accuracy:.1f}" + (f" ±{spread / 2:.1f}" if spread else ""),
                f"{result.seconds:.1f}",
                f"{result.images_per_second:.0f}",
            ]
        )
    first, *rest = aligned(rows)
    return "\n".join([first, "-" * len(first), *rest])


def legend(batch: int, clock: str) -> str:
    """What the table's columns mean; ``clock``: what times are."""
    return (
        "DoF: numbers that the block convolutions are made of (dense: their weights). "
        "trainable: all parameters, with stem, norms and classifier.\n"
        "state: weights, gradients, optimiser state and tables. "
        f"saved: what one forward of {batch} images keeps for the backward, without parameters "
        "and input.\n"
        "beyond act.: the part of it that is the same whatever the images are: "
        "tables, and copies of weights.\n"
        "accuracy: mean over seeds, and half their range.\n"
        f"images/s: of training steps, all networks in turn, {clock}. time: of a training at that "
        "rate, without tests."
    )


def plot(path: Path, results: Sequence[Result], title: str) -> None:
    """Two panels of test accuracy: against seconds of training, and against training memory."""
    figure_module = require("matplotlib.figure", "matplotlib", "demo.png")
    figure = figure_module.Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2, sharey=True)
    over_time, of_memory = [], []
    met = dict.fromkeys(LOOKS, 0)
    for result in results:
        looks = LOOKS[result.kind]
        colour, mark, line = looks[min(met[result.kind], len(looks) - 1)]
        met[result.kind] += 1
        label = f"{result.label}, {_short(result.dof)}"
        over_time.append(Series(label, _course(result), line, "", colour))
        of_memory.append(Series(label, [_final(result)], "none", mark, colour))
    seconds, megabytes = "training time (s)", "training memory without activations (MB)"
    Chart("", seconds, "test accuracy (%)", over_time).draw(left, "light")
    Chart("", megabytes, "", of_memory, log_x=True).draw(right, "light")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    # The first epochs would take most of the height.
    final = [result.mean_accuracy for result in results]
    spread = max(final) - min(final)
    left.set_ylim(max(0.0, min(final) - 1.5 * spread - 5), min(100.5, max(final) + spread + 1))
    left.legend(loc="lower right", fontsize=8)
    right.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)


def _short(number: int) -> str:
    """
    Example:
        >>> _short(2_000_000), _short(44_992), _short(512)
        ('2M', '45K', '512')
    """
    for size, letter in ((1_000_000, "M"), (1_000, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def _course(result: Result) -> list[Point]:
    """Mean accuracy over seeds against seconds, epoch by epoch."""
    epochs = list(zip(*result.curves, strict=True))
    of_epoch = result.seconds / len(epochs)
    return [Point(of_epoch * i, sum(e) / len(e)) for i, e in enumerate(epochs, 1)]


def _final(result: Result) -> Point:
    lowest, highest = min(result.accuracy), max(result.accuracy)
    return Point(result.training_bytes / 1e6, result.mean_accuracy, lowest, highest)
