"""Every case of a benchmark called once, in several processes at once: its kernels are compiled.

    python -m tools.gpu_check.compile_ahead --out DIR [--jobs N] [--longer]

Triton compiles a kernel when it is first called, and keeps it on the disk: a benchmark, which runs
alone, would wait for most of its time. DIR/compile.jsonl has a line for each case and back end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tools.gpu_check import items
from tools.gpu_check.bench import SUSPECTS

RESULTS = "compile.jsonl"
GOOD = ("called", "does not apply")
SUITE, LONGER = "gpu", "gpu-longer"


def every(suite: str = SUITE) -> list[str]:
    """All items: suite, number of the case, implementation."""
    from benchmarks.harness import suites

    count = len(suites.suite(suite, "bf16"))
    return [f"{suite} {number} {name}" for number in range(count) for name in SUSPECTS]


def prepare() -> None:
    """Nothing."""


def answer(item: str, device: str = "cuda", dtype: str = "bf16") -> dict[str, Any]:
    """Call one implementation once, forward and backward, where it can run the case."""
    import torch

    from benchmarks.harness import baselines, suites
    from benchmarks.harness.problem import Problem
    from benchmarks.harness.timing import Work

    suite, number, name = item.split()
    case, where = suites.suite(suite, dtype)[int(number)], torch.device(device)
    implementation = baselines.IMPLEMENTATIONS[name]
    reason = implementation.refuse(case, where)
    if reason:
        return {"outcome": "does not apply", "message": reason}
    problem = Problem(case, where)
    work = Work(problem, implementation.build(problem, 1))
    y = work.stack.forward(0)
    if not implementation.refuse_backward(case, where):
        work.backward(0, y)
    return {"outcome": "called", "message": f"{case.name} {case.setting}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    longer = "--longer" in words
    if longer:
        words.remove("--longer")
    return items.main(__name__, words, every(LONGER) if longer else None)


if __name__ == "__main__":
    items.run(main)
