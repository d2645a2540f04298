"""Rooms with boxes and spheres, rendered by ray casting: images with exact depth and normals.

Camera coordinates are x to the right, y down, z forward. The room's axes are the camera's before it
is turned, with the camera at the origin: the floor is at y = the camera's height.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg_kernels import _checks

SIDE = 64  # pixels
FOCAL = 48.0  # pixels: the camera sees 67 degrees
BOXES, SPHERES = 5, 4  # at most, in one scene
CHUNK = 16  # scenes drawn and cast together; results depend on it
ROOM = 0  # the first solid; then the boxes, then the spheres
FACES = 6  # surfaces of the room; every box and every sphere is one surface
PLAIN, STRIPES, CHECKER, MARBLE = range(4)
LIGHTS = 3
NOISE = 0.03  # standard deviation of a pixel's noise, of white


@dataclass(frozen=True)
class Layout:
    """``n`` scenes before they are seen. Lengths are metres, angles radians, all float32.

    Args:
        yaw, pitch: ``[n]``, how the camera is turned: to the right, and down.
        centre: ``[n, solids, 3]``, of the room, the boxes and the spheres; solids that a scene has
            not are behind the camera.
        half: ``[n, solids, 3]``, half of the solid's sizes; a sphere's radius, three times.
        angle: ``[n, solids]``, how the solid is turned about the vertical axis; the room is not.
        kind: ``[n, surfaces]`` int64, PLAIN, STRIPES, CHECKER or MARBLE.
        waves: ``[n, surfaces, 2, 4]``: two waves of a texture, radians per metre along the solid's
            axes, and a phase.
        colours: ``[n, surfaces, 2, 3]``: red, green and blue of a texture's two colours.
        lights: ``[n, LIGHTS, 2, 3]``: directions to the lights, and their colours.
        ambient: ``[n, 3]``: light from everywhere.
        noise: ``[n, 3, SIDE, SIDE]``: what the camera adds.
    """

    yaw: Tensor
    pitch: Tensor
    centre: Tensor
    half: Tensor
    angle: Tensor
    kind: Tensor
    waves: Tensor
    colours: Tensor
    lights: Tensor
    ambient: Tensor
    noise: Tensor


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes of a seed, in an order that does not depend on how many are asked for.

    Args:
        count: of scenes.
        seed: of everything in them.

    Returns:
        Images, uint8 ``[count, 3, 64, 64]``; depth along the optical axis in metres, float32
        ``[count, 64, 64]``; unit normals in camera coordinates, facing the camera, float32
        ``[count, 3, 64, 64]``.

    Raises:
        TypeError, ValueError: an argument is not an int, or out of range.

    >>> images, depth, normals = scenes(2, seed=0)
    >>> images.shape, images.dtype, depth.shape, normals.shape
    (torch.Size([2, 3, 64, 64]), torch.uint8, torch.Size([2, 64, 64]), torch.Size([2, 3, 64, 64]))
    """
    _checks.integer("count", count, 1, 1_000_000)
    _checks.integer("seed", seed, 0, 2**31 - 1)
    images = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    depth = torch.empty(count, SIDE, SIDE)
    normals = torch.empty(count, 3, SIDE, SIDE)
    for first in range(0, count, CHUNK):
        rows = slice(first, min(first + CHUNK, count))
        drawn = render(layout(seed, first // CHUNK))
        for whole, part in zip((images, depth, normals), drawn, strict=True):
            whole[rows] = part[: rows.stop - first]
    return images, depth, normals


def layout(seed: int, chunk: int) -> Layout:
    """Scenes ``chunk * CHUNK`` and following of a seed, ``CHUNK`` of them."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + chunk)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(CHUNK, *shape, generator=generator) * (high - low) + low

    def logarithmic(low: float, high: float, *shape: int) -> Tensor:
        return uniform(math.log(low), math.log(high), *shape).exp()

    yaw, pitch = uniform(-0.6, 0.6), uniform(-0.1, 0.35)
    height = uniform(1.1, 1.9)
    low = -torch.stack([uniform(1.3, 4), uniform(0.8, 1.8), uniform(1, 1)], 1)
    high = torch.stack([uniform(1.3, 4), height, uniform(4, 9)], 1)
    # Boxes and spheres stand in front of the camera wherever it looks, some of them in a wall.
    count = BOXES + SPHERES
    ahead = logarithmic(1.8, 6, count)
    aside = ahead * uniform(-0.6, 0.6, count)
    absent = uniform(0, 1, count) < 0.3
    half = logarithmic(0.15, 0.6, count, 3)
    half[:, :, 1] *= 1.4
    half[:, BOXES:] = logarithmic(0.2, 0.65, SPHERES, 1)
    floating = uniform(0, 1, count) < 0.3
    centre = torch.stack(
        [
            aside * yaw.cos()[:, None] + ahead * yaw.sin()[:, None],
            height[:, None] - half[:, :, 1] - floating * uniform(0.2, 1.5, count),
            ahead * yaw.cos()[:, None] - aside * yaw.sin()[:, None],
        ],
        2,
    )
    centre[absent] = torch.tensor([0.0, 0.0, -20.0])
    turned = torch.cat([uniform(-math.pi, math.pi, BOXES), torch.zeros(CHUNK, SPHERES)], 1)
    surfaces = FACES + count
    # Periods of a texture spread further than distances do, so that a fine one says nothing of
    # distance; brightness is each surface's own, and light does not fall off.
    direction = torch.randn(CHUNK, surfaces, 2, 3, generator=generator)
    direction /= direction.norm(dim=3, keepdim=True)
    frequency = 2 * math.pi / logarithmic(0.25, 2.5, surfaces, 2, 1)
    phase = uniform(-math.pi, math.pi, surfaces, 2, 1)
    towards = torch.randn(CHUNK, LIGHTS, 3, generator=generator)
    towards /= towards.norm(dim=2, keepdim=True)
    tint = uniform(0.6, 1, LIGHTS, 3) * uniform(0.2, 1, LIGHTS, 1)
    return Layout(
        yaw=yaw,
        pitch=pitch,
        centre=torch.cat([(low + high)[:, None] / 2, centre], 1),
        half=torch.cat([(high - low)[:, None] / 2, half], 1),
        angle=torch.cat([torch.zeros(CHUNK, 1), turned], 1),
        kind=torch.randint(0, 4, (CHUNK, surfaces), generator=generator),
        waves=torch.cat([direction * frequency, phase], 3),
        colours=uniform(0.15, 1, surfaces, 2, 3) * logarithmic(0.5, 1, surfaces, 1, 1),
        lights=torch.stack([towards, tint], 2),
        ambient=uniform(0.6, 1, 3) * uniform(0.3, 0.6, 1),
        noise=torch.randn(CHUNK, 3, SIDE, SIDE, generator=generator) * NOISE,
    )


def rays() -> Tensor:
    """Directions of the pixels' centres in camera coordinates, ``[3, pixels]``.

    Their z is 1, so that the length of a ray, counted in directions, is depth.
    """
    steps = (torch.arange(SIDE) + 0.5 - SIDE / 2) / FOCAL
    down, right = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([right.flatten(), down.flatten(), torch.ones(SIDE * SIDE)])


def rotation(scene: Layout) -> Tensor:
    """From camera to room coordinates, ``[n, 3, 3]``: down by ``pitch``, then right by ``yaw``."""
    zero, one = torch.zeros_like(scene.yaw), torch.ones_like(scene.yaw)
    cos, sin = scene.pitch.cos(), scene.pitch.sin()
    down = torch.stack([one, zero, zero, zero, cos, sin, zero, -sin, cos], 1)
    cos, sin = scene.yaw.cos(), scene.yaw.sin()
    right = torch.stack([cos, zero, sin, zero, one, zero, -sin, zero, cos], 1)
    return right.view(-1, 3, 3) @ down.view(-1, 3, 3)


def render(scene: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Images, depth and normals of a layout, as :func:`scenes` returns them."""
    turn = rotation(scene)
    ray = turn @ rays()  # [n, 3, pixels]
    depth, solid = _nearest(scene, ray)
    normal, point, surface = _hit(scene, ray, depth, solid)
    image = _shade(scene, normal, point, surface).view_as(scene.noise) + scene.noise
    shape = (-1, SIDE, SIDE)
    return (
        (image.clamp_(0, 1) * 255).round_().to(torch.uint8),
        depth.view(shape),
        (turn.mT @ normal).view(-1, 3, SIDE, SIDE),
    )


def _nearest(scene: Layout, ray: Tensor) -> tuple[Tensor, Tensor]:
    """Depth, and number of the solid that each ray meets first: both ``[n, pixels]``."""
    inside = -scene.centre[:, ROOM, :, None]  # the camera, seen from the room's centre
    half = scene.half[:, ROOM, :, None]
    leaves = ((half - inside * ray.sign()) / ray.abs()).amin(1, keepdim=True)
    boxes = slice(1, 1 + BOXES)
    angle = scene.angle[:, boxes]
    start = _along(-scene.centre[:, boxes].transpose(1, 2), angle)  # three of [n, boxes]
    step = _along(ray[:, :, None], angle[:, :, None])  # three of [n, boxes, pixels]
    enters = torch.full_like(step[0], -math.inf)
    exits = torch.full_like(step[0], math.inf)
    for axis in range(3):
        inverse = step[axis].reciprocal()
        middle = start[axis][:, :, None] * -inverse
        reach = scene.half[:, boxes, axis, None] * inverse.abs()
        enters = torch.maximum(enters, middle - reach)
        exits = torch.minimum(exits, middle + reach)
    boxed = enters.masked_fill((enters >= exits) | (enters <= 0), math.inf)
    centre = scene.centre[:, 1 + BOXES :]
    square = (ray * ray).sum(1)[:, None]
    along = centre @ ray  # [n, spheres, pixels]
    apart = (centre.square().sum(2) - scene.half[:, 1 + BOXES :, 0].square())[:, :, None]
    root = (along * along - square * apart).sqrt()  # NaN where the ray misses
    met = (along - root) / square
    met = met.masked_fill(~(met > 0), math.inf)
    depth, solid = torch.cat([leaves, boxed, met], 1).min(1)
    return depth, solid


def _hit(scene: Layout, ray: Tensor, depth: Tensor, solid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normals in room coordinates, points in the solids' axes, and numbers of the surfaces."""

    def of_solid(values: Tensor) -> Tensor:
        return values.gather(1, solid)

    angle = of_solid(scene.angle)
    centre = torch.stack([of_solid(scene.centre[:, :, axis]) for axis in range(3)], 1)
    half = torch.stack([of_solid(scene.half[:, :, axis]) for axis in range(3)], 1)
    away = ray * depth[:, None] - centre
    start = torch.stack(_along(-centre, angle), 1)
    step = torch.stack(_along(ray, angle), 1)
    point = torch.stack(_along(away, angle), 1)
    in_room, in_sphere = solid == ROOM, solid > BOXES
    # Where a ray meets the planes of a box: it enters by the last of them, and leaves the room by
    # the first of the opposite ones. Asking this rather than which face the point lies on makes
    # every normal face the camera, at edges too.
    side = torch.where(in_room[:, None], half, -half)
    planes = (side * step.sign() - start) / step
    axis = torch.where(in_room, planes.argmin(1), planes.argmax(1))[:, None]
    towards = -step.gather(1, axis).sign()
    flat = torch.zeros_like(ray).scatter_(1, axis, towards)
    back = torch.stack(_along(flat, -angle), 1)
    outwards = away / away.norm(dim=1, keepdim=True)
    normal = torch.where(in_sphere[:, None], outwards, back)
    face = 2 * axis[:, 0] + (towards[:, 0] > 0)
    return normal, point, torch.where(in_room, face, solid - 1 + FACES)


def _along(vector: Tensor, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and z of vectors ``[n, 3, ...]`` along the axes of solids turned by ``[n, ...]``.

    A solid's own x axis points to (cos, 0, -sin) of the room.
    """
    (x, y, z), cos, sin = vector.unbind(1), angle.cos(), angle.sin()
    return cos * x - sin * z, y, sin * x + cos * z


def _shade(scene: Layout, normal: Tensor, point: Tensor, surface: Tensor) -> Tensor:
    """Colours without noise, ``[n, 3, pixels]``."""

    def of_surface(values: Tensor) -> Tensor:
        return values.gather(1, surface)

    def wave(number: int) -> Tensor:
        one = scene.waves[:, :, number]
        parts = [of_surface(one[:, :, axis]) * point[:, axis] for axis in range(3)]
        return parts[0] + parts[1] + parts[2] + of_surface(one[:, :, 3])

    kind, first, second = of_surface(scene.kind), wave(0), wave(1)
    striped, crossed = first.sin().sign(), second.sin().sign()
    swirl = (first + 2.5 * second.sin()).sin()
    value = torch.where(kind == STRIPES, striped, swirl)
    value = torch.where(kind == CHECKER, striped * crossed, value)
    share = (0.5 + 0.5 * value).masked_fill(kind == PLAIN, 0)
    colour = torch.stack(
        [
            torch.lerp(
                of_surface(scene.colours[:, :, 0, channel]),
                of_surface(scene.colours[:, :, 1, channel]),
                share,
            )
            for channel in range(3)
        ],
        1,
    )
    lit = (scene.lights[:, :, 0] @ normal).clamp_(min=0)  # [n, LIGHTS, pixels]
    return colour * (scene.ambient[:, :, None] + scene.lights[:, :, 1].mT @ lit)
