"""Starts setuptools. Metadata is in pyproject.toml, what is compiled in tools/build_backend.py."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

import build_backend

setup(**build_backend.arguments())
