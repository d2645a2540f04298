"""What makes a virtual weight look like a tensor to code that reads ``layer.weight``.

Three answers to a function of torch that is called with a virtual weight: an entry of ``FUSED``
computes it without Ŵ (``rpg_kernels.functional`` fills that table); a function that changes its
argument in place is turned into a change of the scale, or refused; anything else is called with
Ŵ itself, unpacked and differentiable.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

from rpg_kernels import _checks, settings
from rpg_kernels.bank.in_place import CHANGES

if TYPE_CHECKING:
    from rpg_kernels.bank.virtual_weight import VirtualWeight

# What would be lost on a temporary tensor.
_OF_LEAVES = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward")
_NO_GRADIENT = (
    "{}: a virtual weight has no gradient of its own; the bank's parameter has, the sum over all "
    "layers that read it (model.rpg_bank.weight)"
)
FUSED: dict[Any, Callable[..., Any]] = {}  # function of torch -> the same, or NotImplemented


class TensorLike(ABC):
    """Base of VirtualWeight and of its transpose: what tensors have, as far as it makes sense."""

    shape: torch.Size
    grad_fn = None
    is_leaf = True
    is_sparse = is_quantized = is_nested = False
    layout = torch.strided

    @property
    def grad(self) -> None:
        """None: the bank's parameter has the gradient."""
        return None

    @grad.setter
    def grad(self, value: object) -> None:
        if value is not None:
            raise RuntimeError(_NO_GRADIENT.format("grad"))

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The bank's dtype."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The bank's device."""

    @property
    @abstractmethod
    def requires_grad(self) -> bool:
        """Whether the bank gets a gradient through this weight."""

    @abstractmethod
    def unpack(self) -> Tensor:
        """Ŵ itself."""

    @abstractmethod
    def detach(self) -> TensorLike:
        """The same weight without a gradient."""

    @abstractmethod
    def whole(self) -> VirtualWeight:
        """The virtual weight that this is, or is another view of."""

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Virtual weights."""
        return math.prod(self.shape)

    nelement = numel

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        return True  # there is one; its values are not asked for

    @property
    def itemsize(self) -> int:
        """Bytes of an element, once it is unpacked."""
        return self.dtype.itemsize

    def element_size(self) -> int:
        """Bytes of an element, once it is unpacked."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of Ŵ, once it is unpacked."""
        return self.numel() * self.itemsize

    @property
    def is_meta(self) -> bool:
        """Whether the bank is on meta."""
        return self.device.type == "meta"

    @property
    def is_cuda(self) -> bool:
        """Whether the bank is on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def is_cpu(self) -> bool:
        """Whether the bank is on the CPU."""
        return self.device.type == "cpu"

    def get_device(self) -> int:
        """The number of the bank's device, -1 on the CPU."""
        index = self.device.index
        return -1 if index is None else index

    def is_floating_point(self) -> bool:
        """True: a bank holds nothing else."""
        return True

    def is_complex(self) -> bool:
        """False."""
        return False

    def is_contiguous(self, memory_format: Any = None) -> bool:
        """True: unpacked, it is."""
        return True

    def contiguous(self, memory_format: Any = None) -> TensorLike:
        """Itself."""
        return self

    @property
    def data(self) -> Any:
        """The same weight without a gradient; what is written into it changes the scale only."""
        return self.detach()

    @property
    def T(self) -> Any:
        """The transpose, which still runs the fused operators."""
        return TransposedWeight(self) if self.ndim == 2 else self.unpack().permute(*_reversed(self))

    def t(self) -> Any:
        """The transpose, which still runs the fused operators."""
        return TransposedWeight(self) if self.ndim == 2 else self.unpack().t()

    def transpose(self, dim0: int, dim1: int) -> Any:
        """The transpose, which of a matrix still runs the fused operators."""
        if self.ndim == 2 and {dim0 % 2, dim1 % 2} == {0, 1}:
            return TransposedWeight(self)
        return _unpacked(self).transpose(dim0, dim1)

    @property
    def mT(self) -> Any:
        """The transpose, which of a matrix still runs the fused operators."""
        return self.transpose(-2, -1)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself where nothing changes; else Ŵ, unpacked and converted."""
        args, copy = _plain(args), kwargs.pop("copy", False)
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        same = device is None or torch.device(device) == self.device
        if same and dtype in (None, self.dtype) and memory_format is None and not copy:
            return self
        return _unpacked(self).to(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Whatever else a tensor has: asked of Ŵ."""
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        method = getattr(torch.Tensor, name)
        if not callable(method):
            return getattr(_unpacked(self), name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if name in _OF_LEAVES:
                raise RuntimeError(_NO_GRADIENT.format(name))
            return self.__torch_function__(method, (), (self, *args), kwargs)

        return call

    def __getitem__(self, index: Any) -> Tensor:
        part: Tensor = _unpacked(self)[index]
        return part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return _unpacked(self).detach().cpu().numpy().astype(dtype or None, copy=False)

    def __eq__(self, other: object) -> Any:
        """With numbers and tensors elementwise; two weights are equal when they are one."""
        if isinstance(other, Tensor | int | float):
            return _unpacked(self) == other
        return self is other

    def __ne__(self, other: object) -> Any:
        if isinstance(other, Tensor | int | float):
            return _unpacked(self) != other
        return self is not other

    __hash__ = object.__hash__

    def __setitem__(self, index: Any, value: object) -> None:
        raise self._no_place("assigning to elements")

    def __iter__(self) -> Iterator[Tensor]:
        return iter(_unpacked(self))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        fused = FUSED.get(func)
        if fused is not None:
            result = fused(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = getattr(func, "__name__", str(func))
        target = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        out = kwargs.get("out")
        if isinstance(out, TensorLike):
            raise out._no_place("out=")
        if isinstance(target, TensorLike) and _in_place(name):
            kwargs = {key: value for key, value in kwargs.items() if value is not target}
            return target._change(name, args[1:], kwargs)
        if _in_place(name) and tree_any(lambda a: isinstance(a, TensorLike), target):
            raise next(w for w in tree_leaves(target) if isinstance(w, TensorLike))._no_place(name)
        if name == "view_as" and isinstance(target, TensorLike) and _asked_by("torch.nn.init"):
            raise target._no_place("nn.init")  # which writes through the view
        args, kwargs = tree_map_only(TensorLike, _unpacked, (args, kwargs))
        return func(*args, **kwargs)

    def _change(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TensorLike:
        """In place: what gives a scale or a standard deviation changes the scale."""
        if tree_any(lambda value: isinstance(value, Tensor | TensorLike), (args, kwargs)):
            raise self._no_place(f"{name} with a tensor")
        if self.numel() != self.whole().numel():
            raise self._no_place(f"{name} of selected rows or columns")
        change = CHANGES.get(name)
        try:
            scale = None if change is None else change(self.whole(), *args, **kwargs)
        except TypeError:  # arguments that mean something else
            scale = None
        if scale is None:
            raise self._no_place(f"{name}{args or ''}")
        self.whole().rescale(scale)
        return self

    def _no_place(self, what: str) -> RuntimeError:
        """The refusal of whatever would write values."""
        vw = self.whole()
        layer = vw.name or f"number {vw.placement.layer}"
        return RuntimeError(
            f"{what}: the weight of layer {layer} has no memory of its own, it is read from the "
            "parameter bank. Its standard deviation can be set (normal_, uniform_, mul_ of the "
            "weight, or virtual_weight.rescale); its values cannot. rpg.convert(..., "
            "init='least_squares') starts from given values, rpg.materialize(model) makes a dense "
            "model, and a dense layer can be put in this one's place"
        )


class TransposedWeight(TensorLike):
    """The transpose of a virtual matrix."""

    def __init__(self, base: TensorLike) -> None:
        self.base = base
        self.shape = torch.Size(reversed(base.shape))

    @property
    def dtype(self) -> torch.dtype:
        """The bank's dtype."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """The bank's device."""
        return self.base.device

    @property
    def requires_grad(self) -> bool:
        """Whether the bank gets a gradient through this weight."""
        return self.base.requires_grad

    def unpack(self) -> Tensor:
        """Ŵ transposed: a view."""
        return self.base.unpack().t()

    def detach(self) -> TensorLike:
        """The same without a gradient."""
        return TransposedWeight(self.base.detach())

    def whole(self) -> VirtualWeight:
        """The weight that this is the transpose of."""
        return self.base.whole()

    def t(self) -> Any:
        """The weight that this is the transpose of."""
        return self.base

    @property
    def T(self) -> Any:
        """The weight that this is the transpose of."""
        return self.base

    def transpose(self, dim0: int, dim1: int) -> Any:
        """The weight that this is the transpose of, or itself."""
        return self.base if dim0 % 2 != dim1 % 2 else self

    def is_contiguous(self, memory_format: Any = None) -> bool:
        """False, as of a transposed tensor."""
        return False

    def contiguous(self, memory_format: Any = None) -> Any:
        """Unpacked."""
        return self.unpack().contiguous()

    def __repr__(self) -> str:
        return f"{self.base!r}.t()"


def _operator(name: str) -> Callable[..., Any]:
    method = getattr(torch.Tensor, name)

    def call(self: TensorLike, *args: Any) -> Any:
        return self.__torch_function__(method, (), (self, *args), {})

    call.__name__ = name
    return call


_OPERATORS = """
    add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv matmul rmatmul
    pow rpow neg pos abs mod rmod floordiv rfloordiv lt le gt ge
"""
# Python looks operators up on the class.
for _operator_name in _OPERATORS.split():
    setattr(TensorLike, f"__{_operator_name}__", _operator(f"__{_operator_name}__"))


def _unpacked(weight: TensorLike) -> Tensor:
    """Ŵ, with one warning per layer where it exceeds what an operator may use as scratch."""
    vw = weight.whole()
    limit = settings.scratch_bytes(weight.device.type)
    if weight.nbytes > limit and not weight.is_meta and vw.bank.first_unpacking(vw):
        _checks.warn(
            f"the weight of layer {vw.name or vw.placement.layer} {list(vw.shape)} was unpacked "
            f"into {weight.nbytes} bytes, more than rpg.scratch_limit allows an operator "
            f"({limit}), because something used it as a tensor; linear, embedding, "
            "convolutions and matmul do not need that"
        )
    return weight.unpack()


def _asked_by(module: str) -> bool:
    """Whether a function of this module called the one that called a method of a weight."""
    caller: FrameType | None = sys._getframe(3)
    return caller is not None and caller.f_globals.get("__name__") == module


def _in_place(name: str) -> bool:
    inner = name.strip("_")
    return (name.endswith("_") and not name.endswith("__")) or (
        name.startswith("__i") and hasattr(torch.Tensor, f"{inner[1:]}_")
    )


def _reversed(weight: TensorLike) -> range:
    return range(weight.ndim - 1, -1, -1)


def _plain(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of ``to`` with the dtype and device of another weight spelled out."""
    if args and isinstance(args[0], TensorLike):
        return (args[0].device, args[0].dtype, *args[1:])
    return args
