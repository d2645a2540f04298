"""The pose experiment: drawn figures, heat maps, the rows' networks, a run and its pictures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.paper import capsules, pose, pose_machine, pose_pictures
from benchmarks.paper.experiment import Row
from benchmarks.paper.figures import Look, figures
from benchmarks.paper.skeleton import BONES, JOINTS, MIRRORED, SIDE

BARE = Look(clutter=False, occlusion=False, spoilt=False)
ROWS = {row.name: row for row in pose.ROWS}


def place(name: str) -> int:
    return JOINTS.index(name)


def test_figures_have_their_shapes_dtypes_and_ranges() -> None:
    pixels, joints, heads = figures(70, seed=3)
    assert pixels.shape == (70, 3, SIDE, SIDE)
    assert pixels.dtype == torch.uint8
    assert joints.shape == (70, 14, 2)
    assert heads.shape == (70,)
    assert float(joints.min()) > 2.9
    assert float(joints.max()) < SIDE - 2.9
    assert float(heads.min()) > 3
    assert float(heads.max()) < 20
    contrast = pixels.float().flatten(1).std(1)
    assert float(contrast.min()) > 2


def test_figures_depend_on_the_seed_alone_and_begin_alike() -> None:
    few, many = figures(5, seed=8), figures(40, seed=8)
    torch.manual_seed(1)
    for first, second in zip(few, many, strict=True):
        assert torch.equal(first, second[:5])
    other = figures(5, seed=9)
    assert not any(torch.equal(a, b) for a, b in zip(few, other, strict=True))
    pixels = many[0].flatten(1)
    assert len(torch.unique(pixels, dim=0)) == 40


def test_leaving_a_part_out_changes_neither_the_rest_nor_the_joints() -> None:
    whole = figures(8, seed=2)
    without = figures(8, seed=2, look=Look(occlusion=False))
    assert torch.equal(whole[1], without[1])
    changed = (whole[0] != without[0]).any(1).float().mean((1, 2))
    assert 0 < float(changed.max()) < 0.6
    assert float(changed.min()) == 0  # one that nothing stood in front of


@pytest.mark.parametrize("seed", [0, 1])
def test_limbs_are_drawn_where_the_joints_are(seed: int) -> None:
    """Along every bone pixels change when the figure comes; away from all bones none does."""
    count = 32
    there, joints, heads = figures(count, seed, BARE)
    gone, _, _ = figures(count, seed, replace(BARE, figure=False))
    changed = (there.int() - gone.int()).abs().sum(1)
    for first, second in BONES:
        for share in (0.0, 0.5, 1.0):
            at = joints[:, first].lerp(joints[:, second], share).floor().long()
            seen = changed[torch.arange(count), at[:, 1], at[:, 0]] > 0
            # Two colours may happen to be alike at a pixel.
            assert float(seen.float().mean()) > 0.9, (JOINTS[first], JOINTS[second], share)
    distance = distance_to_bones(joints)
    assert not changed[distance > 0.8 * heads[:, None, None] + 2].any()
    assert changed[distance < 1].bool().float().mean() > 0.9


def distance_to_bones(joints: Tensor) -> Tensor:
    """From each pixel's centre to the nearest of 20 points of each bone: ``[B, 64, 64]``."""
    share = torch.linspace(0, 1, 20)[:, None]
    points = [joints[:, None, a].lerp(joints[:, None, b], share) for a, b in BONES]
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    centres = torch.stack([columns, rows], -1).reshape(-1, 2) + 0.5
    return torch.cdist(centres.float(), torch.cat(points, 1)).amin(2).view(-1, SIDE, SIDE)


def test_bodies_are_bodies() -> None:
    """Seen from the side a limb looks shorter, never longer than it is."""
    _, joints, heads = figures(192, seed=5)
    lengths = torch.stack([(joints[:, a] - joints[:, b]).norm(dim=1) for a, b in BONES], 1)
    longest = (lengths / heads[:, None]).amax(0)
    assert float(longest[0]) < 1.001  # the head
    assert float(longest.max()) < 3
    # Most show their front, so that their left is on the right of the picture.
    left, right = place("left shoulder"), place("right shoulder")
    to_the_right = (joints[:, left, 0] > joints[:, right, 0]).float().mean()
    assert 0.6 < float(to_the_right) < 0.9
    higher = (joints[:, place("head top"), 1] < joints[:, place("left ankle"), 1]).float().mean()
    assert float(higher) > 0.8


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((0, 1), ValueError, "count"),
        ((2.0, 1), TypeError, "count"),
        ((2, -1), ValueError, "seed"),
        ((2, 2**32), ValueError, "seed"),
        ((2, 1, "all"), TypeError, "look"),
    ],
)
def test_figures_refuse(arguments: tuple[Any, ...], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        figures(*arguments)


def test_a_capsule_covers_what_lies_within_its_radii() -> None:
    pixels = torch.zeros(1, 3, 24, 24)
    first, second = torch.tensor([[[4.0, 5.0]]]), torch.tensor([[[18.0, 15.0]]])
    radii, one = (torch.tensor([[2.0]]), torch.tensor([[4.0]])), torch.ones(1, 1)
    shape = capsules.Capsules(
        first, second, *radii, torch.tensor([[[1.0, 0.5, 0.25]]]), one, 0 * one, one
    )
    capsules.paint(pixels, shape, torch.ones(1, 24, 24))
    for y in range(24):
        for x in range(24):
            nearest, inside = math.inf, 0.0
            for i in range(401):
                share = i / 400
                at = 4 + 14 * share, 5 + 10 * share
                gap = math.hypot(x + 0.5 - at[0], y + 0.5 - at[1])
                if gap < nearest:
                    nearest, inside = gap, 2 + 2 * share - gap
            cover = min(max(inside + 0.5, 0), 1)
            assert pixels[0, :, y, x].tolist() == pytest.approx(
                [cover, cover / 2, cover / 4], abs=5e-3
            )


def test_joints_come_back_from_their_heat_maps() -> None:
    _, joints, _ = figures(64, seed=4)
    maps = pose_machine.heat_maps(joints)
    assert maps.shape == (64, 14, 16, 16)
    assert float((pose_machine.found(maps.log()) - joints).norm(dim=2).max()) < 1.5
    assert torch.allclose(maps.sum((2, 3)), torch.ones(64, 14))


def test_mirrored_joints_are_those_of_the_mirrored_picture() -> None:
    pixels, joints, _ = figures(40, seed=6, look=BARE)
    made, moved = pose._augmented(pixels, joints, torch.Generator().manual_seed(0))
    for i in range(40):
        same = sorted(made[i].flatten(1).sum(1).tolist())
        assert same == sorted(pixels[i].flatten(1).sum(1).tolist())
        mirrored = not torch.equal(moved[i], joints[i])
        for j, name in enumerate(JOINTS):
            k = j
            if mirrored:
                swapped = name.replace("left", "RIGHT").replace("right", "left").lower()
                k = place(swapped)
                assert MIRRORED[j] == k
            x = SIDE - float(joints[i, k, 0]) if mirrored else float(joints[i, k, 0])
            assert moved[i, j].tolist() == pytest.approx([x, float(joints[i, k, 1])])
        grey = made[i].int().sum(0)
        was = pixels[i].int().sum(0)
        assert torch.equal(grey, was.flip(1) if mirrored else was)


@pytest.mark.parametrize("name", list(ROWS))
def test_rows_have_the_sizes_that_they_stand_for(name: str) -> None:
    task, row = pose.PoseTask("tiny"), ROWS[name]
    model = task.build(row, 0)
    times, one = row.settings["times"], 9 * (72 * 16 + 16 * 56)
    sizes = pose.sizes(model)
    stored = times if row.settings["weights"] == "own" else 1
    assert sizes["dof"] == pytest.approx(one * stored, abs=64)
    assert sizes["dof"] <= one * stored
    assert sizes["virtual_weights"] == one * times
    outside = sum(p.numel() for p in [*model.stem.parameters(), *model.guess.parameters()])
    assert sizes["trainable"] == sizes["dof"] + outside + 2 * times * (16 + 56)


def test_uses_differ_in_what_the_row_says() -> None:
    task = pose.PoseTask("tiny")
    weights = {
        name: [stage.blocks[0][0].weight.clone().detach() for stage in task.build(row, 0).stages]
        for name, row in ROWS.items()
    }
    assert torch.equal(*weights["2x shared"])
    assert not torch.equal(*weights["2x RPG"])
    assert not torch.equal(*weights["2x not shared"])
    first, second = (float(weight.std()) for weight in weights["2x RPG"])
    assert first == pytest.approx(second, rel=0.1)
    stems = [task.build(row, 0).stem[0][0].weight for row in ROWS.values()]
    assert all(torch.equal(stems[0], stem) for stem in stems)


def test_a_task_refuses_data_and_other_sizes() -> None:
    with pytest.raises(ValueError, match="size"):
        pose.PoseTask("huge")
    with pytest.raises(ValueError, match="data"):
        pose.PoseTask("tiny", "somewhere")


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    task = pose.EXPERIMENT.task("tiny", None)
    made = []
    for row in pose.EXPERIMENT.rows:
        steps: list[int] = []
        record = task.run(row, 0, lambda steps=steps: steps.append(1))
        assert len(steps) == task.steps(row)
        made.append({"row": row.name, "seed": 0, **json.loads(json.dumps(record, allow_nan=False))})
    return made


def test_a_run_records_what_the_table_and_the_pictures_need(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert {metric.key for metric in pose.EXPERIMENT.metrics} <= set(record)
        assert 0 <= record["pckh"] <= 100
        assert record["pckh"] == pytest.approx(sum(record["pckh_by_joint"].values()) / 14)
        assert len(record["pckh_by_epoch"]) == len(record["loss_by_epoch"]) == 1
        assert torch.tensor(record["found"]).shape == (pose_pictures.SHOWN, 14, 2)


def test_runs_repeat(records: list[dict[str, Any]]) -> None:
    again = pose.PoseTask("tiny").run(ROWS["2x RPG"], 0, lambda: None)
    first = next(record for record in records if record["row"] == "2x RPG")
    same = ("pckh", "training_loss", "found", "pckh_by_epoch")
    assert {key: again[key] for key in same} == {key: first[key] for key in same}


def test_steps_lower_the_loss_of_their_batch() -> None:
    task = pose.PoseTask("tiny")
    for name in ("4x RPG", "4x shared"):
        step = task.training_step(task.build(ROWS[name], 0))
        losses = [float(step()) for _ in range(12)]
        assert losses[-1] < 0.7 * losses[0]


def test_right_joints_are_nearer_than_half_a_head() -> None:
    joints = torch.zeros(1, 14, 2)
    truth = pose.Figures(torch.zeros(1), joints, torch.tensor([8.0]))
    guess = joints.clone()
    guess[0, 3] = torch.tensor([3.0, 2.6])  # 3.97 pixels
    guess[0, 5] = torch.tensor([0.0, -4.1])
    guess[0, 7] = math.nan
    assert pose._right(guess, truth)[0].tolist() == [j not in (5, 7) for j in range(14)]


def test_pictures_are_drawn_from_records(records: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = pose_pictures.pictures(records, tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == ["pose_figures.png", "pose_found.png"]
    assert all(f"]({name})" in text for name in drawn)
    one = pose_pictures.pictures(records[:1], tmp_path / "few")
    assert [path.name for path in (tmp_path / "few").iterdir()] == ["pose_figures.png"]
    assert "pose_found.png" not in one


def test_every_row_is_one_of_the_paper_or_has_no_number() -> None:
    with_paper = {row.name: row.paper["pckh"] for row in pose.ROWS if row.paper}
    assert with_paper == {
        "2x shared": 86.1, "2x RPG": 86.5, "2x not shared": 87.1,
        "4x shared": 86.5, "4x RPG": 87.3, "4x not shared": 88.0,
    }  # fmt: skip
    assert pose.EXPERIMENT.unshared in ROWS
    assert isinstance(pose.ROWS[0], Row)
