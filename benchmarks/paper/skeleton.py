"""Skeletons of figures: random bodies in random poses, in three dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 64  # pixels
MARGIN = 3.0  # pixels between every joint and the border
JOINTS = (
    "head top", "neck",
    "left shoulder", "left elbow", "left wrist", "right shoulder", "right elbow", "right wrist",
    "left hip", "left knee", "left ankle", "right hip", "right knee", "right ankle",
)  # fmt: skip
# What each joint becomes in a mirror.
MIRRORED = (0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10)
# Pairs of joints that a limb, the neck or the trunk joins, to be drawn as lines.
BONES = ((0, 1), (1, 2), (2, 3), (3, 4), (1, 5), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
         (1, 11), (11, 12), (12, 13))  # fmt: skip


class Random:
    """Uniform numbers for a chunk of images, from one generator."""

    def __init__(self, seed: int, count: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.count = count

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """``[images, *shape]``, float32."""
        drawn = torch.rand((self.count, *shape), generator=self.generator)
        return drawn * (high - low) + low

    def degrees(self, low: float, high: float) -> Tensor:
        """An angle for each image, in radians."""
        return self.between(math.radians(low), math.radians(high))

    def chance(self, probability: float, *shape: int) -> Tensor:
        """1 with a probability, else 0."""
        return (self.between(0, 1, *shape) < probability).float()

    def colour(self) -> Tensor:
        """``[images, 3]``, 0 to 1: of any brightness, more often pale than bright."""
        grey = self.between(0.1, 0.9, 1)
        tint = self.between(-0.4, 0.4, 3) * self.between(0.2, 1, 1)
        return (grey + tint).clamp(0, 1)


@dataclass(frozen=True)
class Body:
    """Points in space: x to the right of the picture, y upwards, z to the viewer; pixels."""

    joints: Tensor  # [images, 14, 3]
    head: Tensor  # [images]: length
    face: Tensor  # [images, 3]: from the middle of the head to the face, half a head long
    toes: Tensor  # [images, 2, 3]: left, right


def pose(random: Random) -> Body:
    """A body in a pose, turned, and put where all of its joints are inside of the picture."""
    size = {
        part: length * random.between(0.85, 1.15, 1)
        for part, length in {
            "head": 0.17, "trunk": 0.30, "shoulders": 0.11, "hips": 0.065,
            "upper arm": 0.17, "forearm": 0.15, "thigh": 0.24, "shin": 0.23,
        }.items()
    }  # fmt: skip
    zero, one = torch.zeros(random.count), torch.ones(random.count)
    up = torch.stack([zero, one, zero], 1)
    left = torch.stack([one, zero, zero], 1)
    pelvis = torch.zeros(random.count, 3)
    neck = up * size["trunk"]
    bow, tilt = random.degrees(-30, 30), random.degrees(-25, 25)
    top = neck + size["head"] * _direction(tilt, -bow) * torch.tensor([1.0, -1.0, 1.0])
    joints = [top, neck]
    liveliness = random.between(0.2, 0.9)
    for side in (1.0, -1.0):
        shoulder = neck + left * size["shoulders"] * side - up * 0.03
        out = side * random.degrees(-10, 150) * liveliness
        upper = _direction(out, random.degrees(-40, 100) * liveliness)
        elbow = shoulder + upper * size["upper arm"]
        ahead = random.between(-0.6, 0.6, 3) + torch.tensor([0.0, 0.2, 1.0])
        fore = _bent(upper, ahead, random.degrees(0, 140))
        joints += [shoulder, elbow, elbow + fore * size["forearm"]]
    for side in (1.0, -1.0):
        hip = pelvis + left * size["hips"] * side
        out = side * random.degrees(-8, 50) * liveliness
        thigh = _direction(out, random.degrees(-30, 100) * liveliness)
        knee = hip + thigh * size["thigh"]
        behind = random.between(-0.3, 0.3, 3) + torch.tensor([0.0, 0.0, -1.0])
        shin = _bent(thigh, behind, random.degrees(0, 120) * liveliness)
        joints += [hip, knee, knee + shin * size["shin"]]
    forward = torch.stack([zero, zero, one], 1)
    toes = [joints[i] + 0.07 * (forward - 0.3 * up) for i in (10, 13)]
    face = forward * size["head"] / 2
    points = torch.stack([*joints, *toes, face], 1)
    # Most show their front, some their back; most stand upright, some lean far.
    yaw = random.degrees(-75, 75) + random.chance(0.25) * math.pi
    pitch = random.degrees(-10, 10)
    roll = random.degrees(-20, 20) * torch.where(random.chance(0.8) > 0, 1.0, 3.0)
    points = points @ _turned(yaw, pitch, roll)
    height = random.between(48, 64)
    seen = flat(points[:, :14])
    low, high = seen.amin(1), seen.amax(1)
    room = SIDE - 2 * MARGIN
    scale = torch.minimum(height, room / (high - low).amax(1))[:, None]
    low, high = low * scale, high * scale
    place = MARGIN - low + random.between(0, 1, 2) * (room - (high - low)).clamp_min(0)
    points = points * scale[:, None]
    moved = points[:, :16] + torch.cat([place[:, :1], -place[:, 1:], zero[:, None]], 1)[:, None]
    return Body(moved[:, :14], (size["head"] * scale)[:, 0], points[:, 16], moved[:, 14:])


def _direction(out: Tensor, ahead: Tensor) -> Tensor:
    """From straight down, sideways by one angle and then forwards by another: ``[images, 3]``."""
    return torch.stack([out.sin(), -out.cos() * ahead.cos(), out.cos() * ahead.sin()], 1)


def _bent(limb: Tensor, towards: Tensor, angle: Tensor) -> Tensor:
    """The direction of a limb after a joint that bends by an angle, towards a vector."""
    across = towards - (towards * limb).sum(1, keepdim=True) * limb
    across = across / across.norm(dim=1, keepdim=True).clamp_min(1e-3)
    bent: Tensor = limb * angle.cos()[:, None] + across * angle.sin()[:, None]
    return bent


def _turned(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Rotations about the upright, the sideways and the viewer's axis: ``[images, 3, 3]``."""
    result: Tensor = torch.eye(3).expand(len(yaw), 3, 3)
    for angle, (i, j) in ((yaw, (0, 2)), (pitch, (1, 2)), (roll, (0, 1))):
        turn = torch.eye(3).repeat(len(yaw), 1, 1)
        turn[:, i, i] = turn[:, j, j] = angle.cos()
        turn[:, i, j], turn[:, j, i] = angle.sin(), -angle.sin()
        result = result @ turn
    return result


def flat(points: Tensor) -> Tensor:
    """Where points of space are seen: x and y of the picture, whose y points down."""
    seen: Tensor = points[..., :2] * torch.tensor([1.0, -1.0])
    return seen
