"""The list of families: to add one, write its file with ``WAYS`` and give it a line here."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.rivals.contender import Way

OURS = "rpg-kernels"


@dataclass(frozen=True)
class Family:
    """Ways of one package, which share a process.

    Args:
        name: for options and tables.
        module: that has ``WAYS``.
        needs: packages as they are imported, by the name that pip knows them by.
    """

    name: str
    module: str
    needs: dict[str, str]

    def missing(self) -> str:
        """A sentence saying why it is left out, or "". Nothing is imported."""
        for package, imported in self.needs.items():
            if importlib.util.find_spec(imported) is None:
                return f"{self.name} was skipped: {package} is not installed (extra `rivals`)."
        return ""

    def versions(self) -> dict[str, str]:
        """Of the packages that it needs, as far as they are installed."""
        found = {}
        for package in self.needs:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found

    def ways(self, what: str, dofs: Sequence[int] = ()) -> list[Way]:
        """Import the family; its ways for one pass.

        Args:
            what: ``"forward"`` or ``"training"``.
            dofs: sizes of banks, of ours only; none takes all.

        Raises:
            ImportError: a package is missing, or refuses what it finds.

        Example:
            >>> [way.name for way in FAMILIES["torch"].ways("training")]
            ['torch fp32, training', 'torch bf16, training']
        """
        module = importlib.import_module(f"{__package__}.families.{self.module}")
        found: Sequence[Way] = module.ways(dofs) if self.name == OURS else module.WAYS
        return [way for way in found if way.what == what]


FAMILIES = {
    family.name: family
    for family in (
        Family(OURS, "ours", {}),
        Family("torch", "torch_ways", {}),
        Family("zentorch", "zentorch_ways", {"zentorch": "zentorch"}),
        Family("onnxruntime", "onnxruntime_ways", {"onnxruntime": "onnxruntime", "onnx": "onnx"}),
        Family("openvino", "openvino_ways", {"openvino": "openvino"}),
        Family("bitsandbytes", "bitsandbytes_ways", {"bitsandbytes": "bitsandbytes"}),
        Family(
            "torch-structured",
            "monarch_ways",
            {"torch-structured": "torch_structured", "triton": "triton"},
        ),
    )
}
