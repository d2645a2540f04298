"""One training loop for every network of the demo: same data order, schedule and optimiser."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.demo.data import Images
from rpg_kernels.conversion import param_groups

EVAL_BATCH = 500
CROP_PADDING = 4
STEP_ROUNDS = 7


@dataclass(frozen=True)
class Schedule:
    """SGD with Nesterov momentum under a one-cycle learning rate.

    ``augment`` flips images and crops them out of a reflected border of 4 pixels, each image on its
    own; ``bfloat16`` runs the network under autocast.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 5e-4
    momentum: float = 0.9
    augment: bool = False
    bfloat16: bool = False


@dataclass(frozen=True)
class Trained:
    """A trained network with its optimiser, and its test accuracy after each epoch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    curve: list[float]
    loss: float

    @property
    def accuracy(self) -> float:
        return self.curve[-1]


class Pixels:
    """Turns batches of ``uint8 [B, C, H, W]`` into normalised channels-last fp32 on a device."""

    def __init__(self, data: Images, device: torch.device) -> None:
        self.data, self.device = data, device
        mean, deviation = _statistics(data.train_pixels)
        self._mean = mean.view(1, -1, 1, 1).to(device)
        self._scale = deviation.clamp_min(1e-3).reciprocal().view(1, -1, 1, 1).to(device)

    def batch(self, pixels: Tensor) -> Tensor:
        values = pixels.to(self.device).float().div_(255)
        values = (values - self._mean) * self._scale
        return values.contiguous(memory_format=torch.channels_last)


def steps_of(images: int, schedule: Schedule) -> int:
    """Optimiser steps of one training run; an incomplete last batch of an epoch is left out."""
    return schedule.epochs * (images // min(schedule.batch_size, images))


def autocast(device: torch.device, schedule: Schedule) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16, enabled=schedule.bfloat16)


def train(
    model: nn.Module,
    pixels: Pixels,
    schedule: Schedule,
    seed: int,
    on_step: Callable[[Tensor], object] = lambda loss: None,
    groups: list[dict[str, Any]] | None = None,
) -> Trained:
    """Train ``model`` in place as ``fit`` does, and test it after each epoch."""
    curve: list[float] = []

    def test() -> None:
        curve.append(accuracy(model, pixels, schedule))

    optimizer, loss = fit(model, pixels, schedule, seed, on_step, test, groups)
    return Trained(model, optimizer, curve, loss.item())


def step_seconds(
    models: Sequence[nn.Module], pixels: Pixels, schedule: Schedule, seed: int = 0
) -> list[float]:
    """Seconds of a training step of each model: the median of ``STEP_ROUNDS``, one of each in turn.

    Other work on the machine slows all of them then, where it would slow one that trains alone.
    The models are trained by it.
    """
    data, order = pixels.data, random.Random(seed)
    optimizers = [
        torch.optim.SGD(param_groups(m, lr=1e-4), momentum=schedule.momentum, nesterov=True)
        for m in models
    ]
    size = min(schedule.batch_size, len(data.train_labels))
    chosen = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))
    x = pixels.batch(data.train_pixels[chosen[:size]])
    labels = data.train_labels[chosen[:size]].to(pixels.device)
    seconds: list[list[float]] = [[] for _ in models]
    for round_ in range(STEP_ROUNDS + 1):  # the first makes caches and workspaces
        for i in order.sample(range(len(models)), len(models)):
            models[i].train()
            with sound_convolutions(models[i]):
                begin = _now(pixels.device)
                step(models[i], x, labels, optimizers[i], schedule)
                if round_:
                    seconds[i].append(_now(pixels.device) - begin)
    return [statistics.median(of_model) for of_model in seconds]


def fit(
    model: nn.Module,
    pixels: Pixels,
    schedule: Schedule,
    seed: int,
    on_step: Callable[[Tensor], object] = lambda loss: None,
    on_epoch: Callable[[], object] = lambda: None,
    groups: list[dict[str, Any]] | None = None,
) -> tuple[torch.optim.Optimizer, Tensor]:
    """Train ``model`` in place on its device: the optimiser, and the last batch's loss.

    Args:
        model: any classifier of the images.
        pixels: the images, on the model's device.
        schedule: epochs, batch size and the optimiser's settings.
        seed: of the order of images and of the augmentation, which are the same for every model.
        on_step: called with the loss after each optimiser step.
        on_epoch: called after each epoch.
        groups: of the optimiser; None for param_groups with the schedule's values.
    """
    data, device = pixels.data, pixels.device
    count = len(data.train_labels)
    size = min(schedule.batch_size, count)
    if groups is None:
        groups = param_groups(model, lr=schedule.lr, weight_decay=schedule.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=schedule.lr, momentum=schedule.momentum, nesterov=True)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=steps_of(count, schedule),
        cycle_momentum=False,
    )
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    with sound_convolutions(model):
        for _ in range(schedule.epochs):
            model.train()
            order = torch.randperm(count, generator=generator)
            for start in range(0, count - size + 1, size):
                chosen = order[start : start + size]
                x = data.train_pixels[chosen]
                if schedule.augment:
                    x = augment(x, generator)
                labels = data.train_labels[chosen].to(device)
                loss = step(model, pixels.batch(x), labels, optimizer, schedule)
                one_cycle.step()
                on_step(loss)
            on_epoch()
    return optimizer, loss


def step(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
) -> Tensor:
    """One step of the optimiser; the loss before it."""
    with autocast(x.device, schedule):
        logits = model(x)
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@contextlib.contextmanager
def sound_convolutions(model: nn.Module) -> Iterator[None]:
    """Leave oneDNN out where the model has a convolution with which it damages memory.

    The gradient of a strided 1x1 weight of fewer channels than a vector has, channels-last, is
    written past its end: https://github.com/uxlfoundation/oneDNN/issues/6035, in torch 2.13.
    """
    before = torch.backends.mkldnn.enabled
    harmful = any(
        isinstance(m, nn.Conv2d)
        and m.kernel_size == (1, 1)
        and m.stride != (1, 1)
        and m.in_channels < 16
        for m in model.modules()
    )
    torch.backends.mkldnn.enabled = before and not harmful  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def accuracy(model: nn.Module, pixels: Pixels, schedule: Schedule) -> float:
    """Per cent of the test images that are classified rightly."""
    return per_cent(right(model, pixels, schedule))


def right(model: nn.Module, pixels: Pixels, schedule: Schedule, limit: int | None = None) -> Tensor:
    """Which of the first test images are classified rightly: bool ``[images]``."""
    model.eval()
    images, labels = pixels.data.test_pixels[:limit], pixels.data.test_labels[:limit]
    with torch.no_grad(), autocast(pixels.device, schedule):
        guesses = [model(pixels.batch(x)).argmax(1).cpu() for x in images.split(EVAL_BATCH)]
    return torch.cat(guesses) == labels


def per_cent(right: Tensor) -> float:
    return 100 * int(right.sum()) / len(right)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images left to right, and crop each out of a reflected border.

    Shape:
        ``uint8 [B, C, H, W] -> uint8 [B, C, H, W]``.
    """
    count, _, height, width = pixels.shape
    border = CROP_PADDING
    flip = torch.rand(count, generator=generator) < 0.5
    top, left = torch.randint(0, 2 * border + 1, (2, count), generator=generator)
    rows = _reflect(top[:, None] + torch.arange(height) - border, height)
    columns = torch.arange(width)
    columns = torch.where(flip[:, None], columns.flip(0), columns)
    columns = _reflect(columns + left[:, None] - border, width)
    image = torch.arange(count)[:, None, None]
    # Advanced indices around a slice come first: [B, H, W, C].
    return pixels[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, pixels scaled to 0 … 1.

    From counts of the 256 values: exact, and without a floating-point copy of all images.
    """
    value = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in pixels.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256) / channel.numel()
        mean = (share * value).sum()
        means.append(mean)
        deviations.append((share * (value - mean) ** 2).sum().sqrt())
    return torch.stack(means).float(), torch.stack(deviations).float()


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions outside ``0 … size-1`` mirrored at the edge pixel."""
    position = position.abs()
    return torch.where(position < size, position, 2 * (size - 1) - position)


def clock(device: torch.device) -> str:
    """What training is timed by: of one thread of a processor, what that thread really ran."""
    return "process time" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall time"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if clock(device) == "process time" else time.perf_counter()
