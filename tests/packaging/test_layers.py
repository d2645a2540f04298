"""Who may import whom: docs/architecture.md, and nothing above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rpg_kernels

ROOT = Path(rpg_kernels.__file__).parent
BASE = {
    "_bank_sums",
    "_checks",
    "_extras",
    "_json",
    "_processors",
    "_sources",
    "_stored",
    "_tensors",
    "_version",
}
BASE |= {"_wrappers"}
LAW = BASE | {"law"}
BANK = LAW | {"bank", "settings"}
BACKENDS = LAW | {"native", "settings", "backends"}
FUNCTIONAL = BANK | {"functional", "convolutions", "ops"}
NN = FUNCTIONAL | {"nn", "torch_functions"}
MODELS = NN | {"conversion"}
MAY = {
    **dict.fromkeys(BASE, BASE),
    "law": LAW,
    "settings": BASE,
    "bank": BANK,
    "native": LAW | {"native"},
    "backends": BACKENDS,
    "ops": BACKENDS | {"ops"},
    **dict.fromkeys(("functional", "convolutions"), FUNCTIONAL),
    "torch_functions": FUNCTIONAL | {"torch_functions"},
    "nn": NN,
    "explanation": BACKENDS | {"ops"},
    "proof": BACKENDS | {"ops", "explanation", "nn", "functional", "bank"},
    "flops": BACKENDS | {"ops"},
    "conversion": MODELS,
    "models": MODELS | {"models"},
    "pruning": MODELS | {"pruning"},
    "checkpoint": MODELS | {"checkpoint"},
    "interop": MODELS | {"models", "interop"},
}
ANY = {"__init__", "cli", "doctor", "timing"}  # at the top; the package's own names are theirs too
LENT = {"cpu": {"reference"}, "triton": {"reference"}}  # the reference's helpers
CORE = {"proving"}  # of the protocol; no back end


def imported(file: Path) -> Iterator[list[str]]:
    """Modules of the package that a file imports, as parts of their names."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            package, *rest = module.split(".")
            if package == "rpg_kernels" and rest:
                yield rest


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_imports_only_what_stands_below(file: Path) -> None:
    folder = file.relative_to(ROOT).parts
    layer = folder[0].removesuffix(".py")
    if layer in ANY:
        return
    for module in imported(file):
        assert module[0] in MAY[layer], f"{file} imports {'.'.join(module)}"
        if layer == "backends" and len(folder) == 3 and module[0] == "backends":
            others = {path.name for path in ROOT.glob("backends/*/")} - {folder[1]}
            others -= LENT.get(folder[1], set()) | CORE
            assert module[1] not in others, f"{file} imports {'.'.join(module)}"
