"""convert: replace the dense layers of a model by virtual ones that share one bank."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from torch import nn

from rpg_kernels import _checks
from rpg_kernels._wrappers import unwrap, unwrap_to_change
from rpg_kernels.bank.config import RPGConfig
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.scales import layer_std
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.conversion.kinds import CONVOLUTIONS, SHARED_TYPES, counterpart, weight_of
from rpg_kernels.conversion.least_squares import fit_bank
from rpg_kernels.conversion.ownership import register
from rpg_kernels.conversion.select import Filter, Selection, select
from rpg_kernels.conversion.ties import tie_key
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import check_laps, place
from rpg_kernels.nn import VirtualLayer
from rpg_kernels.nn._convolution import taps_with_stride
from rpg_kernels.nn.part import BANK_NAME

INIT = ("random", "least_squares")
Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    config: RPGConfig,
    filter_fn: Filter | None = None,
    *,
    init: str = "random",
    uses: int = 1,
) -> Model:
    """Make layers of a model read their weights from one shared bank. In place, all or nothing.

    By default hidden layers are shared; the first and last layer, norms and biases stay as they
    are (paper, section 4). ``rpg.summary(model)`` lists both, with reasons. The bank becomes
    ``model.rpg_bank``, which the state dict holds once, and the first child of the model; in an
    nn.Sequential, whose children are its steps, the first virtual layer registers it. Plain
    attributes of the layers travel. The model may be on ``meta``: a model too large to exist
    densely is converted there and then brought to life by ``rpg.initialize``.

    Args:
        model: any nn.Module that is not itself a layer; also inside torch.compile, DataParallel
            or AveragedModel.
        config: size of the bank, granularity, reflect mode, laps, seed, scale rule.
        filter_fn: ``filter_fn(module, name) -> bool`` for every nn.Linear, nn.Embedding, nn.Conv1d,
            nn.Conv2d, nn.ConvTranspose1d and nn.ConvTranspose2d (and transformers' Conv1D); None
            for the default rule. A layer that was asked for and cannot be shared is named in a
            warning.
        init: ``"random"``, or ``"least_squares"``: start from the bank that is nearest to the
            weights the model has. ``rpg.summary`` reports the relative residual per layer, which
            is large unless the bank is nearly as large as the model.
        uses: how often ``rpg.reuse`` is going to apply the layers, each time with another
            permutation: the bank may have so many times more laps.

    Returns:
        The same model.

    Raises:
        TypeError: model is itself a layer or a list of layers, or config is not an RPGConfig.
        ValueError: nothing to share, layers on several devices or in several dtypes, a model
            that has a bank already or that DistributedDataParallel or FSDP has taken over, least
            squares on meta, more laps than the model compresses.
            The model is then unchanged.

    Example:
        >>> import torch.nn as nn
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
        ...                     nn.Linear(64, 10))
        >>> net = convert(net, RPGConfig(dof=512))
        >>> [name for name, _ in net.named_parameters()]
        ['0.weight', '0.bias', '2.bias', '2.rpg_bank.weight', '4.weight', '4.bias']
    """
    _check(model, config, filter_fn, init)
    _checks.integer("uses", uses, 1, _checks.INT32_MAX)
    plain = unwrap_to_change(model)
    chosen = select(plain, filter_fn)
    if not chosen.shared:
        reasons = "; ".join(f"{name}: {why}" for name, why in chosen.skipped.items())
        raise _checks.fail("model", f"no layer to share ({reasons})", "at least one; see filter_fn")
    bank = _bank(chosen, config, init, uses)
    virtual = _place(chosen, bank, config)
    residuals = {}
    if init == "least_squares":
        residuals = fit_bank(
            bank,
            {
                name: (virtual[name], weight_of(m), getattr(m, "padding_idx", None))
                for name, m in chosen.shared.items()
            },
        )
        bank.trained()
    layers = {id(m): counterpart(m, virtual[n]) for n, m in chosen.shared.items()}
    if chosen.refused:
        said = "; ".join(f"{name}: {why}" for name, why in list(chosen.refused.items())[:5])
        more = len(chosen.refused) - 5
        said += f"; and {more} more, see rpg.summary" if more > 0 else ""
        _checks.warn(f"not shared, though asked for: {said}")
    # Nothing has been changed up to here; nothing below can fail.
    _replace(plain, layers)
    register(plain, bank)
    bank.write_map()
    bank.skipped = chosen.skipped
    bank.residuals = residuals
    return model


def _check(model: nn.Module, config: RPGConfig, filter_fn: Filter | None, init: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, wanted an nn.Module")
    if not isinstance(config, RPGConfig):
        raise TypeError(f"config: got a {type(config).__name__}, wanted an RPGConfig")
    _checks.choice("init", init, INIT)
    inner = unwrap(model)
    if isinstance(inner, SHARED_TYPES):
        got = type(inner).__name__
        raise TypeError(
            f"model: got a single {got}, which cannot be replaced in place; wanted a model that "
            f"contains it (or build rpg.nn.{got})"
        )
    container = isinstance(inner, nn.ModuleList | nn.ModuleDict)
    if container and type(inner).forward is nn.Module.forward:
        got = type(inner).__name__
        raise TypeError(f"model: got a {got}, whose elements are layers; wanted a model around it")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: got a {type(filter_fn).__name__}, wanted a function or None")
    virtual = (ParameterBank, VirtualLayer)
    if hasattr(inner, BANK_NAME) or any(isinstance(m, virtual) for m in model.modules()):
        raise _checks.fail("model", "a model that has a bank already", "a dense model")


def _bank(chosen: Selection, config: RPGConfig, init: str, uses: int) -> ParameterBank:
    """The shared bank, on the device and in the dtype that all shared layers have."""
    weights = {name: weight_of(module) for name, module in chosen.shared.items()}
    for what in ("device", "dtype"):
        values = {str(getattr(w, what)): name for name, w in weights.items()}
        if len(values) > 1:
            got = ", ".join(f"{value} ({name})" for value, name in values.items())
            raise _checks.fail("model", f"layers of several {what}s: {got}", f"one {what}")
    first = next(iter(weights.values()))
    if init == "least_squares" and first.device.type == "meta":
        raise _checks.fail("init", "'least_squares' for a model on meta", "a model with weights")
    if config.laps is not None:
        check_laps(config.laps, config.generator.dof, uses * _end(chosen, config.generator))
    return ParameterBank(
        dof=config.dof,
        granularity=config.granularity,
        reflect=config.reflect,
        permute=config.permute,
        window=config.window,
        laps=config.laps,
        seed=config.seed,
        init_std=config.init_std,
        device=first.device,
        dtype=first.dtype,
    )


def _end(chosen: Selection, generator: Generator) -> int:
    """Where the last layer ends, in elements."""
    end = 0
    by_memory = {tie_key(w): w for w in map(weight_of, chosen.shared.values())}
    for layer, weight in enumerate(by_memory.values()):
        _, end = place(generator, layer, end, weight.shape)
    return end


def _place(chosen: Selection, bank: ParameterBank, config: RPGConfig) -> dict[str, VirtualWeight]:
    """A virtual weight per layer; layers on one memory get one virtual weight."""
    by_memory: dict[Hashable, VirtualWeight] = {}
    virtual = {}
    for name, module in chosen.shared.items():
        weight = weight_of(module)
        key = tie_key(weight)
        if key not in by_memory:
            lookup = isinstance(module, nn.Embedding)
            std = layer_std(config.scale, weight.shape, lookup=lookup, weight=weight)
            taps = None
            if isinstance(module, CONVOLUTIONS):
                taps = taps_with_stride(bank, module.stride)
            by_memory[key] = bank.place(tuple(weight.shape), scale=std / bank.init_std, taps=taps)
            by_memory[key].name = name
            for note, value in vars(module.weight).items():  # no_weight_decay, and the like
                setattr(by_memory[key], note, value)
        virtual[name] = by_memory[key]
    return virtual


def _replace(model: nn.Module, layers: dict[int, VirtualLayer]) -> None:
    """Put the new layers wherever the old ones stand, also under several names."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and id(child) in layers:
                parent._modules[key] = layers[id(child)]
