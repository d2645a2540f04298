"""Seconds of a training step and memory of every row of an experiment, all rows in turn.

Other work on the machine slows all of them then, where it would slow one that is timed alone.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.accuracy import jobs
from benchmarks.harness import machine, memory
from benchmarks.paper import running
from benchmarks.paper.experiment import Experiment, Infers, Task
from examples.demo import train
from rpg_kernels._extras import require

ROUNDS = 5
CPU = torch.device("cpu")


def path_of(results: Path) -> Path:
    """The file of costs that belongs to a results file."""
    return results.with_name(f"{results.stem}_costs.json")


def read(results: Path) -> dict[str, Any] | None:
    """What was measured for a results file, or None."""
    path = path_of(results)
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def measure(experiment: Experiment, task: Task, pattern: str = "*") -> dict[str, Any]:
    """Costs of the rows that match, and of the unshared rows that they stand beside.

    Seconds are read on the clock that the record names: process time on one thread, otherwise wall
    time. Bytes are those after a step: see ``memory.Persistent`` and ``memory.SavedBytes``; what is
    saved is None where the network does not take one tensor of images.

    Raises:
        ValueError: no row matches.
    """
    wanted = {
        name
        for row in running.chosen(experiment, pattern)
        for name in (row.name, row.unshared or experiment.unshared)
    }
    rows = [row for row in experiment.rows if row.name in wanted]
    models = [task.build(row, 0) for row in rows]
    steps = [task.training_step(model) for model in models]
    bytes_ = [_bytes(model, step) for model, step in zip(models, steps, strict=True)]
    seconds = in_turn(steps)
    forwards: list[dict[str, Any]] = [{} for _ in rows]
    if isinstance(task, Infers):
        of_forwards = in_turn([task.inference(model) for model in models])
        forwards = [{"inference_seconds": statistics.median(of)} for of in of_forwards]
    return {
        "experiment": experiment.name,
        **running.common(task),
        "clock": train.clock(CPU),
        "environment": machine.environment(CPU),
        "measured": machine.now(),
        "rows": {
            row.name: {
                "settings": jobs.as_json(dict(row.settings)),
                "step_seconds": statistics.median(of_row),
                "rounds": of_row,
                **of_memory,
                **of_forward,
            }
            for row, of_row, of_memory, of_forward in zip(
                rows, seconds, bytes_, forwards, strict=True
            )
        },
    }


def in_turn(steps: Sequence[Callable[[], object]], rounds: int | None = None) -> list[list[float]]:
    """Seconds of each function by round; in each round all of them run, in another order."""
    order, rounds = random.Random(0), ROUNDS if rounds is None else rounds
    now = time.process_time if train.clock(CPU) == "process time" else time.perf_counter
    seconds: list[list[float]] = [[] for _ in steps]
    tqdm = require("tqdm", "tqdm", "the progress bar")
    for _ in tqdm.trange(rounds, unit="round", disable=None):
        for i in order.sample(range(len(steps)), len(steps)):
            begin = now()
            steps[i]()
            seconds[i].append(now() - begin)
    return seconds


def _bytes(model: nn.Module, step: Callable[[], object]) -> dict[str, Any]:
    """What a step leaves behind, and what its forward saves; it also makes caches and workspaces.

    Optimiser and batch are the task's own affair, so they are caught while a step uses them.
    """
    left: list[memory.Persistent] = []
    inputs: list[tuple[tuple[Any, ...], bool]] = []

    def stepped(optimizer: torch.optim.Optimizer, *_: object) -> None:
        left.append(memory.of_model(model, optimizer))

    def called(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append((args, torch.is_autocast_enabled("cpu")))

    hooks = [register_optimizer_step_post_hook(stepped), model.register_forward_pre_hook(called)]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    state = left[-1]
    return {
        "parameter_bytes": state.parameters,
        "gradient_bytes": state.gradients,
        "optimizer_bytes": state.optimizer,
        "table_bytes": state.tables,
        "state_bytes": state.total,
        "saved_beyond_activations_bytes": _saved(model, *inputs[-1]) if inputs else None,
    }


def _saved(model: nn.Module, args: tuple[Any, ...], bfloat16: bool) -> int | None:
    if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].dim() != 4:
        return None
    saved = memory.saved_by_model(model, args[0], bfloat16)
    return saved.beyond_activations
