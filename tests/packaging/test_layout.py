"""The imports of the package as a graph: no cycle, nothing from outside, data without computing.

Which folder may import which is in ``test_layers.py``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "rpg_kernels"
# What never reaches a wheel.
OUTSIDE = {"benchmarks", "examples", "tools", "tests"}
# What holds data, and the parts that compute with it.
DATA = ("law", "bank")
COMPUTE = ("backends", "ops", "nn", "native", "functional")


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports, also those inside of functions, but not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from statements(ast.Module([other], []))
        else:
            yield from statements(node)


def named(source: str, module: str, *, is_package: bool) -> set[str]:
    """The dotted names that a module's source asks for, as far as an import says them."""
    found = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            package = module.split(".") if is_package else module.split(".")[:-1]
            above = package[: len(package) - node.level + 1]
            base = ".".join([*above, *filter(None, [node.module])])
        found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def graph() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports.

    ``from a import b`` is an import of a.b where that is a module, otherwise of a. The packages
    that a module lies in count as imported only where something is taken from them.
    """
    known = modules()
    edges: dict[str, set[str]] = {}
    for module, path in known.items():
        names = named(path.read_text("utf-8"), module, is_package=path.stem == "__init__")
        edges[module] = set()
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            edges[module] |= {name} - {"", module}
    return edges


EDGES = graph()


def part(module: str) -> str:
    """The part of the package that a module belongs to: "law", "ops" and so on."""
    return module.split(".")[1] if "." in module else ""


def reached(edges: dict[str, set[str]], start: str) -> dict[str, str]:
    """Module -> the one it was first reached through, of all that ``start`` imports in the end."""
    through = {start: ""}
    waiting = [start]
    for module in waiting:
        for other in sorted(edges[module] - set(through)):
            through[other] = module
            waiting.append(other)
    return through


def path_to(through: dict[str, str], module: str) -> str:
    """The chain of imports that leads to a module."""
    chain = [module]
    while through[chain[-1]]:
        chain.append(through[chain[-1]])
    return " -> ".join(reversed(chain))


def test_every_module_is_seen() -> None:
    assert {part(module) for module in EDGES} >= {*COMPUTE, *DATA}
    assert EDGES[f"{PACKAGE}.nn.linear"]


def test_no_cycle() -> None:
    try:
        TopologicalSorter(EDGES).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("module", [module for module in EDGES if part(module) in DATA])
def test_data_needs_nothing_that_computes(module: str) -> None:
    through = reached(EDGES, module)
    assert [path_to(through, other) for other in through if part(other) in COMPUTE] == []


def test_nothing_that_stays_in_the_checkout_is_imported() -> None:
    for module, path in modules().items():
        names = named(path.read_text("utf-8"), module, is_package=path.stem == "__init__")
        assert {name.split(".")[0] for name in names} & OUTSIDE == set(), module


def test_what_counts_as_an_import() -> None:
    source = """
import a.b
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import hidden
else:
    import shown
def f():
    from . import sibling
    from ..other import name as alias
"""
    found = named(source, "p.q.m", is_package=False)
    assert found == {"a.b", "typing.TYPE_CHECKING", "shown", "p.q.sibling", "p.other.name"}
    assert "p.q.m.sibling" in named(source, "p.q.m", is_package=True)
