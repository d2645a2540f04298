"""What `import rpg_kernels` costs and brings along, each seen from a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

# Needed by extras or by other back ends, so never by the import.
OPTIONAL = ("matplotlib", "numpy", "PIL", "sklearn", "tqdm", "triton")


def run_python(code: str) -> str:
    # Byte code may be written, as in normal use: compiling our sources is not what is measured.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_brings_in_no_optional_module() -> None:
    # torch itself may import some of them; only what we add counts.
    added = run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import rpg_kernels\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    assert "rpg_kernels" in added.split()
    assert not set(OPTIONAL) & set(added.split())


def test_a_layer_runs_without_any_optional_module() -> None:
    # None in sys.modules makes an import fail as if the module were not installed.
    shape = run_python(
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
        "import torch, rpg_kernels as rpg\n"
        "layer = rpg.nn.Linear(8, 4, bank=rpg.ParameterBank(dof=64, granularity=8))\n"
        "layer(torch.ones(2, 8)).sum().backward()\n"
        "print(*layer(torch.ones(2, 8)).shape)"
    )
    assert shape == "2 4"


def test_import_adds_under_300_ms_to_torch() -> None:
    # The best of three: the first run writes the byte code.
    code = (
        "import time, torch\n"
        "start = time.perf_counter()\n"
        "import rpg_kernels\n"
        "print(time.perf_counter() - start)"
    )
    best = min(float(run_python(code)) for _ in range(3))
    assert best < 0.3, f"import rpg_kernels takes {best:.2f} s after import torch"
