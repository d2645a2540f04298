"""``PYTHONPATH=tests/helpers python -m tools.reports.architectures`` writes docs/architectures.md.

What the default rule shares of networks of transformers and timm: each is built on meta, in a size
that is used, and converted. Takes half a minute and no memory to speak of.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from architecture import Architecture
from architectures import ALL
from torch import nn

import rpg_kernels as rpg
from tools.reports.pages import replaced

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
NAMED = 0.01  # of the weights outside of embeddings: what is less is not named
COMPRESSION = 4  # what is shared does not depend on it


@dataclass(frozen=True)
class Share:
    """What became virtual of a network, in elements of its trainable parameters.

    ``left`` has what did not and is no embedding: the name of a kind and its elements.
    """

    layers: int
    total: int
    virtual: int
    embeddings: int
    virtual_embeddings: int
    left: dict[str, int]

    @property
    def of_all(self) -> float:
        """Per cent of all elements that became virtual."""
        return 100 * self.virtual / self.total

    @property
    def outside(self) -> float:
        """The same without embeddings, and without output layers that are tied to one."""
        virtual, total = self.virtual - self.virtual_embeddings, self.total - self.embeddings
        return 100 * virtual / total


def measured(architecture: Architecture) -> Share:
    """Build a network, convert it and count."""
    model = architecture.build_large()
    # Parameters by their first owner; every owner is asked, since tied ones have several.
    sizes: dict[int, int] = {}
    owners: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                sizes[id(parameter)] = parameter.numel()
                owners[id(parameter)].append((name, module))
    tables = {key for key, held in owners.items() if any(is_table(m) for _, m in held)}
    # They are held on to, so that no other object takes their numbers.
    weights = {name: getattr(m, "weight", None) for name, m in model.named_modules()}
    layers, skipped = shared(model, sum(sizes.values()))
    virtual = {id(weights[name]) for name in layers}
    left: dict[str, int] = defaultdict(int)
    for key, ((name, module), *_) in owners.items():
        if key not in virtual and key not in tables:
            left[kind_of_rest(module, skipped.get(name, ""))] += sizes[key]
    return Share(
        layers=len(layers),
        total=sum(sizes.values()),
        virtual=sum(sizes[key] for key in virtual),
        embeddings=sum(sizes[key] for key in tables),
        virtual_embeddings=sum(sizes[key] for key in tables & virtual),
        left=dict(left),
    )


def is_table(module: nn.Module) -> bool:
    """Whether it looks up rows."""
    return isinstance(module, nn.Embedding)


def shared(model: nn.Module, weights: int) -> tuple[list[str], dict[str, str]]:
    """Convert a model: the names of its layers that are shared, and why others are not."""
    try:
        rpg.convert(model, rpg.RPGConfig(dof=weights // COMPRESSION))
    except ValueError as error:
        if "no layer to share" not in str(error):
            raise
        return [], {}
    summary = rpg.summary(model)
    return [layer.name for layer in summary.layers], summary.skipped


def kind_of_rest(module: nn.Module, reason: str) -> str:
    """What to call a parameter that is not shared: by the rule that keeps it, or its module."""
    for rule in ("first layer", "last layer"):
        if reason.startswith(rule):
            return rule
    kind = type(module)
    if getattr(nn, kind.__name__, kind) is kind:
        return f"`{kind.__name__}`"
    return f"`{kind.__name__}` of {kind.__module__.partition('.')[0]}"


def row(architecture: Architecture) -> str:
    """A network's line of the table."""
    share = measured(architecture)
    rest = share.total - share.embeddings
    kinds = sorted(share.left.items(), key=lambda kind: -kind[1])
    left = [f"{name} {100 * size / rest:.1f} %" for name, size in kinds if size >= NAMED * rest]
    return (
        f"| `{architecture.name}` | {share.total / 1e6:,.1f} M | {share.layers} | "
        f"{share.of_all:.1f} % | {share.outside:.1f} % | {', '.join(left)} |"
    )


def table() -> str:
    """All networks, and the versions of the libraries that have them."""
    lines = [
        f"transformers {version('transformers')}, timm {version('timm')}.",
        "",
        "| network | weights | layers shared | virtual | virtual, outside of embeddings "
        "| what else was left |",
        "|---|---:|---:|---:|---:|---|",
    ]
    return "\n".join([*lines, *map(row, ALL)])


def main() -> None:
    """Write the table."""
    PAGE.write_text(replaced(PAGE.read_text("utf-8"), "architectures", table()), "utf-8")


if __name__ == "__main__":
    main()
