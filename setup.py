"""Starts setuptools. All metadata is in pyproject.toml; the package is pure Python."""

from setuptools import setup

setup()
