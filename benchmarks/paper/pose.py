"""Joints of figures, found by a sub-network that is used again: the paper's table of poses.

The paper repeats sub-networks of a convolutional pose machine on photographs of people (MPII). Here
the pictures are drawn (``benchmarks.paper.figures``) and everything is small enough for one core.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rpg_kernels as rpg
from benchmarks.paper.experiment import SIZES, Experiment, Metric, Record, Row
from benchmarks.paper.figures import figures
from benchmarks.paper.pose_machine import PoseMachine, SubNetwork, found, heat_maps, loss_of
from benchmarks.paper.pose_pictures import SHOWN, TEST_SEED, TRAIN_SEED, pictures
from benchmarks.paper.skeleton import JOINTS, MIRRORED, SIDE
from rpg_kernels import _checks

_EVAL_BATCH = 250  # figures


@dataclass(frozen=True)
class Recipe:
    """AdamW under a one-cycle learning rate; the loss is the cross-entropy of the heat maps.

    Half of the pictures of a batch are mirrored, their left and right joints with them, and each
    batch has its colours exchanged by one permutation of the channels.
    """

    images: int
    test_images: int
    epoch_test_images: int  # of the test set, after every epoch
    epochs: int
    batch_size: int
    width: int = 64
    depth: int = 0
    features: int = 64
    lr: float = 5e-3
    weight_decay: float = 1e-2
    bfloat16: bool = True


RECIPES = {
    "full": Recipe(8000, 2000, 1000, 6, 32),
    "quick": Recipe(512, 200, 200, 2, 32),
    "tiny": Recipe(16, 16, 8, 1, 8, width=16, features=16),
}


class Figures(NamedTuple):
    """Pictures ``uint8 [B, 3, 64, 64]``, joints ``[B, 14, 2]`` and sizes of heads ``[B]``."""

    pixels: Tensor
    joints: Tensor
    heads: Tensor


class PoseTask:
    """Drawn figures of one size, and the recipe."""

    def __init__(self, size: str, data: str | None = None) -> None:
        """Draws nothing yet.

        Raises:
            ValueError: another size, or a file of data, which this experiment has no use for.
        """
        _checks.choice("size", size, SIZES)
        if data is not None:
            raise _checks.fail("data", repr(data), "None: the pictures of this one are drawn")
        self._recipe = RECIPES[size]

    @property
    def recipe(self) -> Mapping[str, Any]:
        return asdict(self._recipe)

    @property
    def data(self) -> Mapping[str, Any]:
        r = self._recipe
        return {"name": "figures", "train_images": r.images, "test_images": r.test_images}

    @cached_property
    def train(self) -> Figures:
        return Figures(*figures(self._recipe.images, TRAIN_SEED))

    @cached_property
    def test(self) -> Figures:
        return Figures(*figures(self._recipe.test_images, TEST_SEED))

    def steps(self, row: Row) -> int:
        return self._recipe.epochs * (self._recipe.images // self._recipe.batch_size)

    def build(self, row: Row, seed: int) -> PoseMachine:
        r = self._recipe
        times, weights = row.settings["times"], row.settings["weights"]
        torch.manual_seed(seed)
        # Before the stages, so that the stem starts alike in every row.
        machine = PoseMachine(nn.Sequential(), r.features)
        first = SubNetwork(r.features, r.width, r.depth)
        if weights == "own":
            others = [SubNetwork(r.features, r.width, r.depth) for _ in range(times - 1)]
            machine.stages = nn.Sequential(first, *others)
        else:
            config = None
            if weights == "RPG":
                config = rpg.RPGConfig(dof=_weights(first), laps=row.settings["laps"], seed=seed)
            norm, remap = row.settings["norm"], weights == "RPG"
            machine.stages = rpg.reuse(first, times, config, norm=norm, remap=remap)
        # torch's own annotations of Module.to leave memory_format out.
        machine.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return machine

    def run(self, row: Row, seed: int, on_step: Callable[[], object] = lambda: None) -> Record:
        r, data, test = self._recipe, self.train, self.test  # drawn before the clock starts
        begin, process_begin = time.perf_counter(), time.process_time()
        model = self.build(row, seed)
        optimizer = self._optimizer(model)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [g["lr"] for g in optimizer.param_groups], self.steps(row), pct_start=0.2
        )
        order = torch.Generator().manual_seed(seed)
        losses, right = [], []
        for epoch in range(r.epochs):
            total = torch.zeros(())
            batches = torch.randperm(r.images, generator=order).split(r.batch_size)
            batches = batches[: r.images // r.batch_size]
            for batch in batches:
                pixels, joints = _augmented(data.pixels[batch], data.joints[batch], order)
                total += self._step(model, optimizer, pixels, joints)
                schedule.step()
                on_step()
            losses.append(float(total) / len(batches))
            last = epoch + 1 == r.epochs
            guessed = self._found(model, test.pixels[: None if last else r.epoch_test_images])
            few = slice(r.epoch_test_images)
            right.append(float(_right(guessed[few], test, few).mean()) * 100)
        every = _right(guessed, test)
        off = (guessed - test.joints).norm(dim=2).mean()
        return {
            **sizes(model),
            "pckh": float(every.mean()) * 100,
            "pixels_off": _number(off),
            "training_loss": _number(losses[-1]),
            "pckh_by_joint": {
                name: float(share) * 100 for name, share in zip(JOINTS, every.mean(0), strict=True)
            },
            "pckh_by_epoch": right,
            "loss_by_epoch": [_number(loss) for loss in losses],
            "epoch_test_images": r.epoch_test_images,
            "found": guessed[:SHOWN].nan_to_num(0, 0, 0).mul(10).round().div(10).tolist(),
            "seconds": time.perf_counter() - begin,
            "process_seconds": time.process_time() - process_begin,
        }

    def training_step(self, model: nn.Module) -> Callable[[], object]:
        optimizer = self._optimizer(model)
        size = self._recipe.batch_size
        drawn = Figures(*figures(size, TRAIN_SEED))
        model.train()
        return lambda: self._step(model, optimizer, drawn.pixels, drawn.joints)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        r = self._recipe
        return torch.optim.AdamW(rpg.param_groups(model, r.lr, r.weight_decay), lr=r.lr)

    def _step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, pixels: Tensor, joints: Tensor
    ) -> Tensor:
        model.train()
        truth = heat_maps(joints)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._recipe.bfloat16):
            maps = model(_normal(pixels))
        loss = loss_of(maps, truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def _found(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """The joints that the last stage finds, ``[B, 14, 2]``."""
        model.eval()
        parts = []
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=self._recipe.bfloat16),
        ):
            for batch in pixels.split(_EVAL_BATCH):
                parts.append(found(model(_normal(batch))[-1]))
        return torch.cat(parts)


def sizes(model: PoseMachine) -> dict[str, int]:
    """Of the stages' convolutions: degrees of freedom, weights counted at every use. All trained.

    Example:
        >>> sizes(PoseTask("tiny").build(ROWS[1], seed=0))
        {'dof': 18432, 'virtual_weights': 36864, 'trainable': 40112}
    """
    stored = [p for p in model.stages.parameters() if p.dim() > 1]
    return {
        "dof": sum(p.numel() for p in stored),
        "virtual_weights": sum(_weights(stage) for stage in model.stages),
        "trainable": sum(p.numel() for p in model.parameters()),
    }


def _weights(module: nn.Module) -> int:
    """Of its convolutions."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))


def _normal(pixels: Tensor) -> Tensor:
    values = pixels.float().sub_(127.5).mul_(1 / 64)
    return values.contiguous(memory_format=torch.channels_last)


def _augmented(pixels: Tensor, joints: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    mirrored = torch.rand(len(pixels), generator=random) < 0.5
    pixels = pixels[:, torch.randperm(3, generator=random)]
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    other = joints[:, MIRRORED] * torch.tensor([-1.0, 1.0]) + torch.tensor([float(SIDE), 0.0])
    return pixels, torch.where(mirrored[:, None, None], other, joints)


def _right(joints: Tensor, truth: Figures, which: slice = slice(None)) -> Tensor:
    """Which joints are nearer to where they are than half a head: ``[B, 14]``, 1 or 0."""
    off = (joints - truth.joints[which]).norm(dim=2)
    near: Tensor = off <= 0.5 * truth.heads[which, None]
    return near.float()


def _number(value: float | Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _row(name: str, times: int, weights: str, pckh: float | None = None, **more: Any) -> Row:
    settings = {"times": times, "weights": weights, "norm": "separate", **more}
    return Row(name, settings, {} if pckh is None else {"pckh": pckh})


ROWS = (
    _row("no repetition", 1, "own"),
    _row("2x shared", 2, "shared", 86.1),
    _row("2x RPG", 2, "RPG", 86.5, laps=None),
    _row("2x not shared", 2, "own", 87.1),
    _row("4x shared", 4, "shared", 86.5),
    _row("4x RPG", 4, "RPG", 87.3, laps=None),
    _row("4x not shared", 4, "own", 88.0),
)

EXPERIMENT = Experiment(
    name="pose",
    title="Pose: one sub-network, used again and again",
    rows=ROWS,
    metrics=(
        Metric("pckh", "PCKh@0.5 (%)"),
        Metric("pixels_off", "mean error (pixels)", digits=2, higher=False),
    ),
    unshared="4x not shared",
    task=PoseTask,
    pictures=pictures,
    text="""\
Figures of 14 joints, drawn by code on 64x64 pixels in random poses and clothes, seen from any
side, behind and in front of clutter; places of joints are exact. PCKh@0.5 is the share of
joints, hidden ones too, that are found nearer than half a head to where they are.

The network is a small convolutional pose machine: a dense stem of four convolutions, and one for a
first guess of the heat maps, see little of the picture; then a sub-network of two 3x3
convolutions corrects the maps, once, twice or four times, and sees farther each time. Every stage
is trained by a loss of its own. "Shared" uses the same weights each time. "RPG" has one bank of as
many numbers as one sub-network has weights, and each use reads it by a permutation and signs of
its own. "Not shared" has a sub-network for each use. In all of them each use has norms of its own,
so that shared and RPG differ in the permutation alone. Stem and first guess are dense in all rows,
and not counted in the degrees of freedom.

The paper's numbers are from photographs of people (MPII) and a network of 3.3 million degrees
of freedom, so only the order of the rows compares.
""",
)
