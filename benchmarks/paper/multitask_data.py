"""Scenes as the multitask experiment learns from them, and how it keeps what it predicted."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.paper.scenes import SIDE, scenes

TRAIN_SEED, TEST_SEED = 1, 2  # of the scenes, the same in every run
STRIDE = 2  # pixels of the image for one of the output, in each direction
OUT = SIDE // STRIDE


@dataclass(frozen=True)
class Batch:
    """Images ``uint8 [B, 3, 64, 64]``; truth at every second pixel of every second line, from the
    first: depth in metres ``[B, 1, 32, 32]``, normals ``[B, 3, 32, 32]``."""

    images: Tensor
    depth: Tensor
    normals: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        return Batch(self.images[rows], self.depth[rows], self.normals[rows])

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Moments:
    """Means and variances of truth: of depth, and of normals about their mean, three summed."""

    depth_mean: Tensor
    depth_variance: Tensor
    normals_variance: Tensor


def render(count: int, seed: int) -> Batch:
    """The first scenes of a seed."""
    images, depth, normals = scenes(count, seed)
    # Taken and not averaged: a mean over an edge is the depth of nothing. The network's stem has
    # its windows' centres at the same pixels.
    return Batch(
        images,
        depth[:, None, ::STRIDE, ::STRIDE].contiguous(),
        normals[:, :, ::STRIDE, ::STRIDE].contiguous(),
    )


def moments(truth: Batch) -> Moments:
    """Of all pixels of a set."""
    mean = truth.normals.mean((0, 2, 3), keepdim=True)
    return Moments(
        truth.depth.mean(),
        truth.depth.var(correction=0),
        (truth.normals - mean).square().sum(1).mean(),
    )


def packed(values: Tensor) -> str:
    """Rounded to bytes, compressed, in base64."""
    levels = values.nan_to_num().clamp(0, 255).round().to(torch.uint8).contiguous()
    return base64.b64encode(zlib.compress(bytes(levels.flatten().tolist()), 9)).decode()


def unpacked(text: str, *shape: int) -> Tensor:
    """What ``packed`` made."""
    held = bytearray(zlib.decompress(base64.b64decode(text)))
    return torch.frombuffer(held, dtype=torch.uint8).view(shape).float()
