"""``python -m benchmarks.harness``, which ``make bench`` runs from a checkout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks import harness
from rpg_kernels.cli import said


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of the benchmarks.

    Args:
        arguments: the command line without the program's name; None takes ``sys.argv``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harness",
        description="Measure layers of real models against a dense layer and the ways to share "
        "weights that exist: correctness first, then memory and speed. Write the results as JSON.",
    )
    harness.add_arguments(parser)
    args = parser.parse_args(arguments)
    return said("bench", lambda: harness.run(args))


if __name__ == "__main__":
    sys.exit(main())
