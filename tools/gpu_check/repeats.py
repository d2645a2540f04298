"""The same calls again and again, bit by bit: ``benchmarks.harness.repeat`` in several processes.

    python -m tools.gpu_check.repeats --out DIR [--jobs N]

DIR/repeat.jsonl has a line for each back end, case and dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.gpu_check import items

RESULTS = "repeat.jsonl"
GOOD = ("same", "does not apply")
BACKENDS = ("cuda", "triton", "reference")  # in the order in which they are to be known
RUNS = 20


def every() -> list[str]:
    """All items, the CUDA kernels' first."""
    from benchmarks.harness import repeat

    pairs = repeat.every(BACKENDS)
    return [f"{name} {case.layer.names[0]} {case.dtype}" for name, case in pairs]


def prepare() -> None:
    """In every worker, before anything is computed."""
    from benchmarks.harness import repeat

    repeat.prepare()


def answer(item: str, device: str = "cuda", runs: int = RUNS) -> dict[str, Any]:
    """Whether one back end gives the same bits every time, in both modes."""
    import torch

    from benchmarks.harness import calls, repeat

    backend, named, dtype = item.split()
    ((_, case),) = repeat.every([backend], [dtype], [named])
    where = torch.device(device)
    reason, forward_only = calls.refused(case, where, backend)
    if reason:
        return {"outcome": "does not apply", "message": reason}
    found = list(repeat.results(where, [(backend, case)], runs))
    raised = [record["error"] for record in found if "error" in record]
    differs = any(map(repeat.failed, found))
    outcome = "raised" if raised else "differs" if differs else "same"
    free = [r for r in found if not r["deterministic"] and any(r.get(n) for n in repeat.NAMES)]
    note = "differs outside of deterministic mode, as it may" if free and not raised else ""
    return {
        "outcome": outcome,
        "message": "; ".join(filter(None, [*raised[:1], note])),
        "forward_only": forward_only,
        "runs": found,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    return items.main(__name__, arguments)


if __name__ == "__main__":
    items.run(main)
