"""Pictures of the pose experiment, from records alone: test pictures are drawn again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.paper.experiment import Record
from benchmarks.paper.figures import figures
from benchmarks.paper.skeleton import BONES, JOINTS, SIDE
from rpg_kernels._extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN_SEED, TEST_SEED = 1, 2  # of the figures, whatever the run's seed
SHOWN = 6  # figures in a row, and the first test figures whose joints are recorded
SHOWN_ROWS = ("4x shared", "4x RPG", "4x not shared")
_LEFT, _RIGHT, _MIDDLE = "#56b4e9", "#e69f00", "#ffffff"


def pictures(records: list[Record], folder: Path) -> str:
    """Draw ``pose_figures.png`` and ``pose_found.png``; Markdown that shows them.

    Args:
        records: of runs; those of one seed of ``SHOWN_ROWS`` are drawn, where they are.
        folder: where to.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pixels, joints, _ = figures(2 * SHOWN, TEST_SEED)
    rows = [joints[:SHOWN], joints[SHOWN:]]
    _draw(folder / "pose_figures.png", [pixels[:SHOWN], pixels[SHOWN:]], rows, ["", ""])
    text = (
        "![Figures with their true joints](pose_figures.png)\n\n"
        "Test figures with their true joints: blue is the figure's left, orange its right.\n"
    )
    shown = _found(records)
    if shown:
        names = ["truth", *shown]
        _draw(
            folder / "pose_found.png",
            [pixels[:SHOWN]] * len(names),
            [joints[:SHOWN], *shown.values()],
            names,
        )
        text += (
            "\n![Joints that networks found](pose_found.png)\n\n"
            "The same figures, and what three networks of the first seed found.\n"
        )
    return text


def _found(records: Sequence[Record]) -> dict[str, Tensor]:
    """By row, the joints ``[6, 14, 2]`` of the first seed that all shown rows have."""
    by_row = {
        name: {r["seed"]: r for r in records if r["row"] == name and r.get("found")}
        for name in SHOWN_ROWS
    }
    seeds = set.intersection(*(set(of) for of in by_row.values()))
    if not seeds:
        return {}
    return {name: torch.tensor(of[min(seeds)]["found"]) for name, of in by_row.items()}


def _draw(
    path: Path, pixels: Sequence[Tensor], joints: Sequence[Tensor], names: Sequence[str]
) -> None:
    """Rows of pictures with lines between the joints."""
    require("matplotlib", "matplotlib", "the pictures of figures")
    from matplotlib.figure import Figure

    inch = 1.25
    figure = Figure(figsize=(SHOWN * inch, len(pixels) * inch))
    axes = figure.subplots(len(pixels), SHOWN, squeeze=False)
    for i, name in enumerate(names):
        for j, axis in enumerate(axes[i]):
            axis.imshow(pixels[i][j].permute(1, 2, 0).numpy(), extent=(0, SIDE, SIDE, 0))
            _lines(axis, joints[i][j])
            axis.set(xlim=(0, SIDE), ylim=(SIDE, 0), xticks=[], yticks=[])
        axes[i][0].set_ylabel(name, fontsize=8)
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _lines(axis: Axes, joints: Tensor) -> None:
    for first, second in BONES:
        name = JOINTS[second]
        colour = (
            _LEFT if name.startswith("left") else _RIGHT if name.startswith("right") else _MIDDLE
        )
        ends = joints[[first, second]]
        axis.plot(*ends.T.tolist(), color=colour, linewidth=1.2, solid_capstyle="round")
