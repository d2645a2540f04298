"""What a part of a model has to do with the bank that its layers read.

The model registers its bank once. A layer, and so any part of the model, holds it as torch's
modules hold a tied parameter: ``part.parameters()`` lists it, ``part.state_dict()`` holds it,
``part.to(...)`` moves it, a copy of the part has a copy of it. Where a traversal or a state dict
meets the registered bank too, it appears once, under that name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight

BANK_NAME = "rpg_bank"
_READS = "rpg_reads"
_GROUP = "rpg_group"


def bank_name(group: str) -> str:
    """Under which name a model registers the bank of a group; "" for its only bank.

    >>> bank_name(""), bank_name("late")
    ('rpg_bank', 'rpg_bank_late')
    """
    return f"{BANK_NAME}_{group}" if group else BANK_NAME


def banks_of(module: nn.Module) -> dict[str, ParameterBank]:
    """The banks that ``convert`` or ``attach`` gave to a model, by their names as attributes."""
    named = {**module._modules, **module.__dict__}
    return {
        name: bank
        for name, bank in named.items()
        if isinstance(bank, ParameterBank) and name == bank_name(bank.group)
    }


class HoldsBank(nn.Module):
    """The side of a layer that answers for the bank of ``virtual_weight``."""

    virtual_weight: VirtualWeight
    alone = False  # True in a copy that was made of this layer alone

    @property
    def rpg_bank(self) -> ParameterBank:
        """The bank that the layer reads."""
        return self.virtual_weight.bank

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The layer, and its bank unless the traversal has met, or will meet, it elsewhere."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        if not _met(self.rpg_bank, memo):
            name = f"{prefix}.{BANK_NAME}" if prefix else BANK_NAME
            yield from self.rpg_bank.named_modules(memo, name, remove_duplicate)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HoldsBank:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse and not self._registers() and not self.rpg_bank.was_applied(fn):
            self.rpg_bank._apply(fn)
        return self

    def _registers(self) -> bool:
        """Whether the bank that the layer reads is a child of its."""
        return self._modules.get(BANK_NAME) is self.rpg_bank

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:  # torch's place for what a module wants to know when it loads
            metadata[_READS] = self._reads()
            if self.rpg_bank.group:
                metadata[_GROUP] = self.rpg_bank.group
        if not self._registers() and self.rpg_bank.held_by(destination) is None:
            self.rpg_bank.lend(destination, f"{prefix}{BANK_NAME}.", keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.check_reads(prefix, local_metadata)
        common = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *common)
        if self._registers():
            return
        mine = f"{prefix}{BANK_NAME}."
        if any(key.startswith(mine) for key in state_dict):
            unexpected_keys[:] = [k for k in unexpected_keys if not k.startswith(mine)]
            for name, module in self.rpg_bank.named_modules():  # a parametrised one has children
                module._load_from_state_dict(
                    state_dict, f"{mine}{name}." if name else mine, *common
                )
        elif self.rpg_bank.not_yet_loaded(missing_keys):
            missing_keys.append(_OfBank(f"{mine}weight", self.rpg_bank))

    def check_reads(self, prefix: str, metadata: Mapping[str, Any], dense: bool = False) -> None:
        """Refuse the values of a layer that reads its bank otherwise, or another group's bank.

        Args:
            prefix: of the layer's keys in a state dict.
            metadata: torch's, of this layer in the state dict.
            dense: refuse those of a dense layer too, of which the metadata says nothing.

        Raises:
            RuntimeError: it does; where the metadata is lost, nothing tells.
        """
        mine, group = self._reads(), self.rpg_bank.group
        theirs, their_group = metadata.get(_READS, mine), metadata.get(_GROUP, group)
        got = ""
        if dense and _READS not in metadata:
            got = f"with a weight of its own, wanted one that reads {bank_name(group)}"
        elif theirs != mine:
            what = "(number of the layer; rows and columns, of a part of one)"
            got = f"that reads its bank at {str(theirs)[:200]} {what}, wanted {str(mine)[:200]}"
        elif group and their_group != group:
            got = f"in group {their_group!r}, wanted {group!r}"
        if got:
            raise RuntimeError(
                f"Error(s) in loading a state dict: {prefix[:-1] or 'layer'}: got values of a "
                f"layer {got}; build the model as the saved one was built, in the same order, with "
                "the same ties and groups, and prune it alike (rpg.keep_channels)"
            )

    def _reads(self) -> list[Any]:
        """Which of the bank's layers this is, as metadata of state dicts."""
        placement = self.virtual_weight.placement
        whole = placement.selected_shape == placement.shape
        return [placement.layer, *([] if whole else placement.selection_record())]

    def __deepcopy__(self, memo: dict[int, Any]) -> HoldsBank:
        alone = not memo
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(nn.Module.__getstate__(self), memo))
        if alone:
            twin.alone = True
            setattr(twin, BANK_NAME, twin.virtual_weight.bank)
        return twin

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel copies layers to several devices, but not the parameter bank that "
            "they read; use torch.nn.parallel.DistributedDataParallel, or one device"
        )

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose weight is virtual; "
            "script rpg.materialize(model), or use torch.compile or torch.export"
        )


class _OfBank(str):
    """A missing key that is forgiven when the bank turns out to be in the state dict elsewhere."""

    bank: ParameterBank

    def __new__(cls, key: str, bank: ParameterBank) -> _OfBank:
        made = super().__new__(cls, key)
        made.bank = bank
        return made


def _met(bank: ParameterBank, memo: set[nn.Module]) -> bool:
    """Whether the bank, or a module that registers it, is among modules already listed.

    With accelerate's hooks on the bank, accelerate places its memory where it is registered; parts
    then do not list it.
    """
    if "_hf_hook" in bank.__dict__:
        return True
    if bank in memo or bank.listed_in(memo):
        return True
    return any(bank in m._modules.values() for m in memo if isinstance(m, nn.Module))


def is_traced(x: object) -> bool:
    """Whether a layer's input stands for a tensor in torch.fx's symbolic tracing."""
    return isinstance(x, torch.fx.Proxy)


def as_leaf(layer: nn.Module, x: Any, *more: Any) -> Any:
    """The node of a traced graph that calls the layer, as of torch's own layers."""
    path = x.tracer.path_of_module(layer)
    return x.tracer.create_proxy("call_module", path, (x, *more), {})
