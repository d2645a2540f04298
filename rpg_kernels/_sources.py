"""Which sources of the package these are."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def sources() -> str:
    """SHA-256 over the package's sources: says what ran where there is no git, or a dirty tree."""
    digest = hashlib.sha256()
    compiled = _PACKAGE.parent / "csrc"
    for path in sorted([*_PACKAGE.rglob("*.py"), *compiled.rglob("*.*")]):
        digest.update(str(path.relative_to(_PACKAGE.parent)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
