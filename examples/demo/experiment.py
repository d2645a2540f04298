"""Runs the demo: train every network, measure it, report, and reload a trained state."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import machine, memory
from examples.demo import data, networks, report, train
from rpg_kernels import RPGConfig, explain, timing
from rpg_kernels._extras import require
from rpg_kernels.models.resnet import ResNet
from rpg_kernels.nn import VirtualLayer

DEFAULT_EPOCHS = {"small": 6, "resnet18": 10}
DEFAULT_LR = {"small": 0.2, "resnet18": 0.05}
DEFAULT_SEEDS = {"small": 2, "resnet18": 1}
DEFAULT_THREADS = {"small": 1}
RELOAD_IMAGES = 100


@dataclass(frozen=True)
class Setting:
    """What all networks of one run have in common."""

    architecture: networks.Architecture
    channels: int
    classes: int
    config: RPGConfig
    schedule: train.Schedule
    seeds: int
    device: torch.device

    def build(self, network: networks.Network, seed: int) -> ResNet:
        """A fresh network on the device: values and generating matrix drawn with ``seed``."""
        torch.manual_seed(seed)
        config = dataclasses.replace(self.config, seed=seed)
        shape = (self.channels, self.classes)
        model = networks.build(network, self.architecture, *shape, config)
        model.to(self.device)
        # torch's own annotations of Module.to leave memory_format out.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model


def experiment(args: argparse.Namespace) -> list[report.Result]:
    """Train and compare the networks; ``args`` are those of ``python -m examples.demo``.

    Raises:
        MissingExtraError: a package that the demo needs is not installed.
        FileNotFoundError, ValueError: an option or a data file is not what it should be.
    """
    model_name = args.model or ("small" if args.data is None else "resnet18")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or DEFAULT_THREADS.get(model_name, before))
    try:
        return _compare(args, model_name)
    finally:
        torch.set_num_threads(before)


def _compare(args: argparse.Namespace, model_name: str) -> list[report.Result]:
    begin = time.perf_counter()
    require("matplotlib.figure", "matplotlib", "demo.png")
    images = data.load(args.data, args.images, args.test_images)
    setting = _setting(args, model_name, images)
    rows = networks.plan(
        setting.architecture,
        setting.channels,
        setting.classes,
        setting.config,
        args.dof or setting.architecture.dofs,
        args.laps,
    )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    record = _header(images, model_name, setting)
    record["plan"] = [dataclasses.asdict(row) for row in rows]
    title = (
        f"{images.name}: {len(images.train_labels)} training and {len(images.test_labels)} test "
        f"images; {model_name} network, {args.stem} stem, {setting.schedule.epochs} epochs, "
        f"{setting.seeds} seed(s)"
    )
    print(f"{title}\non {record['environment']['device_name']}, torch {torch.__version__}")

    pixels = train.Pixels(images, setting.device)
    results, models = _train_all(rows, setting, pixels, record, out / "demo.json")
    # The last row is ours, at the largest DoF; a copy, as measuring steps trains.
    model = copy.deepcopy(models[-1])
    for result, seconds in zip(
        results, train.step_seconds(models, pixels, setting.schedule), strict=True
    ):
        result.images_per_second = setting.schedule.batch_size / seconds
    record["networks"] = [result.record() for result in results]
    legend = report.legend(setting.schedule.batch_size, record["clock"])
    print(f"\n{report.table(results)}\n{legend}\n")

    record["backend"] = _backend(model, pixels)
    record["reloaded_outputs_identical"] = _reload(
        out / "demo.pt", rows[-1], setting, model, pixels
    )
    report.plot(out / "demo.png", results, title)
    record["total_seconds"] = time.perf_counter() - begin
    machine.write_json(out / "demo.json", record)
    print(
        f"wrote {out / 'demo.json'} and {out / 'demo.png'}; {record['total_seconds']:.0f} s in all"
    )
    return results


def _setting(args: argparse.Namespace, model_name: str, images: data.Images) -> Setting:
    """The options, with the defaults that depend on images and network."""
    return Setting(
        architecture=dataclasses.replace(networks.ARCHITECTURES[model_name], stem=args.stem),
        channels=images.channels,
        classes=len(images.classes),
        config=RPGConfig(dof=1, granularity=args.granularity, reflect=args.reflect),
        schedule=train.Schedule(
            epochs=args.epochs or DEFAULT_EPOCHS[model_name],
            lr=args.lr or DEFAULT_LR[model_name],
            batch_size=min(args.batch_size, len(images.train_labels)),
            augment=args.data is not None,
            bfloat16=args.amp == "bfloat16",
        ),
        seeds=args.seeds or DEFAULT_SEEDS[model_name],
        device=timing.device(args.device),
    )


def _train_all(
    rows: list[networks.Network],
    setting: Setting,
    pixels: train.Pixels,
    record: dict[str, Any],
    path: Path,
) -> tuple[list[report.Result], list[nn.Module]]:
    """Every row's result, and its model of seed 0.

    What a run with the same options finished before it was cut short is taken from ``path``, with
    a fresh model.
    """
    tqdm = require("tqdm", "tqdm", "the progress bar")
    steps = train.steps_of(len(pixels.data.train_labels), setting.schedule)
    finished = _finished(path, record)
    results: list[report.Result] = []
    models: list[nn.Module] = []
    # disable=None: no bar where the output is not a terminal.
    bar = tqdm.tqdm(total=steps * setting.seeds * len(rows), unit="step", disable=None)
    with bar:
        for row in rows:
            bar.set_description(row.label)
            if len(results) < len(finished) and row is not rows[-1]:  # whose state is saved
                result = finished[len(results)]
                model: nn.Module = setting.build(row, seed=0)
                bar.update(steps * setting.seeds)
            else:
                result, model = _train_row(row, setting, pixels, lambda _: bar.update())
            results.append(result)
            models.append(model)
            # Written after every network: a long run that is cut short leaves what it has.
            record["networks"] = [done.record() for done in results]
            machine.write_json(path, record)
            bar.write(f"{result.label}, DoF {result.dof:,}: {result.mean_accuracy:.1f} %")
    return results, models


def _finished(path: Path, record: dict[str, Any]) -> list[report.Result]:
    """The first networks of a run with the same options that never came to its end."""
    try:
        earlier = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    same = isinstance(earlier, dict) and all(
        earlier.get(key) == value for key, value in record.items() if key != "environment"
    )
    if not same or "total_seconds" in earlier:
        return []
    return [report.Result.of_record(network) for network in earlier.get("networks", [])]


def _header(images: data.Images, model_name: str, setting: Setting) -> dict[str, Any]:
    return {
        "data": {
            "name": images.name,
            "train_images": len(images.train_labels),
            "test_images": len(images.test_labels),
        },
        "model": model_name,
        "stem": setting.architecture.stem,
        "granularity": setting.config.granularity,
        "reflect": setting.config.reflect,
        "schedule": dataclasses.asdict(setting.schedule),
        "clock": train.clock(setting.device),
        "seeds": list(range(setting.seeds)),
        "environment": machine.environment(setting.device),
    }


def _train_row(
    row: networks.Network,
    setting: Setting,
    pixels: train.Pixels,
    on_step: Callable[[Tensor], object],
) -> tuple[report.Result, nn.Module]:
    """Measure one network and train it with every seed; the model returned is seed 0's."""
    result = _measured(row, setting, pixels)
    models = []
    for seed in range(setting.seeds):
        model = setting.build(row, seed)
        trained = train.train(model, pixels, setting.schedule, seed, on_step)
        if seed == 0:
            result.state = memory.of_model(model, trained.optimizer)
        result.curves.append(trained.curve)
        result.loss.append(trained.loss)
        models.append(model)
    return result, models[0]


def _measured(row: networks.Network, setting: Setting, pixels: train.Pixels) -> report.Result:
    """A network's sizes and what its forward saves, before any training."""
    weights = networks.block_weights(
        setting.architecture, row.width, setting.channels, setting.classes
    )
    model = setting.build(row, seed=0)
    batch = pixels.batch(pixels.data.train_pixels[: setting.schedule.batch_size])
    return report.Result(
        label=row.label,
        kind=row.kind,
        width=row.width,
        dof=networks.degrees_of_freedom(model, weights),
        laps=row.laps,
        virtual_weights=weights,
        trainable=networks.trainable(model),
        images=train.steps_of(len(pixels.data.train_labels), setting.schedule)
        * setting.schedule.batch_size,
        saved=memory.saved_by_model(model, batch, setting.schedule.bfloat16),
    )


def _backend(model: nn.Module, pixels: train.Pixels) -> dict[str, str]:
    """Ask what runs a shared convolution, on the input that it really gets."""
    name, layer = next(
        (name, module) for name, module in model.named_modules() if isinstance(module, VirtualLayer)
    )
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model.eval()(pixels.batch(pixels.data.test_pixels[:1]))
    hook.remove()
    explanation = explain(layer, inputs[0])
    print(f"back end of {name}: {explanation.backend} ({explanation.reason})")
    return {"layer": name, "backend": explanation.backend, "reason": explanation.reason}


def _reload(
    path: Path, row: networks.Network, setting: Setting, model: nn.Module, pixels: train.Pixels
) -> bool:
    """Save ``model``, load it into a fresh network, and compare outputs bit for bit."""
    torch.save(model.state_dict(), path)
    fresh = setting.build(row, seed=0)
    fresh.load_state_dict(torch.load(path, map_location=setting.device, weights_only=True))
    x = pixels.batch(pixels.data.test_pixels[:RELOAD_IMAGES])
    with torch.no_grad(), train.autocast(setting.device, setting.schedule):
        identical = torch.equal(model.eval()(x), fresh.eval()(x))
    if not identical:
        raise RuntimeError(
            f"{path}: a network loaded from it gives other outputs than the saved one"
        )
    print(
        f"saved {path} ({path.stat().st_size / 1e6:.2f} MB) and loaded it into a new network: "
        f"outputs of {len(x)} test images identical"
    )
    return identical
