"""A command, with the stand-in in place of the CUDA libraries.

    python -m tools.cuda_stand_in [OPTIONS] -- COMMAND

Run by a Python that has a CUDA build of torch; see `make stand-in`. Nothing is computed, so values
are garbage: with --assert soft the assertions of tests are evaluated and not enforced, and a
test fails only by an exception. What the stand-in refuses or lacks is written to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.cuda_stand_in import library

CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def environment(args: argparse.Namespace) -> dict[str, str]:
    """What the command's environment has beside what is there already."""
    folder = library.library()
    log = str(args.log.resolve()) if args.log else ""
    paths = {
        "PATH": [str(Path(sys.executable).parent)],
        "PYTHONPATH": [str(library.HERE / "startup"), str(library.ROOT)],
        "LD_LIBRARY_PATH": [str(folder), *([str(at.parent)] if (at := library.runtime()) else [])],
    }
    joined = {
        name: os.pathsep.join([*first, *filter(None, [os.environ.get(name)])])
        for name, first in paths.items()
    }
    soft = {"CUDA_STAND_IN_SOFT": "1", "PYTEST_ADDOPTS": "--assert=plain"}
    return {
        **joined,
        "LD_PRELOAD": str(folder / library.NAME),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(library.BUILD / "triton"),
        "NVCC_APPEND_FLAGS": "-cudart shared",  # for programs that tests compile
        "RPG_KERNELS_CACHE": str(library.BUILD / "cache"),  # its verdicts are no GPU's
        # A trial would find garbage, and no call would be given to the back end.
        "RPG_KERNELS_PROVE": os.environ.get("RPG_KERNELS_PROVE", "0"),
        "CUDA_STAND_IN_CAPABILITY": args.capability,
        "CUDA_STAND_IN_DEVICES": str(args.devices),
        "CUDA_STAND_IN_MEMORY": str(args.memory << 30),
        "CUDA_STAND_IN_LOG": log,
        "CUDA_STAND_IN_NATIVE": "" if args.no_native else str(library.native(args.capability)),
        **({"RPG_KERNELS_NATIVE": "0"} if args.no_native else {}),
        **(soft if args.assertions == "soft" else {}),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Becomes the command; returns only if that cannot be."""
    parser = argparse.ArgumentParser(
        prog="cuda_stand_in", description="A command with a pretended GPU."
    )
    parser.add_argument("--capability", choices=CAPABILITIES, default="9.0")
    parser.add_argument("--devices", type=int, default=1, metavar="N")
    parser.add_argument("--memory", type=int, default=140, metavar="GIB", help="of a device")
    parser.add_argument("--log", type=Path, metavar="FILE", help="every launch, a line each")
    parser.add_argument("--assert", dest="assertions", choices=("hard", "soft"), default="hard")
    parser.add_argument("--no-native", action="store_true", help="without the native module")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    args = parser.parse_args(arguments)
    try:
        settings = environment(args)
    except RuntimeError as error:
        print(f"cuda_stand_in: {error}", file=sys.stderr)
        return 1
    os.execvpe(args.command[0], args.command, {**os.environ, **settings})


if __name__ == "__main__":
    sys.exit(main())
