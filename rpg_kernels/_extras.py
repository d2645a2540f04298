"""Imports that the package itself does not need, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """A package that only a part of rpg-kernels needs is not installed."""


def require(module: str, package: str, purpose: str) -> Any:
    """Import ``module``; without it, say which package provides it.

    Raises:
        MissingExtraError: the module cannot be found.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{purpose} needs {package}: pip install {package}") from error
