"""Which modules of the package are collected for doctests: those whose imports are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_KERNELS = Path(__file__).parent / "rpg_kernels" / "backends" / "triton"

collect_ignore = (
    []
    if importlib.util.find_spec("triton")
    else [
        str(p)
        for p in _KERNELS.glob("*.py")
        if p.name not in ("__init__.py", "rules.py", "config.py")
    ]
)
