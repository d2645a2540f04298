"""Processes that tests start: their output as text, and an end to those that hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Seconds. It ends what hangs, and measures nothing: a busy machine may take a hundred times as
# long as a quiet one, and no test may fail of it.
HANGS = 3600


def run(*command: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command; ``how`` is subprocess.run's."""
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=HANGS, **how)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in another interpreter, which finds the modules that this one finds."""
    path = os.pathsep.join(filter(None, sys.path))
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return run(sys.executable, "-c", code, env=env)
