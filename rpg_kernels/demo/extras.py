"""Imports that only the demo needs, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """A package that the demo needs is not installed."""


def require(module: str, package: str, purpose: str) -> Any:
    """Import ``module``; without it, say which package provides it.

    Raises:
        MissingExtraError: the module cannot be found.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{purpose} needs {package}: pip install {package}") from error
