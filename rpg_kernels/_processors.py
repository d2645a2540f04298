"""How many processors there are."""

from __future__ import annotations

import os


def processors() -> int:
    """Those that this process may use.

    Example:
        >>> processors() > 0
        True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
