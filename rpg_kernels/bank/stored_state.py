"""Banks that are stored in fewer bytes, in state dicts: their parts, as plain tensors.

``weight`` is replaced by ``codes`` and, where they are there, ``scales`` and ``places``, so that
every tool that saves state dicts saves the small tensors and never sees a special one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rpg_kernels._stored import PARTS, StoredValues, check_parts

WEIGHT = "weight"


def split(values: StoredValues, state: Any, prefix: str, keep_vars: bool) -> None:
    """Put the parts into a state dict, in place of the values."""
    state.pop(prefix + WEIGHT, None)
    for name, part in values.parts().items():
        state[prefix + name] = part if keep_vars else part.detach()


def joined(mine: StoredValues | None, state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A state dict with the values in place of their parts.

    Args:
        mine: what the bank holds; None where it holds float values.
        state: a state dict, which is left as it is.
        prefix: of the bank.

    Raises:
        ValueError: values in another form than the bank's.
    """
    given = {name: state[prefix + name] for name in PARTS if prefix + name in state}
    if mine is None:
        if "codes" not in given:
            return state
        raise ValueError(
            f"got values stored as {_form(given)}, wanted float values; convert the model as the "
            "saved one was (rpg.quantize, rpg.compact), or use rpg.load with a file of rpg.save"
        )
    if not given:
        if prefix + WEIGHT in state:
            raise ValueError(
                f"got float values, wanted values stored as {mine.form}; rpg.dequantize and "
                "rpg.expand make the model take these"
            )
        return state
    wanted = mine.parts()
    if not all(isinstance(part, Tensor) for part in given.values()) or _kinds(given) != _kinds(
        wanted
    ):
        raise ValueError(f"got values stored as {_kinds(given)}, wanted {_kinds(wanted)}")
    check_parts(given, mine.shape)
    rest = {key: value for key, value in state.items() if key not in _names(prefix)}
    return {**rest, prefix + WEIGHT: mine.with_parts(given, mine.dtype)}


def _names(prefix: str) -> set[str]:
    return {prefix + name for name in PARTS}


def _kinds(parts: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {str(getattr(part, 'dtype', type(part).__name__)).removeprefix('torch.')} "
        f"{list(getattr(part, 'shape', ()))}"
        for name, part in sorted(parts.items())
    )


def _form(parts: dict[str, Any]) -> str:
    dtype = str(getattr(parts["codes"], "dtype", "?")).removeprefix("torch.")
    return f"{dtype}, without its zero slots" if "places" in parts else dtype
