"""The command line: an experiment's name trains it, ``report`` writes the pages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.accuracy import jobs
from benchmarks.harness import machine
from benchmarks.paper import costs, report, running
from benchmarks.paper.experiment import SIZES
from rpg_kernels.cli import said

SEEDS = (0, 1, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status.

    Args:
        arguments: the command line without the program's name; None takes ``sys.argv``.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["report"]:
        given = report.parser().parse_args(arguments[1:])
        return said("report", lambda: report.main(given))
    args = _parser().parse_args(arguments)
    return said(args.name, lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    """Train, measure or list one experiment.

    Raises:
        FileNotFoundError, ValueError: an option or a file is not what it should be.
    """
    if args.threads < 1:
        raise ValueError(f"threads: got {args.threads}, wanted at least 1")
    size = args.size or ("quick" if args.quick else "full")
    experiment = running.load(args.name)
    out = args.out or running.results_of(args.name, size)
    seeds = args.seeds or (SEEDS if size == "full" else SEEDS[:1])
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        task = experiment.task(size, args.data)
        if args.list:
            jobs.show(
                running.plan(experiment, task, seeds, args.only), running.runs_of(experiment, out)
            )
        elif args.costs:
            record = costs.measure(experiment, task, args.only)
            path = costs.path_of(out)
            path.parent.mkdir(parents=True, exist_ok=True)
            machine.write_json(path, record)
            print("\n".join([*report.costs_table(experiment, record), "", str(path)]))
        else:
            running.run(experiment, task, out, seeds, args.only, args.budget)
            runs = running.runs_of(experiment, out)
            print("\n".join(report.results_table(experiment, runs)))
    finally:
        torch.set_num_threads(before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description="Train a table of the paper: what its results file lacks.",
        epilog="`python -m benchmarks.paper report` writes the pages of all of them.",
    )
    parser.add_argument("name", help=f"one of: {', '.join(running.names())}")
    parser.add_argument("--quick", action="store_true", help="under a minute; written to build/")
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="default: no end")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; 0 with --quick")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="rows, as in '*RPG*'")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="images, where the experiment does not make its own: CIFAR-10 as torchvision's "
        "cifar-10-batches-py folder or an .npz of JPEGs (default: scikit-learn's digits)",
    )
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument(
        "--out", type=Path, help="results file (default: benchmarks/results/paper_NAME.jsonl)"
    )
    parser.add_argument(
        "--costs",
        action="store_true",
        help="train nothing: time training steps of all rows in turn and count their memory",
    )
    parser.add_argument("--list", action="store_true", help="show the runs and train none")
    return parser


if __name__ == "__main__":
    sys.exit(main())
