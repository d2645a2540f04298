"""One training step of ResNet-18 on CIFAR-sized images: dense, as published, and ours.

    python -m benchmarks.resnet18_step [--out FILE.json]

Prints, and writes as JSON: the median time of a step (interleaved, so that all three see the same
machine), the largest single allocation of a step from the profiler's memory events, and the bytes
that autograd saves beyond activations, per virtual weight.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import rpg_kernels as rpg
from benchmarks.harness import memory
from examples.demo.published import share_as_published
from rpg_kernels.doctor.machine import commit
from rpg_kernels.models import resnet18


def networks(dof: int, granularity: int, reflect: str) -> dict[str, nn.Module]:
    """The three networks, from one seed."""
    torch.manual_seed(0)
    config = rpg.RPGConfig(dof=dof, granularity=granularity, reflect=reflect)
    published = share_as_published(
        resnet18(10, "cifar"), dof, lambda m, name: type(m) is nn.Conv2d and name != "conv1"
    )
    return {
        "dense": resnet18(10, "cifar"),
        "published": published,
        "rpg-kernels": resnet18(10, "cifar", rpg=config),
    }


class Step:
    """A network with its optimiser."""

    def __init__(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dof", type=int, default=2_000_000)
    parser.add_argument("--granularity", type=int, default=64)
    parser.add_argument("--reflect", default="vector")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    x = torch.randn(args.batch_size, 3, 32, 32)
    y = torch.randint(0, 10, (args.batch_size,))
    models = networks(args.dof, args.granularity, args.reflect)
    steps = {name: Step(model, x, y) for name, model in models.items()}
    virtual = rpg.summary(models["rpg-kernels"]).virtual_weights
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(args.steps + 2):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - begin)
    rows = {}
    for name, step in steps.items():
        saved = memory.saved_by_model(step.model, x)
        rows[name] = {
            "median_s": statistics.median(seconds[name]),
            "min_s": min(seconds[name]),
            "largest_allocation_bytes": memory.peak(lambda step=step: step, x.device).largest,
            "saved_beyond_activations_bytes": saved.beyond_activations,
            "saved_activations_bytes": saved.activations,
        }
    published = rows["published"]["median_s"]
    print(
        f"{'network':12} {'median s':>9} {'min s':>7} {'x published':>11} {'largest MB':>10}"
        f" {'saved beyond activations, bytes per virtual weight':>20}"
    )
    for name, row in rows.items():
        print(
            f"{name:12} {row['median_s']:9.3f} {row['min_s']:7.3f}"
            f" {row['median_s'] / published:11.2f}"
            f" {row['largest_allocation_bytes'] / 1e6:10.2f}"
            f" {row['saved_beyond_activations_bytes'] / virtual:20.2f}"
        )
    result = {
        "benchmark": "resnet18_step",
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "arguments": {k: v for k, v in vars(args).items() if k != "out"},
        "virtual_weights": virtual,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
