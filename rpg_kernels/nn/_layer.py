"""What the layers share: where the virtual weight comes from, and the bias."""

from __future__ import annotations

import math
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rpg_kernels import _checks, torch_functions
from rpg_kernels._tensors import DTYPES
from rpg_kernels.bank.config import RPGConfig
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.scales import layer_std
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.law.geometry import VirtualMatrix
from rpg_kernels.nn.part import BANK_NAME, HoldsBank

_CURES = (
    "to tie a layer, assign another rpg layer's weight; to give it values of its own, put a "
    "torch.nn layer in its place (rpg.materialize makes one, of a layer or of a whole model); to "
    "start a bank from given values, rpg.convert(..., init='least_squares')"
)
assert torch_functions  # importing it teaches torch's functions about virtual weights


class VirtualLayer(HoldsBank):
    """Base of the layers: holds a VirtualWeight, which holds the bank unregistered.

    The bank is registered once, by the model: as ``model.rpg_bank`` by ``convert`` and ``attach``.
    A layer made without a bank owns a private one, registered as ``layer.rpg_bank``.

    ``layer.weight`` is the virtual weight, which behaves as a tensor where code expects one. A
    virtual weight of the same shape may be assigned to it: that ties. A parameter may be assigned
    in a copy of the layer, or where no other weight is read from the bank: it is then an ordinary
    dense layer.
    """

    rpg_operator: ClassVar[str]
    dense_type: ClassVar[type[nn.Module]]
    bias: nn.Parameter | None

    @property
    def weight(self) -> Any:
        """The virtual weight."""
        weight = self.virtual_weight
        if not torch.compiler.is_compiling():
            weight.resized = weakref.WeakMethod(self._resized)
        return weight

    @weight.setter
    def weight(self, value: Any) -> None:  # __setattr__ comes first; torch's types ask for this
        self._take_weight(value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "virtual_weight" in self.__dict__:
            self._take_weight(value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise AttributeError("weight: a virtual layer's cannot be deleted")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's; what pruning makes of a weight cannot be made of a virtual one."""
        if isinstance(param, VirtualWeight):
            raise TypeError(
                f"{name}: got a virtual weight, wanted a parameter; prune or normalise "
                "the bank (model.rpg_bank, 'weight'), or the layers of rpg.materialize(model)"
            )
        super().register_parameter(name, param)

    def _take_weight(self, value: object) -> None:
        """``layer.weight = value``."""
        old = self.virtual_weight
        shape = list(old.shape)
        if isinstance(value, VirtualWeight):
            if value.shape != old.shape:
                got = f"a virtual weight {list(value.shape)}"
                raise _checks.fail("weight", got, f"one of shape {shape}")
            if value.bank is not old.bank and self._registers():
                if old.bank.layers > 1:
                    raise RuntimeError(
                        f"weight: layer {old.name or old} registers the bank that other layers "
                        "read; tie the other layer to this one instead"
                    )
                del self._modules[BANK_NAME]
            self.virtual_weight = value
            return
        if isinstance(value, nn.Parameter) and (self.alone or old.bank.layers == 1):
            if value.shape != old.shape:
                got = f"a parameter {list(value.shape)}"
                raise _checks.fail("weight", got, f"one of shape {shape}")
            self._become_dense(value)
            return
        if not isinstance(value, nn.Parameter):
            wanted = "a virtual weight, or a parameter where no other layer reads the bank"
            raise TypeError(f"weight: got a {type(value).__name__}, wanted {wanted}; {_CURES}")
        raise TypeError(
            f"weight: got a {type(value).__name__}, but this layer ({old.name or old}) reads its "
            f"weight from a bank that other layers read too; {_CURES}"
        )

    def _resized(self, values: Tensor) -> None:
        """``layer.weight.data = values`` of another shape, as transformers resizes embeddings."""
        old = self.virtual_weight
        self._become_dense(nn.Parameter(values.detach(), requires_grad=old.requires_grad))
        _checks.warn(
            f"layer {old.name or old} was resized from {list(old.shape)} to "
            f"{list(values.shape)}: it is a dense layer now and no longer reads the bank"
        )

    def _refuse_buffer(self) -> None:
        """Something has written a tensor into the layer, past its attributes."""
        self._buffers["weight"] = None
        raise RuntimeError(
            f"weight: a tensor was put into layer {self.virtual_weight.name or self}, which reads "
            f"its weight from the bank; {_CURES}"
        )

    def _become_dense(self, weight: nn.Parameter) -> None:
        del self.virtual_weight
        self.__dict__.pop("alone", None)
        self._modules.pop(BANK_NAME, None)
        self.__class__ = self.dense_type  # type: ignore[assignment]
        nn.Module.__setattr__(self, "weight", weight)

    def _place(
        self,
        shape: tuple[int, ...],
        bank: ParameterBank | None,
        virtual_weight: VirtualWeight | None,
        scale: float | str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        lookup: bool = False,
        taps: int | None = None,
    ) -> None:
        """Set ``virtual_weight``: the one given, or the next of the bank, or of a private bank."""
        # An entry without a tensor: transformers ties weights by get_buffer, which asks for one and
        # then returns the attribute.
        self._buffers["weight"] = None
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
            setattr(self, BANK_NAME, bank)
        if isinstance(scale, str):
            scale = layer_std(scale, shape, lookup=lookup) / bank.init_std
        self.virtual_weight = bank.place(shape, scale=scale, taps=taps)

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
