"""Wrappers that people put around models: seen through, or refused."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from rpg_kernels import _checks

COMPILED = "_orig_mod"  # where torch.compile keeps the module that it wraps
_AVERAGED = "torch.optim.swa_utils"
_FSDP = "torch.distributed.fsdp"


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, (Distributed)DataParallel, FSDP and AveragedModel.

    Example:
        >>> inner = nn.Linear(2, 2)
        >>> unwrap(DataParallel(inner)) is inner
        True
    """
    while True:
        inner = _inside(model)
        if inner is None:
            return model
        model = inner


def _inside(model: nn.Module) -> nn.Module | None:
    inner: object
    if isinstance(model, DataParallel | DistributedDataParallel) or _averaged(model):
        inner = model.module
    elif _sharded_by_wrapper(model):
        inner = model._modules.get("_fsdp_wrapped_module")
    else:
        inner = model._modules.get(COMPILED)
    return inner if isinstance(inner, nn.Module) else None


def unwrap_to_change(model: nn.Module) -> nn.Module:
    """The same, for what replaces layers.

    Raises:
        ValueError: something around or inside the model has taken its parameters over already.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, DistributedDataParallel) or _sharded_by_wrapper(module):
            what = f"layers inside {kind}, which has registered their parameters"
        elif _sharded(module):
            what = f"layers sharded by fully_shard ({name or 'the model'})"
        else:
            continue
        raise _checks.fail("model", what, "the plain model; convert it first and wrap it then")
    return unwrap(model)


def plain_name(key: str) -> str:
    """A name without the parts that torch.compile puts into it."""
    return ".".join(part for part in key.split(".") if part != COMPILED)


# Asked for without importing what few programs use.
def _averaged(model: nn.Module) -> bool:
    swa = sys.modules.get(_AVERAGED)
    return swa is not None and isinstance(model, swa.AveragedModel)


def _sharded_by_wrapper(model: nn.Module) -> bool:
    fsdp = sys.modules.get(_FSDP)
    kind = getattr(fsdp, "FullyShardedDataParallel", None)
    return kind is not None and isinstance(model, kind)


def _sharded(model: nn.Module) -> bool:
    fsdp = sys.modules.get(_FSDP)
    kind = getattr(fsdp, "FSDPModule", None)
    return kind is not None and isinstance(model, kind)
