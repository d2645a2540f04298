"""What the demo leaves behind: a table on the screen, ``demo.json`` and ``demo.png``."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.memory import Persistent, SavedBytes
from rpg_kernels._extras import require
from rpg_kernels.doctor.machine import commit, cpu_name

# Okabe and Ito's colours, told apart with any colour vision; the markers differ as well.
STYLES = {
    "rpg": ("#0072B2", "o"),
    "published": ("#D55E00", "s"),
    "dense": ("#000000", "^"),
}
LABELS = {
    "rpg": "rpg-kernels",
    "published": "as published (tables)",
    "dense": "dense, narrowed and full",
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
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


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


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for the result file."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "commit": commit(),
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write by renaming, so that a run cut short leaves the last whole file."""
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def plot(path: Path, results: Sequence[Result], title: str) -> None:
    """Two panels against DoF: test accuracy, and bytes of training memory."""
    figure_module = require("matplotlib.figure", "matplotlib", "demo.png")
    figure = figure_module.Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2)
    for axes, values in ((left, _accuracies), (right, _megabytes)):
        for kind, (colour, marker) in STYLES.items():
            of_kind = sorted((r for r in results if r.kind == kind), key=lambda r: r.dof)
            if not of_kind:
                continue
            middle, low, high = zip(*(values(result) for result in of_kind), strict=True)
            axes.errorbar(
                [result.dof for result in of_kind],
                middle,
                yerr=[
                    [m - v for m, v in zip(middle, low, strict=True)],
                    [v - m for m, v in zip(middle, high, strict=True)],
                ],
                color=colour,
                marker=marker,
                markersize=7,
                capsize=3,
                linestyle="-" if kind == "rpg" else "--" if kind == "dense" else "none",
                linewidth=1.5,
                label=LABELS[kind],
            )
        axes.set_xscale("log")
        axes.set_xlabel("degrees of freedom of the block convolutions")
        axes.grid(alpha=0.3, which="major")
    left.set_ylabel("test accuracy (%)")
    right.set_yscale("log")
    right.set_ylabel("training memory without activations (MB)")
    left.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def _accuracies(result: Result) -> tuple[float, float, float]:
    return result.mean_accuracy, min(result.accuracy), max(result.accuracy)


def _megabytes(result: Result) -> tuple[float, float, float]:
    size = result.training_bytes / 1e6
    return size, size, size
