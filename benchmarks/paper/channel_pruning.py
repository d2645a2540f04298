"""ResNet-18 pruned to half of its FLOPs, dense and read from a bank: the paper's coarse pruning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import rpg_kernels as rpg
from benchmarks.paper.classification import DENSE, HALF, RPG, Classification, Recipe
from benchmarks.paper.experiment import Experiment, Metric, Record, Row
from examples.demo import train
from examples.demo.networks import trainable
from rpg_kernels.models.resnet import ResNet

PAPER = "ImageNet top-1 (%)"
SHARE = 0.5


@dataclass(frozen=True)
class PruningRecipe(Recipe):
    """The recipe of classification, then ``tuning_epochs`` more under a smaller one-cycle rate.

    Importance is first-order Taylor on ``batches`` batches of training images; channels remain in
    multiples of ``multiple``.
    """

    epochs: int = 5
    tuning_epochs: int = 2
    tuning_lr: float = 0.02
    batches: int = 8
    multiple: int = 16


RECIPES = {
    "full": PruningRecipe(),
    "quick": PruningRecipe(
        16, 1000, 1000, epochs=2, batch_size=50, tuning_epochs=1, batches=4, multiple=4
    ),
    "tiny": PruningRecipe(
        8, 32, 32, 1, batch_size=16, bfloat16=False, tuning_epochs=1, batches=2, multiple=2
    ),
}


class Pruning(Classification):
    """Images and a recipe, as in ``classification``. A pruned row begins with the trained network
    of the row before it, where both run in one process; otherwise it trains that first."""

    def __init__(self, recipe: PruningRecipe, path: str | None) -> None:
        super().__init__(recipe, path)
        self._pruning = recipe
        self._whole: dict[tuple[str, int], tuple[Mapping[str, Tensor], float]] = {}
        self._tuning = dataclasses.replace(
            self._schedule, epochs=recipe.tuning_epochs, lr=recipe.tuning_lr
        )

    def steps(self, row: Row) -> int:
        images = len(self._pixels.data.train_labels)
        tuning = train.steps_of(images, self._tuning)
        return tuning + (0 if _pruned(row) else train.steps_of(images, self._schedule))

    def build(self, row: Row, seed: int) -> ResNet:
        """A pruned one goes by magnitude here, as nothing is trained: for its sizes and costs."""
        model = super().build(row, seed)
        if _pruned(row):
            self._prune(model, row)
        return model

    def run(self, row: Row, seed: int, on_step: Callable[[], object]) -> Record:
        model = super().build(row, seed)
        trained = self._trained(row, seed, model, on_step)
        flops = self._flops(model)
        found: Record = {"accuracy_before": trained, "accuracy_at_once": trained}
        if _pruned(row):
            self._prune(model, row, self._losses)
            found["accuracy_at_once"] = train.accuracy(model, self._pixels, self._schedule)
        # Another order of images than that of the first epochs.
        train.fit(model, self._pixels, self._tuning, seed + 1000, lambda _: on_step())
        return {
            "dof": rpg.summary(model).dof or _block_weights(model),
            "virtual_weights": _block_weights(model),
            "trainable": trainable(model),
            **found,
            "test_accuracy": train.accuracy(model, self._pixels, self._schedule),
            "mflops": self._flops(model) / 1e6,
            "flops_share": 100 * self._flops(model) / flops,
            "channels": {
                name: module.out_channels
                for name, module in model.named_modules()
                if isinstance(module, nn.Conv2d)
            },
        }

    def inference(self, model: nn.Module) -> Callable[[], object]:
        x = self._pixels.batch(self._pixels.data.train_pixels[: self._schedule.batch_size])

        def run() -> None:
            model.eval()
            with torch.no_grad(), train.autocast(x.device, self._schedule):
                model(x)

        return run

    def _trained(self, row: Row, seed: int, model: ResNet, on_step: Callable[[], object]) -> float:
        """Give a whole network the values of a trained one; its accuracy then."""
        key = str(row.settings["kind"]) + str(row.settings.get("dof")), seed
        if key not in self._whole:
            told = (lambda _: None) if _pruned(row) else (lambda _: on_step())
            train.fit(model, self._pixels, self._schedule, seed, told)
            values = {name: value.clone() for name, value in model.state_dict().items()}
            accuracy = train.accuracy(model, self._pixels, self._schedule)
            self._whole[key] = values, accuracy
        trained, accuracy = self._whole[key]
        model.load_state_dict(trained)
        return accuracy

    def _prune(self, model: ResNet, row: Row, importance: Any = None) -> None:
        share: float = row.settings["flops"]
        rpg.prune_channels(model, self._one(), share, importance, multiple=self._pruning.multiple)

    def _losses(self, model: nn.Module) -> Iterator[Tensor]:
        """Of the first training images, as they are."""
        images, size = self._pixels.data, self._schedule.batch_size
        for first in range(0, self._pruning.batches * size, size):
            labels = images.train_labels[first : first + size]
            if len(labels):
                with train.autocast(torch.device("cpu"), self._schedule):
                    logits = model(self._pixels.batch(images.train_pixels[first : first + size]))
                yield F.cross_entropy(logits.float(), labels)

    def _one(self) -> Tensor:
        return self._pixels.batch(self._pixels.data.train_pixels[:1])

    def _flops(self, model: nn.Module) -> int:
        """Of one image, by torch's counter."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(self._one())
        return int(counter.get_total_flops())


def _pruned(row: Row) -> bool:
    return "flops" in row.settings


def _block_weights(model: nn.Module) -> int:
    """Weights of block convolutions, stored or virtual."""
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and name.startswith("layer")
    )


def task(size: str, data: str | None) -> Pruning:
    """The images of one size; ``data`` as ``path`` of ``Classification``."""
    return Pruning(RECIPES[size], data)


def _rows(
    kind: str,
    dof: int | None,
    laps: int | None,
    label: str,
    whole: float | None,
    half: float | None,
) -> tuple[Row, Row]:
    given: dict[str, Any] = {"depth": 18, "kind": kind, "dof": dof, "laps": laps}
    given = {name: value for name, value in given.items() if value is not None}
    name = f"ResNet-18, {label}"
    paper = [{} if number is None else {PAPER: number} for number in (whole, half)]
    return (
        Row(name, given, paper[0]),
        Row(f"{name}, half the FLOPs", {**given, "flops": SHARE}, paper[1], unshared=name),
    )


ROWS = (
    *_rows(DENSE, None, None, "vanilla", 70.5, 69.35),
    *_rows(RPG, 2_000_000, 4, "RPG 2M", 67.2, None),
    *_rows(RPG, 700_000, 9, "RPG 700K", None, None),
    *_rows(RPG, HALF[18], 2, "RPG 5.6M", 70.5, 69.10),
)

EXPERIMENT = Experiment(
    name="channel_pruning",
    title="Pruning of channels: ResNet-18 at half of its FLOPs",
    rows=ROWS,
    metrics=(
        Metric("test_accuracy", "test accuracy (%)"),
        Metric("accuracy_at_once", "before tuning (%)"),
        Metric("mflops", "MFLOPs per image", higher=False),
    ),
    unshared="ResNet-18, vanilla",
    task=task,
    text="""\
The paper's coarse-grained pruning, with networks and images of the classification tables: each
network is trained, and tuned for two more epochs; or it is trained, `rpg.prune_channels` removes
output channels until a forward takes half of the FLOPs, and it is tuned as long. Dense networks and
those that read a bank are pruned by the same code: importance is first-order Taylor on eight
batches of training images, the channels of least importance for each FLOP go first, the residual
ones together, and multiples of 16 remain. "Before tuning" is the accuracy at the end of training,
or right after channels were removed. A pruned layer reads its part of the bank where the whole one
reads it, and the bank stays as large, so the degrees of freedom do too. FLOPs are those of torch's
counter, which counts a multiplication as two. The pruned networks that are timed are pruned as they
start, by the magnitude of their filters.
""",
)
