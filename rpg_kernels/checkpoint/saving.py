"""``save``: a model's values in one file, with all that they mean."""

from __future__ import annotations

import json
import os

from torch import Tensor, nn

from rpg_kernels import _checks
from rpg_kernels._version import __version__
from rpg_kernels.checkpoint import file_format
from rpg_kernels.checkpoint.contents import CHANNELS, contents_of, some, ties
from rpg_kernels.checkpoint.stored_banks import record_of
from rpg_kernels.pruning import kept_channels


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's values to a safetensors file that only a model of the same map loads.

    A pruned model's file says which channels remain, so that ``load`` prunes a whole one alike.

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
        >>> import tempfile, torch, rpg_kernels as rpg
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
    contents = contents_of(model)
    absent = [name for name, tensor in contents.tensors.items() if tensor.is_meta]
    if absent:
        raise _checks.fail("model", f"tensors on meta: {some(absent)}", "tensors with values")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for first, *others in ties(contents.tensors):
        tensors[first] = contents.tensors[first]
        aliases.update(dict.fromkeys(others, first))
    stored = {
        name: record_of(bank.stored)
        for name, bank in contents.banks.items()
        if bank.stored is not None
    }
    metadata = {
        "format": "pt",  # what other readers of safetensors look for
        "rpg_format": file_format.STORED_FORMAT if stored else file_format.FORMAT,
        "rpg_version": __version__,
        "rpg_banks": _dump({name: bank.map.record() for name, bank in contents.banks.items()}),
        "rpg_layers": _dump(contents.layers),
        "rpg_aliases": _dump(aliases),
    }
    if stored:
        metadata["rpg_stored"] = _dump(stored)
    kept = kept_channels(contents.model)
    if kept:
        metadata[CHANNELS] = _dump(kept)
    file_format.write(os.path.realpath(os.fsdecode(path)), tensors, metadata)


def _dump(record: object) -> str:
    return json.dumps(record, separators=(",", ":"))
