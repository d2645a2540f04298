"""The benchmark harness: correctness first, then memory and speed, results as data.

``python -m benchmarks.harness`` runs it; this module holds its options. docs/benchmarks.md says how
to read what it writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.harness.cases import Case

__all__ = ["add_arguments", "run"]

QUICK_MEMORY = 8 << 30
SECONDS = {"quick": 4.0, "full": 8.0, "gpu": 1.0, "gpu-longer": 1.0}
CPU_SUITES = ("cpu", "decoder", "networks", "rivals")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of ``python -m benchmarks.harness`` on ``parser``."""
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--suite",
        choices=("quick", "full", "gpu", "gpu-longer", *CPU_SUITES),
        help="default: quick, unless cases are chosen; gpu, gpu-longer: with windows, the most "
        "telling first; cpu: linear layers beside every dense layer there is, "
        "continued where OUT holds a part of it; decoder: a whole model on a CPU; rivals: beside "
        "other packages, those that are installed",
    )
    what.add_argument(
        "--case",
        nargs="+",
        default=[],
        metavar="NAME",
        help="model.layer or model.layer/batch, its beginning, or a shell pattern; see --list",
    )
    what.add_argument("--op", nargs="+", default=[], help="linear, conv2d, embedding")
    what.add_argument("--batch", nargs="+", type=int, default=[], help="images or tokens")
    what.add_argument(
        "--dof", nargs="+", default=[], metavar="N", help="such as 45K 2M 20M (default: 2M)"
    )
    what.add_argument(
        "--granularity", nargs="+", type=int, default=[], metavar="G", help="default: 64"
    )
    what.add_argument(
        "--reflect", nargs="+", default=[], help="element, vector, none (default: vector)"
    )
    what.add_argument(
        "--dtype", nargs="+", default=[], help="fp32, bf16, fp16, amp (default: fp32; bf16 on CUDA)"
    )
    what.add_argument(
        "--impl",
        nargs="+",
        default=[],
        metavar="NAME",
        help="baselines and back ends, see --list (default: all that run and need no compiler)",
    )
    what.add_argument(
        "--longer", action="store_true", help="suite cpu: the largest layers at batch 4096 too"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    how.add_argument("--threads", type=int, help="default: 1; all of suites decoder and rivals")
    how.add_argument("--seconds", type=float, help="for the samples of one case (default: 4 or 8)")
    how.add_argument(
        "--limit", type=float, help="seconds after which no other case is begun (quick, full, gpu)"
    )
    how.add_argument("--memory", type=float, metavar="GB", help="one implementation may need")
    how.add_argument("--seed", type=int, default=0, help="of values and of the order of samples")
    how.add_argument("--eager", action="store_true", help="on CUDA, no graphs")
    how.add_argument("--commit", help="to record, where the sources lie outside a git checkout")
    how.add_argument("--out", type=Path, default=Path("bench.json"), help="default: bench.json")
    other = parser.add_argument_group("instead of measuring")
    other.add_argument("--list", action="store_true", help="list cases and implementations")
    other.add_argument(
        "--compare",
        nargs=2,
        metavar=("BEFORE", "AFTER"),
        help="two result files; or two commits, which are measured now, in turn",
    )


def run(args: argparse.Namespace) -> None:
    """Run the harness with parsed options.

    Raises:
        ValueError: an option names something that does not exist, with what does; or a result
            of ours is wrong.
    """
    import sys

    from benchmarks.harness import baselines, cases, compare, harness, schema, table
    from rpg_kernels import _checks

    if args.list:
        print("cases:", cases.listing(), "implementations:", baselines.listing(), sep="\n")
        return
    if args.compare and args.suite in CPU_SUITES:
        raise _checks.fail("suite", repr(args.suite), "quick or full with --compare")
    if args.compare:
        print(compare.compare(args.compare[0], args.compare[1], _options(args), Path.cwd()))
        return
    if args.longer and args.suite != "cpu":
        raise _checks.fail("longer", "an option", "none but with suite cpu")
    if args.suite in CPU_SUITES:
        _cpu(args)
        return
    chosen, suite = _cases(args)
    record = harness.run(
        chosen,
        impls=args.impl,
        device=args.device,
        threads=1 if args.threads is None else args.threads,
        seconds=SECONDS[suite or "quick"] if args.seconds is None else args.seconds,
        seed=args.seed,
        memory_limit=_memory(args, suite),
        graphs=not args.eager,
        suite=suite,
        commit=args.commit,
        limit=args.limit,
        out=args.out,
    )
    print(table.text(record, colour=sys.stdout.isatty()))
    print(f"\n{args.out}")
    bad = [
        f"{row['case']} {table.setting(row)} {row['impl']}: {row['status']}: {row['reason']}"
        for row in record["results"]
        if row["impl"].startswith("rpg-") and row["status"] in (schema.WRONG, schema.FAILED)
    ]
    _refuse(bad)


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise ValueError("results of ours that are wrong:\n" + "\n".join(wrong))


def _cpu(args: argparse.Namespace) -> None:
    """Run a suite of CPU kernels."""
    from benchmarks.harness.cpu import (
        decoder,
        grid,
        networks,
        networks_report,
        networks_run,
        report,
        run,
    )
    from rpg_kernels import _checks, timing

    choice: dict[str, Any] = {
        "patterns": args.case, "batches": args.batch,
        "dofs": [timing.count(text) for text in args.dof],
    }  # fmt: skip
    others = ["op", "granularity", "reflect", "memory", "limit", "eager"]
    if args.suite != "rivals":
        others += ["impl"]
    if args.suite == "decoder":
        others += ["case", "batch", "dof", "seconds", "longer"]
    if args.suite == "networks":
        others += ["dof", "longer"]
    if args.suite == "rivals":
        others += ["dtype", "longer"]
    for name in others:
        if getattr(args, name) not in (None, [], False):
            raise _checks.fail(name, getattr(args, name), f"none with suite {args.suite}")
    if args.device == "cuda":
        raise _checks.fail("device", "'cuda'", f"'cpu' with suite {args.suite}")
    common: dict[str, Any] = {
        "threads": args.threads, "seed": args.seed, "commit": args.commit, "out": args.out,
    }  # fmt: skip
    if args.suite == "rivals":
        lines, wrong = _rivals(args, choice["dofs"], common)
    elif args.suite == "decoder":
        record = decoder.run(dtypes=args.dtype, **common)
        lines, wrong = report.tokens_of(args.out, record), decoder.wrong(record)
    elif args.suite == "networks":
        chosen = networks.choose(args.case, args.batch, args.dtype)
        record = networks_run.run(chosen, seconds=args.seconds, **common)
        lines, wrong = networks_report.tables_of(args.out, record), networks_run.wrong(record)
    else:
        points = grid.choose(**choice, dtypes=args.dtype, longer=args.longer)
        record = run.run(points, seconds=args.seconds, **common)
        lines, wrong = report.layers_of(args.out, record), run.wrong(record)
    print("\n".join(lines).replace("{up}", ""), f"\n{args.out}", sep="\n")
    _refuse(wrong)


def _rivals(
    args: argparse.Namespace, dofs: list[int], common: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Run suite ``rivals``: its tables, and what is wrong of ours."""
    from benchmarks.harness.rivals import points, report, run
    from benchmarks.harness.rivals.tokens import CONFIG

    found, tokens = points.choose(args.case, args.batch)
    record = run.run(
        found, CONFIG if tokens else None, families=args.impl, dofs=dofs, seconds=args.seconds,
        **common,
    )  # fmt: skip
    return report.tables_of(args.out, record), run.wrong(record)


def _cases(args: argparse.Namespace) -> tuple[list[Case], str | None]:
    """What the options choose, and the suite's name where it is one."""
    import torch

    from benchmarks.harness import cases, suites
    from rpg_kernels import _checks, timing

    on_gpu = args.device == "cuda" or (args.device is None and torch.cuda.is_available())
    dtypes = args.dtype or ["bf16" if on_gpu else "fp32"]
    dofs = [timing.count(text) for text in args.dof]
    picky = args.case or args.op or args.batch or dofs or args.granularity or args.reflect
    if args.suite or not picky:
        if picky:
            raise _checks.fail("suite", args.suite, "no choice of cases beside it")
        suite = args.suite or "quick"
        return [case for dtype in dtypes for case in suites.suite(suite, dtype)], suite
    return [
        case
        for dtype in dtypes
        for case in cases.select(
            args.case, args.op, args.batch, dofs, args.granularity, args.reflect, dtype
        )
    ], None


def _memory(args: argparse.Namespace, suite: str | None) -> int | None:
    from rpg_kernels import _checks

    if args.memory is not None:
        if not 0 <= args.memory < 1e9:
            raise _checks.fail("memory", repr(args.memory), "a number of GB from 0")
        return int(args.memory * 1e9)
    return QUICK_MEMORY if suite == "quick" else None


def _options(args: argparse.Namespace) -> list[str]:
    """The options that say what and how to measure, as a command line."""
    words = []
    for name in (
        "suite", "case", "op", "batch", "dof", "granularity", "reflect", "dtype", "impl",
        "device", "threads", "seconds", "memory", "seed",
    ):  # fmt: skip
        value = getattr(args, name)
        if value not in (None, []):
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return [*words, *(["--eager"] if args.eager else [])]
