"""convert: replace the dense layers of a model by virtual ones that share one bank."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from rpg_kernels import _checks
from rpg_kernels.bank.config import RPGConfig, ring_of
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.scales import layer_std
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.conversion.least_squares import fit_bank
from rpg_kernels.conversion.ownership import BANK_NAME
from rpg_kernels.conversion.select import Filter, Selection, select
from rpg_kernels.law import window as window_law
from rpg_kernels.nn import Conv2d, Embedding, Linear, VirtualLayer

INIT = ("random", "least_squares")
MOST_LAPS = 4  # that convert chooses by itself
Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model, config: RPGConfig, filter_fn: Filter | None = None, *, init: str = "random"
) -> Model:
    """Make layers of a model read their weights from one shared bank. In place, all or nothing.

    By default hidden layers are shared; the first and last layer, norms and biases stay as they
    are (paper, section 4). ``rpg.summary(model)`` lists both, with reasons. The bank becomes
    ``model.rpg_bank``: one key of the state dict (of an nn.Sequential it is the last module, and
    returns what it is given). The model may be on ``meta``: a model too large
    to exist densely is converted there and then brought to life by ``rpg.initialize``.

    Args:
        model: any nn.Module that is not itself a layer.
        config: size of the bank, granularity, reflect mode, windows, seed, scale rule.
        filter_fn: ``filter_fn(module, name) -> bool`` for every nn.Linear, nn.Conv2d and
            nn.Embedding; None for the default rule.
        init: ``"random"``, or ``"least_squares"``: start from the bank that is nearest to the
            weights the model has. ``rpg.summary`` reports the relative residual per layer, which
            is large unless the bank is nearly as large as the model.

    Returns:
        The same model.

    Raises:
        TypeError: model is itself a layer or a list of layers, or config is not an RPGConfig.
        ValueError: nothing to share, layers on several devices or in several dtypes, a model
            that has a bank already, least squares on meta, more laps than the model compresses.
            The model is then unchanged.

    Example:
        >>> import torch.nn as nn
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
        ...                     nn.Linear(64, 10))
        >>> net = convert(net, RPGConfig(dof=512))
        >>> [name for name, _ in net.named_parameters()]
        ['0.weight', '0.bias', '2.bias', '4.weight', '4.bias', 'rpg_bank.weight']
    """
    _check(model, config, filter_fn, init)
    chosen = select(model, filter_fn)
    if not chosen.shared:
        reasons = "; ".join(f"{name}: {why}" for name, why in chosen.skipped.items())
        raise _checks.fail("model", f"no layer to share ({reasons})", "at least one; see filter_fn")
    bank = _bank(chosen, config, init)
    virtual = _place(chosen, bank, config)
    residuals = {}
    if init == "least_squares":
        residuals = fit_bank(
            bank,
            {
                name: (virtual[name], cast(Tensor, m.weight), getattr(m, "padding_idx", None))
                for name, m in chosen.shared.items()
            },
        )
    layers = {id(m): _counterpart(m, virtual[n]) for n, m in chosen.shared.items()}
    # Nothing has been changed up to here; nothing below can fail.
    _replace(model, layers)
    model.register_module(BANK_NAME, bank)
    bank.skipped = chosen.skipped
    bank.residuals = residuals
    return model


def _check(model: nn.Module, config: RPGConfig, filter_fn: Filter | None, init: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, wanted an nn.Module")
    if not isinstance(config, RPGConfig):
        raise TypeError(f"config: got a {type(config).__name__}, wanted an RPGConfig")
    _checks.choice("init", init, INIT)
    if isinstance(model, nn.Linear | nn.Conv2d | nn.Embedding):
        got = type(model).__name__
        raise TypeError(
            f"model: got a single {got}, which cannot be replaced in place; wanted a model that "
            f"contains it (or build rpg.nn.{got})"
        )
    if isinstance(model, nn.ModuleList | nn.ModuleDict):
        got = type(model).__name__
        raise TypeError(f"model: got a {got}, whose elements are layers; wanted a model around it")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: got a {type(filter_fn).__name__}, wanted a function or None")
    virtual = (ParameterBank, VirtualLayer)
    if hasattr(model, BANK_NAME) or any(isinstance(m, virtual) for m in model.modules()):
        raise _checks.fail("model", "a model that has a bank already", "a dense model")


def _bank(chosen: Selection, config: RPGConfig, init: str) -> ParameterBank:
    """The shared bank, on the device and in the dtype that all shared layers have."""
    weights = {name: module.weight for name, module in chosen.shared.items()}
    for what in ("device", "dtype"):
        values = {str(getattr(w, what)): name for name, w in weights.items()}
        if len(values) > 1:
            got = ", ".join(f"{value} ({name})" for value, name in values.items())
            raise _checks.fail("model", f"layers of several {what}s: {got}", f"one {what}")
    first = next(iter(weights.values()))
    assert isinstance(first, torch.Tensor)
    if init == "least_squares" and first.device.type == "meta":
        raise _checks.fail("init", "'least_squares' for a model on meta", "a model with weights")
    return ParameterBank(
        dof=config.dof,
        granularity=config.granularity,
        reflect=config.reflect,
        permute=config.permute,
        window=config.window,
        laps=_laps(chosen, config),
        seed=config.seed,
        init_std=config.init_std,
        device=first.device,
        dtype=first.dtype,
    )


def _laps(chosen: Selection, config: RPGConfig) -> int | None:
    """Laps of the bank's windows: those asked for, or as many as the model allows, up to 4.

    Raises:
        ValueError: those asked for are above the compression.
    """
    if config.window is None:
        return None
    slots, granularity = ring_of(config.dof, config.granularity)
    end = 0
    for weight in {id(m.weight): cast(Tensor, m.weight) for m in chosen.shared.values()}.values():
        _, end = window_law.place(weight.shape, granularity, end)
    dof = slots * granularity
    if config.laps is not None:
        window_law.check_laps(config.laps, dof, end)
        return config.laps
    return 1 << max(1, min(MOST_LAPS, end // dof)).bit_length() - 1


def _place(chosen: Selection, bank: ParameterBank, config: RPGConfig) -> dict[str, VirtualWeight]:
    """A virtual weight per layer; layers with one parameter get one virtual weight."""
    by_parameter: dict[int, VirtualWeight] = {}
    virtual = {}
    for name, module in chosen.shared.items():
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        if id(weight) not in by_parameter:
            lookup = isinstance(module, nn.Embedding)
            std = layer_std(config.scale, weight.shape, lookup=lookup, weight=weight)
            by_parameter[id(weight)] = bank.place(tuple(weight.shape), scale=std / bank.init_std)
        virtual[name] = by_parameter[id(weight)]
    return virtual


def _counterpart(module: nn.Module, weight: VirtualWeight) -> VirtualLayer:
    """The virtual layer with a dense layer's geometry, bias, and training mode."""
    layer: VirtualLayer
    if isinstance(module, nn.Linear):
        layer = Linear(module.in_features, module.out_features, bias=False, virtual_weight=weight)
    elif isinstance(module, nn.Embedding):
        layer = Embedding(
            module.num_embeddings,
            module.embedding_dim,
            padding_idx=module.padding_idx,
            virtual_weight=weight,
        )
    else:
        assert isinstance(module, nn.Conv2d)
        layer = Conv2d(
            module.in_channels,
            module.out_channels,
            cast(tuple[int, int], module.kernel_size),
            cast(tuple[int, int], module.stride),
            cast(tuple[int, int] | str, module.padding),
            cast(tuple[int, int], module.dilation),
            module.groups,
            bias=False,
            padding_mode=module.padding_mode,
            virtual_weight=weight,
        )
    layer.bias = getattr(module, "bias", None)
    return layer.train(module.training)


def _replace(model: nn.Module, layers: dict[int, VirtualLayer]) -> None:
    """Put the new layers wherever the old ones stand, also under several names."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and id(child) in layers:
                parent._modules[key] = layers[id(child)]
    for parent in model.modules():
        if any(isinstance(child, VirtualLayer) for child in parent.modules()):
            # torch's inference shortcuts read linear1.weight; these switches turn them off.
            if isinstance(parent, nn.TransformerEncoderLayer):
                parent.activation_relu_or_gelu = 0
            elif isinstance(parent, nn.TransformerEncoder):
                parent.use_nested_tensor = False
