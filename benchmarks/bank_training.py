"""Learning rate, weight decay, initial spread and gradient clipping of a bank, on real images.

    python -m benchmarks.bank_training [--seeds 3] [--out FILE.json]

Trains the demo's small network on scikit-learn's digits, one setting changed at a time, and prints
the test accuracy: mean over seeds, and half their range. docs/training.md shows the result.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from examples.demo import data, networks, train
from rpg_kernels import RPGConfig, param_groups

DOF = 8_192
LR = 0.2
DECAY = 5e-4
SCHEDULE = train.Schedule(epochs=8, batch_size=128, lr=LR, weight_decay=DECAY)
PAPER = RPGConfig(dof=DOF)
UNIT = RPGConfig(dof=DOF, init_std=1.0)
SETTINGS: dict[str, tuple[RPGConfig, dict[str, float]]] = {
    "as param_groups gives it": (PAPER, {}),
    "bank learning rate x 0.1": (PAPER, {"bank_lr": LR * 0.1}),
    "bank learning rate x 0.3": (PAPER, {"bank_lr": LR * 0.3}),
    "bank learning rate x 3": (PAPER, {"bank_lr": LR * 3}),
    "bank learning rate x 10": (PAPER, {"bank_lr": LR * 10}),
    "bank weight decay 0": (PAPER, {"bank_weight_decay": 0.0}),
    "bank weight decay x 10": (PAPER, {"bank_weight_decay": DECAY * 10}),
    "bank weight decay x 100": (PAPER, {"bank_weight_decay": DECAY * 100}),
    "init_std 1 (unit variance)": (UNIT, {}),
    "init_std 1, bank learning rate x 1000": (UNIT, {"bank_lr": LR * 1000}),
}


def run(config: RPGConfig, options: dict[str, float], pixels: train.Pixels, seed: int) -> float:
    """Test accuracy of one training, in per cent."""
    torch.manual_seed(seed)
    architecture = networks.Architecture((1, 1, 1), 32, (DOF,))
    network = networks.Network("rpg-kernels", "rpg", architecture.width, DOF)
    images = pixels.data
    model = networks.build(network, architecture, images.channels, len(images.classes), config)
    model.to(memory_format=torch.channels_last)
    groups = param_groups(model, lr=LR, weight_decay=DECAY, **options)
    return train.train(model, pixels, SCHEDULE, seed, groups=groups).accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    pixels = train.Pixels(data.load(None, None, None), device)
    rows: dict[str, Any] = {}
    for name, (config, options) in SETTINGS.items():
        accuracy = [run(config, options, pixels, seed) for seed in range(args.seeds)]
        rows[name] = accuracy
        mean, spread = sum(accuracy) / len(accuracy), (max(accuracy) - min(accuracy)) / 2
        print(f"{name:40} {mean:5.1f} ± {spread:.1f}", flush=True)
    if args.out:
        record = {
            "benchmark": "bank_training",
            "environment": machine.environment(device),
            "dof": DOF,
            "accuracy": rows,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
