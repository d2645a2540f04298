"""The console script ``rpg-kernels``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from rpg_kernels import doctor
from rpg_kernels._extras import MissingExtraError
from rpg_kernels._version import __version__

MODELS = ("resnet18", "resnet34")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``rpg-kernels``; the result is the exit status.

    Args:
        arguments: the command line without the program's name; None takes ``sys.argv``.
    """
    args = _parser().parse_args(arguments)
    return said("rpg-kernels", lambda: args.command(args))


def said(program: str, command: Callable[[], int | None]) -> int:
    """The exit status of a command, whose expected errors become one sentence.

    Args:
        program: the name that the sentence begins with.
        command: returns an exit status, or None for 0.
    """
    try:
        return command() or 0
    except (MissingExtraError, OSError, TypeError, ValueError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rpg-kernels",
        description="Networks whose layers read their weights from one small shared bank.",
    )
    parser.add_argument("--version", action="version", version=f"rpg-kernels {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor_parser = commands.add_parser(
        "doctor",
        help="check this installation; put its report into a bug report",
        description="Say what is installed, what was compiled, which back end runs what and why, "
        "and check the result of every operator on every device. The exit status is 0 when all "
        "is well. Please put what it prints into a bug report.",
    )
    doctor.add_arguments(doctor_parser)
    doctor_parser.set_defaults(command=doctor.run)

    summary_parser = commands.add_parser(
        "summary",
        help="list the shared layers of a model",
        description="List the shared layers of a model of the paper: shape, granularity, place "
        "on the ring, scale. Nothing is allocated.",
    )
    _summary_arguments(summary_parser)
    summary_parser.set_defaults(command=_summary)

    bench_parser = commands.add_parser(
        "bench",
        help="time layers of your own shapes beside torch's dense layer",
        description="A quick look: time linear layers that read one bank beside torch.nn.Linear, "
        "forward and forward with backward, in turn, and say which back end ran. Correctness, "
        "memory, convolutions, embeddings and other baselines are in the full suite: `python -m "
        "benchmarks.harness` in a source checkout.",
    )
    _bench_arguments(bench_parser)
    bench_parser.set_defaults(command=_bench)

    # No prefix means an option: whatever follows, the answer is the same.
    demo_parser = commands.add_parser(
        "demo", help="say where the demo is", add_help=False, prefix_chars="\0"
    )
    demo_parser.add_argument("options", nargs="*")
    demo_parser.set_defaults(command=_demo)
    return parser


def _summary_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", choices=MODELS)
    parser.add_argument(
        "--dof", type=int, default=2_000_000, help="degrees of freedom (default: 2000000)"
    )
    parser.add_argument(
        "--granularity", type=int, default=64, help="bank elements in a slot (default: 64)"
    )
    parser.add_argument("--reflect", choices=("element", "vector", "none"), default="vector")
    parser.add_argument(
        "--laps", type=int, metavar="N", help="as for bench, and at most the compression"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the generating matrix")
    parser.add_argument("--stem", choices=("imagenet", "cifar"), default="imagenet")
    parser.add_argument("--num-classes", type=int, default=1000)


def _summary(args: argparse.Namespace) -> None:
    import torch

    from rpg_kernels import RPGConfig, models, summary

    config = RPGConfig(
        dof=args.dof,
        granularity=args.granularity,
        reflect=args.reflect,
        laps=args.laps,
        seed=args.seed,
    )
    with torch.device("meta"):
        model = getattr(models, args.model)(args.num_classes, stem=args.stem, rpg=config)
    print(summary(model))


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shapes", nargs="+", metavar="ROWSxCOLUMNS", help="of a weight, such as 4096x1024"
    )
    parser.add_argument(
        "--batch", default="1,16,256", metavar="N,N,...", help="rows of x (default: 1,16,256)"
    )
    parser.add_argument("--dtype", default="fp32", help="fp32 or bf16 (default: fp32)")
    parser.add_argument("--dof", default="2M", help="elements of the bank (default: 2M)")
    parser.add_argument(
        "--laps",
        type=int,
        metavar="N",
        help="read each slot N times close together, which saves as many multiplications "
        "(default: read the whole bank at random)",
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")


def _bench(args: argparse.Namespace) -> None:
    from rpg_kernels import timing

    for line in timing.run(
        args.shapes, args.batch.split(","), args.dtype, args.dof, args.laps, args.device
    ):
        print(line, flush=True)


def _demo(args: argparse.Namespace) -> int:
    raise ValueError(
        "the demo is in the source checkout and not in the package: run `make demo` or `python -m "
        "examples.demo` there"
    )


if __name__ == "__main__":
    sys.exit(main())
