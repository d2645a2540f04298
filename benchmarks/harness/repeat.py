"""Run-to-run comparison: the same call on the same inputs, bit by bit.

    python -m benchmarks.harness.repeat [--device cuda] [--backend NAME ...] [--case NAME ...]
        [--dtype NAME ...] [--runs 20]

Under ``torch.use_deterministic_algorithms(True)`` a difference is an error; otherwise it is
counted. Prints one JSON object per back end, case, dtype and mode. One run of it is also what
sanitizers watch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import baselines, calls
from benchmarks.harness.cases import Case, Layer
from benchmarks.harness.problem import Problem
from benchmarks.harness.timing import Work
from rpg_kernels import _checks
from rpg_kernels.backends import registry

_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}
# Sizes most of which no tile divides, and a bank small enough that its elements are used many
# times. First what the CUDA kernels are made for: windows, of a few tokens.
CASES = (
    Case(Layer("linear", ("repeat.windows",), (200, 320)), 16, 5_000, 64, "vector", "fp32", 64, 2),
    Case(Layer("linear", ("repeat.one_of_windows",), (200, 320)), 1, 9_000, 32, "none", "fp32",
         128, 3),
    Case(Layer("linear", ("repeat.linear",), (200, 328)), 67, 5_000, 64, "vector"),
    Case(Layer("linear", ("repeat.one_token",), (200, 328)), 1, 5_000, 64, "element"),
    Case(Layer("conv2d", ("repeat.conv2d",), (72, 40, 3, 3), 13, 2), 5, 5_000, 16, "vector"),
    Case(Layer("conv2d", ("repeat.conv2d_of_windows",), (72, 64, 3, 3), 13), 5, 5_000, 64,
         "vector", "fp32", 64, 4),
    Case(Layer("embedding", ("repeat.embedding",), (300, 72)), 150, 2_000, 8, "vector"),
)  # fmt: skip
NOTHING = 75  # the exit status when nothing could run
NAMES = ("output", "gradients")
DTYPES = ("fp32", "bf16", "amp")


def every(
    names: Sequence[str] = (), dtypes: Sequence[str] = (), cases: Sequence[str] = ()
) -> list[tuple[str, Case]]:
    """(back end, case) of all that is named, whether it can run or not; none names everything.

    Raises:
        ValueError: an unknown back end, case or dtype, with those that exist.
    """
    for name in names:
        _checks.choice("backend", name, registry.names())
    known = [case.layer.names[0] for case in CASES]
    for name in cases:
        _checks.choice("case", name, known)
    return [
        (name, replace(case, dtype=dtype))
        for name in (names or registry.names())
        for dtype in (dtypes or DTYPES)
        for case in CASES
        if case.layer.names[0] in (cases or known)
    ]


def chosen(
    device: torch.device,
    names: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    cases: Sequence[str] = (),
) -> list[tuple[str, Case]]:
    """(back end, case) of everything named that our back ends can run on a device.

    Raises:
        ValueError: as ``every``.
    """
    return [
        (name, case)
        for name, case in every(names, dtypes, cases)
        if not calls.refused(case, device, name)[0]
    ]


def compare(case: Case, backend: str, device: torch.device, runs: int) -> dict[str, int]:
    """How many of the runs after the first gave other bits, for the output and the gradients.

    A back end that has no backward of the case has no gradients.
    """
    problem = Problem(case, device)
    forward_only = bool(calls.refused(case, device, backend)[1])
    work = Work(problem, baselines.IMPLEMENTATIONS[f"rpg-{backend}"].build(problem, 1))
    first: list[Tensor] = []
    differing = dict.fromkeys(NAMES, 0)
    for _ in range(runs):
        y = work.stack.forward(0)
        results = [y.detach(), *(() if forward_only else work.backward(0, y))]
        first = first or results
        same = [torch.equal(_bits(a), _bits(b)) for a, b in zip(first, results, strict=True)]
        differing["output"] += not same[0]
        differing["gradients"] += not all(same[1:])
    return differing


def _bits(values: Tensor) -> Tensor:
    """As integers, so that NaN equals itself and 0 does not equal -0."""
    return values.contiguous().view(_INTEGER[values.element_size()])


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """torch.use_deterministic_algorithms for a while."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def results(
    device: torch.device, pairs: Sequence[tuple[str, Case]], runs: int
) -> Iterator[dict[str, Any]]:
    """One record for each back end and case, in both modes."""
    for backend, case in pairs:
        for on in (False, True):
            record: dict[str, Any] = {
                "backend": backend,
                "case": case.layer.names[0],
                "dtype": case.dtype,
                "deterministic": on,
                "runs": runs,
            }
            try:
                with deterministic(on):
                    record |= compare(case, backend, device, runs)
            except Exception as error:  # of one case; the others are still compared
                record["error"] = f"{type(error).__name__}: {error}"[:300]
            yield record


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 when something raised, or differed in deterministic mode; 75 when
    nothing of what was asked for can run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", nargs="+", default=[])
    parser.add_argument("--case", nargs="+", default=[])
    parser.add_argument("--dtype", nargs="+", default=[])
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    prepare()
    bad = 0
    pairs = chosen(device, args.backend, args.dtype, args.case)
    if not pairs:
        print("none of these cases runs on these back ends")
        return NOTHING
    for record in results(device, pairs, args.runs):
        print(json.dumps(record), flush=True)
        bad += failed(record)
    return int(bad > 0)


def prepare() -> None:
    """Before the first product: cuBLAS is deterministic only with this, and reads it once."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def failed(record: Mapping[str, Any]) -> bool:
    """Whether a case raised, or differed in deterministic mode."""
    differs = record["deterministic"] and any(record.get(name) for name in NAMES)
    return bool("error" in record or differs)


if __name__ == "__main__":
    sys.exit(main())
