"""Banks that are stored in fewer bytes, in files: the file's form becomes the model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpg_kernels import _checks
from rpg_kernels._stored import PARTS, StoredValues, check_activations, check_parts
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.rounding import FORMS
from rpg_kernels.bank.stored_state import WEIGHT
from rpg_kernels.checkpoint.contents import Contents, join

_FIELDS = ("dtype", "activations")
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}
_DTYPES["float64"] = torch.float64


def record_of(values: StoredValues) -> dict[str, str]:
    """What a file says of a stored bank beside its parts."""
    return {
        "dtype": str(values.dtype).removeprefix("torch."),
        "activations": values.activations,
    }


def forms_of(
    contents: Contents, records: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, StoredValues | None]:
    """The banks that the file holds in another form than the model: what they are to be replaced
    by, None for float values. They are for products of the model's dtype, whatever the file's is.

    Args:
        contents: of the model.
        records: of the file's stored banks, by the names of banks.
        tensors: of the file; codes that are values are cast to the model's dtype.

    Raises:
        ValueError: a record or parts that no bank has.
    """
    out: dict[str, StoredValues | None] = {}
    for name, record in records.items():
        if name not in contents.banks:
            raise ValueError(f"rpg_stored: got {name!r}, which is no bank of the model")
        bank = contents.banks[name]
        theirs = _values(name, bank, record, tensors).to(bank.weight.dtype)
        assert isinstance(theirs, StoredValues)
        tensors[join(name, "codes")] = theirs.codes
        mine = bank.stored
        if mine is None or _kind(mine) != _kind(theirs):
            out[name] = theirs
    for name, bank in contents.banks.items():
        if bank.stored is not None and name not in records:
            out[name] = None
    return out


def in_forms(contents: Contents, forms: dict[str, StoredValues | None]) -> None:
    """Make the contents of a model say what they will be once banks have these forms."""
    for name, values in forms.items():
        bank = contents.banks[name]
        prefix = contents.bank_keys[name].removesuffix("map_digits")
        for part in (WEIGHT, *PARTS):
            contents.keys.pop(join(name, part), None)
            contents.tensors.pop(join(name, part), None)
        plain = torch.empty(bank.weight.shape, dtype=bank.weight.dtype, device="meta")
        parts = {WEIGHT: plain} if values is None else values.parts()
        for part, tensor in parts.items():
            contents.keys[join(name, part)] = prefix + part
            contents.tensors[join(name, part)] = tensor


def take_forms(contents: Contents, forms: dict[str, StoredValues | None]) -> None:
    """Give the banks these forms; their values come with the state dict that is loaded next."""
    for name, values in forms.items():
        bank = contents.banks[name]
        device = torch.device("cpu") if bank.weight.is_meta else bank.weight.device
        if values is None:
            bank.hold(torch.empty(bank.weight.shape, dtype=bank.weight.dtype, device=device))
        else:
            bank.hold(values.clone().to(device))


def _values(
    name: str, bank: ParameterBank, record: object, tensors: dict[str, Tensor]
) -> StoredValues:
    what = f"{name}: rpg_stored"
    if not isinstance(record, dict) or set(record) != set(_FIELDS):
        raise _checks.fail(what, repr(record), f"a record of {', '.join(_FIELDS)}")
    dtype = _DTYPES[_checks.choice(f"{what} dtype", record["dtype"], tuple(_DTYPES))]
    parts = {part: tensors[join(name, part)] for part in PARTS if join(name, part) in tensors}
    if "codes" not in parts:
        raise ValueError(f"{what}: got no codes")
    codes = parts["codes"]
    if codes.dtype not in (FORMS.values() if "scales" in parts else (dtype,)):
        raise _checks.fail(f"{name}: codes", codes.dtype, "8 bits with scales, or values")
    try:
        check_parts(parts, (bank.slots, bank.granularity))
        activations = check_activations(record["activations"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    return StoredValues(**parts, dtype=dtype, activations=activations)


def _kind(values: StoredValues) -> Any:
    shapes = {name: (part.dtype, part.shape) for name, part in values.parts().items()}
    return shapes, values.dtype, values.activations
