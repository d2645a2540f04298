"""``python -m examples.demo``, which ``make demo`` runs from a checkout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from examples import demo
from rpg_kernels.cli import said


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of the demo.

    Args:
        arguments: the command line without the program's name; None takes ``sys.argv``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Train a dense network, a dense one narrowed to the same number of "
        "parameters, the network as published and ours at several degrees of freedom, on real "
        "images, with the same code, seeds and schedule. Print accuracy, memory and time.",
    )
    demo.add_arguments(parser)
    args = parser.parse_args(arguments)
    return said("demo", lambda: demo.run(args))


if __name__ == "__main__":
    sys.exit(main())
