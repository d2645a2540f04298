"""ResNet-18 and ResNet-34 at several degrees of freedom: the paper's tables of classification."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import rows as maps
from benchmarks.accuracy.maps import Ring
from benchmarks.accuracy.network import share
from benchmarks.paper.experiment import Experiment, Metric, Record, Row
from examples.demo import data as demo_data
from examples.demo import train
from examples.demo.networks import trainable
from rpg_kernels import RPGConfig, param_groups
from rpg_kernels.models.resnet import ResNet, blocks, is_block_convolution, share_blocks

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
WIDTH = 64
# Half of the virtual weights, 11,157,504 and 21,258,240; a bank that is larger refuses two laps.
HALF = {18: 5_578_752, 34: 10_629_120}
DENSE, RPG, BLK, HASHED, UNSIGNED = "dense", "rpg", "rpg.blk", "hashed", "unsigned"
PAPER = ("CIFAR-100 top-1 (%)", "ImageNet top-1 (%)")


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum under a one-cycle learning rate, as in the demo.

    ``width`` is that of the first stage; 64 is a ResNet as it was published, and banks of narrower
    ones are smaller in proportion to their weights. ``images`` and ``test_images`` are how many the
    data set is cut to; None keeps all. Weight decay is not for norms and biases.
    """

    width: int = WIDTH
    images: int | None = 4000
    test_images: int | None = 5000
    epochs: int = 6
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9
    bfloat16: bool = True


RECIPES = {
    "full": Recipe(),
    "quick": Recipe(16, 1000, 1000, epochs=2, batch_size=50),
    "tiny": Recipe(8, 32, 32, epochs=1, batch_size=16, bfloat16=False),
}


class Classification:
    """Images and a recipe: CIFAR-10 from a file, or scikit-learn's digits.

    The first convolution has stride 2 where images have 32 pixels a side, so that they reach the
    blocks as 16x16; digits reach them as they are, 8x8.

    Args:
        recipe: of all rows.
        path: of CIFAR-10, see ``examples.demo.data.load``; None takes the digits.

    Raises:
        FileNotFoundError, ValueError: of the images.
    """

    def __init__(self, recipe: Recipe, path: str | None) -> None:
        images = demo_data.load(path, recipe.images, recipe.test_images)
        self._recipe, self._pixels = recipe, train.Pixels(images, torch.device("cpu"))
        self._stride = 2 if images.train_pixels.shape[-1] >= demo_data.CIFAR_SIDE else 1
        names = {field.name for field in fields(train.Schedule)}
        given = {name: value for name, value in asdict(recipe).items() if name in names}
        # A mirrored or shifted digit is another one.
        self._schedule = train.Schedule(**given, augment=path is not None)

    @property
    def recipe(self) -> Mapping[str, Any]:
        schedule = {"augment": self._schedule.augment, "stem_stride": self._stride}
        return {**asdict(self._recipe), **schedule}

    @property
    def data(self) -> Mapping[str, Any]:
        images = self._pixels.data
        return {
            "name": images.name,
            "train_images": len(images.train_labels),
            "test_images": len(images.test_labels),
        }

    def steps(self, row: Row) -> int:
        return train.steps_of(len(self._pixels.data.train_labels), self._schedule)

    def build(self, row: Row, seed: int) -> ResNet:
        """Stem, norms and classifier start alike in every row of one depth."""
        images, kind = self._pixels.data, row.settings["kind"]
        torch.manual_seed(seed)
        depths, width = DEPTHS[row.settings["depth"]], self._recipe.width
        model = ResNet(depths, len(images.classes), "cifar", width, images.channels)
        model.conv1.stride = (self._stride, self._stride)
        if kind == RPG:
            share_blocks(model, RPGConfig(self._dof(row), laps=row.settings["laps"], seed=seed))
        elif kind == BLK:
            share_blocks(model, blocks(self._dof(row), laps=row.settings["laps"], seed=seed))
        elif kind != DENSE:
            table = {HASHED: maps.HASHED, UNSIGNED: maps.UNSIGNED}[kind]
            share(model, Ring(maps.Row(row.name, table), self._dof(row), seed))
        # torch's own annotations of Module.to leave memory_format out.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def run(self, row: Row, seed: int, on_step: Callable[[], object]) -> Record:
        model, record = self.train(row, seed, on_step)
        return {**record, "test_accuracy": train.accuracy(model, self._pixels, self._schedule)}

    def train(self, row: Row, seed: int, on_step: Callable[[], object]) -> tuple[ResNet, Record]:
        """A network after its training, and what is recorded of it beside its accuracy."""
        model = self.build(row, seed)
        losses: list[float] = []
        sums: list[Tensor] = []

        def step(loss: Tensor) -> None:
            sums.append(loss + sums.pop() if sums else loss)
            on_step()

        def epoch() -> None:
            losses.append(float(sums.pop()) / (self.steps(row) // self._schedule.epochs))

        train.fit(model, self._pixels, self._schedule, seed, step, epoch)
        finite = [loss if math.isfinite(loss) else None for loss in losses]
        return model, {
            **self._sizes(row, model),
            "training_loss": finite[-1],
            "loss_by_epoch": finite,
        }

    def training_step(self, model: nn.Module) -> Callable[[], object]:
        images, size = self._pixels.data, self._schedule.batch_size
        x = self._pixels.batch(images.train_pixels[:size])
        labels = images.train_labels[:size]
        # So small a rate that the network stays as it is.
        groups = param_groups(model, lr=1e-4, weight_decay=self._schedule.weight_decay)
        momentum = self._schedule.momentum
        optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=momentum, nesterov=True)
        model.train()

        def step() -> None:
            with train.sound_convolutions(model):
                train.step(model, x, labels, optimizer, self._schedule)

        return step

    def _dof(self, row: Row) -> int:
        """Of a row, less in a narrower network."""
        dof: int = row.settings["dof"]
        return max(1, dof * self._recipe.width**2 // WIDTH**2)

    def _sizes(self, row: Row, model: ResNet) -> Record:
        """Degrees of freedom are all numbers that the weights of block convolutions come from."""
        images = self._pixels.data
        shape = (len(images.classes), "cifar", self._recipe.width, images.channels)
        with torch.device("meta"):
            dense = ResNet(DEPTHS[row.settings["depth"]], *shape)
        weights = sum(
            module.weight.numel()
            for name, module in dense.named_modules()
            if isinstance(module, nn.Conv2d) and is_block_convolution(module, name)
        )
        everything = trainable(model)
        dof = everything - (trainable(dense) - weights)
        return {"dof": dof, "virtual_weights": weights, "trainable": everything}


def task(size: str, data: str | None) -> Classification:
    """The images of one size; ``data`` as ``path`` of :class:`Classification`."""
    return Classification(RECIPES[size], data)


def _row(
    depth: int, kind: str, dof: int | None, laps: int | None, label: str, *paper: float
) -> Row:
    settings = {"depth": depth, "kind": kind, "dof": dof, "laps": laps}
    given = {name: value for name, value in settings.items() if value is not None}
    return Row(
        f"ResNet-{depth}, {label}",
        given,
        dict(zip(PAPER, paper, strict=True)),
        unshared=f"ResNet-{depth}, vanilla",
    )


ROWS = (
    _row(18, RPG, 45_000, 16, "RPG 45K", 60.2, 40.0),
    _row(18, RPG, 2_000_000, 4, "RPG 2M", 75.6, 67.2),
    _row(18, RPG, HALF[18], 2, "RPG 5.6M", 77.6, 70.5),
    _row(18, DENSE, None, None, "vanilla", 77.6, 70.5),
    _row(34, RPG, 45_000, 16, "RPG 45K", 61.7, 41.6),
    _row(34, RPG, 2_000_000, 4, "RPG 2M", 76.5, 69.1),
    _row(34, RPG, HALF[34], 2, "RPG 10.6M", 78.9, 73.4),
    _row(34, DENSE, None, None, "vanilla", 79.1, 73.4),
)

EXPERIMENT = Experiment(
    name="classification",
    title="Classification: ResNets at several degrees of freedom",
    rows=ROWS,
    metrics=(
        Metric("test_accuracy", "test accuracy (%)"),
        Metric("training_loss", "training loss", digits=3, higher=False),
    ),
    unshared="ResNet-34, vanilla",
    task=task,
    text="""\
The paper's tables for CIFAR-100 and ImageNet, with the same networks on fewer and smaller images:
the first convolution has stride 2, so that the blocks see 16x16 pixels, and networks are trained
for a few epochs on a part of CIFAR-10. Our RPG rows read their weights with `laps`, 16 at 45K, 4 at
2M and 2 where the bank has half as many elements as there are weights; the paper draws every weight
from the whole bank. Only the order of our rows can be compared with the paper's, not the numbers.
""",
)
