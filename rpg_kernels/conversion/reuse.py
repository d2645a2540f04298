"""reuse: one module applied several times, each use with a permutation and norms of its own."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from rpg_kernels import _checks
from rpg_kernels._wrappers import COMPILED, unwrap_to_change
from rpg_kernels.bank.config import RPGConfig
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.conversion.convert import convert
from rpg_kernels.conversion.kinds import kind_of
from rpg_kernels.conversion.reach import held_by, plain_attributes, reached
from rpg_kernels.law.placement import Placement, place
from rpg_kernels.nn import VirtualLayer

NORMS = ("separate", "shared")
_NORM_TYPES = (
    nn.modules.batchnorm._NormBase,  # of batches and instances
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_OWN_FIELDS = {field.name for field in fields(VirtualWeight)}


class Reused(nn.Sequential):
    """The uses of a module, made by ``reuse``: called, each is applied to what the one before gave.

    Also a list of modules, for networks that do something between the uses. Further arguments go
    to every use.
    """

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Of whatever shape the module takes and gives."""
        for use in self:
            input = use(input, *args, **kwargs)
        return input


def reuse(
    module: nn.Module,
    times: int,
    config: RPGConfig | None = None,
    *,
    norm: str = "separate",
    remap: bool = True,
) -> Reused:
    """Apply a module several times, at the size of one.

    With ``remap`` each use reads its weights from the same bank by a permutation and signs of its
    own: ``times`` different sub-networks at the bytes of one (paper, section 4, on pose and on
    several tasks). Without, the uses have the same weights, virtual or not. What is neither a
    virtual weight nor a norm is one and the same in all uses: biases, dense layers, single
    parameters. Modules around what is separated are copied, with plain attributes and buffers;
    all else is the same object, so the state dict names what is tied once for each use.

    Args:
        module: applied first as it is; virtual layers and norms in it are found by themselves.
            A torch norm, or a module called so whose parameters have one axis, is a norm.
        times: of application, 1 or more.
        config: for a module without virtual layers: it is converted, every layer that can be or
            those of its groups, to banks that it registers. Laps may be as many as all uses
            together compress.
        norm: ``"separate"`` (each use has norms of its own, which start as they are now) or
            ``"shared"`` (one, whose running statistics mix those of all uses).
        remap: False gives every use the same weights.

    Returns:
        A sequence of the uses, the module itself first; ``rpg.materialize`` makes it dense.

    Raises:
        TypeError: module is not an nn.Module, or config not an RPGConfig.
        ValueError: times below 1, another norm, nothing to remap, a bank of tables (which have no
            entries for another use), or state that cannot be separated, with its name: a norm
            that is tied to something else, a compiled or scripted part, a function that holds a
            part of the module, what cannot be copied. Nothing has changed then.

    Example:
        >>> import rpg_kernels as rpg
        >>> block = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.ReLU())
        >>> stages = reuse(block, 3, rpg.RPGConfig(dof=4096, laps=3))
        >>> stages(torch.randn(2, 64)).shape, sum(p.numel() for p in stages.parameters())
        (torch.Size([2, 64]), 4480)
        >>> torch.equal(stages[0][0].weight.clone(), stages[1][0].weight.clone())
        False
    """
    _check(module, times, config, norm, remap)
    apart = _apart(module, norm, remap, dense=config is not None)
    _separable(module, apart)
    _copyable(module, apart)
    moved = _placements(module, times) if remap else []
    if config is not None:
        every = None if config.groups else lambda layer, name: True
        convert(module, config, every, uses=times if remap else 1)
        apart = _apart(module, norm, remap)
        moved = _placements(module, times) if remap else []
    uses = [module]
    for again in range(1, times):
        weights = {id(root): _place(root, again) for root in moved}
        uses.append(_use(module, apart, weights))
    return Reused(*uses)


def _check(module: nn.Module, times: int, config: RPGConfig | None, norm: str, remap: bool) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got a {type(module).__name__}, wanted an nn.Module")
    _checks.integer("times", times, 1, _checks.INT32_MAX)
    _checks.choice("norm", norm, NORMS)
    _checks.boolean("remap", remap)
    if config is not None and not isinstance(config, RPGConfig):
        raise TypeError(f"config: got a {type(config).__name__}, wanted an RPGConfig or None")
    if unwrap_to_change(module) is not module:
        got = f"a {type(module).__name__} around it"
        raise _checks.fail("module", got, "the plain module; wrap or compile what reuse returns")
    virtual = any(isinstance(m, VirtualLayer) for m in module.modules())
    if remap and config is None and not virtual:
        wanted = "at least one; convert it first, give a config, or reuse it with remap=False"
        raise _checks.fail("module", "one without virtual layers to remap", wanted)


def _is_norm(module: nn.Module) -> bool:
    """A norm of torch's, or a module that is called one and holds vectors only."""
    if isinstance(module, _NORM_TYPES):
        return True
    held = list(module.parameters())
    return (
        "norm" in type(module).__name__.lower()
        and (bool(held) or any(True for _ in module.buffers()))
        and all(p.dim() <= 1 for p in held)
        and not any(isinstance(m, VirtualLayer) for m in module.modules())
    )


def _apart(module: nn.Module, norm: str, remap: bool, *, dense: bool = False) -> set[int]:
    """The modules, by id, that every use has its own of: they, and those around them.

    With ``dense`` what convert is going to make virtual counts as virtual.
    """
    own: set[int] = set()
    for each in module.modules():
        virtual = isinstance(each, VirtualLayer) or (dense and kind_of(each) is not None)
        if (remap and virtual) or (norm == "separate" and _is_norm(each)):
            own.update(id(m) for m in each.modules() if not isinstance(m, ParameterBank))
    around: set[int] = set()
    for each in module.modules():
        if any(id(m) in own for m in each.modules()):
            around.add(id(each))
    return own | around


def _separable(module: nn.Module, apart: set[int]) -> None:
    """Refuse what would be neither shared nor separate.

    Raises:
        ValueError: with the name of it.
    """
    parts = {id(m) for m in module.modules()}
    norms: dict[int, str] = {}
    others: dict[int, str] = {}
    inside: set[int] = set()
    for each in module.modules():
        if _is_norm(each) and id(each) in apart:
            inside.update(id(m) for m in each.modules())
    for name, each in module.named_modules():
        for key, parameter in each.named_parameters(recurse=False):
            where = norms if id(each) in inside else others
            where.setdefault(id(parameter), f"{name}.{key}" if name else key)
        if id(each) not in apart:
            continue
        if isinstance(each, torch.jit.ScriptModule) or COMPILED in each._modules:
            wanted = "a plain module; compile what reuse returns"
            raise _cannot(name, f"a {type(each).__name__}", wanted)
        for what, value in plain_attributes(each):
            for found in reached(value):
                outside = isinstance(found, nn.Module | nn.Parameter)
                if not outside and any(id(x) in parts for x in held_by(found)):
                    got = f"a {type(found).__name__} ({what}) that holds a part of the module"
                    raise _cannot(name, got, "a bound method, which a copy takes along")
    for key, name in norms.items():
        if key in others:
            wanted = f"parameters of its own, or norm='shared': it is tied to {others[key]}"
            raise _cannot(name, "a norm's parameter", wanted)


def _copyable(module: nn.Module, apart: set[int]) -> None:
    """Try the copy, with every tensor as it is; find what cannot be copied."""
    try:
        copy.deepcopy(module, _kept(module, apart, tensors=True))
    except Exception as error:
        for name, each in reversed(list(module.named_modules())):
            try:
                copy.deepcopy(each, _kept(module, apart, tensors=True))
            except Exception:
                wanted = "a module that copy.deepcopy copies"
                raise _cannot(name, f"a {type(each).__name__} ({error})", wanted) from error
        raise


def _cannot(name: str, got: str, wanted: str) -> ValueError:
    return _checks.fail("module", f"{name or 'the module itself'}: {got}", wanted)


def _placements(module: nn.Module, times: int) -> list[VirtualWeight]:
    """The weights that each use reads elsewhere, once it is sure that there is room for all.

    Raises:
        ValueError: a bank has none.
    """
    roots: dict[int, VirtualWeight] = {}
    for name, each in module.named_modules():
        if isinstance(each, VirtualLayer):
            root = each.virtual_weight.whole()
            roots.setdefault(id(root), root)
            if root.bank.table is not None:
                got = f"{name or 'the module'}: a bank whose generating matrix is a table"
                wanted = "one that computes it, as a table has no entries for another use"
                raise _checks.fail("module", got, wanted)
    cursors: dict[int, tuple[int, int]] = {}
    for _ in range(1, times):
        for root in roots.values():
            bank, p = root.bank, root.placement
            number, cursor = cursors.get(id(bank), (bank.layers, bank._cursor))
            _, cursor = place(bank.generator, number, cursor, p.shape, p.scale, p.taps)
            cursors[id(bank)] = number + 1, cursor
    return list(roots.values())


def _place(root: VirtualWeight, again: int) -> VirtualWeight:
    """The same weight with the next placement of its bank."""
    weight = root.bank.place(root.placement.shape, scale=root.scale, taps=root.placement.taps)
    weight.name = f"{root.name}, use {again + 1}" if root.name else ""
    return _like(weight, root)


def _like(weight: VirtualWeight, other: VirtualWeight) -> VirtualWeight:
    """Take over whether it is frozen, and what other code has noted on it."""
    weight.frozen = other.frozen
    for key, value in vars(other).items():
        if key not in _OWN_FIELDS:
            setattr(weight, key, value)
    return weight


def _part(weight: VirtualWeight, whole: VirtualWeight) -> VirtualWeight:
    """The rows and columns of a part, of another whole."""
    mine: Placement = weight.placement
    placement = replace(whole.placement, rows=mine.rows, columns=mine.columns)
    return _like(VirtualWeight(whole.bank, placement, whole), weight)


def _kept(module: nn.Module, apart: set[int], *, tensors: bool = False) -> dict[int, Any]:
    """For deepcopy, what is the same in the copy: banks, modules not apart, all parameters but
    those of norms; or all tensors, for a copy that is only tried."""
    kept: dict[int, Any] = {}
    inside: set[int] = set()
    for each in module.modules():
        if isinstance(each, ParameterBank) or id(each) not in apart:
            kept[id(each)] = each
        if isinstance(each, VirtualLayer):
            kept[id(each.virtual_weight.bank)] = each.virtual_weight.bank
            kept[id(each.virtual_weight)] = each.virtual_weight
        if _is_norm(each) and id(each) in apart:
            inside.update(id(m) for m in each.modules())
    own = {id(p) for m in module.modules() if id(m) in inside for p in m._parameters.values()}
    parts = {id(m) for m in module.modules()}
    for each in module.modules():
        held: list[Tensor | None] = list(each._parameters.values())
        if tensors:
            held += each._buffers.values()
        for t in held:
            # What autograd has made cannot be copied, which is to be found out.
            if t is not None and (id(t) not in own or tensors) and t.is_leaf:
                kept[id(t)] = t
        for _, value in plain_attributes(each) if id(each) in apart else ():
            for found in reached(value):
                if isinstance(found, nn.Module) and id(found) not in parts:
                    kept[id(found)] = found  # not the module's: the same for all
                elif isinstance(found, nn.Parameter) and id(found) not in own:
                    kept[id(found)] = found
    return kept


def _use(module: nn.Module, apart: set[int], weights: dict[int, VirtualWeight]) -> nn.Module:
    """A copy of the module that shares all but what is apart, and reads other placements."""
    kept = _kept(module, apart)
    for each in module.modules():
        if isinstance(each, VirtualLayer):
            weight, root = each.virtual_weight, each.virtual_weight.whole()
            if id(root) in weights:
                new = weights[id(root)]
                kept[id(weight)] = new if weight is root else _part(weight, new)
    used: nn.Module = copy.deepcopy(module, kept)
    for each in used.modules():
        if id(each) not in kept:  # a copy: the bank stays registered where it is
            for key in [k for k, m in each._modules.items() if isinstance(m, ParameterBank)]:
                del each._modules[key]
    copies = dict(used.named_parameters(remove_duplicate=False))
    for name, parameter in module.named_parameters():
        if copies.get(name, parameter) is not parameter:  # of a norm; what was noted on it too
            vars(copies[name]).update(vars(parameter))
    return used
