"""VirtualWeight: a weight that has a bank and a placement, and no storage."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rpg_kernels import _checks, settings
from rpg_kernels.law.generator import Generator, TableGenerator
from rpg_kernels.law.placement import Placement, parse

if TYPE_CHECKING:
    from rpg_kernels.bank.parameter_bank import ParameterBank


@dataclass(frozen=True, eq=False, repr=False)
class VirtualWeight:
    """Ŵ = scale · G · w of one layer. Made by ``ParameterBank.place``.

    Frozen, but for the scale, which follows a state dict that is loaded into the bank.

    Not a tensor and not a module: an nn.Module may hold one without registering the bank.

    Args:
        bank: what it reads; its generator must be the placement's.
        placement: shape, layer, segment, scale and selection.
        root: the weight that this is a part of, whose scale it follows; None for a whole one.

    Raises:
        ValueError: the placement was made for another generator.

    Example:
        >>> from rpg_kernels import ParameterBank
        >>> vw = ParameterBank(dof=640, granularity=64).place((8, 128), scale=0.5)
        >>> vw.shape, vw.numel(), vw.narrow(0, 2, 3).shape
        (torch.Size([8, 128]), 1024, torch.Size([3, 128]))
        >>> torch.equal(vw.narrow(0, 2, 3).unpack(), vw.unpack()[2:5])
        True
    """

    bank: ParameterBank
    placement: Placement
    root: VirtualWeight | None = None  # the whole weight, when this is a part of one
    text: str = field(init=False)  # the placement as JSON, made once
    shape: torch.Size = field(init=False)  # torch's shape of the (selected) weight

    def __post_init__(self) -> None:
        if not isinstance(getattr(self.bank, "generator", None), Generator | TableGenerator):
            raise TypeError(f"bank: got a {type(self.bank).__name__}, wanted a ParameterBank")
        if not isinstance(self.placement, Placement):
            got = type(self.placement).__name__
            raise TypeError(f"placement: got a {got}, wanted a Placement")
        if self.placement.generator != self.bank.generator:
            raise _checks.fail("placement", self.placement.generator, str(self.bank.generator))
        object.__setattr__(self, "shape", torch.Size(self.placement.selected_shape))
        object.__setattr__(self, "text", self.placement.to_json())

    @property
    def spec(self) -> str:
        """The placement as text, which operators take on every call."""
        if self.root is not None and self.root.scale != self.placement.scale:
            return replace(self.placement, scale=self.root.scale).to_json()
        return self.text

    @property
    def scale(self) -> float:
        """The layer's multiplier; that of the whole weight, for a part of one."""
        return self.placement.scale if self.root is None else self.root.scale

    @property
    def dtype(self) -> torch.dtype:
        """The bank's dtype."""
        return self.bank.weight.dtype

    @property
    def device(self) -> torch.device:
        """The bank's device."""
        return self.bank.weight.device

    def numel(self) -> int:
        """Virtual weights."""
        return self.placement.numel

    def narrow(self, dim: int, start: int, length: int) -> VirtualWeight:
        """Rows (dim 0) or columns (dim 1, in-channels of a convolution) start to start + length.

        Raises:
            IndexError, ValueError: dim, start or length is out of range.
        """
        placement = self.placement.narrow(dim, start, length)
        return VirtualWeight(self.bank, placement, self.root or self)

    def rescale(self, scale: float) -> None:
        """Change the scale: what loading a state dict into the bank does, and nothing else should.

        Raises:
            TypeError, ValueError: not a finite number other than 0.
        """
        placement = replace(self.placement, scale=scale)
        object.__setattr__(self, "placement", placement)
        object.__setattr__(self, "text", placement.to_json())

    def unpack(self) -> Tensor:
        """Ŵ itself: torch's layout, scale included, the bank's dtype; differentiable."""
        bank, table = self.operands()
        result: Tensor = torch.ops.rpg_kernels.unpack(
            bank, table, self.spec, settings.forced_backend()
        )
        return result

    def pack(self, dense: Tensor) -> Tensor:
        """The adjoint of unpack, scale · Gᵀ · dŴ: ``[slots, granularity]``, the bank's dtype.

        Raises:
            TypeError, ValueError: dense is not of this weight's shape, dtype and device.
        """
        bank, table = self.operands()
        if _checks.tensor("dense", dense).device != bank.device:
            raise _checks.fail("dense", f"device {dense.device}", f"device {bank.device}")
        result: Tensor = torch.ops.rpg_kernels.pack(
            dense, table, self.spec, bank.dtype, settings.forced_backend()
        )
        return result

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """What operators read: the bank's parameter, and its table or None.

        Raises:
            RuntimeError: in forward-mode differentiation, where torch.library's derivatives are
                silently dropped.
        """
        if forward_ad._current_level >= 0:
            raise RuntimeError("forward-mode differentiation of rpg operators is not supported")
        return self.bank.weight, self.bank.table

    def to_json(self) -> str:
        """The placement as one line of JSON, law version included; the bank's values are not."""
        return self.spec

    @classmethod
    def from_json(cls, bank: ParameterBank, text: str) -> VirtualWeight:
        """The inverse of to_json for a bank with the same generator.

        Raises:
            TypeError, ValueError: not a placement's JSON, or made for another generator.
        """
        placement = parse(text)
        return cls(bank, placement, bank.placed(placement))

    def __repr__(self) -> str:
        p = self.placement
        full = tuple(p.shape)
        part = "" if p.selected_shape == full else f" of {full} at {p.rows}, {p.columns}"
        return (
            f"VirtualWeight({tuple(self.shape)}{part}, layer={p.layer}, start={p.start}, "
            f"scale={self.scale:.4g}, dof={self.bank.dof})"
        )
