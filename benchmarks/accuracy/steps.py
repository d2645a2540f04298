"""Seconds of a training step of the networks whose accuracy was measured, to draw it against time.

Accuracies come from runs whose weights are gathered through tables, so that any map can be
compared; here ours runs on its own kernels. Steps of all networks are timed in turn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy import training
from benchmarks.accuracy.network import NETWORKS, build
from benchmarks.accuracy.rows import DENSE, ROWS
from benchmarks.accuracy.running import RESULTS, default_name
from benchmarks.accuracy.summary import Summary
from benchmarks.harness import machine, memory
from benchmarks.harness.chart import Chart, Point, Series
from examples.demo import data, train
from rpg_kernels import RPGConfig, convert, param_groups
from rpg_kernels.models.resnet import is_block_convolution


@dataclass(frozen=True)
class Timed:
    """A network that is timed.

    Args:
        label: of it.
        row: whose accuracy it has.
        tables: as published: each weight is gathered through tables.
    """

    label: str
    row: str
    tables: bool = False


TIMED = (
    Timed("dense", "dense"),
    Timed("published", "rpg 4x g1 element", tables=True),
    Timed("rpg-kernels, 4 laps", "rpg 4x g64 vector, 4 laps"),
    Timed("rpg-kernels, 4 laps", "rpg 17x g64 vector, 4 laps"),
    Timed("rpg-kernels, 16 laps", "rpg 17x g64 vector, 16 laps"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of ``steps``."""
    parser.add_argument("--data", help="as of run")
    parser.add_argument("--out", type=Path, help="default: beside the results in float32")


def path_of(results: Path) -> Path:
    """The file of steps that belongs to a results file."""
    return results.with_name(f"{results.stem}_steps.json")


def main(args: argparse.Namespace) -> None:
    """Measure on one thread of the processor, and write the file.

    Raises:
        FileNotFoundError, ValueError: of the images.
    """
    torch.set_num_threads(1)
    recipe = training.Recipe(augment=args.data is not None, bfloat16=False)
    images = data.load(args.data, recipe.images, recipe.test_images)
    pixels = train.Pixels(images, torch.device("cpu"))
    record = measure(recipe, pixels)
    out = args.out or path_of(RESULTS / default_name(recipe.network, args.data, float32=True))
    machine.write_json(out, record)
    for name, row in record["networks"].items():
        print(f"{name:40} {row['step_seconds'] * 1e3:7.1f} ms {row['state_bytes'] / 1e6:6.1f} MB")
    print(out)


def measure(recipe: training.Recipe, pixels: train.Pixels) -> dict[str, Any]:
    """Seconds of a step and bytes between steps of every network of ``TIMED``."""
    schedule = training.schedule_of(recipe)
    models = [_model(one, recipe, pixels.data) for one in TIMED]
    seconds = train.step_seconds(models, pixels, schedule)
    networks = {
        f"{one.label}, {one.row}": {
            "row": one.row,
            "label": one.label,
            "step_seconds": of_step,
            "state_bytes": _state(model, pixels, schedule),
        }
        for one, model, of_step in zip(TIMED, models, seconds, strict=True)
    }
    return {
        "recipe": asdict(recipe),
        "steps_of_epoch": training.steps_of(recipe, pixels.data) // recipe.epochs,
        "clock": train.clock(pixels.device),
        "environment": machine.environment(pixels.device),
        "networks": networks,
    }


def read(results: Path) -> dict[str, Any] | None:
    """What was measured for a results file, or None."""
    path = path_of(results)
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def chart(found: Mapping[str, Summary], timed: Mapping[str, Any]) -> Chart:
    """Curves of the networks whose steps were timed; legends say what training keeps in memory."""
    series = []
    for network in timed["networks"].values():
        one = found.get(network["row"])
        if one is None:
            continue
        of_epoch = network["step_seconds"] * timed["steps_of_epoch"]
        points = [Point(of_epoch * i, y) for i, y in enumerate(one.curve, 1)]
        size = f"{network['state_bytes'] / 1e6:.1f} MB"
        line = "solid" if network["label"].startswith("rpg") else "dashed"
        series.append(Series(f"{network['label']}: {size}", points, line, ""))
    count = next(iter(found.values())).any["epoch_test_images"]
    return Chart(
        "Accuracy against time, and memory of training",
        "seconds of training on one core",
        f"accuracy on {count:,} test images (%)",
        series,
    )


def _model(one: Timed, recipe: training.Recipe, images: data.Images) -> nn.Module:
    row = ROWS[one.row]
    built = build(row, recipe.network, images.channels, len(images.classes), seed=0)
    if one.tables or row.map == DENSE:
        return built.model
    network = NETWORKS[recipe.network]
    model: nn.Module = network.dense(built.width, images.channels, len(images.classes))
    config = RPGConfig(dof=built.dof, laps=row.laps, scale=row.scale)
    model = convert(model, config, filter_fn=is_block_convolution)
    # torch's own annotations of Module.to leave memory_format out.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _state(model: nn.Module, pixels: train.Pixels, schedule: train.Schedule) -> int:
    """Weights, gradients, momentum and tables, after a step."""
    optimizer = torch.optim.SGD(param_groups(model, lr=1e-4), momentum=schedule.momentum)
    model.train()
    model(pixels.batch(pixels.data.train_pixels[:2])).sum().backward()
    optimizer.step()
    return memory.of_model(model, optimizer).total
