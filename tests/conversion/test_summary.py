"""summary: every number of the record, and what is printed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import rpg_kernels as rpg


def every(module: nn.Module, name: str) -> bool:
    return True


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 32, 3, groups=2)
        self.mix = nn.Linear(30, 10)
        self.words = nn.Embedding(24, 32)
        self.head = nn.Linear(32, 24)


CONFIG = rpg.RPGConfig(dof=1000, granularity=64, init_std=0.5, scale="fan_in")


def test_counts_segments_laps_scale_and_std() -> None:
    model = rpg.convert(Net(), CONFIG)
    record = rpg.summary(model)
    assert record.dof == 960
    body, mix, words = record.layers
    # 32 rows of 9 taps of 8 channels: blocks of 8. 10 rows of 30: one block of 32 each.
    assert (body.name, body.kind, body.shape) == ("body", "conv2d", (32, 8, 3, 3))
    assert (body.virtual_weights, body.granularity, body.layer) == (32 * 72, 8, 0)
    assert (body.start, body.span) == (0, 32 * 72)
    assert (mix.virtual_weights, mix.granularity, mix.layer) == (300, 32, 1)
    assert (mix.start, mix.span) == (32 * 72 % 960, 320)
    assert (words.virtual_weights, words.granularity, words.layer) == (24 * 32, 32, 2)
    assert (words.start, words.span) == ((384 + 320) % 960, 24 * 32)
    for x in record.layers:
        assert x.laps == pytest.approx(x.span / 960)
        assert x.std == pytest.approx(x.scale * 0.5)
        assert x.residual is None
        assert x.tied_to == ""
    assert body.std == pytest.approx(math.sqrt(2 / 72))
    assert mix.std == pytest.approx(math.sqrt(2 / 30))
    assert words.std == pytest.approx(1)
    assert record.virtual_weights == 2304 + 300 + 768
    assert record.compression == pytest.approx(3372 / 960)
    dense = 3 * 16 * 9 + 16 + 2 * 16 + 32 + 10 + 32 * 24 + 24
    assert record.unshared == dense
    assert set(record.skipped) == {"stem", "norm", "head"}


def test_unshared_counts_what_trains() -> None:
    model = Net()
    model.stem.requires_grad_(False)
    record = rpg.summary(rpg.convert(model, CONFIG))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert record.unshared == trainable - record.dof


def test_printed_form() -> None:
    text = str(rpg.summary(rpg.convert(Net(), CONFIG)))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "shape", "virtual", "g", "start", "laps", "scale", "std"]
    assert lines[1].split() == ["body", "32x8x3x3", "2,304", "8", "0", "2.4", "0.3333", "0.1667"]
    assert len({len(line.rstrip()) for line in lines[:4]}) == 1, "columns must line up"
    assert "dof=960 (asked for 1000)" in text
    assert "3,372 virtual weights from 960 degrees of freedom (3.51 uses each)" in text
    assert "  stem: first layer (stem), kept by the default rule" in lines
    assert "  norm: BatchNorm2d has no virtual counterpart and keeps its own parameters" in lines
    assert "WARNING" not in text
    assert "at most once" not in text
    assert all(line == line.rstrip() for line in lines)


def test_ties_and_residuals_are_noted() -> None:
    model = Net()
    model.head.weight = model.words.weight
    rpg.convert(model, rpg.RPGConfig(dof=512, granularity=8), every, init="least_squares")
    record = rpg.summary(model)
    words, head = record.layers[-2:]
    assert (words.tied_to, head.tied_to) == ("", "words")
    assert words.residual == head.residual
    assert 0 < words.residual < 1
    assert record.virtual_weights == 432 + 2304 + 300 + 768
    assert f"tied to words residual {head.residual:.1%}" in str(record)


def test_names_are_those_of_the_model_that_is_asked_about() -> None:
    outer = nn.ModuleDict({"a": Net(), "b": nn.ModuleDict({"c": Net()}), "d": nn.Linear(3, 3)})
    rpg.convert(outer["a"], CONFIG, init="least_squares")
    rpg.convert(outer["b"]["c"], rpg.RPGConfig(dof=64, seed=1))
    record = rpg.summary(outer)
    assert [x.name for x in record.layers] == [
        "a.body", "a.mix", "a.words", "b.c.body", "b.c.mix", "b.c.words",
    ]  # fmt: skip
    assert {"a.stem", "a.head", "b.c.stem", "b.c.norm"} <= set(record.skipped)
    assert [x.residual is None for x in record.layers] == [False] * 3 + [True] * 3
    assert record.dof == 960 + 64
    assert len(record.banks) == 2


def test_a_bank_as_large_as_the_model_is_said() -> None:
    def check(dof: int, granularity: int, *sizes: tuple[int, int]) -> None:
        model = nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes))
        rpg.convert(model, rpg.RPGConfig(dof=dof, granularity=granularity), every)
        text = str(rpg.summary(model))
        uses = torch.zeros(model.rpg_bank.weight.shape, dtype=torch.float64)
        for layer in model[: len(sizes)]:
            weight = layer.virtual_weight
            signs = weight.unpack().detach().sign()
            # No sign survives, so that two uses of an element add up.
            uses += weight.pack(signs).detach().abs() / abs(weight.scale)
        assert ("each slot is used at most once" in text) == (uses.max() < 1.5)

    check(165 + 64, 1, (33, 5), (8, 8))
    check(100_000, 64, (33, 5), (8, 8))
    check(256, 64, (33, 5), (8, 8))  # 200 elements with padding, then 64: more than one lap
    check(100, 1, (33, 5), (8, 8))
    check(128, 64, (8, 1), (64, 1), (8, 7))  # the second begins at 64, the third wraps to 0
    check(192, 64, (8, 1), (64, 1), (8, 7))


def test_a_dense_model_and_a_model_on_meta() -> None:
    record = rpg.summary(Net())
    assert (record.layers, record.dof, record.virtual_weights, record.compression) == ((), 0, 0, 0)
    assert "0 virtual weights" in str(record)
    with torch.device("meta"):
        model = rpg.convert(Net(), CONFIG)
    assert rpg.summary(model).layers == rpg.summary(rpg.convert(Net(), CONFIG)).layers


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match="model: got a int"):
        rpg.summary(3)  # type: ignore[arg-type]
