"""The command line: ``run``, ``steps`` and ``report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.accuracy import report, running, steps
from rpg_kernels._extras import MissingExtraError


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy")
    commands = parser.add_subparsers(dest="command", required=True)
    running.add_arguments(commands.add_parser("run", help="train what is missing"))
    steps.add_arguments(commands.add_parser("steps", help="time training steps, in turn"))
    report.add_arguments(commands.add_parser("report", help="write tables and plots"))
    args = parser.parse_args(arguments)
    try:
        if args.command == "report":
            return report.main(args)
        (steps if args.command == "steps" else running).main(args)
    except (FileNotFoundError, ValueError, MissingExtraError) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the runs that had finished are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
