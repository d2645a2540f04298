"""quantize, dequantize, compact, expand: how the banks of a model are stored. In place.

Every layer goes on reading its bank by the same map. Back ends read the stored values as they are;
whatever cannot do so leaves the call to another, see ``rpg.explain``.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import is_parametrized

from rpg_kernels import _checks
from rpg_kernels._stored import ABSENT, KEPT, StoredValues, check_activations
from rpg_kernels._wrappers import unwrap
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.rounding import FORMS, Rounding, round_slots

Module = TypeVar("Module", bound=nn.Module)


def quantize(
    model: Module, dtype: str = "int8", *, activations: str = KEPT, training: bool = False
) -> Module:
    """Store the banks of a model in 8 bits, with one scale per slot.

    A quarter of the bytes of float32, and one scale (4 bytes) for each slot. Values are rounded to
    the nearest code, symmetric around zero: ``rpg_kernels.bank.rounding`` has the formula and the
    error. Nothing is trained from then on: no gradient reaches such a bank, while x gets its own.
    Norms, biases and layers that are not shared stay as they are.

    Args:
        model: with rpg layers and their banks, which may be compacted.
        dtype: ``"int8"``, or ``"float8_e4m3fn"``, which CPUs read by the reference back end only.
        activations: ``"kept"``: products take x as it is. ``"int8"``: where a back end can, linear
            layers round each row of x to int8 too, with a step of its own, and multiply integers,
            which is faster and less exact (about 1 % of an output, as of any int8 product).
            Convolutions, lookups and gradients keep x.
        training: leave float values and round them whenever they are read; gradients pass straight
            through to them (quantisation-aware training). ``quantize`` again, without
            ``training``, then stores what was trained with.

    Returns:
        The model.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: the model has no bank; a bank is quantised already, or, for training, compacted;
            it holds NaN or infinity, is on meta, has a table, is pruned or parametrised (make that
            permanent first), or would not become smaller; an unknown dtype or ``activations``. The
            model is unchanged.

    Example:
        >>> import rpg_kernels as rpg
        >>> net = rpg.convert(nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))),
        ...                   rpg.RPGConfig(dof=2048))
        >>> x = torch.randn(3, 64)
        >>> before = net(x)
        >>> quantize(net, "int8").rpg_bank.stored
        StoredValues([32, 64], torch.float32, as int8)
        >>> bool((net(x) - before).norm() < 0.02 * before.norm())
        True

    Source: section 4.6 of the paper quantises a trained RPG after training, as here, to 8 bits.
    """
    check_activations(activations)
    _checks.choice("dtype", dtype, tuple(FORMS))
    banks = banks_in(model)
    for name, bank in banks.items():
        _check_floats(name, bank, quantised=True)
        _check_smaller(name, bank)
        if training and bank.stored is not None:
            raise ValueError(
                f"model: bank {name}: got values stored as {bank.stored.form}, which are not "
                "trained, wanted float values: rpg.expand first"
            )
    for bank in banks.values():
        if training:
            bank.rounding = Rounding(dtype, activations)
            continue
        old, bank.rounding = bank.stored, None
        floats = bank.weight if old is None else old.codes
        codes, scales = round_slots(floats, FORMS[dtype])
        places = None if old is None else old.places
        bank.hold(StoredValues(codes, scales, places, bank.weight.dtype, activations))
    return model


def dequantize(model: Module) -> Module:
    """Back to float values, those that the codes stand for; training with rounding ends.

    Slots that ``compact`` left out stay out. Banks that are not quantised are left as they are.

    Args:
        model: that was quantised.

    Returns:
        The model.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: no bank of the model is quantised.

    Example:
        >>> import rpg_kernels as rpg
        >>> net = quantize(rpg.nn.Linear(64, 64, bank=rpg.ParameterBank(dof=2048)))
        >>> dequantize(net).virtual_weight.bank.weight.dtype
        torch.float32
    """
    banks = banks_in(model)
    if not any(bank.rounding is not None or is_quantised(bank) for bank in banks.values()):
        raise _checks.fail("model", "banks of float values", "one that was quantised")
    for bank in banks.values():
        bank.rounding = None
        stored = bank.stored
        if stored is None or stored.scales is None:
            continue
        if stored.places is None:
            bank.hold(stored.dense())
            continue
        rows = StoredValues(stored.codes, stored.scales, None, stored.dtype).dense()
        bank.hold(StoredValues(rows, None, stored.places, stored.dtype))
    return model


def compact(model: Module) -> Module:
    """Leave out the slots that are wholly zero: of memory, of checkpoints and of products.

    Products shrink in layers with laps whose activations are kept. Outputs do not change. What is
    left is not trained; ``expand`` brings all slots back. Prune by slot first (``rpg.prune(model,
    amount, by="slot")``): zeros that are scattered over all slots gain nothing here. A slot takes 4
    bytes for its place.

    Args:
        model: with rpg layers and their banks, quantised or not.

    Returns:
        The model.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: the model has no bank, or no slot that is wholly zero; a bank is compacted
            already, is all zeros, holds NaN or infinity, is on meta, has a table, or is pruned or
            parametrised (make that permanent first, so that the mask goes). The model is unchanged.

    Example:
        >>> import rpg_kernels as rpg
        >>> bank = rpg.ParameterBank(dof=2048)
        >>> layer = rpg.nn.Linear(64, 64, bank=bank)
        >>> with torch.no_grad():
        ...     _ = bank.weight[::2].zero_()
        >>> x = torch.randn(3, 64)
        >>> before = layer(x)
        >>> compact(layer).virtual_weight.bank.stored
        StoredValues([32, 64], torch.float32, as float32, 16 of 32 slots)
        >>> torch.allclose(layer(x), before, atol=1e-6)
        True
    """
    banks = banks_in(model)
    kept = {name: _present(name, bank) for name, bank in banks.items()}
    if all(bool(rows.all()) for rows in kept.values()):
        wanted = "one with slots that are wholly zero, which could be left out"
        raise _checks.fail("model", "banks without such slots", wanted)
    for name, bank in banks.items():
        rows, old = kept[name], bank.stored
        if bool(rows.all()):
            continue
        places = torch.full((len(rows),), ABSENT, dtype=torch.int32, device=rows.device)
        places[rows] = torch.arange(int(rows.sum()), dtype=torch.int32, device=rows.device)
        if old is None:
            bank.hold(StoredValues(bank.weight.detach()[rows], None, places, bank.weight.dtype))
            continue
        assert old.scales is not None  # the only other form without places
        codes = old.codes.view(torch.uint8)[rows].view(old.codes.dtype)
        bank.hold(StoredValues(codes, old.scales[rows], places, old.dtype, old.activations))
    return model


def expand(model: Module) -> Module:
    """Bring back the slots that ``compact`` left out, as zeros. Float values can be trained again.

    Args:
        model: that was compacted.

    Returns:
        The model.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: no bank of the model is compacted.

    Example:
        >>> import rpg_kernels as rpg
        >>> bank = rpg.ParameterBank(dof=2048)
        >>> with torch.no_grad():
        ...     _ = bank.weight[::2].zero_()
        >>> layer = compact(rpg.nn.Linear(64, 64, bank=bank))
        >>> tuple(expand(layer).virtual_weight.bank.weight.shape)
        (32, 64)
    """
    banks = banks_in(model)
    if not any(
        bank.stored is not None and bank.stored.places is not None for bank in banks.values()
    ):
        raise _checks.fail("model", "banks with all their slots", "one that was compacted")
    for bank in banks.values():
        stored = bank.stored
        if stored is None or stored.places is None:
            continue
        if stored.scales is None:
            bank.hold(stored.dense())
            continue
        codes = stored.codes.new_zeros(stored.shape)
        scales = stored.scales.new_zeros(len(stored))
        here = stored.places >= 0
        rows = stored.places[here].long()
        codes.view(torch.uint8)[here] = stored.codes.view(torch.uint8)[rows]
        scales[here] = stored.scales[rows]
        bank.hold(StoredValues(codes, scales, None, stored.dtype, stored.activations))
    return model


def is_quantised(bank: ParameterBank) -> bool:
    """Whether a bank is stored in 8 bits."""
    return bank.stored is not None and bank.stored.scales is not None


def banks_in(model: object) -> dict[str, ParameterBank]:
    """The banks of a model by their names, those included that only layers hold.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: it has none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, wanted an nn.Module")
    named = unwrap(model).named_modules()
    banks = {name: module for name, module in named if isinstance(module, ParameterBank)}
    if not banks:
        raise _checks.fail("model", "a model without a bank", "one that was converted")
    return banks


def _check_floats(name: str, bank: ParameterBank, *, quantised: bool) -> None:
    """Refuse a bank whose values cannot be stored otherwise, or are already."""
    what = f"model: bank {name}"
    if bank.table is not None:
        raise ValueError(f"{what}: got a bank with a table, whose slots are single elements")
    if prune.is_pruned(bank):
        raise ValueError(
            f"{what}: got a mask of torch.nn.utils.prune, wanted values only: "
            "rpg.finish_pruning(model) makes it permanent"
        )
    if is_parametrized(bank):
        raise ValueError(
            f"{what}: got a parametrisation, wanted values only: "
            "torch.nn.utils.parametrize.remove_parametrizations makes it permanent"
        )
    if quantised and is_quantised(bank):
        stored = bank.stored
        assert stored is not None
        raise ValueError(
            f"{what}: got values stored as {stored.form}, wanted float values; quantising twice "
            "would round twice: rpg.dequantize first"
        )
    values = bank.weight if bank.stored is None else bank.stored.codes
    if values.is_meta:
        raise ValueError(f"{what}: got a bank on meta, wanted values")
    if values.dtype.is_floating_point and not bool(values.detach().float().isfinite().all()):
        raise ValueError(f"{what}: got NaN or infinite values, wanted finite ones")


def _check_smaller(name: str, bank: ParameterBank) -> None:
    size, granularity = bank.weight.dtype.itemsize, bank.granularity
    if granularity + 4 >= granularity * size:
        raise ValueError(
            f"model: bank {name}: got granularity {granularity} in {bank.weight.dtype}, wanted "
            "longer slots: with a scale of 4 bytes for each, 8 bits would take as much memory"
        )


def _present(name: str, bank: ParameterBank) -> Tensor:
    """bool ``[slots]``: which slots hold anything but zeros."""
    _check_floats(name, bank, quantised=False)
    what, stored = f"model: bank {name}", bank.stored
    if stored is not None and stored.places is not None:
        raise ValueError(f"{what}: got a bank that is compacted already")
    if bank.rounding is not None:
        raise ValueError(f"{what}: got a bank in training with rounding, wanted rpg.quantize first")
    values = bank.weight.detach() if stored is None else stored.codes.float()
    rows: Tensor = (values != 0).any(dim=1)
    if stored is not None and stored.scales is not None:
        rows &= stored.scales != 0
    if not bool(rows.any()):
        raise ValueError(f"{what}: got zeros only, wanted at least one slot that holds something")
    return rows
