"""RPGConfig: everything that ``convert`` needs to know, in one frozen record; and its groups."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar, Unpack, cast

from torch import nn

from rpg_kernels import _checks
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.ring import REFLECT
from rpg_kernels.law.unit import check_windows

SCALES = ("match", "fan_out", "fan_in")

# Kaiming fan-out of a 3x3 convolution with 512 filters (paper, section 4): sqrt(2 / 4608).
PAPER_INIT_STD = math.sqrt(2 / (512 * 3 * 3))

_Made = TypeVar("_Made")
_GROUP_NAME = re.compile("[A-Za-z0-9_]+")


class BankSettings(TypedDict, total=False):
    """Fields of ``RPGConfig`` that several banks may have in common."""

    granularity: int
    reflect: str
    permute: bool
    laps: int | None
    window: int | None
    seed: int
    init_std: float
    scale: str


class GroupSettings(BankSettings, total=False):
    """What a group may say otherwise than its config."""

    dof: int | None


@dataclass(frozen=True, init=False, repr=False)
class Group:
    """Layers of a model that read a bank of their own ("RPG.blk", section 3 of the paper).

    Args:
        name: letters, digits and underscores. The bank becomes ``model.rpg_bank_<name>``.
        layers: a pattern of names as of ``fnmatch.fnmatchcase``, which a layer's dotted name or
            that of a module around it has to match, so that ``"blocks.1"`` means everything in that
            block and nothing in ``blocks.10``; or a function ``(module, name) -> bool``, as
            ``filter_fn`` of ``convert``.
        settings: fields of ``RPGConfig`` that replace the config's for this group. ``laps=None``
            replaces too. A group without a dof gets a share of the config's.

    Raises:
        TypeError, ValueError: a setting that there is not, or an argument of a wrong type or value.

    Example:
        >>> Group("late", "blocks.[67]", laps=4, dof=1024)
        Group('late', 'blocks.[67]', dof=1024, laps=4)
        >>> Group("late", "blocks.7", lap=4)
        Traceback (most recent call last):
        TypeError: group 'late': got lap, wanted settings among granularity, reflect, ...
    """

    name: str
    layers: str | Callable[[nn.Module, str], bool]
    _settings: tuple[tuple[str, Any], ...]  # not a dictionary, so that a config can be hashed

    def __init__(
        self,
        name: str,
        layers: str | Callable[[nn.Module, str], bool],
        **settings: Unpack[GroupSettings],
    ) -> None:
        check_group_name("name", name)
        what = f"group {name!r}"
        if not callable(layers) and (not isinstance(layers, str) or not layers):
            raise TypeError(f"{what}: got layers {layers!r}, wanted a pattern or a function")
        known = GroupSettings.__annotations__
        if unknown := [key for key in settings if key not in known]:
            wanted = f"settings among {', '.join(known)}"
            raise TypeError(f"{what}: got {', '.join(unknown)}, wanted {wanted}")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "_settings", tuple(sorted(settings.items())))
        # Beside what a config may well say; what the two say together is checked by the config.
        laps = None if settings.get("window") is None else 1
        RPGConfig(dof=1, laps=laps).of_group(self, 1)

    @property
    def settings(self) -> GroupSettings:
        """The settings that were given."""
        return cast(GroupSettings, dict(self._settings))

    def __repr__(self) -> str:
        given = "".join(f", {name}={value!r}" for name, value in self._settings)
        return f"Group({self.name!r}, {self.layers!r}{given})"


@dataclass(frozen=True)
class RPGConfig:
    """How a model shares one parameter bank, or one for each of several groups of layers.

    Args:
        dof: degrees of freedom, the size of the bank. Rounded down to whole slots. A value above
            the number of virtual weights is allowed: each slot is then used at most once. With
            groups, what those without a dof of their own share out in proportion to their virtual
            weights: in whole slots, at least one each, together at most this; by largest
            remainders. Without groups it is required.
        granularity: elements per slot, a power of two from 1 (the paper) to 128.
        reflect: ``"element"`` (the paper: a sign per element), ``"vector"`` (a sign per slot
            use) or ``"none"``.
        permute: False reads the ring in order (an ablation of the paper).
        laps: times that the slots of a unit, some rows and taps of a channel block, are read close
            together: a layer needs 1/laps of the multiplications, and reads memory that many times
            less often (law 3, ``docs/unit_law.md``). 1 to 64, and at most the compression (weights,
            padding counted, / dof). None draws each weight from the whole bank (law 1).
        window: slots that the units aim at, a multiple of 8 from 8 to 4096: for experts, and only
            with laps. None lets the law choose.
        seed: of the generating matrix and nothing else, 0 to 2^63 - 1.
        init_std: standard deviation of the bank at initialisation.
        scale: the rule for each layer's standard deviation at initialisation: ``"match"`` (the
            rule by which the replaced weight was drawn, see ``scales.layer_std``), ``"fan_out"``
            or ``"fan_in"`` (Kaiming, gain sqrt(2)).
            The layer's scale is that standard deviation divided by init_std.
        groups: of layers with a bank each, see ``Group``; layers outside of all of them stay dense.
            The other fields hold for every group that does not say otherwise.

    Raises:
        TypeError, ValueError: a field is out of range, with what was got and wanted; groups of one
            name; a dof that no group would use, or groups that would have none.

    Example:
        >>> RPGConfig(dof=2_000_000).granularity
        64
        >>> RPGConfig(dof=0)
        Traceback (most recent call last):
        ValueError: dof: got 0, wanted an int from 1 to 4611686018427387904
    """

    dof: int | None = None
    granularity: int = 64
    reflect: str = "vector"
    permute: bool = True
    laps: int | None = None
    window: int | None = None
    seed: int = 0
    init_std: float = PAPER_INIT_STD
    scale: str = "match"
    groups: Sequence[Group] = ()

    def __post_init__(self) -> None:
        self._check_groups()
        if self.dof is not None or not self.groups:
            _checks.integer("dof", self.dof, 1, 2**62)
        _checks.granularity(self.granularity)
        _checks.choice("reflect", self.reflect, REFLECT)
        _checks.boolean("permute", self.permute)
        if self.laps is not None:
            check_windows(self.window, self.laps)
        elif self.window is not None:
            raise _checks.fail("window", self.window, "None without laps")
        _checks.integer("seed", self.seed, 0, 2**63 - 1)
        if _checks.finite("init_std", self.init_std) <= 0:
            raise _checks.fail("init_std", self.init_std, "a number above 0")
        _checks.choice("scale", self.scale, SCALES)
        for group in self.groups:
            self.of_group(group, 1)

    def _check_groups(self) -> None:
        if isinstance(self.groups, str | Group) or not isinstance(self.groups, Sequence):
            got = type(self.groups).__name__
            raise TypeError(f"groups: got a {got}, wanted a sequence of rpg.Group")
        object.__setattr__(self, "groups", tuple(self.groups))
        names = set()
        for group in self.groups:
            if not isinstance(group, Group):
                got = type(group).__name__
                raise TypeError(f"groups: got a {got} among them, wanted each an rpg.Group")
            if group.name in names:
                raise _checks.fail("groups", f"two called {group.name!r}", "names of their own")
            names.add(group.name)
        sharing = [g.name for g in self.groups if g.settings.get("dof") is None]
        if self.dof is None and sharing:
            got = f"None, and group {sharing[0]!r} has none of its own"
            raise _checks.fail("dof", got, "an int for such groups to share out")
        if self.dof is not None and self.groups and not sharing:
            got = f"{self.dof}, though every group has a dof of its own"
            raise _checks.fail("dof", got, "None, or a group without a dof")

    def of_group(self, group: Group, dof: int) -> RPGConfig:
        """What holds for one of the groups: a config without groups.

        Args:
            group: one of them.
            dof: its share, for a group without a dof of its own.

        Raises:
            ValueError: the group's settings and the config's do not go together.

        Example:
            >>> late = Group("late", "blocks.7", laps=4)
            >>> RPGConfig(dof=1024, seed=3, groups=[late]).of_group(late, 512).seed
            3
        """
        given: dict[str, Any] = {"dof": dof, "groups": ()}
        given.update(
            (key, value) for key, value in group._settings if (key, value) != ("dof", None)
        )
        return _within(group, lambda: dataclasses.replace(self, **given))

    @property
    def generator(self) -> Generator:
        """What G is: of law 3 with laps, and of law 1 without.

        Raises:
            ValueError: more slots than a bank can have; groups, which have a generator each.
        """
        if self.dof is None or self.groups:
            raise _checks.fail("groups", len(self.groups), "none: each has a generator of its own")
        slots, granularity = ring_of(self.dof, self.granularity)
        return Generator(
            slots=slots,
            granularity=granularity,
            reflect=self.reflect,
            permute=self.permute,
            window=self.window,
            laps=self.laps,
            seed=self.seed,
        )


def ring_of(dof: int, granularity: int) -> tuple[int, int]:
    """(slots, granularity) of a bank: whole slots, of a smaller granularity where dof has none.

    Example:
        >>> ring_of(1000, 64), ring_of(63, 64)
        ((15, 64), (1, 32))
    """
    granularity = min(granularity, 1 << (dof.bit_length() - 1))
    return dof // granularity, granularity


def check_group_name(argument: str, name: object) -> str:
    """Letters, digits and underscores, as it becomes a part of an attribute's name."""
    if not isinstance(name, str):
        raise TypeError(f"{argument}: got {name!r} ({type(name).__name__}), wanted a str")
    if not _GROUP_NAME.fullmatch(name):
        raise _checks.fail(argument, repr(name), "letters, digits and underscores (A-Za-z0-9_)")
    return name


def _within(group: Group, make: Callable[[], _Made]) -> _Made:
    """What ``make`` returns; its errors name the group."""
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise type(error)(f"group {group.name!r}: {error}") from error
