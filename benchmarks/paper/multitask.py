"""The multitask table: depth and surface normals from one image, with building blocks reused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rpg_kernels as rpg
from benchmarks.paper.experiment import SIZES, Experiment, Metric, Record, Row
from benchmarks.paper.multitask_data import (
    OUT,
    TEST_SEED,
    TRAIN_SEED,
    Batch,
    Moments,
    moments,
    packed,
    render,
    unpacked,
)
from benchmarks.paper.multitask_network import Multitask, build, sizes
from benchmarks.paper.scenes import SIDE
from rpg_kernels import _checks
from rpg_kernels._extras import require

TEST_BATCH = 100
SHOWN = 3  # the first scenes of the test set; predictions of them are kept
DEPTH_STEP = 0.05  # metres: how finely depth is kept for pictures, in 256 steps
VANILLA, FULL = "vanilla", "reuse, new BN, permute and reflect"


@dataclass(frozen=True)
class Recipe:
    """AdamW under a one-cycle learning rate, the same for every row."""

    images: int
    test_images: int
    epochs: int
    batch_size: int
    lr: float = 4e-3
    weight_decay: float = 0.01
    bfloat16: bool = True


RECIPES = {
    "full": Recipe(images=3200, test_images=500, epochs=4, batch_size=16),
    "quick": Recipe(images=320, test_images=96, epochs=2, batch_size=16),
    "tiny": Recipe(images=16, test_images=16, epochs=1, batch_size=8),
}


class Scenes:
    """The task of :mod:`experiment`'s protocol.

    Args:
        recipe: sizes and optimiser.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {**asdict(self._recipe), "optimiser": "AdamW", "schedule": "one cycle"}

    @property
    def data(self) -> Mapping[str, Any]:
        return {
            "name": "rendered rooms",
            "side": SIDE,
            "train_images": self._recipe.images,
            "train_seed": TRAIN_SEED,
            "test_images": self._recipe.test_images,
            "test_seed": TEST_SEED,
        }

    @cached_property
    def training(self) -> Batch:
        return render(self._recipe.images, TRAIN_SEED)

    @cached_property
    def test(self) -> Batch:
        return render(self._recipe.test_images, TEST_SEED)

    @cached_property
    def moments(self) -> Moments:
        return moments(self.training)

    def steps(self, row: Row) -> int:
        return self._recipe.epochs * (self._recipe.images // self._recipe.batch_size)

    def build(self, row: Row, seed: int) -> Multitask:
        model = build(row.settings, seed)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def run(self, row: Row, seed: int, on_step: Callable[[], object]) -> Record:
        recipe, model = self._recipe, self.build(row, seed)
        optimizer = self._optimizer(model)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=self.steps(row),
            cycle_momentum=False,
        )
        order = torch.Generator().manual_seed(seed)
        losses: list[float | None] = []
        errors: list[tuple[float | None, float | None]] = []
        for _ in range(recipe.epochs):
            total, count = torch.zeros(()), 0
            for chosen in self._batches(order):
                total += self._step(model, self.training[chosen], optimizer)
                count += 1
                schedule.step()
                on_step()
            losses.append(_finite(float(total) / count))
            errors.append(self.errors(model))
        depth, normals = self.predict(model, self.test.images[:SHOWN])
        return {
            "depth_rmse": errors[-1][0],
            "normal_rmse": errors[-1][1],
            **sizes(model),
            "training_loss": losses[-1],
            "loss_by_epoch": losses,
            "depth_rmse_by_epoch": [depth for depth, _ in errors],
            "normal_rmse_by_epoch": [normal for _, normal in errors],
            "depth_by_scene": packed(depth / DEPTH_STEP),
            "normals_by_scene": packed((normals + 1) * 127.5),
        }

    def training_step(self, model: nn.Module) -> Callable[[], object]:
        optimizer = self._optimizer(model)
        batch = self.training[: self._recipe.batch_size]
        return lambda: self._step(model, batch, optimizer)

    def predict(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Depth in metres and normals as they come, not made one long, of all images."""
        model.eval()
        with torch.no_grad():
            parts = [self._forward(model, part) for part in images.split(TEST_BATCH)]
        depth, normals = (torch.cat(part) for part in zip(*parts, strict=True))
        return depth * self.moments.depth_variance.sqrt() + self.moments.depth_mean, normals

    def errors(self, model: nn.Module) -> tuple[float | None, float | None]:
        """Root mean square errors of depth and normals on the test set, per cent of the root mean
        square of the truth about its mean: who answers with the mean has 100."""
        truth = self.test
        depth, normals = self.predict(model, truth.images)
        spread = moments(truth)
        of_depth = (depth - truth.depth).square().mean() / spread.depth_variance
        of_normals = (normals - truth.normals).square().sum(1).mean() / spread.normals_variance
        return _per_cent(of_depth), _per_cent(of_normals)

    def _batches(self, order: torch.Generator) -> Iterator[Tensor]:
        size = self._recipe.batch_size
        chosen = torch.randperm(len(self.training), generator=order)
        return (part for part in chosen.split(size) if len(part) == size)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        recipe = self._recipe
        groups = rpg.param_groups(model, lr=recipe.lr, weight_decay=recipe.weight_decay)
        return torch.optim.AdamW(groups)

    def _forward(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the network says, in float32: depth in standard deviations from its mean."""
        x = images.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._recipe.bfloat16):
            depth, normals = model(x)
        return depth.float(), normals.float()

    def _step(self, model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> Tensor:
        """One step; the loss before it: the sum of both tasks' squared errors over variances."""
        model.train()
        known = self.moments
        depth, normals = self._forward(model, batch.images)
        wanted = (batch.depth - known.depth_mean) / known.depth_variance.sqrt()
        loss = (depth - wanted).square().mean()
        loss = loss + (normals - batch.normals).square().sum(1).mean() / known.normals_variance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()


def _per_cent(square: Tensor) -> float | None:
    return _finite(100 * math.sqrt(float(square)) if square >= 0 else math.nan)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def task(size: str, data: str | None) -> Scenes:
    """Of a size of ``SIZES``; scenes are rendered, so that ``data`` must be None.

    Raises:
        ValueError: another size, or a file.
    """
    _checks.choice("size", size, SIZES)
    if data is not None:
        raise _checks.fail("data", repr(data), "none, as the scenes are rendered")
    return Scenes(RECIPES[size])


def pictures(records: list[Record], folder: Path) -> str:
    """Draw ``multitask_scenes.png``: images, truth, and predictions of two rows, seed 0 or the
    first there is.

    Returns:
        Markdown that shows it; nothing where a row has no run.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    first = {row: _first(records, row) for row in (VANILLA, FULL)}
    runs = {row: run for row, run in first.items() if run is not None}
    if len(runs) < 2:
        return ""
    require("matplotlib", "matplotlib", "pictures of the scenes")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    truth = render(SHOWN, TEST_SEED)
    shown: list[tuple[str, Tensor, Tensor]] = [("truth", truth.depth, truth.normals)]
    for row, run in runs.items():
        depth = unpacked(run["depth_by_scene"], SHOWN, 1, OUT, OUT) * DEPTH_STEP
        shown.append(
            (row, depth, unpacked(run["normals_by_scene"], SHOWN, 3, OUT, OUT) / 127.5 - 1)
        )
    figure = Figure(figsize=(2 * (1 + 2 * len(shown)), 2 * SHOWN + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(SHOWN, 1 + 2 * len(shown))
    for scene in range(SHOWN):
        line = iter(axes[scene])
        _draw(next(line), truth.images[scene].permute(1, 2, 0), "image", scene)
        far = float(truth.depth[scene].max())
        for name, depth, _ in shown:
            _draw(next(line), depth[scene, 0], f"depth\n{name}", scene, vmin=0, vmax=far)
        for name, _, normals in shown:
            colours = (normals[scene].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
            _draw(next(line), colours, f"normals\n{name}", scene)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "multitask_scenes.png", dpi=80)
    return (
        f"![Images, depth and normals of {SHOWN} test scenes: truth, and what two rows predict]"
        "(multitask_scenes.png)\n"
    )


def _draw(axis: Any, values: Tensor, title: str, scene: int, **limits: float) -> None:
    axis.imshow(values.numpy(), **limits)
    axis.set_axis_off()
    if scene == 0:
        axis.set_title(title.replace(", ", ",\n"), fontsize=8)


def _first(records: list[Record], row: str) -> Record | None:
    found = [record for record in records if record["row"] == row]
    return min(found, key=lambda record: record["seed"], default=None)


ROWS = (
    Row(VANILLA, {"uses": 1}, {"depth_rmse": 25.5, "normal_rmse": 41.0}),
    Row(
        "reuse, shared BN",
        {"uses": 2, "norm": "shared", "remap": False},
        {"depth_rmse": 24.7, "normal_rmse": 40.3},
    ),
    Row(
        "reuse, new BN",
        {"uses": 2, "norm": "separate", "remap": False},
        {"depth_rmse": 24.0, "normal_rmse": 39.4},
    ),
    Row(
        FULL,
        {"uses": 2, "norm": "separate", "remap": True},
        {"depth_rmse": 22.8, "normal_rmse": 39.1},
    ),
)

TEXT = f"""
**Data.** Rooms with boxes and spheres, rendered by ray casting from a seed
(`benchmarks/paper/scenes.py`): images of {SIDE}x{SIDE} with exact depth and normals. Colours,
brightness and the size of textures are drawn for each surface, and light does not fall off, so that
depth has to be seen in shapes. The paper uses photographs of rooms.

**Network.** An encoder and decoder with five residual blocks at 32x32, 16x16 and 8x8, of two 3x3
convolutions each, and one head for each task, at {OUT}x{OUT}
(`benchmarks/paper/multitask_network.py`). "{VANILLA}" applies every block once. The other rows
apply each block twice in turn, with the same degrees of freedom. In the first two of them the
second use has the weights of the first. In the last row all blocks read one bank, and each use has
a permutation and signs of its own; that bank is as large as the blocks are. Stem, changes of
resolution and heads are dense in every row.

**Errors.** Root mean square over all pixels of the test set, in per cent of the root mean square of
the truth about its mean: a network that always answers with the mean has 100. Normals count their
three components together, and are not made one long. Truth is that of every second pixel of every
second line. The loss is the sum of both squared errors over their variances in the training set,
the same in all rows. The paper's figures are other images and another network: their order, not
their size, is what there is to compare.
"""

EXPERIMENT = Experiment(
    name="multitask",
    title="Depth and normals from one image: building blocks reused",
    rows=ROWS,
    metrics=(
        Metric("depth_rmse", "depth RMSE (%)", higher=False),
        Metric("normal_rmse", "normals RMSE (%)", higher=False),
    ),
    unshared=VANILLA,
    task=task,
    pictures=pictures,
    text=TEXT,
)
