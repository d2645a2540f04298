"""``load``: a file's values into a model, once everything about them has been checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rpg_kernels import _checks
from rpg_kernels._json import parse_json
from rpg_kernels._tensors import memory
from rpg_kernels.bank.bank_map import BankMap
from rpg_kernels.checkpoint import file_format, stored_banks
from rpg_kernels.checkpoint.contents import (
    CHANNELS,
    EXTRA_STATE,
    Contents,
    contents_of,
    join,
    some,
    ties,
)
from rpg_kernels.pruning import keep_channels, kept_channels

Model = TypeVar("Model", bound=nn.Module)


def load(model: Model, path: str | os.PathLike[str]) -> Model:
    """Load a file written by ``save`` into a model of the same map. In place.

    Everything is checked before the model changes. Values are copied into the parameters there
    are, floating-point ones cast to their dtype, so that optimisers keep them; parameters on
    meta are made anew on the CPU, in their dtype. The layers' scales are those of the file. A bank
    that the file holds in another form, quantised, compacted or neither, takes that form, as a new
    parameter. A file of a model whose channels were pruned prunes a whole model alike: the layers
    that lost some then have new parameters.
    Nothing is unpickled. The file's tensors are held in CPU memory meanwhile.

    Args:
        model: built as the saved one was; it may be on meta, wholly or in part. Buffers that no
            state dict holds stay where they are.
        path: of the file.

    Returns:
        The model.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: the file is damaged, foreign or of an unknown version; its generator, layers,
            names, shapes or (unless floating) dtypes are not the model's; the model cannot be
            loaded into (see ``save``; expanded and inference tensors). The model is unchanged.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile, rpg_kernels as rpg
        >>> def build(seed):
        ...     return rpg.nn.Linear(64, 64, bank=rpg.ParameterBank(dof=1024, seed=seed))
        >>> first, second = (rpg.attach(layer, layer.virtual_weight.bank)
        ...                  for layer in (build(seed=0), build(seed=1)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rpg.save(first, f"{folder}/model.safetensors")
        ...     rpg.load(second, f"{folder}/model.safetensors")
        Traceback (most recent call last):
        ValueError: ...rpg_bank: ... (seed: got 0, wanted 1)
    """
    contents = contents_of(model)
    for name, tensor in contents.tensors.items():
        _writable(name, tensor)
    path = os.fsdecode(path)
    try:
        tensors, metadata = file_format.read(path)
        stored = _record(metadata, "rpg_stored") if "rpg_stored" in metadata else {}
        with _pruned_alike(contents.model, metadata):
            contents = contents_of(model)
            forms = stored_banks.forms_of(contents, stored, tensors)
            stored_banks.in_forms(contents, forms)
            state = _state(contents, tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error)[:1000]}") from error
    stored_banks.take_forms(contents, forms)
    _materialize(contents.model)
    contents.model.load_state_dict(state)
    return model


@contextmanager
def _pruned_alike(model: nn.Module, metadata: dict[str, str]) -> Iterator[None]:
    """Remove the channels that the saved model lacks; whole again where the context fails.

    Raises:
        ValueError: the model has lost other channels before, or its layers are others.
    """
    theirs = _record(metadata, CHANNELS) if CHANNELS in metadata else {}
    mine = kept_channels(model)
    if theirs == mine:
        yield
        return
    if mine:
        got = f"those of a model that was pruned otherwise ({some(sorted({*theirs, *mine}))})"
        wanted = "those that this model kept, or load into a whole model, which is pruned alike"
        raise _checks.fail(CHANNELS, got, wanted)
    try:
        undo = keep_channels(model, theirs)
    except TypeError as error:
        raise ValueError(f"{CHANNELS}: {error}") from error
    try:
        yield
    except BaseException:
        undo()
        raise


def _state(
    contents: Contents, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> dict[str, Tensor]:
    """The state dict to load, when a file's contents fit a model.

    Raises:
        ValueError: they do not.
    """
    records, layers, aliases = (
        _record(metadata, f"rpg_{part}") for part in ("banks", "layers", "aliases")
    )
    maps = {name: BankMap.from_record(record) for name, record in records.items()}
    for alias, name in aliases.items():
        if not isinstance(name, str) or name not in tensors or alias in tensors:
            raise ValueError(f"rpg_aliases: got {alias!r} for {name!r}, which is not so")
    values = {**tensors, **{alias: tensors[name] for alias, name in aliases.items()}}
    _same_names("banks", maps, contents.banks)
    for name, bank in contents.banks.items():
        try:
            bank.check(maps[name], values.get(join(name, "table"), bank.table))
        except ValueError as error:
            raise ValueError(f"{name or 'bank'}: {error}") from error
    _same_names("rpg layers", layers, contents.layers)
    for name, wanted in contents.layers.items():
        if layers[name] != wanted:
            what = "(bank, layer number, rows, columns)"
            got = f"{str(layers[name])[:200]}, wanted {str(wanted)[:200]}"
            raise ValueError(f"{name or 'model'}: got {got} {what}")
    _same_names("tensors", values, contents.tensors)
    for name, tensor in contents.tensors.items():
        if name.endswith(EXTRA_STATE):  # another module's, which may be of any kind
            continue
        _check_dtype(name, values[name].dtype, tensor.dtype)
        if values[name].shape != tensor.shape:
            got = f"shape {list(values[name].shape)}"
            raise _checks.fail(name, got, f"shape {list(tensor.shape)}")
    for first, *others in ties(contents.tensors):
        for other in others:
            a, b = values[first], values[other]
            if a is not b and (a.dtype != b.dtype or memory(a) != memory(b)):
                raise ValueError(f"{first} and {other}: got two tensors, wanted one (tied)")
    state = {key: values[name] for name, key in contents.keys.items()}
    state.update({key: maps[name].to_tensor() for name, key in contents.bank_keys.items()})
    return state


def _check_dtype(name: str, got: torch.dtype, wanted: torch.dtype) -> None:
    """Refuse what copying would silently change beyond rounding."""
    floating = got.is_floating_point and wanted.is_floating_point
    if got != wanted and not floating and not (got.is_complex and wanted.is_complex):
        raise _checks.fail(name, got, str(wanted))


def _writable(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that cannot be copied into, before any other is."""
    if tensor.is_inference():
        raise _checks.fail(name, "an inference tensor", "an ordinary tensor")
    if any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
        raise _checks.fail(name, "an expanded tensor", "a tensor with memory for every element")


def _record(metadata: dict[str, str], key: str) -> dict[str, Any]:
    record = parse_json(metadata.get(key, "null"))
    if not isinstance(record, dict):
        raise ValueError(f"{key}: got a {type(record).__name__}, wanted an object")
    return record


def _same_names(what: str, got: Iterable[str], wanted: Iterable[str]) -> None:
    missing, unexpected = sorted(set(wanted) - set(got)), sorted(set(got) - set(wanted))
    parts = [f"none of {some(missing)}"] * bool(missing)
    parts += [f"{some(unexpected)}, which the model lacks"] * bool(unexpected)
    if parts:
        raise ValueError(f"{what}: got {', and '.join(parts)}")


def _materialize(model: nn.Module) -> None:
    """Give every saved tensor on meta memory on the CPU; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    places: list[tuple[nn.Module, str, Tensor]] = []
    for module in model.modules():
        saved = {**module._parameters, **module._buffers}
        for key, tensor in saved.items():
            if tensor is None or not tensor.is_meta or key in module._non_persistent_buffers_set:
                continue
            if id(tensor) not in made:
                new = torch.empty_like(tensor, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                made[id(tensor)] = new
            places.append((module, key, made[id(tensor)]))
    for module, key, new in places:
        setattr(module, key, new)
