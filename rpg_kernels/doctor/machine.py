"""Which commit and which processor: what a report, a result file and a bug report all say."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


def commit() -> str | None:
    """The commit of the checkout that this file is tracked in, else None.

    It ends in ``-dirty`` when tracked files differ from it.
    """
    here = Path(__file__)
    output = ""
    for arguments in (
        ["ls-files", "--error-unmatch", here.name],
        ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
    ):
        try:
            done = subprocess.run(
                ["git", *arguments],
                cwd=here.parent,
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None
        output = done.stdout.strip()
    return output


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # There is no such file outside Linux.
    return platform.processor() or platform.machine()
