"""The generating matrix G as a frozen description: computed by a law, or read from a table."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any

from rpg_kernels import _checks
from rpg_kernels.law.ring import LAW_VERSION, REFLECT
from rpg_kernels.law.unit import UNIT_LAW
from rpg_kernels.law.unit import check_windows as check_units

TABLE_LAW = "table"
LAWS = (LAW_VERSION, UNIT_LAW)


@dataclass(frozen=True)
class Generator:
    """A generating matrix that a packing law computes; nothing is stored but these numbers.

    Args:
        slots: slots on the ring, 1 to 2^31 - 1.
        granularity: elements per slot, a power of two from 1 to 128.
        reflect: ``"element"``, ``"vector"`` or ``"none"``.
        permute: False reads the ring in order.
        window: slots of a window that law 3 aims at, a multiple of 8 from 8 to 4096; None for its
            own choice.
        laps: times that a unit reads each slot of its window, 1 to 64; None, the whole ring.
        seed: 0 to 2^63 - 1.
        law: version of the packing law; None for 3 with laps and 1 without.

    Raises:
        TypeError, ValueError: a field is out of range, a window without laps, a law that this
            version does not know, or one that contradicts window and laps.

    Example:
        >>> g = Generator(slots=31250, granularity=64, reflect="vector")
        >>> g.dof, g.law, Generator.from_json(g.to_json()) == g
        (2000000, 1, True)
        >>> Generator(slots=31250, granularity=64, reflect="vector", laps=16).law
        3
    """

    slots: int
    granularity: int
    reflect: str
    permute: bool = True
    window: int | None = None
    laps: int | None = None
    seed: int = 0
    law: int | None = None
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.law is None:
            object.__setattr__(self, "law", LAW_VERSION if self.laps is None else UNIT_LAW)
        _check_law(self.law)
        _checks.integer("slots", self.slots, 1, _checks.INT32_MAX)
        _checks.granularity(self.granularity)
        _checks.choice("reflect", self.reflect, REFLECT)
        _checks.boolean("permute", self.permute)
        if self.law == LAW_VERSION:
            if self.laps is not None:
                raise _checks.fail("laps", self.laps, f"None with law {self.law}")
            if self.window is not None:
                raise _checks.fail("window", self.window, "None without laps")
        elif self.laps is None:
            raise _checks.fail("laps", None, f"an int from 1 to 64 with law {self.law}")
        else:
            check_units(self.window, self.laps)
        _checks.integer("seed", self.seed, 0, 2**63 - 1)
        object.__setattr__(self, "text", _text(self))

    @property
    def dof(self) -> int:
        """Degrees of freedom: elements of the bank."""
        return self.slots * self.granularity

    def to_json(self) -> str:
        """One line of JSON with every field, the law version among them; laps not with law 1."""
        return self.text

    @classmethod
    def from_json(cls, text: str) -> Generator:
        """The inverse of to_json.

        Raises:
            ValueError: not such a JSON object, or a field out of range.
        """
        return cls(**_fields(cls, text))


@dataclass(frozen=True)
class TableGenerator:
    """A generating matrix given by an explicit table, for maps that no law produced.

    The table itself is a buffer of the bank, ``bank.table``: int32, one entry per virtual weight
    in virtual-matrix order, the bank index in bits 0 to 30 and the sign in bit 31.

    Args:
        slots: elements of the bank, 1 to 2^31 - 1.
        entries: entries of the table: virtual weights of all layers.
        sha256: hexadecimal digest of the table's bytes (little endian).

    Raises:
        TypeError, ValueError: a field is out of range.

    Example:
        >>> TableGenerator(slots=10, entries=40, sha256="0" * 64).granularity
        1
    """

    slots: int
    entries: int
    sha256: str
    law: str = TABLE_LAW
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _checks.choice("law", self.law, (TABLE_LAW,))
        _checks.integer("slots", self.slots, 1, _checks.INT32_MAX)
        _checks.integer("entries", self.entries, 1, 2**62)
        if not isinstance(self.sha256, str) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise _checks.fail("sha256", repr(self.sha256), "64 hexadecimal digits")
        object.__setattr__(self, "text", _text(self))

    @property
    def granularity(self) -> int:
        """1: every element is drawn alone."""
        return 1

    @property
    def dof(self) -> int:
        """Degrees of freedom: elements of the bank."""
        return self.slots

    def to_json(self) -> str:
        """One line of JSON with every field; the table is not part of it."""
        return self.text

    @classmethod
    def from_json(cls, text: str) -> TableGenerator:
        """The inverse of to_json.

        Raises:
            ValueError: not such a JSON object, or a field out of range.
        """
        return cls(**_fields(cls, text))


def parse_generator(text: str) -> Generator | TableGenerator:
    """The generator that a JSON text describes, by its law.

    Raises:
        ValueError: not a generator's JSON, or of a law that this version does not know.

    Example:
        >>> parse_generator('{"slots":4,"granularity":8,"reflect":"none","law":7}')
        Traceback (most recent call last):
        ValueError: law: got 7, wanted one of 1, 3, the laws known here
    """
    _checks.text("generator", text)
    try:
        law = json.loads(text)["law"]
    except (ValueError, TypeError, KeyError) as error:
        raise _checks.fail("generator", repr(text[:80]), "a JSON object with a law") from error
    return (TableGenerator if law == TABLE_LAW else Generator).from_json(text)


def _fields(cls: type, text: str) -> dict[str, Any]:
    """The constructor arguments in a JSON text, refused when there are others or not enough."""
    names = {f.name for f in fields(cls) if f.init}
    _checks.text(cls.__name__, text)
    try:
        record = json.loads(text)
    except ValueError as error:
        raise _checks.fail(cls.__name__, repr(text[:80]), "a JSON object") from error
    law = record.get("law", LAW_VERSION) if isinstance(record, dict) else LAW_VERSION
    if cls is Generator:
        _check_law(law)  # first, since another law may have other fields
    required = {"slots", "law"}
    required |= {"granularity", "reflect"} if cls is Generator else {"entries", "sha256"}
    if cls is Generator and law != LAW_VERSION:
        required |= {"window", "laps"}
    else:
        names -= {"laps"}
    if not isinstance(record, dict) or not set(record) <= names:
        got = sorted(record) if isinstance(record, dict) else repr(record)
        raise _checks.fail(cls.__name__, got, f"a JSON object with {sorted(names)}")
    if not required <= set(record):
        name = f"{cls.__name__} of law {law}"
        raise _checks.fail(name, sorted(record), f"at least {sorted(required)}")
    return record


def _text(generator: Generator | TableGenerator) -> str:
    """The JSON form, made once: torch.compile cannot trace the json module."""
    record = {f.name: getattr(generator, f.name) for f in fields(generator) if f.init}
    if record["law"] == LAW_VERSION:
        record.pop("laps", None)
    return json.dumps(record, separators=(",", ":"))


def _check_law(law: object) -> None:
    if type(law) is not int or law not in LAWS:
        known = ", ".join(map(str, LAWS))
        gone = "; law 2 was never released, law 3 takes its place" if law == 2 else ""
        raise _checks.fail("law", repr(law), f"one of {known}, the laws known here{gone}")
