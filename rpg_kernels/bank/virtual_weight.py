"""VirtualWeight: a weight that has a bank and a placement, and no storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rpg_kernels import _bank_sums, _checks, settings
from rpg_kernels._tensors import refuse_forward_mode
from rpg_kernels.bank.tensor_like import TensorLike
from rpg_kernels.law.generator import Generator, TableGenerator
from rpg_kernels.law.placement import Placement, parse

if TYPE_CHECKING:
    from rpg_kernels.bank.parameter_bank import ParameterBank

_FIXED = ("bank", "placement", "root", "text", "image_text", "shape")


@dataclass(eq=False, repr=False)
class VirtualWeight(TensorLike):
    """Ŵ = scale · G · w of one layer. Made by ``ParameterBank.place``.

    Not a tensor, but it behaves as one where code expects ``layer.weight``: shape, dtype, device
    and so on are there, ``F.linear``, ``F.embedding``, convolutions and ``matmul`` run the fused
    operators, and whatever else is called with it gets Ŵ itself, unpacked and differentiable. In
    place it can only be scaled, or given a standard deviation (``normal_``, ``uniform_``): the
    values are the bank's. Not a module either, so an nn.Module may hold one without registering
    the bank.

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
        >>> (vw * 2).shape, vw.mul_(2).scale
        (torch.Size([8, 128]), 1.0)
    """

    bank: ParameterBank
    placement: Placement
    root: VirtualWeight | None = None  # the whole weight, when this is a part of one
    text: str = field(init=False)  # the placement as JSON, made once
    image_text: str = field(init=False)  # the same for images, where sequences have height one
    shape: torch.Size = field(init=False)  # torch's shape of the (selected) weight
    frozen: bool = field(init=False, default=False)  # no gradient goes into the bank from here
    name: str = field(init=False, default="")  # of the layer, where it is known
    # What to do when data of another shape are assigned: the layer that was last asked for it.
    resized: Callable[[], Callable[[Tensor], None] | None] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not isinstance(getattr(self.bank, "generator", None), Generator | TableGenerator):
            raise TypeError(f"bank: got a {type(self.bank).__name__}, wanted a ParameterBank")
        if not isinstance(self.placement, Placement):
            got = type(self.placement).__name__
            raise TypeError(f"placement: got a {got}, wanted a Placement")
        if self.placement.generator != self.bank.generator:
            raise _checks.fail("placement", self.placement.generator, str(self.bank.generator))
        self.shape = torch.Size(self.placement.selected_shape)
        self.text, self.image_text = _texts(self.placement)

    def __setattr__(self, name: str, value: object) -> None:
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(f"{name}: a virtual weight's does not change; see rescale")
        if name == "_is_param":
            raise TypeError(
                "nn.Parameter: got a virtual weight, wanted a tensor; weight.clone() is one, with "
                "values of its own"
            )
        super().__setattr__(name, value)

    @property
    def spec(self) -> str:
        """The placement as text, which operators take on every call."""
        return self.text if self._has_scale_of_root() else self._rescaled().to_json()

    @property
    def image_spec(self) -> str:
        """The same for operators of convolutions: a kernel ``[k]`` is one of ``[1, k]`` there."""
        if self._has_scale_of_root():
            return self.image_text
        return self._rescaled().of_images().to_json()

    def _has_scale_of_root(self) -> bool:
        return self.root is None or self.root.scale == self.placement.scale

    def _rescaled(self) -> Placement:
        return replace(self.placement, scale=self.scale)

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

    def select(self, dim: int, indices: Sequence[int]) -> VirtualWeight:
        """Chosen rows (dim 0) or columns (dim 1, in-channels of a convolution).

        Args:
            dim: 0 or 1.
            indices: strictly ascending numbers of this weight's rows or columns.

        Raises:
            IndexError, TypeError, ValueError: dim or indices are out of range or order.

        Example:
            >>> from rpg_kernels import ParameterBank
            >>> vw = ParameterBank(dof=640, granularity=64).place((8, 128))
            >>> torch.equal(vw.select(0, [1, 4, 5]).unpack(), vw.unpack()[[1, 4, 5]])
            True
        """
        placement = self.placement.select(dim, indices)
        return VirtualWeight(self.bank, placement, self.root or self)

    def whole(self) -> VirtualWeight:
        """The weight that this is a part of, or itself."""
        return self.root or self

    def rescale(self, scale: float) -> None:
        """Change the scale, and with it the standard deviation of the whole weight.

        A state dict that is loaded into the bank does this, and so does an initialiser.

        Raises:
            TypeError, ValueError: not a finite number other than 0.
        """
        whole = self.whole()
        placement = replace(whole.placement, scale=scale)
        whole.bank.look_at_map()
        whole.set_placement(placement)
        whole.bank.map_changed(whole)

    def set_placement(self, placement: Placement) -> None:
        """Take over a placement that differs in its scale only; the map is not told."""
        text, image_text = _texts(placement)
        self.__dict__.update(placement=placement, text=text, image_text=image_text)

    @property
    def data(self) -> VirtualWeight:
        """The same weight without a gradient; what is written into it changes the scale only."""
        return self.detach()

    @data.setter
    def data(self, value: object) -> None:
        ask = self.__dict__.pop("resized", None)
        resized = None if ask is None else ask()
        if resized is None or not isinstance(value, Tensor) or value.shape == self.shape:
            raise self._no_place("assigning to data")
        resized(value)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "resized"}

    def detach(self) -> VirtualWeight:
        """The same weight without a gradient."""
        twin = VirtualWeight(self.bank, self.placement, self.root or self)
        twin.frozen = True
        return twin

    @property
    def requires_grad(self) -> bool:
        """Whether the bank gets a gradient through this weight."""
        return not self.is_frozen() and any(p.requires_grad for p in self.bank.parameters())

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def is_frozen(self) -> bool:
        """Whether the gradient was stopped here, or at the weight that this is a part of."""
        return self.frozen or (self.root is not None and self.root.frozen)

    def requires_grad_(self, requires_grad: bool = True) -> VirtualWeight:
        """Stop the gradient from here into the bank, or let it through again."""
        self.frozen = not requires_grad
        return self

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
        """What operators read: the bank's values, and its table or None.

        Raises:
            RuntimeError: in forward-mode differentiation, where torch.library's derivatives are
                silently dropped.
            ValueError: the bank's values were replaced by those of another map.
        """
        refuse_forward_mode()
        values = self.bank.read()
        if self.is_frozen():
            values = values.detach()
        return _bank_sums.values(values), self.bank.table

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
        part = "" if p.selected_shape == full else f" of {full} at {_places(p)}"
        return (
            f"VirtualWeight({tuple(self.shape)}{part}, layer={p.layer}, start={p.start}, "
            f"scale={self.scale:.4g}, dof={self.bank.dof})"
        )


def _places(p: Placement) -> str:
    """Rows and columns, for readers."""
    chosen = p.rows_chosen, p.columns_chosen
    ranges = zip(chosen, (p.rows, p.columns), strict=True)
    return ", ".join(str(pair) if c is None else f"{len(c)} chosen" for c, pair in ranges)


def _texts(placement: Placement) -> tuple[str, str]:
    text, of_images = placement.to_json(), placement.of_images()
    return text, text if of_images is placement else of_images.to_json()
