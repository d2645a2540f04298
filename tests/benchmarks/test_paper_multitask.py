"""The multitask experiment: scenes against rays cast one at a time, the network, a tiny run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.paper.experiment import Row
from benchmarks.paper.multitask import (
    DEPTH_STEP,
    EXPERIMENT,
    ROWS,
    SHOWN,
    VANILLA,
    pictures,
    task,
)
from benchmarks.paper.multitask_data import TEST_SEED, packed, render, unpacked
from benchmarks.paper.multitask_network import BLOCKS, Multitask, build, sizes
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


def test_output_stands_at_every_second_pixel() -> None:
    images, depth, normals = scenes(2, TEST_SEED)
    truth = render(2, TEST_SEED)
    assert torch.equal(truth.images, images)
    even = torch.arange(0, SIDE, 2)
    assert torch.equal(truth.depth[:, 0], depth[:, even][:, :, even])
    assert torch.equal(truth.normals, normals[:, :, even][:, :, :, even])
    # The middle of the stem's window for a pixel of the output is that pixel of the image.
    stem = Multitask().stem[0]
    with torch.no_grad():
        stem.weight.zero_()
        stem.weight[:, :, 1, 1] = 1
    assert torch.equal(stem(images.float())[:, 0], images[:, :, ::2, ::2].sum(1).float())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_have_the_same_dof(row: Row) -> None:
    model = build(row.settings, seed=1)
    uses = row.settings["uses"]
    blocks = (32, 32, 64, 64, 128)
    weights = sum(2 * 9 * width**2 for width in blocks)  # two convolutions of 3x3 each
    counted = sizes(model)
    assert counted["dof"] == weights
    assert counted["virtual_weights"] == uses * weights
    held = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert counted["trainable"] == sum(held.values())
    own = uses if row.settings.get("norm") == "separate" else 1
    norms = own * 2 * 2 * sum(blocks)
    dense = 9 * (3 * 32 + 32 * 64 + 64 * 128) + 128 * 64 + 64 * 32 + 4 * (9 * 32 + 1)
    around = 2 * (32 + 64 + 128 + 64 + 32)
    assert counted["trainable"] == weights + norms + dense + around


def test_what_rows_share_between_uses() -> None:
    _, shared, apart, remapped = (build(row.settings, seed=1) for row in ROWS)
    for model, tied_norm in ((shared, True), (apart, False), (remapped, False)):
        for name in BLOCKS:
            first, second = model.blocks[name]
            assert (first.bn1.weight is second.bn1.weight) == tied_norm
            same = torch.equal(torch.clone(first.conv1.weight), torch.clone(second.conv1.weight))
            assert same == (model is not remapped)
    banks = {id(p) for n, p in remapped.named_parameters() if n.endswith("rpg_bank.weight")}
    assert len(banks) == 1
    bank = remapped.rpg_bank.weight.flatten().abs()
    # One use of every block reads each element once: a permutation, with signs and scales.
    for use in (0, 1):
        read = [
            getattr(remapped.blocks[name][use], layer).virtual_weight for name in BLOCKS
            for layer in ("conv1", "conv2")
        ]  # fmt: skip
        values = torch.cat([(w.unpack() / w.scale).flatten().abs() for w in read])
        torch.testing.assert_close(values.sort().values, bank.sort().values)


def test_network_begins_with_the_mean_and_learns() -> None:
    tiny = task("tiny", None)
    step = tiny.training_step(tiny.build(ROWS[0], seed=0))
    losses = [float(step()) for _ in range(18)]
    # One for each task; a batch of the training set differs a little from the whole.
    assert losses[0] == pytest.approx(2, rel=0.25)
    assert losses[-1] < 0.6 * losses[0]


def test_errors_against_their_definition() -> None:
    tiny = task("tiny", None)
    truth, known = tiny.test, tiny.moments

    class Guess(nn.Module):
        """Says the truth and 0.1 more, and normals of the mean."""

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            depth = truth.depth + 0.1 - known.depth_mean
            mean = truth.normals.mean((0, 2, 3))[:, None, None].expand(len(x), 3, 32, 32)
            return depth / known.depth_variance.sqrt(), mean

    depth, normal = tiny.errors(Guess())
    assert depth == pytest.approx(10 / float(truth.depth.std()), rel=1e-3)
    assert normal == pytest.approx(100, rel=1e-3)


def test_tiny_runs_and_pictures(tmp_path: Path) -> None:
    tiny = EXPERIMENT.task("tiny", None)
    records = []
    for row in EXPERIMENT.rows:
        steps: list[int] = []
        run = tiny.run(row, 0, lambda steps=steps: steps.append(1))
        assert len(steps) == tiny.steps(row) > 0
        assert {metric.key for metric in EXPERIMENT.metrics} <= set(run)
        assert run["depth_rmse"] == run["depth_rmse_by_epoch"][-1]
        records.append({"row": row.name, "seed": 0, **json.loads(json.dumps(run))})
    again = tiny.run(EXPERIMENT.rows[0], 0, lambda: None)
    assert {"row": VANILLA, "seed": 0, **again} == records[0]
    assert pictures(records[:2], tmp_path) == ""
    said = pictures(records, tmp_path)
    assert (tmp_path / "multitask_scenes.png").stat().st_size > 1000
    assert "(multitask_scenes.png)" in said


def test_predictions_come_back_from_a_record() -> None:
    tiny = task("tiny", None)
    model = tiny.build(ROWS[0], 0)
    depth, _ = tiny.predict(model, tiny.test.images[:SHOWN])
    kept = unpacked(packed(depth / DEPTH_STEP), *depth.shape) * DEPTH_STEP
    torch.testing.assert_close(kept, depth, atol=DEPTH_STEP / 2 + 1e-6, rtol=0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data: got 'x.npz', wanted"):
        task("tiny", "x.npz")
    with pytest.raises(ValueError, match=r"size: got 'huge', wanted"):
        task("huge", None)
    with pytest.raises(ValueError, match=r"norm: got None, wanted"):
        build({"uses": 2, "remap": False}, 0)


@pytest.mark.parametrize(("row", "width"), [(ROWS[0], 95), (ROWS[2], 183)])
def test_another_use_widens_what_a_pixel_sees(row: Row, width: int) -> None:
    model = build(row.settings, seed=0).double().eval()
    nn.init.ones_(model.depth.weight)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.abs_()  # nothing cancels
    image = torch.rand(1, 3, 192, 192, dtype=torch.float64, requires_grad=True)
    model(image)[0][0, 0, 48, 48].backward()
    assert image.grad is not None
    assert (image.grad[0].abs().sum(0) > 0).any(0).sum() == width
