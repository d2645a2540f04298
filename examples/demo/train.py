"""One training loop for every network of the demo: same data order, schedule and optimiser."""

from __future__ import annotations

import time
from collections.abc import Callable
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
    """A trained network with its optimiser, its test accuracy and the seconds training took."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    accuracy: float
    seconds: float
    loss: float


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
    on_step: Callable[[], object] = lambda: None,
    groups: list[dict[str, Any]] | None = None,
) -> Trained:
    """Train ``model`` in place on its device and test it once at the end.

    Args:
        model: any classifier of the images.
        pixels: the images, on the model's device.
        schedule: epochs, batch size and the optimiser's settings.
        seed: of the order of images and of the augmentation, which are the same for every model.
        on_step: called after each optimiser step.
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
    begin = _now(device)
    for _ in range(schedule.epochs):
        model.train()
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            chosen = order[start : start + size]
            x = data.train_pixels[chosen]
            if schedule.augment:
                x = augment(x, generator)
            labels = data.train_labels[chosen].to(device)
            with autocast(device, schedule):
                logits = model(pixels.batch(x))
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            one_cycle.step()
            on_step()
    seconds = _now(device) - begin
    return Trained(model, optimizer, accuracy(model, pixels, schedule), seconds, loss.item())


def accuracy(model: nn.Module, pixels: Pixels, schedule: Schedule) -> float:
    """Per cent of the test images that are classified rightly."""
    data = pixels.data
    model.eval()
    right = 0
    with torch.no_grad(), autocast(pixels.device, schedule):
        for start in range(0, len(data.test_labels), EVAL_BATCH):
            x = pixels.batch(data.test_pixels[start : start + EVAL_BATCH])
            guess = model(x).argmax(1).cpu()
            right += int((guess == data.test_labels[start : start + EVAL_BATCH]).sum())
    return 100 * right / len(data.test_labels)


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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
