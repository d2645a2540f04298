"""What the demo leaves behind: a table on the screen, ``demo.json`` and ``demo.png``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.chart import Chart, Point, Series
from benchmarks.harness.memory import Persistent, SavedBytes
from rpg_kernels._extras import require
from rpg_kernels.timing import aligned

# Kind -> label, colour, mark and line: told apart with any colour vision.
LOOKS = {
    "rpg": ("rpg-kernels", "blue", "circle", "solid"),
    "published": ("as published (tables)", "orange", "square", "none"),
    "dense": ("dense, narrowed and full", "text", "triangle", "dashed"),
}


@dataclass
class Result:
    """One network: its sizes, its bytes, and accuracy and time for each seed."""

    label: str
    kind: str
    width: int
    dof: int
    virtual_weights: int
    trainable: int
    state: Persistent | None = None
    saved: SavedBytes | None = None
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    @property
    def mean_accuracy(self) -> float:
        return sum(self.accuracy) / len(self.accuracy)

    @property
    def training_bytes(self) -> int:
        """State, and weights that the forward copies; tables are part of the state already."""
        if self.state is None or self.saved is None:
            raise ValueError(f"{self.label}: got no measured bytes, wanted a trained network")
        return self.state.total + self.saved.weights

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
        return {**asdict(self), **extra}


def table(results: Sequence[Result]) -> str:
    """The results as text, one network a line."""
    head = [
        "network", "DoF", "virtual weights", "trainable", "state MB", "saved MB",
        "beyond act. MB", "accuracy %", "time s",
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
                f"{sum(result.seconds) / len(result.seconds):.1f}",
            ]
        )
    first, *rest = aligned(rows)
    return "\n".join([first, "-" * len(first), *rest])


def legend(batch: int) -> str:
    """What the table's columns mean."""
    return (
        "DoF: numbers that the block convolutions are made of (dense: their weights). "
        "trainable: all parameters, with stem, norms and classifier.\n"
        "state: weights, gradients, optimiser state and tables. "
        f"saved: what one forward of {batch} images keeps for the backward, without parameters "
        "and input.\n"
        "beyond act.: the part of it that is the same whatever the images are: "
        "tables, and copies of weights.\n"
        "accuracy: mean over seeds, and half their range."
    )


def plot(path: Path, results: Sequence[Result], title: str) -> None:
    """Two panels against DoF: test accuracy, and bytes of training memory."""
    figure_module = require("matplotlib.figure", "matplotlib", "demo.png")
    figure = figure_module.Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2)
    x_label = "degrees of freedom of the block convolutions"
    bytes_label = "training memory without activations (MB)"
    for axes, y_label, place in (
        (left, "test accuracy (%)", _accuracy),
        (right, bytes_label, _megabytes),
    ):
        series = [
            Series(label, [place(r) for r in of_kind], line, mark, colour)
            for kind, (label, colour, mark, line) in LOOKS.items()
            if (of_kind := sorted((r for r in results if r.kind == kind), key=lambda r: r.dof))
        ]
        Chart("", x_label, y_label, series, log_x=True, log_y=axes is right).draw(axes, "light")
        axes.grid(alpha=0.3)
    left.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def _accuracy(result: Result) -> Point:
    lowest, highest = min(result.accuracy), max(result.accuracy)
    return Point(result.dof, result.mean_accuracy, lowest, highest)


def _megabytes(result: Result) -> Point:
    return Point(result.dof, result.training_bytes / 1e6)
