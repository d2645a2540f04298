"""What a bank is to torch's tools: a module whose values are read, moved, saved, loaded, copied.

The map, which says what the values mean, travels with them as the buffer ``map_digits``. The
objects of this package stay the truth: the buffer is written from them, and whatever else has
appeared in it (a tool that sets tensors one by one has loaded a checkpoint) is checked before the
values are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from rpg_kernels import _checks
from rpg_kernels._stored import StoredValues
from rpg_kernels.bank import optimisers, other_rules, stored_state
from rpg_kernels.bank.bank_map import DIGITS, BankMap, digits_of, line_of
from rpg_kernels.bank.buffers import equal, same_memory, sha256_of, unreadable, version
from rpg_kernels.bank.rounding import Rounding
from rpg_kernels.law.generator import Generator, TableGenerator

if TYPE_CHECKING:
    from rpg_kernels.bank.virtual_weight import VirtualWeight


class BankState(nn.Module):
    """Base of ParameterBank: its values and their map in state dicts, copies and moves."""

    weight: nn.Parameter
    table: Tensor | None
    init_std: float
    group: str = ""  # of layers that read this bank, in a model with several banks
    rounding: Rounding | None = None  # of the values as they are read, in training with rounding

    def __init__(self, generator: Generator | TableGenerator) -> None:
        super().__init__()
        self.generator = generator
        self._lines = [generator.to_json().encode()]  # of the map, then one for each layer
        self._placed: list[VirtualWeight] = []
        self._digits: Tensor | None = None  # as written last, on the CPU; None: they have changed
        self._agreed: Tensor | None = None  # the buffer that says the same, and its version then
        self._agreed_version: int | None = None
        self._lent = ""  # the prefix under which a layer has put this bank into a state dict
        self._unpacked: set[int] = set()  # layers whose unpacking was warned about
        # The list of missing keys of the latest load_state_dict, which identifies the call.
        self._loading: list[str] | None = None
        self._steps: WeakSet[Any] = WeakSet()  # optimisers that were asked about this bank
        self._applied: object = None  # the function of the latest move or cast
        self._drawn: nn.Parameter | None = None  # the values, until something trains them
        self._version_drawn = 0  # their version when they were drawn, or looked at last
        optimisers.watch(self)

    @property
    def map(self) -> BankMap:
        """What the values mean: the generator, and every layer's segment, shape and scale."""
        return BankMap(self.generator, tuple(weight.placement for weight in self._placed))

    def forward(self, x: Tensor | None = None) -> Tensor:
        """The values; or x itself, as a step of an nn.Sequential made from a model's children."""
        return self.weight if x is None else x

    def read(self) -> Tensor:
        """The values, for an operator: those that hooks on this module give, when it has any.

        Pruning computes ``weight`` in such a hook, and accelerate fetches it from elsewhere.

        Raises:
            ValueError: the values were replaced by those of another map.
        """
        weight = self._parameters.get("weight")
        if not torch.compiler.is_compiling():
            digits = self._buffers[DIGITS]
            if digits is not self._agreed or version(digits) != self._agreed_version:
                self.look_at_map()
            drawn = self._drawn
            if drawn is not None and (weight is not drawn or drawn._version != self._version_drawn):
                other_rules.scale_back_if_redrawn(self)
        values: Tensor = weight if weight is not None else self.weight
        if self._forward_pre_hooks or "forward" in self.__dict__:
            values = self()
        return values if self.rounding is None else self.rounding(values)

    @property
    def stored(self) -> StoredValues | None:
        """The values, where they are kept in fewer bytes."""
        weight = self._parameters.get("weight")
        return weight if isinstance(weight, StoredValues) else None

    def hold(self, values: Tensor) -> None:
        """Take these values in place of those that are there.

        Args:
            values: ``[slots, granularity]``; float values can be trained, stored ones cannot.
        """
        trained = not isinstance(values, StoredValues)
        self.weight = nn.Parameter(values, requires_grad=trained)
        self.trained()
        optimisers.watch(self)

    def watch_for_other_rules(self) -> None:
        """From now until something trains the values, notice when they are drawn anew."""
        # Not by setattr, which would register it once more.
        self.__dict__["_drawn"] = other_rules.parameter_of(self)
        if self._drawn is not None:
            self._version_drawn = self._drawn._version

    def is_trained(self) -> bool:
        """Whether the values are no longer those that were drawn."""
        return self._drawn is None

    def spread(self) -> float:
        """The standard deviation of the values, for an initialiser of a layer's weight."""
        if self._drawn is not None or self.weight.is_meta:
            return self.init_std
        with torch.no_grad():
            values = self.read()
            norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
        return norm / math.sqrt(values.numel()) or self.init_std

    def trained(self) -> None:
        """The values are someone's: trained, or loaded."""
        self.__dict__["_drawn"] = None

    def was_applied(self, fn: object) -> bool:
        """Whether the latest move or cast was by this function, in the same call most likely."""
        return self._applied is fn

    def first_step_of(self, optimiser: object) -> bool:
        """Whether this optimiser makes its first step since the bank is there.

        Whether it should hold the bank is asked once, since walking through all objects is slow.
        """
        new = optimiser not in self._steps
        self._steps.add(optimiser)
        return new

    def first_unpacking(self, weight: VirtualWeight) -> bool:
        """Whether to say that a layer's weight is unpacked: once per layer."""
        new = weight.placement.layer not in self._unpacked
        self._unpacked.add(weight.placement.layer)
        return new

    def map_changed(self, weight: VirtualWeight) -> None:
        """Called after a layer was placed, or its scale has changed."""
        layer = weight.placement.layer
        self._lines[layer + 1 : layer + 2] = [line_of(weight.placement)]
        self._digits = None
        self.write_map()

    def write_map(self) -> None:
        """Bring the buffer up to date, on the device and in the dtype that it has."""
        old = self._buffers[DIGITS]
        assert old is not None
        if self._digits is None:
            with _disable_current_modes():  # real, also where tensors are fake
                self._digits = digits_of(self._lines)
        if isinstance(old, FakeTensor):
            self._buffers[DIGITS] = old.new_empty(self._digits.shape)
        else:
            self._buffers[DIGITS] = self._digits.to(old.device, old.dtype, copy=True)
        self._agree()

    def _agree(self) -> None:
        digits = self._buffers[DIGITS]
        self.__dict__["_agreed"] = digits
        self._agreed_version = version(digits)

    def look_at_map(self) -> None:
        """Check a buffer that something else has put in place, and take over its scales."""
        digits = self._buffers[DIGITS]
        if digits is None or unreadable(digits):
            return
        if digits is self._agreed and version(digits) == self._agreed_version:
            return
        if self._digits is None or not equal(digits.detach(), self._digits):
            try:
                theirs = BankMap.from_tensor(digits)
                self.check(theirs, self.table)
                self._not_for_a_moment()
            except ValueError as error:
                raise ValueError(
                    f"bank: the values in it were replaced: {error}; load a checkpoint of this "
                    "model, or convert the model as the saved one was"
                ) from error
            self._take_scales(theirs)
        self.trained()
        self._agree()

    def _not_for_a_moment(self) -> None:
        """Scales belong to the layers: torch.func.functional_call cannot lend other ones."""
        values = self._parameters.get("weight")
        if values is not None and not isinstance(values, nn.Parameter):
            raise ValueError("scales of layers that differ from this model's, in a functional call")

    def _take_scales(self, theirs: BankMap) -> None:
        for weight, placement in zip(self._placed, theirs.placements, strict=True):
            weight.set_placement(placement)
        self._lines[1:] = [line_of(weight.placement) for weight in self._placed]
        self._digits = None

    def check(self, theirs: BankMap | None, table: object) -> None:
        """Refuse values that would mean another network in this bank.

        Args:
            theirs: the map that the values were made for; None when nobody knows.
            table: what is to replace ``bank.table``; that itself when nothing is.

        Raises:
            ValueError: another generator, other layers (scales may differ), or another table.
        """
        difference = "" if theirs is None else theirs.difference(self.map)
        if difference:
            raise ValueError(f"got values of another generating matrix or layers ({difference})")
        if table is self.table or not isinstance(self.generator, TableGenerator):
            return
        wanted = f"a torch.int32 tensor [{self.generator.entries}]"
        if not isinstance(table, Tensor):
            raise _checks.fail("table", f"a {type(table).__name__}", wanted)
        if table.dtype != torch.int32 or table.shape != (self.generator.entries,):
            raise _checks.fail("table", f"{table.dtype} {list(table.shape)}", wanted)
        # An index from elsewhere might lie beyond the bank; meta has no values to read.
        if not table.is_meta and (got := sha256_of(table)) != self.generator.sha256:
            raise _checks.fail("table", f"sha256 {got}", self.generator.sha256)

    def named_modules(
        self, memo: set[Any] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As torch's; also without its memory of modules, the layers that follow see it in memo."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        memo.add(id(self))

    def listed_in(self, memo: set[Any]) -> bool:
        """Whether a traversal has come by here."""
        return id(self) in memo

    def held_by(self, state: Mapping[str, Any]) -> str | None:
        """The prefix under which a state dict holds this bank already; None when it does not."""
        mine = self._buffers[DIGITS]
        assert mine is not None
        for key, value in state.items():
            if key.endswith(DIGITS) and isinstance(value, Tensor) and same_memory(value, mine):
                return key.removesuffix(DIGITS)
        return None

    def not_yet_loaded(self, call: list[str]) -> bool:
        """Whether this call of load_state_dict, known by its list, has not come by here yet."""
        return self._loading is not call

    def lend(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Put the bank into a part's state dict, until it turns out to be elsewhere in it."""
        self.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        self._lent = prefix

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.look_at_map()
        if self._drawn is not None:
            self.read()  # which brings values back that were drawn by a rule for matrices
        # A layer that came before has put this bank beside itself: it belongs here.
        if self._lent and self.held_by(destination) == self._lent:
            for key in [key for key in destination if key.startswith(self._lent)]:
                del destination[key]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stored is not None:
            stored_state.split(self.stored, destination, prefix, keep_vars)

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
        """Refuse the values of another map before any changes; take scales only with values.

        The values may have any name: pruning and parametrisations rename them.
        """
        self._loading = missing_keys
        missing_keys[:] = [key for key in missing_keys if getattr(key, "bank", None) is not self]
        key, table = prefix + DIGITS, f"{prefix}table"
        # Without values of ours in the state dict its map does not concern this bank.
        values = any(k.startswith(prefix) and k not in (key, table) for k in state_dict)
        given = key in state_dict and values
        try:
            theirs = BankMap.from_tensor(state_dict[key]) if given else None
            self.check(theirs, state_dict.get(table, self.table))
            state_dict = stored_state.joined(self.stored, state_dict, prefix)
        except ValueError as error:
            # At once: torch would load everything else before it says anything.
            raise RuntimeError(
                f"Error(s) in loading a state dict: {prefix[:-1] or 'bank'}: {error}"
            ) from error
        errors = len(error_msgs)
        if key in state_dict:
            # The buffer is written from the map below, so it is not to be copied into: torch
            # would, even when the values do not fit.
            buffer = self._buffers[DIGITS]
            assert buffer is not None
            state_dict = {**state_dict, key: buffer.clone()}
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if len(error_msgs) > errors:
            return
        if values:
            self.trained()
        if theirs is not None:
            self._take_scales(theirs)
        digits = self._buffers[DIGITS]
        assert digits is not None
        trained = next(self.parameters())  # ``weight`` may be what a hook computed before
        if digits.is_meta and not trained.is_meta:
            self._buffers[DIGITS] = torch.empty_like(digits, device=trained.device)
        self.write_map()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> BankState:
        """Move or cast; the map is written anew where it arrives, since meta forgets it."""
        self.look_at_map()
        self._applied = fn
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        computed = self.__dict__.get("weight")
        if isinstance(computed, Tensor):  # what a hook made of the values, until it does so again
            with torch.no_grad():
                self.__dict__["weight"] = fn(computed)
        self.write_map()
        if self._drawn is not None:
            self.watch_for_other_rules()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._loading, self._steps, self._applied = None, WeakSet(), None
        self.trained()  # a copy is of values that someone means
        optimisers.watch(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        if isinstance(state.get("weight"), Tensor):
            # Pruning computes it in a hook, with a graph behind it that no copy can have.
            state["weight"] = state["weight"].detach()
        return {k: v for k, v in state.items() if k not in ("_steps", "_applied", "_loading")}
