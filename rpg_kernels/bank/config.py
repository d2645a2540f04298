"""RPGConfig: everything that ``convert`` needs to know, in one frozen record."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rpg_kernels import _checks
from rpg_kernels.law.ring import REFLECT
from rpg_kernels.law.window import check_windows

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
        window: slots of a window (law 2, ``docs/window_law.md``), a power of two (a multiple of
            8) from 64 to 32768 and at most the ring; None draws from the whole ring (law 1).
        laps: times that a unit reads each slot of its window, 1 to 64 and at most the compression
            (weights, padding counted, / dof); None for the largest power of two up to 4 that this
            allows. Memory is read that many times less often.
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
    window: int | None = None
    laps: int | None = None
    seed: int = 0
    init_std: float = PAPER_INIT_STD
    scale: str = "match"

    def __post_init__(self) -> None:
        _checks.integer("dof", self.dof, 1, 2**62)
        _checks.granularity(self.granularity)
        _checks.choice("reflect", self.reflect, REFLECT)
        _checks.boolean("permute", self.permute)
        check_windows(self.window, self.laps, ring_of(self.dof, self.granularity)[0])
        _checks.integer("seed", self.seed, 0, 2**63 - 1)
        if _checks.finite("init_std", self.init_std) <= 0:
            raise _checks.fail("init_std", self.init_std, "a number above 0")
        _checks.choice("scale", self.scale, SCALES)


def ring_of(dof: int, granularity: int) -> tuple[int, int]:
    """(slots, granularity) of a bank: whole slots, of a smaller granularity where dof has none.

    Example:
        >>> ring_of(1000, 64), ring_of(63, 64)
        ((15, 64), (1, 32))
    """
    granularity = min(granularity, 1 << (dof.bit_length() - 1))
    return dof // granularity, granularity
