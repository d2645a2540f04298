"""Which modules of the package are collected for doctests: those that can be imported here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PACKAGE = Path(__file__).parent / "rpg_kernels"
_KERNELS = _PACKAGE / "backends" / "triton"

# What these two held is elsewhere; importing them raises and says where.
collect_ignore = [str(_PACKAGE / name) for name in ("bench.py", "demo.py")]
if not importlib.util.find_spec("triton"):
    collect_ignore += [
        str(p)
        for p in _KERNELS.glob("*.py")
        if p.name not in ("__init__.py", "rules.py", "config.py")
    ]
# They run in processes of their own (tests/backends/triton/triton_process.py), which name them.
collect_ignore += [
    str(p) for p in (Path(__file__).parent / "tests/backends/triton/cases").iterdir()
]
# Fixtures, loaded by pytest itself; as modules for doctests their names would collide.
collect_ignore += [str(p) for p in (Path(__file__).parent / "tests").rglob("conftest.py")]
