"""The experiments: one named row for each network that is trained, in the order of importance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from rpg_kernels.bank.config import PAPER_INIT_STD

GRANULARITIES = (1, 8, 16, 64, 128)
REFLECT = ("element", "vector", "none")
DENSE, LAW, HASHED, UNSIGNED = "dense", "law", "hashed", "unsigned"


@dataclass(frozen=True)
class Row:
    """One network and how it is trained; everything else is the recipe, which all rows share.

    Args:
        name: of the row; results are filed under it.
        map: a key of ``maps.MAPS``, or ``"dense"`` for weights of their own.
        compression: virtual weights over degrees of freedom. A dense network is narrowed until it
            has no more trainable numbers than a shared one of this compression.
        granularity, reflect, permute: of the packing law.
        init_std, scale: of the bank and of the layers, as in ``RPGConfig``.
        window, laps, taps: of generator and placement; None for the whole ring, and for what the
            law chooses.
        lr: factor on the recipe's learning rate.
        bank_lr, bank_decay: factors on the bank's learning rate and weight decay.
    """

    name: str
    map: str = LAW
    compression: float = 1.0
    granularity: int = 64
    reflect: str = "vector"
    permute: bool = True
    window: int | None = None
    laps: int | None = None
    taps: int | None = None
    init_std: float = PAPER_INIT_STD
    scale: str = "fan_out"
    lr: float = 1.0
    bank_lr: float = 1.0
    bank_decay: float = 1.0

    def settings(self) -> dict[str, Any]:
        """What the row means, for its record: the map, and every field that is not the default."""
        defaults = {field.name: field.default for field in fields(self)}
        given = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        return {"map": self.map, **{k: v for k, v in given.items() if k != "name"}}


def law_name(compression: float, granularity: int, reflect: str) -> str:
    """Name of a row of the design table.

    Example:
        >>> law_name(17, 64, "vector")
        'rpg 17x g64 vector'
    """
    return f"rpg {compression:g}x g{granularity} {reflect}"


def _law(compression: float, granularity: int = 64, reflect: str = "vector") -> Row:
    name = law_name(compression, granularity, reflect)
    return Row(name, LAW, compression, granularity, reflect)


def _other(kind: str, compression: float) -> Row:
    label = "narrow" if kind == DENSE else kind
    return Row(f"{label} {compression:g}x", kind, compression)


def _design(compression: float) -> list[Row]:
    """Granularity times reflect; at granularity 1 a sign per slot use is one per element."""
    return [
        _law(compression, granularity, reflect)
        for granularity in GRANULARITIES
        for reflect in REFLECT
        if not (granularity == 1 and reflect == "vector")
    ]


def unit_name(compression: float, laps: int, window: int | None, taps: int | None) -> str:
    """Name of a row of the unit law.

    Example:
        >>> unit_name(17, 4, None, None), unit_name(17, 4, 256, 1)
        ('rpg 17x g64 vector, 4 laps', 'rpg 17x g64 vector, 4 laps, windows of 256, 1 tap')
    """
    name = f"{law_name(compression, 64, 'vector')}, {laps} lap{'s' * (laps > 1)}"
    name += f", windows of {window}" if window else ""
    return name + (f", {taps} tap{'s' * (taps > 1)}" if taps else "")


def _units(
    compression: float, laps: int, window: int | None = None, taps: int | None = None
) -> Row:
    name = unit_name(compression, laps, window, taps)
    return Row(name, LAW, compression, window=window, laps=laps, taps=taps)


def _trained(name: str, **changed: Any) -> Row:
    """The middle row at 17x with another setting of the optimiser or of the start."""
    return Row(f"rpg 17x g64 vector, {name}", compression=17.0, **changed)


# Narrowed dense, HashedNet and unsigned sharing beside the paper's map and what speed wants.
DECIDING = (
    _law(17, 1, "element"),
    _law(17, 64, "vector"),
    Row(DENSE, DENSE),
    _other(DENSE, 17),
    _law(17, 64, "element"),
    _other(HASHED, 17),
    _other(UNSIGNED, 17),
    _law(17, 16, "vector"),
    _law(17, 128, "vector"),
    _law(4, 1, "element"),
    _law(4, 64, "vector"),
)
# The unit law as it chooses, with larger windows, and with units of one tap.
UNITS = (
    _units(17, 4),
    _units(4, 4),
    _units(17, 9),
    _units(4, 4, window=256),
    _units(17, 4, window=256),
    _units(4, 4, taps=1),
    _units(17, 16),
    _units(17, 9, window=256),
    _units(17, 4, taps=1),
    _units(17, 16, window=256),
    _units(17, 1),
    _units(4, 1),
)
# Degrees of freedom from 45K to as many as weights; comparators at 4x; permutation and signs alone.
SUPPORTING = (
    _law(27),
    _law(8),
    _law(2),
    _law(1),
    _other(DENSE, 4),
    _other(HASHED, 4),
    _other(UNSIGNED, 4),
    _law(17, 64, "none"),
    _law(17, 8, "vector"),
    _law(17, 1, "none"),
    Row("rpg 17x in order element", LAW, 17, 1, "element", permute=False),
    Row("rpg 17x in order none", LAW, 17, 1, "none", permute=False),
    _trained("init_std 1", init_std=1.0),
    _trained("bank lr x 0.3", bank_lr=0.3),
    _trained("bank lr x 3", bank_lr=3.0),
    _trained("bank decay 0", bank_decay=0.0),
    _trained("bank decay x 10", bank_decay=10.0),
    _trained("scale fan_in", scale="fan_in"),
)
# What is left of the design table, and whether the recipe favours somebody.
FURTHER = (
    *_design(17),
    *_design(4),
    _other(DENSE, 27),
    _other(DENSE, 8),
    _other(DENSE, 2),
    _trained("lr x 0.5", lr=0.5),
    _trained("lr x 2", lr=2.0),
    Row("dense, lr x 0.5", DENSE, lr=0.5),
    Row("dense, lr x 2", DENSE, lr=2.0),
)


def _unique(tiers: Iterable[Sequence[Row]]) -> Iterator[tuple[Row, ...]]:
    """Each row in the first tier that has it."""
    seen: set[str] = set()
    for tier in tiers:
        fresh = tuple(row for row in tier if row.name not in seen)
        seen |= {row.name for row in fresh}
        yield fresh


TIERS = tuple(_unique((DECIDING, UNITS, SUPPORTING, FURTHER)))
ROWS = {row.name: row for tier in TIERS for row in tier}


def plan(seeds: Sequence[int], pattern: str = "*") -> list[tuple[Row, int]]:
    """The runs in order: tier by tier, in each all rows at the first seed, then at the next.

    Args:
        seeds: of the runs.
        pattern: of the names, as a shell writes it.

    Raises:
        ValueError: no row has such a name.
    """
    chosen = [[row for row in tier if fnmatchcase(row.name, pattern)] for tier in TIERS]
    if not any(chosen):
        raise ValueError(f"only: got {pattern!r}, wanted a pattern of: {', '.join(ROWS)}")
    return [(row, seed) for tier in chosen for seed in seeds for row in tier]
