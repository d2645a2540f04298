"""Checkpoints: a model's values in one safetensors file, with all that they mean."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rpg_kernels import _checks
from rpg_kernels._json import parse_json
from rpg_kernels._tensors import memory
from rpg_kernels._version import __version__
from rpg_kernels.bank.bank_map import BankMap
from rpg_kernels.bank.parameter_bank import EXTRA_STATE, ParameterBank
from rpg_kernels.checkpoint import safetensors_file as _safetensors
from rpg_kernels.conversion.ownership import orphans
from rpg_kernels.nn import VirtualLayer

Model = TypeVar("Model", bound=nn.Module)

FORMAT = "1"
_COMPILED = "_orig_mod"  # where torch.compile keeps the module that it wraps


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's values to a safetensors file that only a model of the same map loads.

    The file holds parameters and persistent buffers, tied ones once: bank elements, what is not
    shared, and a header. Its metadata holds each bank's map (generator and layers, with scales)
    and a sha256 of everything. It is written beside the path and then renamed, so that the path
    always holds a whole file: the old one until the new one is on disk.

    Names are those of the plain model under torch.compile and (Distributed)DataParallel. A model
    without any bank is saved in the same way.

    Args:
        model: the model; its banks are registered with it.
        path: of the file; an existing one is replaced.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: a tensor has no values here (meta, lazy, sharded), or a layout or dtype that
            the format lacks; an extra state that is not a tensor; a bank that the model does not
            register.
        OSError: the path cannot be written; what it held is unchanged.

    Example:
        >>> import tempfile, rpg_kernels as rpg
        >>> def build():
        ...     net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
        ...     return rpg.convert(net, rpg.RPGConfig(dof=1024))
        >>> model, x = build(), torch.randn(2, 64)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rpg.save(model, f"{folder}/model.safetensors")
        ...     other = rpg.load(build(), f"{folder}/model.safetensors")
        >>> torch.equal(other(x), model(x))
        True
    """
    contents = _contents(model)
    absent = [name for name, tensor in contents.tensors.items() if tensor.is_meta]
    if absent:
        raise _checks.fail("model", f"tensors on meta: {_some(absent)}", "tensors with values")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for first, *others in _ties(contents.tensors):
        tensors[first] = contents.tensors[first]
        aliases.update(dict.fromkeys(others, first))
    metadata = {
        "format": "pt",  # what other readers of safetensors look for
        "rpg_format": FORMAT,
        "rpg_version": __version__,
        "rpg_banks": _dump({name: bank.map.record() for name, bank in contents.banks.items()}),
        "rpg_layers": _dump(contents.layers),
        "rpg_aliases": _dump(aliases),
    }
    _replace(os.path.realpath(os.fsdecode(path)), tensors, metadata)


def load(model: Model, path: str | os.PathLike[str]) -> Model:
    """Load a file written by ``save`` into a model of the same map. In place.

    Everything is checked before the model changes. Values are copied into the parameters there
    are, floating-point ones cast to their dtype, so that optimisers keep them; parameters on
    meta are made anew on the CPU, in their dtype. The layers' scales are those of the file.
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
    contents = _contents(model)
    for name, tensor in contents.tensors.items():
        _writable(name, tensor)
    path = os.fsdecode(path)
    with open(path, "rb") as file:
        try:
            header = _safetensors.read_header(file)
            _check_format(header.metadata)
            tensors = _safetensors.read_tensors(file, header)
            state = _state(contents, tensors, header.metadata)
        except ValueError as error:
            raise ValueError(f"{path}: {str(error)[:1000]}") from error
    _materialize(contents.model)
    contents.model.load_state_dict(state)
    return model


@dataclass(frozen=True)
class _Contents:
    """A model's state, by the names that files use."""

    model: nn.Module  # without wrappers
    keys: dict[str, str]  # name -> key of the state dict, without the maps of banks
    tensors: dict[str, Tensor]
    banks: dict[str, ParameterBank]
    bank_keys: dict[str, str]  # name of a bank -> key of its map
    layers: dict[str, list[Any]]  # name of an rpg layer -> bank, number, rows, columns


def _contents(model: nn.Module) -> _Contents:
    """Everything to be saved or loaded.

    Raises:
        TypeError, ValueError: something that a file cannot hold.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, wanted an nn.Module")
    plain = _unwrap(model)
    lost = orphans(plain)
    if lost:
        wanted = "banks registered with the model; see rpg.attach"
        raise _checks.fail("model", f"layers whose bank it does not own: {_some(lost)}", wanted)
    modules = [(_name(n), m) for n, m in plain.named_modules(remove_duplicate=False)]
    banks = {name: m for name, m in modules if isinstance(m, ParameterBank)}
    first_names = {id(bank): name for name, bank in reversed(banks.items())}
    layers: dict[str, list[Any]] = {}
    for name, module in modules:
        if isinstance(module, VirtualLayer):
            weight = module.virtual_weight
            place = weight.placement.layer, *map(list, weight.placement.selection)
            layers[name] = [first_names[id(weight.bank)], *place]
    contents = _Contents(plain, {}, {}, banks, {}, layers)
    maps = {_join(name, EXTRA_STATE): name for name in banks}
    for key, value in plain.state_dict(keep_vars=True).items():
        name = _name(key)
        if name in maps:
            contents.bank_keys[maps[name]] = key
        elif name in contents.keys or name == _safetensors.METADATA:
            raise _checks.fail("model", f"two tensors, or metadata, called {name}", "other names")
        else:
            contents.keys[name], contents.tensors[name] = key, _savable(name, value)
    return contents


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, _COMPILED, None), nn.Module):
            model = inner
        else:
            return model


def _name(key: str) -> str:
    """A key without the parts that torch.compile puts into it."""
    return ".".join(part for part in key.split(".") if part != _COMPILED)


def _join(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


def _savable(name: str, value: object) -> Tensor:
    """An ordinary tensor, or an error that names it."""
    if not isinstance(value, Tensor):
        module = name.removesuffix(EXTRA_STATE).rstrip(".") or "the model"
        got = f"a {type(value).__name__} in the state dict of {module}"
        raise _checks.fail(name, got, "tensors only; files hold nothing else")
    if is_lazy(value):
        raise _checks.fail(name, "an uninitialised tensor", "values; run a forward first")
    if is_traceable_wrapper_subclass(value):
        wanted = "a plain tensor (for sharded models there is torch.distributed.checkpoint)"
        raise _checks.fail(name, f"a {type(value).__name__}", wanted)
    if value.layout != torch.strided or value.dtype not in _safetensors.NAMES:
        wanted = f"a dense tensor of a dtype in {', '.join(_safetensors.DTYPES)}"
        raise _checks.fail(name, f"{value.layout}, {value.dtype}", wanted)
    return value


def _ties(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Names grouped by tensor: those in a group are one and the same."""
    groups: dict[object, list[str]] = {}
    for name, t in tensors.items():
        same: object = id(t)
        if not t.is_meta and t.numel():
            where = t.device, t.untyped_storage().data_ptr(), t.storage_offset()
            same = (*where, t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg())
        groups.setdefault(same, []).append(name)
    return list(groups.values())


def _replace(path: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file beside the path, bring it to disk, and rename it."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise OSError(f"path: got {path}, which is not a file, wanted a file or nothing there")
    temporary = os.path.join(os.path.dirname(path), f".rpg-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if os.path.isfile(path):
                os.chmod(temporary, stat.S_IMODE(os.stat(path).st_mode))
            _safetensors.write(file, tensors, metadata)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"cannot be written ({error.strerror})", path) from error
        raise


def _check_format(metadata: dict[str, str]) -> None:
    given = metadata.get("rpg_format")
    if given is None:
        raise ValueError(
            "not written by rpg.save, so that nothing tells which map its values belong to; to "
            "load it all the same: model.load_state_dict(safetensors.torch.load_file(path))"
        )
    if given != FORMAT:
        writer = metadata.get("rpg_version")
        raise ValueError(f"format: got {given} (of rpg-kernels {writer}), wanted {FORMAT}")


def _state(
    contents: _Contents, tensors: dict[str, Tensor], metadata: dict[str, str]
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
            bank.check(maps[name], values.get(_join(name, "table"), bank.table))
        except ValueError as error:
            raise ValueError(f"{name or 'bank'}: {error}") from error
    _same_names("rpg layers", layers, contents.layers)
    for name, wanted in contents.layers.items():
        if layers[name] != wanted:
            what = "(bank, layer number, rows, columns)"
            raise ValueError(f"{name or 'model'}: got {layers[name]}, wanted {wanted} {what}")
    _same_names("tensors", values, contents.tensors)
    for name, tensor in contents.tensors.items():
        if name.endswith(EXTRA_STATE):  # another module's, which may be of any kind
            continue
        _check_dtype(name, values[name].dtype, tensor.dtype)
        if values[name].shape != tensor.shape:
            got = f"shape {list(values[name].shape)}"
            raise _checks.fail(name, got, f"shape {list(tensor.shape)}")
    for first, *others in _ties(contents.tensors):
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
    parts = [f"none of {_some(missing)}"] * bool(missing)
    parts += [f"{_some(unexpected)}, which the model lacks"] * bool(unexpected)
    if parts:
        raise ValueError(f"{what}: got {', and '.join(parts)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name or "(the model itself)" for name in names[:5]) + more


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


def _dump(record: object) -> str:
    return json.dumps(record, separators=(",", ":"))
