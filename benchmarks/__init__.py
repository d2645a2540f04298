"""Measurements of rpg-kernels, run from a checkout; nothing here is part of the package."""
