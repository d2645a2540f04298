"""Fine-grained pruning: ResNet-18 with a bank beside iterative pruning of the dense network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

import rpg_kernels as rpg
from benchmarks.paper.classification import DENSE, RPG, WIDTH, Classification, Recipe
from benchmarks.paper.experiment import Experiment, Metric, Record, Row
from examples.demo import train
from rpg_kernels.models.resnet import ResNet, is_block_convolution

DEPTH = 18
ELEMENT, SLOT = "element", "slot"
BEFORE, AFTER = "before pruning, CIFAR-10 (%)", "after pruning to 274K, CIFAR-10 (%)"


@dataclass(frozen=True)
class PruningRecipe(Recipe):
    """As of classification; ``beginning`` is the epochs before the state that is rewound to.

    Every network is trained for ``beginning`` epochs, and then for ``epochs``, each with a
    one-cycle learning rate of its own, as often as it is pruned and once before.
    """

    beginning: int = 1


RECIPES = {
    "full": PruningRecipe(epochs=3, batch_size=64),
    "quick": PruningRecipe(16, 1000, 1000, epochs=1, batch_size=50),
    "tiny": PruningRecipe(8, 32, 32, epochs=1, batch_size=16, bfloat16=False),
}


class Pruning(Classification):
    """Trains rows from the networks of the rows before them, where those are of this process.

    Args:
        recipe: of all rows.
        path: of CIFAR-10, see ``examples.demo.data.load``; None takes the digits.

    Raises:
        FileNotFoundError, ValueError: of the images.
    """

    def __init__(self, recipe: PruningRecipe, path: str | None) -> None:
        super().__init__(recipe, path)
        self._beginning = replace(self._schedule, epochs=recipe.beginning)
        # Of one network and seed: its early state, and what was trained by what it was pruned to.
        self._of: tuple[Any, ...] = ()
        self._early: Mapping[str, Tensor] = {}
        self._trained: dict[tuple[Any, ...], tuple[ResNet, Record]] = {}

    def steps(self, row: Row) -> int:
        images = len(self._pixels.data.train_labels)
        first = 0 if row.settings.get("kept") else train.steps_of(images, self._beginning)
        return first + train.steps_of(images, self._schedule)

    def build(self, row: Row, seed: int) -> ResNet:
        """A fresh network, pruned at once as far as its row is."""
        model = super().build(row, seed)
        for kept in row.settings.get("kept", ())[-1:]:
            self._prune(model, kept, row.settings["by"])
        return model

    def run(self, row: Row, seed: int, on_step: Callable[[], object]) -> Record:
        network = {key: row.settings[key] for key in ("depth", "kind", "dof", "laps")
                   if key in row.settings}  # fmt: skip
        of = (*network.values(), seed)
        if of != self._of:
            self._trained.clear()
            model = super().build(Row(row.name, network), seed)
            self._fit(model, self._beginning, seed, on_step)
            self._early, self._of = copy.deepcopy(model.state_dict()), of
            self._trained[()] = model, self._fit(model, self._schedule, seed, on_step)
        by, kept = row.settings.get("by"), tuple(row.settings.get("kept", ()))
        model, record = self._pruned(by, kept, seed, on_step)
        everything = self._sizes(Row(row.name, network), model)
        removed = everything["dof"] - _left(model)
        return {
            **everything,
            "dof": everything["dof"] - removed,
            "trainable": everything["trainable"] - removed,
            **record,
        }

    def _pruned(
        self, by: str | None, kept: tuple[int, ...], seed: int, on_step: Callable[[], object]
    ) -> tuple[ResNet, Record]:
        """The network pruned to each of ``kept`` in turn, and rewound and trained after each."""
        key = (by, *kept) if kept else ()
        if key not in self._trained:
            model = copy.deepcopy(self._pruned(by, kept[:-1], seed, on_step)[0])
            self._prune(model, kept[-1], by or ELEMENT)
            rpg.rewind(model, self._early)
            self._trained[key] = model, self._fit(model, self._schedule, seed, on_step)
        return self._trained[key]

    def _prune(self, model: ResNet, kept: int, by: str) -> None:
        """Leave ``kept`` elements, less in a narrower network."""
        parameters = _parameters(model)
        kept = kept * self._recipe.width**2 // WIDTH**2
        bank = parameters[0][0]
        size = bank.granularity if by == SLOT and isinstance(bank, rpg.ParameterBank) else 1
        rpg.prune(parameters, (_left(model) - kept) // size, by)

    def _fit(
        self, model: ResNet, schedule: train.Schedule, seed: int, on_step: Callable[[], object]
    ) -> Record:
        losses: list[float] = []

        def step(loss: Tensor) -> None:
            losses.append(float(loss))
            on_step()

        train.fit(model, self._pixels, schedule, seed, step)
        model.zero_grad()
        epoch = losses[-(len(losses) // schedule.epochs) :]
        loss = sum(epoch) / len(epoch)
        return {
            "test_accuracy": train.accuracy(model, self._pixels, schedule),
            "training_loss": loss if math.isfinite(loss) else None,
        }


def _parameters(model: ResNet) -> list[tuple[nn.Module, str]]:
    """What is pruned: the bank, or the weights that would be read from one."""
    banks = [module for module in model.modules() if isinstance(module, rpg.ParameterBank)]
    dense = [module for name, module in model.named_modules()
             if isinstance(module, nn.Conv2d) and is_block_convolution(module, name)]  # fmt: skip
    return [(module, "weight") for module in banks or dense]


def _left(model: ResNet) -> int:
    """Elements of what is pruned that are left."""
    left = 0
    for module, name in _parameters(model):
        mask = getattr(module, f"{name}_mask", None)
        left += getattr(module, name).numel() if mask is None else int(mask.sum())
    return left


def task(size: str, data: str | None) -> Pruning:
    """The images of one size; ``data`` as ``path`` of :class:`Pruning`."""
    return Pruning(RECIPES[size], data)


def _rows(
    network: Mapping[str, Any], name: str, stages: Mapping[str, tuple[tuple[int, ...], ...]]
) -> list[Row]:
    """The rows of one network: as it is, and by element or slot at each of ``stages``."""
    rows = [Row(name, {"depth": DEPTH, **network})]
    for by, several in stages.items():
        for kept in several:
            how = "at once" if len(kept) == 1 else f"in {len(kept)} rounds"
            settings = {"depth": DEPTH, **network, "by": by, "kept": kept}
            rows.append(Row(f"{name}, to {_short(kept[-1])} by {by} {how}", settings))
    return rows


def _short(count: int) -> str:
    """Elements as names of rows have them.

    >>> _short(27_392), _short(2_800_000)
    ('27K', '2.8M')
    """
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"


# Whole slots of 64, so that rows by slot and by element have the same number of elements.
BANK, HALF, FIFTH, TENTH = 273_984, 136_960, 54_784, 27_392
DOWN = ((HALF,), (HALF, FIFTH), (HALF, FIFTH, TENTH), (TENTH,))
FROM_2M = ((BANK,), (740_032, BANK))
IMP = tuple((2_800_000, 880_000, BANK, HALF, FIFTH, TENTH)[:count] for count in (3, 4, 5, 6))
NAMES = {RPG: "ResNet-18, RPG 274K", "2M": "ResNet-18, RPG 2M", DENSE: "ResNet-18, dense"}
ROWS = (
    *_rows({"kind": RPG, "dof": 274_000, "laps": 8}, NAMES[RPG], {ELEMENT: DOWN, SLOT: DOWN}),
    *_rows({"kind": DENSE}, NAMES[DENSE], {ELEMENT: (*IMP, (BANK,))}),
    *_rows({"kind": RPG, "dof": 2_000_000, "laps": 4}, NAMES["2M"], {ELEMENT: FROM_2M,
                                                                     SLOT: FROM_2M}),
)  # fmt: skip
PAPER = {
    NAMES[DENSE]: {BEFORE: 92.3},
    f"{NAMES[DENSE]}, to 274K by element in 3 rounds": {AFTER: 90.5},
}

EXPERIMENT = Experiment(
    name="pruning",
    title="Fine-grained pruning: a bank, and the dense network",
    rows=tuple(replace(row, paper=PAPER.get(row.name, {})) for row in ROWS),
    metrics=(
        Metric("test_accuracy", "test accuracy (%)"),
        Metric("training_loss", "training loss", digits=3, higher=False),
    ),
    unshared=NAMES[DENSE],
    task=task,
    quoted=(Row("ResNet-18, RPG of another size", {}, {BEFORE: 95.0, AFTER: 93.0}),),
    text="""\
The paper prunes a bank, and the dense network by iterative magnitude pruning with rewinding, to
274K elements each; here they also go on from there. All rows are the same ResNet-18, trained as in
[classification](paper_classification.md) with other numbers of epochs and images a step. A network
is trained for one epoch, which is the state that it is rewound to, and then for three. To prune it
is to set the elements or slots of smallest magnitude to zero, over all convolutions that are pruned
or read the bank, to set what is left back to that state, and to train it for three epochs again. So
every row has had four epochs of training in its own form, however many rounds chose what is left.

DoF is what is left of the bank, or of the convolutions that would read one. Pruned by element, a
network is as fast and as large in memory as before; slots that are zero can leave the bank. Rows of
one network share the training before they differ, so that their minutes add up to less than each
would take alone.
""",
)
