"""What a process of cases.py found; __main__.py reads it, and needs nothing else of ttsem."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Counts:
    """What came of some files.

    Args:
        passed, failed, skipped: tests, and files that could not be read.
        launches, kernels: that were executed, and compiled for them.
        turned: launches of several programs, executed in the reverse order too.
        hints: values that a hint was compared with.
        unchecked: launches that were too large to look for races in.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    launches: int = 0
    kernels: int = 0
    turned: int = 0
    hints: int = 0
    unchecked: int = 0

    def __add__(self, other: Counts) -> Counts:
        names = [field.name for field in fields(self)]
        return Counts(*(getattr(self, name) + getattr(other, name) for name in names))

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
