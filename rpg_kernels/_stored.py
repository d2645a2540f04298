"""StoredValues: a bank whose values are kept in fewer bytes, as the tensor that operators read.

A slot of it is ``codes[row] * scales[row]``, where ``row`` is ``places[slot]``, or the slot itself
where there are no places; a slot whose place is -1 is zeros and takes no memory. Banks that were
quantised have scales, banks that were compacted have places, and one bank may have both.

Operators that read a bank take it like any tensor. Below autograd each of them becomes its twin,
whose arguments are the parts (``rpg_kernels/ops/stored.py``), so that compilers and tracers see
plain tensors only. Whatever else is called with it works on a dense copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rpg_kernels import _checks

PARTS = ("codes", "scales", "places")
KEPT, INT8 = "kept", "int8"
ACTIVATIONS = (KEPT, INT8)  # what products do with x: leave it, or round each row to int8
ABSENT = -1  # the place of a slot that is zeros
TWIN = "_stored"  # suffix of the operators that take the parts
_NAMESPACE = "rpg_kernels"


class StoredValues(Tensor):
    """Values ``[slots, granularity]`` in fewer bytes; never trained, never changed in place.

    Nothing is checked here, since torch makes many of them; ``check_parts`` and the operators
    check.

    Args:
        codes: int8 or float8_e4m3fn ``[rows, granularity]`` with scales, otherwise of ``dtype``.
            Rows are the slots that are there.
        scales: float32 ``[rows]``, or None where codes are the values.
        places: int32 ``[slots]``: the row of a slot, or -1 where the slot is zeros; None where row
            and slot are the same.
        dtype: that the values stand for: of products, and of a weight that is unpacked.
        activations: ``"kept"``, or ``"int8"``: products may round each row of x to int8 too.

    Example:
        >>> codes = torch.tensor([[127, -64]], dtype=torch.int8)
        >>> values = StoredValues(codes, torch.tensor([0.5]), torch.tensor([-1, 0]).int())
        >>> tuple(values.shape), values.dtype, values.dense().tolist()
        ((2, 2), torch.float32, [[0.0, 0.0], [63.5, -32.0]])
    """

    codes: Tensor
    scales: Tensor | None
    places: Tensor | None
    activations: str

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        scales: Tensor | None = None,
        places: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        activations: str = KEPT,
    ) -> StoredValues:
        slots = len(codes) if places is None else len(places)
        made: StoredValues = Tensor._make_wrapper_subclass(
            cls, (slots, codes.shape[1]), dtype=dtype, device=codes.device
        )
        made.codes, made.scales, made.places = codes, scales, places
        made.activations = activations
        return made

    def __init__(self, *args: Any, **named: Any) -> None:
        """Everything is done by __new__; nn.Parameter makes one without calling this."""

    def parts(self) -> dict[str, Tensor]:
        """The tensors that hold the values, by name; those that are there."""
        named = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def bytes(self) -> int:
        """Memory of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    @property
    def form(self) -> str:
        """What it is stored as, for people: the dtype of codes, and whether slots were left out."""
        dtype = str(self.codes.dtype).removeprefix("torch.")
        return dtype if self.places is None else f"{dtype}, {len(self.codes)} of {len(self)} slots"

    @property
    def rounds_rows(self) -> bool:
        """Whether linear layers round each row of x to int8: where codes are int8 too."""
        return self.activations == INT8 and self.codes.dtype == torch.int8

    def read_blocks(self, slot: Tensor, out: Tensor) -> None:
        """out = blocks of the bank, rounded once to out's dtype.

        Args:
            slot: int64 ``[count]``: numbers of blocks. A block is a slot or one of its equal
                pieces, and is numbered as if the bank were ``[slots * pieces, block]``.
            out: ``[count, block]`` of a floating dtype, which is overwritten.
        """
        block = out.shape[1]
        pieces = self.codes.shape[1] // block
        row, piece = slot.div(pieces, rounding_mode="floor"), slot % pieces
        absent = None
        if self.places is not None:
            row = self.places[row].long()
            absent = row < 0
            if not len(self.codes):
                out.zero_()
                return
            row.clamp_(min=0)
        codes = self.codes.view(-1, block)[row * pieces + piece]
        if self.scales is None:
            out.copy_(codes)
        else:
            out.copy_(codes.float().mul_(self.scales[row].unsqueeze(1)))
        if absent is not None:
            out.masked_fill_(absent.unsqueeze(1), 0)

    def dense(self) -> Tensor:
        """All values ``[slots, granularity]`` of ``dtype``, in memory of their own."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.read_blocks(torch.arange(len(self), device=self.device), out)
        return out

    def with_parts(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> StoredValues:
        """Values of other parts, that are used like these."""
        named = {name: parts.get(name) for name in PARTS}
        return StoredValues(**named, dtype=dtype, activations=self.activations)

    def contiguous(self, *_: Any, **__: Any) -> StoredValues:
        """Itself: parts are contiguous."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> StoredValues:
        """Refuse to be trained, which would change nothing without a word.

        Raises:
            RuntimeError: requires_grad is true.
        """
        if requires_grad:
            raise RuntimeError(_not_trained(self))
        return self

    def share_memory_(self) -> StoredValues:
        """Move the parts to memory that processes share."""
        for part in self.parts().values():
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether all parts are in memory that processes share."""
        return all(part.is_shared() for part in self.parts().values())

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StoredValues({list(self.shape)}, {self.dtype}, as {self.form})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, str]]:
        return list(self.parts()), (self.dtype, self.activations)

    @staticmethod
    def __tensor_unflatten__(
        parts: Mapping[str, Tensor],
        context: tuple[torch.dtype, str],
        size: Sequence[int],
        stride: Sequence[int],
    ) -> StoredValues:
        named = {name: parts.get(name) for name in PARTS}
        dtype, activations = context
        return StoredValues(**named, dtype=dtype, activations=activations)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func.namespace == _NAMESPACE:
            return _twin(func, args)(*_in_parts(func, args), **named)
        own = _OWN.get(func)
        if own is not None and isinstance(args[0], StoredValues):
            return own(*args, **named)
        for value in _written(func, args, named):
            if isinstance(value, StoredValues):
                raise RuntimeError(_not_changed(value))
        return func(*tree_map(_dense, list(args)), **tree_map(_dense, named))


def _not_trained(values: StoredValues) -> str:
    return (
        f"bank: got values stored as {values.form}, which no gradient changes, wanted float "
        "values: rpg.dequantize(model) (and rpg.expand(model), where slots were left out) brings "
        "them back; rpg.quantize(model, ..., training=True) trains with rounding"
    )


def _not_changed(values: StoredValues) -> str:
    return (
        f"bank: got values stored as {values.form}, which are not changed in place, wanted float "
        "values: see rpg.dequantize and rpg.expand"
    )


def _dense(value: object) -> object:
    return value.dense() if isinstance(value, StoredValues) else value


def _written(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
    """The arguments that a function changes in place."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(named)
    written = (a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write)
    return [given.get(name) for name in written]


def _twin(func: Any, args: Sequence[Any]) -> Any:
    """The operator that takes the parts.

    Raises:
        RuntimeError: there is none, as func is for the gradient of a bank.
    """
    name = func._schema.name.partition("::")[2] + TWIN
    twin = getattr(getattr(torch.ops, _NAMESPACE), name, None)
    if twin is None:
        raise RuntimeError(_not_trained(next(a for a in args if isinstance(a, StoredValues))))
    return twin


def _in_parts(func: Any, args: Sequence[Any]) -> list[Any]:
    """The twin's arguments: the parts in place of the bank and of its table."""
    out: list[Any] = []
    at = next(i for i, argument in enumerate(func._schema.arguments) if argument.name == "bank")
    for i, value in enumerate(args):
        if i == at:
            if not isinstance(value, StoredValues):
                raise RuntimeError(f"{func}: got stored values for another tensor than the bank")
            out += [value.codes, value.scales, value.places, value.dtype, value.activations]
        elif i != at + 1:
            out.append(value)
    return out


def _each(function: Callable[..., Tensor]) -> Callable[..., StoredValues]:
    """What a function that keeps values makes of each part."""

    def run(values: StoredValues, *args: Any, **named: Any) -> StoredValues:
        named.pop("dtype", None)
        parts = {name: function(part, *args, **named) for name, part in values.parts().items()}
        return values.with_parts(parts, values.dtype)

    return run


def _to_copy(values: StoredValues, *, dtype: torch.dtype | None = None, **named: Any) -> Any:
    """Elsewhere, or for products of another floating dtype; codes that are values are cast."""
    dtype = dtype or values.dtype
    if not dtype.is_floating_point:
        return values.dense().to(dtype, **named)
    parts = {name: torch.ops.aten._to_copy(p, **named) for name, p in values.parts().items()}
    if values.scales is None:
        parts["codes"] = parts["codes"].to(dtype)
    return values.with_parts(parts, dtype)


def _copy_(values: StoredValues, source: Tensor, *_: Any) -> StoredValues:
    """Values stored in the same way replace these, as when a state dict is loaded. Float values
    have to be what these stand for: DDP hands every process a dense copy of the first one's.
    """
    if not isinstance(source, StoredValues) and _stands_for(values, source):
        return values
    theirs = source.parts() if isinstance(source, StoredValues) else {}
    if _kinds(theirs) != _kinds(values.parts()):
        raise RuntimeError(_not_changed(values))
    for name, part in values.parts().items():
        part.copy_(theirs[name])
    return values


def _stands_for(values: StoredValues, dense: Tensor) -> bool:
    if dense.is_meta or values.codes.is_meta or dense.shape != values.shape:
        return False
    return torch.equal(values.dense(), dense.to(values.device, values.dtype))


def _empty_like(values: StoredValues, *args: Any, **named: Any) -> StoredValues:
    """Parts of whatever memory holds, but for places: kernels read where they point."""
    made = _each(torch.empty_like)(values, *args, **named)
    if made.places is not None:
        made.places.fill_(ABSENT)
    return made


def _kinds(parts: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (part.dtype, part.shape) for name, part in parts.items()}


def _new_empty(values: StoredValues, size: Sequence[int], **named: Any) -> Tensor:
    given = {name: value for name, value in named.items() if value is not None}
    return torch.empty(size, **{"dtype": values.dtype, "device": values.device, **given})


_aten = torch.ops.aten
_OWN: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _each(_aten.detach.default),
    _aten.alias.default: _each(_aten.alias.default),
    _aten.clone.default: _each(torch.clone),
    _aten.empty_like.default: _empty_like,
    _aten.new_empty.default: _new_empty,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy_,
}


def check_parts(parts: Mapping[str, Tensor], shape: Sequence[int]) -> None:
    """Refuse parts from elsewhere that are not those of one bank: kernels read where places point.

    Args:
        parts: codes and, where they are there, scales and places.
        shape: slots and granularity of the bank.

    Raises:
        ValueError: shapes or dtypes that do not fit, places beyond the rows, scales that are no
            finite numbers from 0 on, codes that are NaN.
    """
    slots, granularity = shape
    codes, scales, places = (parts.get(name) for name in PARTS)
    if codes is None or codes.dim() != 2 or codes.shape[1] != granularity:
        got = None if codes is None else f"shape {list(codes.shape)}"
        raise _checks.fail("codes", got, f"[rows, {granularity}]")
    rows = len(codes)
    if places is None and rows != slots:
        raise _checks.fail("codes", f"{rows} rows", f"{slots}, as there are no places")
    if places is not None and (places.dtype, tuple(places.shape)) != (torch.int32, (slots,)):
        got = f"{places.dtype} {list(places.shape)}"
        raise _checks.fail("places", got, f"torch.int32 [{slots}]")
    if scales is not None and (scales.dtype, tuple(scales.shape)) != (torch.float32, (rows,)):
        got = f"{scales.dtype} {list(scales.shape)}"
        raise _checks.fail("scales", got, f"torch.float32 [{rows}]")
    if codes.is_meta:
        return
    if places is not None and bool(((places < ABSENT) | (places >= rows)).any()):
        raise _checks.fail("places", "numbers beyond the rows", f"{ABSENT} to {rows - 1}")
    if scales is not None and not bool((scales.isfinite() & (scales >= 0)).all()):
        raise _checks.fail("scales", "NaN, infinite or negative ones", "finite numbers from 0 on")
    if scales is not None and codes.is_floating_point() and bool(codes.float().isnan().any()):
        raise _checks.fail("codes", "NaN", "numbers")


def check_activations(activations: str) -> str:
    """What was given, where it is one of ``ACTIVATIONS``.

    Raises:
        ValueError: it is not.
    """
    return _checks.choice("activations", activations, ACTIVATIONS)
