"""RPGConfig: everything that ``convert`` needs to know, in one frozen record."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rpg_kernels import _checks
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.ring import REFLECT
from rpg_kernels.law.unit import check_windows

SCALES = ("match", "fan_out", "fan_in")

# Kaiming fan-out of a 3x3 convolution with 512 filters (paper, section 4): sqrt(2 / 4608).
PAPER_INIT_STD = math.sqrt(2 / (512 * 3 * 3))


@dataclass(frozen=True)
class RPGConfig:
    """How a model shares one parameter bank.

    Args:
        dof: degrees of freedom, the size of the bank. Rounded down to whole slots. A value above
            the number of virtual weights is allowed: each slot is then used at most once.
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

    Raises:
        TypeError, ValueError: a field is out of range, with what was got and wanted.

    Example:
        >>> RPGConfig(dof=2_000_000).granularity
        64
        >>> RPGConfig(dof=0)
        Traceback (most recent call last):
        ValueError: dof: got 0, wanted an int from 1 to 4611686018427387904
    """

    dof: int
    granularity: int = 64
    reflect: str = "vector"
    permute: bool = True
    laps: int | None = None
    window: int | None = None
    seed: int = 0
    init_std: float = PAPER_INIT_STD
    scale: str = "match"

    def __post_init__(self) -> None:
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

    @property
    def generator(self) -> Generator:
        """What G is: of law 3 with laps, and of law 1 without.

        Raises:
            ValueError: more slots than a bank can have.
        """
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
