"""Imports that only the demo needs, with an error that says what to install."""

from rpg_kernels._extras import MissingExtraError, require

__all__ = ["MissingExtraError", "require"]
