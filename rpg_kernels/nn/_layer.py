"""What the layers share: where the virtual weight comes from, and the bias."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn

from rpg_kernels import _checks
from rpg_kernels._tensors import DTYPES
from rpg_kernels.bank.config import RPGConfig
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.scales import layer_std
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.law.geometry import VirtualMatrix


class VirtualLayer(nn.Module):
    """Base of the layers: holds a VirtualWeight, which holds the bank unregistered.

    The bank is registered once, by the model: as ``model.rpg_bank`` by ``convert`` and ``attach``.
    A layer made without a bank owns a private one, registered as ``layer.rpg_bank``.
    """

    rpg_operator: ClassVar[str]
    virtual_weight: VirtualWeight
    bias: nn.Parameter | None

    def _place(
        self,
        shape: tuple[int, ...],
        bank: ParameterBank | None,
        virtual_weight: VirtualWeight | None,
        scale: float | str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        lookup: bool = False,
    ) -> None:
        """Set ``virtual_weight``: the one given, or the next of the bank, or of a private bank."""
        if dtype is not None and dtype not in DTYPES:
            raise _checks.fail("dtype", dtype, "float64, float32, bfloat16 or float16")
        owner = bank if virtual_weight is None else getattr(virtual_weight, "bank", None)
        if isinstance(owner, ParameterBank) and device is not None:
            have = owner.weight.device.type
            if torch.device(device).type != have:
                raise _checks.fail("device", device, f"the bank's, {have}, or None")
        if virtual_weight is not None and scale != "match":
            raise _checks.fail("scale", scale, "none, as the virtual weight has its own")
        if virtual_weight is not None:
            if not isinstance(virtual_weight, VirtualWeight):
                got = type(virtual_weight).__name__
                raise TypeError(f"virtual_weight: got a {got}, wanted a VirtualWeight or None")
            if bank is not None and bank is not virtual_weight.bank:
                raise _checks.fail("bank", "another bank", "the virtual weight's, or None")
            if tuple(virtual_weight.shape) != shape:
                got = f"shape {list(virtual_weight.shape)}"
                raise _checks.fail("virtual_weight", got, f"shape {list(shape)}")
            self.virtual_weight = virtual_weight
            return
        if bank is not None and not isinstance(bank, ParameterBank):
            raise TypeError(f"bank: got a {type(bank).__name__}, wanted a ParameterBank or None")
        if bank is None:
            bank = _private_bank(shape, device, dtype)
            self.rpg_bank = bank
        if isinstance(scale, str):
            scale = layer_std(scale, shape, lookup=lookup) / bank.init_std
        self.virtual_weight = bank.place(shape, scale=scale)

    def _make_bias(
        self, size: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        vw = self.virtual_weight
        self.bias = nn.Parameter(
            torch.empty(size, device=device or vw.device, dtype=dtype or vw.dtype)
        )

    def reset_parameters(self) -> None:
        """Draw the bias anew, as torch does. The bank has a ``reset_parameters`` of its own."""
        if self.bias is not None:
            shape = self.virtual_weight.shape
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            nn.init.uniform_(self.bias, -bound, bound)


def _private_bank(
    shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None
) -> ParameterBank:
    """Room for the whole layer, padding and all, in whole slots: nothing is shared."""
    granularity = RPGConfig(dof=1).granularity
    slots = -(-VirtualMatrix(shape, granularity).span // granularity)
    return ParameterBank(dof=slots * granularity, device=device, dtype=dtype)
