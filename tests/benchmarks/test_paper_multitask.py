"""The multitask experiment: scenes against rays cast one at a time, the network, a tiny run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.paper.scenes import (
    BOXES,
    CHUNK,
    FACES,
    FOCAL,
    SIDE,
    SPHERES,
    layout,
    rays,
    scenes,
)

Vector = list[float]


def turned(v: Vector, angle: float) -> Vector:
    """By an angle about the vertical axis, x towards -z."""
    cos, sin = math.cos(angle), math.sin(angle)
    return [cos * v[0] + sin * v[2], v[1], -sin * v[0] + cos * v[2]]


def cast(scene: dict[str, list], row: int, column: int) -> tuple[float, Vector, int, Vector]:
    """Depth, camera normal, surface and point in its solid's axes, of one ray; Python numbers."""
    x, y = (column + 0.5 - SIDE / 2) / FOCAL, (row + 0.5 - SIDE / 2) / FOCAL
    cos, sin = math.cos(scene["pitch"]), math.sin(scene["pitch"])
    # The camera looks along +z; +pitch makes it look down, that is, towards +y.
    way = turned([x, cos * y + sin, cos - sin * y], scene["yaw"])
    hits = []
    for solid, (centre, half, angle) in enumerate(
        zip(scene["centre"], scene["half"], scene["angle"], strict=True)
    ):
        start, step = turned([-c for c in centre], -angle), turned(way, -angle)
        if solid > BOXES:
            a = sum(s * s for s in step)
            b = sum(s * o for s, o in zip(step, start, strict=True))
            c = sum(o * o for o in start) - half[0] ** 2
            if b * b < a * c or b >= 0:
                continue
            depth = (-b - math.sqrt(b * b - a * c)) / a
            at = [o + depth * s for o, s in zip(start, step, strict=True)]
            hits.append((depth, solid, [p / half[0] for p in at], at))
            continue
        for axis in range(3):
            for sign in (-1, 1):
                if step[axis] == 0:
                    continue
                depth = (sign * half[axis] - start[axis]) / step[axis]
                at = [o + depth * s for o, s in zip(start, step, strict=True)]
                others = (i for i in range(3) if i != axis)
                outwards = sign * step[axis] > 0
                if depth <= 0 or any(abs(at[i]) > half[i] for i in others):
                    continue
                if outwards == (solid == 0):
                    normal = [0.0, 0.0, 0.0]
                    normal[axis] = -sign if solid == 0 else sign
                    hits.append((depth, solid, normal, at))
    depth, solid, normal, at = min(hits)
    axis = next((i for i in range(3) if normal[i]), 0)
    surface = solid - 1 + FACES if solid else 2 * axis + (normal[axis] > 0)
    n = turned(turned(normal, scene["angle"][solid]), -scene["yaw"])
    return depth, [n[0], cos * n[1] - sin * n[2], sin * n[1] + cos * n[2]], surface, at


def shade(scene: dict[str, list], normal: Vector, surface: int, at: Vector) -> Vector:
    """A pixel's colour without noise; the normal is the camera's, so the lights are turned."""
    first, second = (
        sum(w * p for w, p in zip(wave, [*at, 1.0], strict=True))
        for wave in scene["waves"][surface]
    )
    signs = [math.copysign(1, math.sin(value)) for value in (first, second)]
    value = (-1, signs[0], signs[0] * signs[1], math.sin(first + 2.5 * math.sin(second)))
    share = (1 + value[scene["kind"][surface]]) / 2
    light = list(scene["ambient"])
    cos, sin = math.cos(scene["pitch"]), math.sin(scene["pitch"])
    for towards, tint in scene["lights"]:
        t = turned(towards, -scene["yaw"])
        t = [t[0], cos * t[1] - sin * t[2], sin * t[1] + cos * t[2]]
        lit = max(0.0, sum(a * b for a, b in zip(t, normal, strict=True)))
        light = [one + lit * c for one, c in zip(light, tint, strict=True)]
    a, b = scene["colours"][surface]
    return [(p + share * (q - p)) * one for p, q, one in zip(a, b, light, strict=True)]


@pytest.fixture(scope="module")
def rendered() -> tuple[Tensor, Tensor, Tensor]:
    return scenes(2 * CHUNK, seed=3)


def test_single_rays_meet_the_same_surfaces(rendered: tuple[Tensor, Tensor, Tensor]) -> None:
    images, depth, normals = rendered
    drawn = layout(3, 1)
    met, off = set(), 0
    for i in range(CHUNK):
        scene = {name: value[i].double().tolist() for name, value in vars(drawn).items()}
        scene["kind"] = drawn.kind[i].tolist()
        for row, column in torch.randint(0, SIDE, (25, 2)).tolist():
            seen = CHUNK + i, row, column
            wanted, normal, surface, at = cast(scene, row, column)
            met.add(surface)
            got = normals[seen[0], :, row, column]
            colour = shade(scene, normal, surface, at)
            noisy = [c + scene["noise"][k][row][column] for k, c in enumerate(colour)]
            pixel = torch.tensor([min(max(c, 0.0), 1.0) * 255 for c in noisy])
            close = (
                math.isclose(float(depth[seen]), wanted, rel_tol=1e-4)
                and torch.allclose(got, torch.tensor(normal), atol=2e-3)
                and (images[seen[0], :, row, column] - pixel).abs().max() < 0.6
            )
            off += not close
    # float32 may choose another surface, or another stripe, where a ray meets an edge.
    assert off <= 2
    assert len(met) > FACES - 1 + (BOXES + SPHERES) / 2


def test_normals_are_those_of_the_unprojected_depth(
    rendered: tuple[Tensor, Tensor, Tensor],
) -> None:
    _, depth, normals = rendered
    points = (rays().view(3, SIDE, SIDE) * depth[:, None]).double()
    right = points[:, :, 1:-1, 2:] - points[:, :, 1:-1, :-2]
    down = points[:, :, 2:, 1:-1] - points[:, :, :-2, 1:-1]
    found = torch.linalg.cross(down, right, dim=1)
    found /= found.norm(dim=1, keepdim=True)
    inner = normals[:, :, 1:-1, 1:-1]
    around = [normals[:, :, 1 + r : SIDE - 1 + r, 1 + c : SIDE - 1 + c]
              for r, c in ((0, 1), (0, -1), (1, 0), (-1, 0))]  # fmt: skip
    flat = torch.stack([(n == inner).all(1) for n in around]).all(0)
    # Neighbours with one normal may be on two parallel planes; those jump in depth.
    steps = torch.linalg.cross(down, right, dim=1).norm(dim=1)
    smooth = flat & (steps < steps[flat].quantile(0.9))
    agree = ((found * inner).sum(1) > 0.999)[smooth]
    assert smooth.double().mean() > 0.5
    assert agree.double().mean() > 0.995


def test_ranges(rendered: tuple[Tensor, Tensor, Tensor]) -> None:
    images, depth, normals = rendered
    assert (images.dtype, depth.dtype, normals.dtype) == (torch.uint8, torch.float32, torch.float32)
    assert depth.isfinite().all()
    assert depth.min() > 0.3
    assert depth.max() < 12
    torch.testing.assert_close(normals.norm(dim=1), torch.ones_like(depth), atol=1e-5, rtol=0)
    assert ((normals.flatten(2) * rays()).sum(1) < 1e-3).all()
    assert 40 < images.float().mean() < 200
    # Brightness must not give depth away.
    together = torch.stack([images.float().mean(1).flatten(), depth.flatten()])
    assert together.corrcoef()[0, 1].abs() < 0.25


def test_a_seed_gives_the_same_scenes_however_many(
    rendered: tuple[Tensor, Tensor, Tensor],
) -> None:
    for whole, part in zip(rendered, scenes(CHUNK + 1, seed=3), strict=True):
        assert torch.equal(whole[: CHUNK + 1], part)
    assert not torch.equal(rendered[1][:CHUNK], rendered[1][CHUNK:])
    assert not torch.equal(scenes(1, seed=4)[1], rendered[1][:1])


@pytest.mark.parametrize(
    ("count", "seed", "error"),
    [(0, 0, ValueError), (1, -1, ValueError), (1.5, 0, TypeError), (1, True, TypeError)],
)
def test_bad_counts_and_seeds_are_refused(count: int, seed: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"(count|seed): got .*, wanted"):
        scenes(count, seed)
