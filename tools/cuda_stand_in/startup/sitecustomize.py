"""What every Python process below the stand-in begins with; Python imports it by its name.

The package's native module is the one that was built for the stand-in, cuDNN is left aside, since
it has a libcudart of its own inside, and with soft assertions those of tests are evaluated only.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

_NATIVE = os.environ.get("CUDA_STAND_IN_NATIVE", "")
_SOFT = bool(os.environ.get("CUDA_STAND_IN_SOFT"))
_TESTS = f"{os.sep}tests{os.sep}"
_execute, _code = SourceFileLoader.exec_module, SourceFileLoader.get_code


class _Native:
    """Finds the native module, before anybody looks into the package's folder."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "rpg_kernels.native._native":
            return None
        return importlib.util.spec_from_file_location(name, _NATIVE)


class _Evaluated(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.Expr:
        return ast.copy_location(ast.Expr(value=node.test), node)


def _exec_module(self: SourceFileLoader, module: ModuleType) -> None:
    _execute(self, module)
    if module.__name__ == "torch":
        module.backends.cudnn.enabled = False
        if _SOFT:
            module.testing.assert_close = lambda *args, **how: None


def _get_code(self: SourceFileLoader, fullname: str) -> CodeType | None:
    if _TESTS not in self.path:
        return _code(self, fullname)
    tree = _Evaluated().visit(ast.parse(self.get_data(self.path)))
    code: CodeType = compile(ast.fix_missing_locations(tree), self.path, "exec")
    return code


if _NATIVE:
    sys.meta_path.insert(0, _Native)
SourceFileLoader.exec_module = _exec_module  # type: ignore[assignment, method-assign]
if _SOFT:
    SourceFileLoader.get_code = _get_code  # type: ignore[assignment, method-assign]
