"""Trains what is not in the results file yet, until the budget is used up."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import jobs, records, training
from benchmarks.accuracy.network import NETWORKS
from benchmarks.accuracy.rows import Row, plan
from benchmarks.harness import machine
from examples.demo import data, train

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of ``run``."""
    default = training.Recipe()
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="CIFAR-10: torchvision's cifar-10-batches-py folder, or an .npz of JPEGs "
        "(default: scikit-learn's handwritten digits)",
    )
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="default: no end")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="rows, as in '*17x*'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--network", choices=tuple(NETWORKS), default=default.network)
    parser.add_argument("--images", type=int, default=default.images, help="default: %(default)s")
    parser.add_argument("--test-images", type=int, help="default: all")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="default: %(default)s")
    parser.add_argument(
        "--float32",
        action="store_true",
        help="instead of bfloat16, which processors without its instructions emulate",
    )
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--out", type=Path, help="results file (default: in benchmarks/results)")
    parser.add_argument("--list", action="store_true", help="show the runs and train none")


def main(args: argparse.Namespace) -> None:
    """Run with parsed options.

    Raises:
        FileNotFoundError, ValueError: an option or a file is not what it should be.
    """
    for name in ("images", "epochs", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, wanted at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', wanted cpu, as there is no CUDA device")
    runs = plan(args.seeds, args.only)
    recipe = training.Recipe(
        network=args.network,
        images=args.images,
        test_images=args.test_images,
        epochs=args.epochs,
        augment=args.data is not None,  # a mirrored or shifted digit is another one
        bfloat16=not args.float32,
    )
    out = args.out or RESULTS / default_name(args.network, args.data, args.float32)
    if args.list:
        done = records.read(out)
        for row, seed in runs:
            state = "done" if records.find(done, row.name, seed) else ""
            print(f"{row.name:40} seed {seed}  {state}")
        return
    torch.set_num_threads(args.threads)
    images = data.load(args.data, recipe.images, recipe.test_images)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run(runs, recipe, train.Pixels(images, device), out, args.budget)


def default_name(network: str, path: str | None, float32: bool = False) -> str:
    """Of the results file: one for each data set, network and dtype."""
    suffix = ("" if network == "small" else f"_{network}") + ("_fp32" if float32 else "")
    return f"accuracy_{'digits' if path is None else 'cifar10'}{suffix}.jsonl"


def run(
    runs: Sequence[tuple[Row, int]],
    recipe: training.Recipe,
    pixels: train.Pixels,
    out: Path,
    budget: float | None = None,
) -> int:
    """Train the runs that ``out`` does not have, in order, and append each when it has finished.

    Args:
        runs: rows and seeds.
        recipe: of all of them.
        pixels: the images.
        out: the results file, made by the same recipe from the same images.
        budget: minutes; no run is begun that would end later, going by the slowest so far.

    Returns:
        How many were trained.

    Raises:
        ValueError: ``out`` holds runs of another recipe, or of rows that meant something else.
    """
    common = {"recipe": asdict(recipe), "data": _data(pixels.data)}
    return jobs.work(
        [_job(row, seed, recipe, pixels) for row, seed in runs],
        common,
        machine.environment(pixels.device),
        out,
        budget,
        lambda record: f"{record['test_accuracy']:.2f} %",
    )


def _job(row: Row, seed: int, recipe: training.Recipe, pixels: train.Pixels) -> jobs.Job:
    def trained(on_step: Callable[[], object]) -> records.Record:
        return {
            **training.record(training.run(row, recipe, pixels, seed, on_step)),
            "lr": recipe.lr * row.lr,
            "bank_lr": recipe.lr * row.lr * row.bank_lr,
            "bank_weight_decay": recipe.weight_decay * row.bank_decay,
        }

    steps = training.steps_of(recipe, pixels.data)
    return jobs.Job(row.name, seed, row.settings(), steps, trained)


def _data(images: data.Images) -> dict[str, Any]:
    return {
        "name": images.name,
        "train_images": len(images.train_labels),
        "test_images": len(images.test_labels),
    }
