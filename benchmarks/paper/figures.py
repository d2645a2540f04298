"""Pictures of jointed figures in front of clutter, with the exact place of every joint.

A figure is a skeleton in three dimensions, of random proportions, in a random pose, seen from any
side and drawn as limbs that cover each other by their depth. Both arms look alike, and both legs:
which one is the left is said by the face, the feet and a mark on the chest alone, wherever in the
picture they are, and if they can be seen. Everything comes from one seed and needs nothing but
torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.paper import capsules
from benchmarks.paper.capsules import Capsules
from benchmarks.paper.skeleton import SIDE, Body, Random, flat, pose
from rpg_kernels import _checks

_CHUNK = 32  # images drawn at once: their planes stay in a core's cache
_SEEDS = 2**32  # torch's generator takes no more bits than these
_DISTRACTORS = 4  # pairs of limbs that belong to nobody
_BLOBS = 4
_OCCLUDERS = 3
_SKULL = 1  # the place of the skull among the parts: it reaches the top of the head


@dataclass(frozen=True)
class Look:
    """What is drawn; without a part of it the rest stays as it is.

    Args:
        figure: the figure itself.
        clutter: blobs, and limbs that belong to nobody, behind it.
        occlusion: shapes in front of it.
        spoilt: blur, brightness, contrast and noise.
    """

    figure: bool = True
    clutter: bool = True
    occlusion: bool = True
    spoilt: bool = True


ALL = Look()


def figures(count: int, seed: int, look: Look = ALL) -> tuple[Tensor, Tensor, Tensor]:
    """Draw figures: their pictures, their joints and the sizes of their heads.

    The first pictures of a seed are the same however many are asked for. The same bits come out
    on machines whose torch computes sines and roots alike; elsewhere some pixels may differ by 1.

    Args:
        count: how many, 1 to 2^24.
        seed: 0 to 2^32 - 1.
        look: what to leave out.

    Returns:
        Pictures ``uint8 [count, 3, 64, 64]``; joints ``float32 [count, 14, 2]``, x and y in pixels
        from the upper left corner, so that the first pixel's centre is at 0.5, in the order of
        ``JOINTS``, hidden ones too; lengths of the heads ``float32 [count]`` in pixels.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Example:
        >>> pixels, joints, heads = figures(3, seed=0)
        >>> pixels.shape, joints.shape, heads.shape
        (torch.Size([3, 3, 64, 64]), torch.Size([3, 14, 2]), torch.Size([3]))
    """
    _checks.integer("count", count, 1, 2**24)
    _checks.integer("seed", seed, 0, _SEEDS - 1)
    if not isinstance(look, Look):
        raise TypeError(f"look: got a {type(look).__name__}, wanted a Look")
    seeds = torch.Generator().manual_seed(seed)
    chunks = []
    for _ in range(math.ceil(count / _CHUNK)):
        of_chunk = int(torch.randint(_SEEDS, (), generator=seeds))
        chunks.append(_draw(Random(of_chunk, _CHUNK), look))
    pixels, joints, heads = (torch.cat(parts)[:count] for parts in zip(*chunks, strict=True))
    return pixels, joints, heads


def _draw(random: Random, look: Look) -> tuple[Tensor, Tensor, Tensor]:
    body = pose(random)
    background = _background(random)
    behind = background.mean((2, 3))
    skin, shirt, trousers = (_apart(random, behind) for _ in range(3))
    clutter = [_blobs(random), _distractors(random, body.head, (skin, shirt, trousers))]
    figure = _figure(random, body, skin, shirt, trousers)
    occluders = _occluders(random)
    stripes = _stripes(random)
    pixels = background
    for shapes in clutter if look.clutter else []:
        capsules.paint(pixels, shapes, stripes)
    if look.figure:
        capsules.paint(pixels, figure, stripes)
    if look.occlusion:
        capsules.paint(pixels, occluders, stripes)
    spoilt = _spoil(random, pixels)
    pixels = spoilt if look.spoilt else pixels
    pixels = pixels.mul(255).round_().clamp_(0, 255).to(torch.uint8)
    return pixels, flat(body.joints), body.head


def _figure(random: Random, body: Body, skin: Tensor, shirt: Tensor, trousers: Tensor) -> Capsules:
    """The parts of a body, from the farthest to the nearest."""
    joints, head = body.joints, body.head
    sleeve = torch.where(random.chance(0.5, 1) > 0, shirt, skin)
    leg = torch.where(random.chance(0.7, 1) > 0, trousers, skin)
    hair, shoes, mark = random.colour(), random.colour(), random.colour()
    marked = random.chance(0.7)
    stout = random.between(0.75, 1.3)
    shoulders = (joints[:, 2] + joints[:, 5]) / 2
    pelvis = (joints[:, 8] + joints[:, 11]) / 2
    crown = joints[:, 0] + (joints[:, 1] - joints[:, 0]) * 0.3
    base = joints[:, 0] + (joints[:, 1] - joints[:, 0]) * 0.6
    chest = shoulders * 0.7 + pelvis * 0.3 + body.face * 0.8
    face = base * 0.7 + crown * 0.3
    full = torch.ones(random.count)
    # Ends, radius at each of them in heads, colour, stripes, opacity, bias of the depth.
    parts: list[tuple[Tensor, Tensor, float, float, Tensor, float, Tensor, float]] = [
        (joints[:, 1], base, 0.18, 0.18, skin, 0, full, 0),
        (crown, base, 0.35, 0.28, hair, 0, full, 0),
        (face + body.face * 0.35, face + body.face * 0.35, 0.24, 0.24, skin, 0, full, 0),
        (shoulders, pelvis, 0.38, 0.32, shirt, 1, full, 0),
        (chest, chest, 0.17, 0.17, mark, 0, marked, 0),
    ]
    for first, toe in ((2, 0), (5, 1)):
        shoulder, elbow, wrist = (joints[:, first + i] for i in range(3))
        hip, knee, ankle = (joints[:, first + 6 + i] for i in range(3))
        parts += [
            (shoulder, hip, 0.24, 0.24, shirt, 1, full, 0),
            (shoulder, elbow, 0.21, 0.17, shirt, 1, full, 0.1),
            (elbow, wrist, 0.17, 0.13, sleeve, 1, full, 0.2),
            (wrist, wrist, 0.16, 0.16, skin, 0, full, 0.2),
            (hip, knee, 0.28, 0.20, trousers, 1, full, 0),
            (knee, ankle, 0.20, 0.14, leg, 1, full, 0),
            (ankle, body.toes[:, toe], 0.15, 0.12, shoes, 0, full, 0),
        ]
    a, b, ra, rb, colour, striped, opacity, bias = zip(*parts, strict=True)
    near, far = torch.stack(a, 1), torch.stack(b, 1)
    size = head[:, None] * torch.where(torch.arange(len(parts)) == _SKULL, 1, stout[:, None])
    depth = (near[..., 2] + far[..., 2]) / 2 + torch.tensor(bias) * size
    shapes = Capsules(
        flat(near), flat(far), torch.tensor(ra) * size, torch.tensor(rb) * size,
        torch.stack(colour, 1), torch.stack(opacity, 1),
        torch.tensor(striped).expand(random.count, -1), torch.ones(random.count, len(parts)),
    )  # fmt: skip
    return shapes.ordered(depth.argsort(dim=1, stable=True))


def _apart(random: Random, behind: Tensor) -> Tensor:
    """A colour ``[images, 3]``, the one of three that differs most from what is behind it."""
    best = random.colour()
    for _ in range(2):
        other = random.colour()
        better = (other - behind).abs().sum(1) > (best - behind).abs().sum(1)
        best = torch.where(better[:, None], other, best)
    return best


def _background(random: Random) -> Tensor:
    """Smooth colours with coarse and fine structure: ``[images, 3, 64, 64]``."""
    base = random.colour()[:, :, None, None]
    for cells, strength in ((3, 0.4), (12, 0.25)):
        grid = random.between(-1, 1, 3, cells, cells)
        wide = F.interpolate(grid, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        base = base + wide * (random.between(0, strength)[:, None, None, None])
    return base.clamp_(0, 1)


def _blobs(random: Random) -> Capsules:
    """Large shapes, some with soft edges."""
    first = random.between(0, SIDE, _BLOBS, 2)
    second = first + random.between(-25, 25, _BLOBS, 2)
    radius = random.between(2, 12, _BLOBS)
    return Capsules(
        first, second, radius, radius * random.between(0.5, 1.5, _BLOBS),
        torch.stack([random.colour() for _ in range(_BLOBS)], 1),
        random.between(0.3, 1, _BLOBS) * random.chance(0.7, _BLOBS),
        random.chance(0.3, _BLOBS), random.between(1, 8, _BLOBS),
    )  # fmt: skip


def _distractors(random: Random, head: Tensor, worn: Sequence[Tensor]) -> Capsules:
    """Pairs of limbs that belong to nobody, mostly in colours that the figure wears."""
    first = random.between(0, SIDE, _DISTRACTORS, 2)
    ends, angle = [first], random.between(-math.pi, math.pi, _DISTRACTORS)
    for _ in range(2):
        step = torch.stack([angle.cos(), angle.sin()], -1) * head[:, None, None]
        ends.append(ends[-1] + step * random.between(0.8, 1.5, _DISTRACTORS, 1))
        angle = angle + random.between(-2, 2, _DISTRACTORS)
    choices = torch.stack([*worn, random.colour()], 1)
    which = random.between(0, len(worn) + 1, 2 * _DISTRACTORS).long()
    radius = random.between(0.12, 0.28, _DISTRACTORS) * head[:, None]
    shown = random.chance(0.45, _DISTRACTORS).repeat(1, 2)
    return Capsules(
        torch.cat(ends[:2], 1), torch.cat(ends[1:], 1),
        radius.repeat(1, 2), radius.repeat(1, 2) * 0.85,
        choices[torch.arange(random.count)[:, None], which],
        shown, random.chance(0.7, 2 * _DISTRACTORS), torch.ones(random.count, 2 * _DISTRACTORS),
    )  # fmt: skip


def _occluders(random: Random) -> Capsules:
    """Shapes in front."""
    first = random.between(0, SIDE, _OCCLUDERS, 2)
    radius = random.between(1.5, 5.5, _OCCLUDERS)
    return Capsules(
        first, first + random.between(-20, 20, _OCCLUDERS, 2), radius, radius,
        torch.stack([random.colour() for _ in range(_OCCLUDERS)], 1),
        random.chance(0.35, _OCCLUDERS), random.chance(0.3, _OCCLUDERS),
        random.between(1, 2, _OCCLUDERS),
    )  # fmt: skip


def _stripes(random: Random) -> Tensor:
    """A pattern that clothes multiply their colour with: ``[images, 64, 64]``, about 1."""
    centres = torch.arange(SIDE) + 0.5
    x, y = random.between(-1.6, 1.6, 1, 1), random.between(-1.6, 1.6, 1, 1)
    wave = (x * centres + y * centres[:, None] + random.between(0, 6.3, 1, 1)).sin()
    strength = random.between(0, 0.5, 1, 1) * random.chance(0.6, 1, 1)
    return 1 + strength * wave


def _spoil(random: Random, pixels: Tensor) -> Tensor:
    """Blur, contrast, brightness and noise."""
    wide = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    blurred = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9
    by_image = (1, 1, 1)
    share = random.between(-0.5, 1, *by_image).clamp_min(0)
    pixels = pixels.lerp(blurred, share)
    contrast = random.between(0.5, 1.1, *by_image)
    pixels = (pixels - 0.5) * contrast + 0.5 + random.between(-0.15, 0.15, *by_image)
    noise = random.between(-1, 1, 3, SIDE, SIDE) * random.between(0, 0.1, *by_image)
    return pixels + noise
