"""ParameterBank: the trainable vector that every virtual weight of a model is read from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rpg_kernels import _checks
from rpg_kernels._tensors import DTYPES, memory
from rpg_kernels.bank.bank_map import BankMap
from rpg_kernels.bank.config import PAPER_INIT_STD, ring_of
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.law import window as window_law
from rpg_kernels.law.generator import Generator, TableGenerator
from rpg_kernels.law.placement import Placement

DEFAULT_LAPS = 4
EXTRA_STATE = "_extra_state"  # torch's suffix for what get_extra_state returns


class ParameterBank(nn.Module):
    """The bank w of Ŵ = scale · G · w, and the list of which layer reads which segment of it.

    ``weight`` is a parameter ``[slots, granularity]``; a bank made by ``from_table`` also has
    the buffer ``table``, int32 ``[entries]``. Layers hold the bank unregistered; the model
    registers it once (``convert`` does, or ``attach``).

    Args:
        dof: elements of the bank; rounded *down* to whole slots. When it is less than one slot,
            the granularity becomes the largest power of two that fits.
        granularity: elements per slot, a power of two from 1 to 128.
        reflect: ``"element"``, ``"vector"`` or ``"none"``.
        permute: False reads the ring in order.
        window: slots of a window (law 2), a power of two (a multiple of 8) from 64 to 32768 and at
            most the ring; None, the whole ring.
        laps: times that a unit reads each slot of its window, 1 to 64; None for 4. Where the
            finished model compresses less than that, nothing reads some windows: ``rpg.summary``.
        seed: of the generating matrix, not of the initial values.
        init_std: standard deviation of the normal distribution that initialises the bank.
        device, dtype: of the weight; floating point.

    Raises:
        TypeError, ValueError: an argument is out of range, with what was got and wanted.

    Example:
        >>> bank = ParameterBank(dof=1000, granularity=64)
        >>> bank.dof, tuple(bank.weight.shape)
        (960, (15, 64))
        >>> bank.place((32, 100)).unpack().shape
        torch.Size([32, 100])

    Source: Wang et al. (WACV 2023), section 3.
    """

    weight: nn.Parameter
    table: Tensor | None

    def __init__(
        self,
        dof: int,
        granularity: int = 64,
        reflect: str = "vector",
        permute: bool = True,
        window: int | None = None,
        laps: int | None = None,
        seed: int = 0,
        init_std: float = PAPER_INIT_STD,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checks.integer("dof", dof, 1, 2**62)
        _checks.granularity(granularity)
        slots, granularity = ring_of(dof, granularity)
        if window is not None and laps is None:
            laps = DEFAULT_LAPS
        generator = Generator(
            slots=slots,
            granularity=granularity,
            reflect=reflect,
            permute=permute,
            window=window,
            laps=laps,
            seed=seed,
        )
        if _checks.finite("init_std", init_std) <= 0:
            raise _checks.fail("init_std", init_std, "a number above 0")
        self._setup(generator, dof, init_std)
        shape = (generator.slots, granularity)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=_floating(dtype)))
        self.register_buffer("table", None)
        self.reset_parameters()

    def _setup(
        self, generator: Generator | TableGenerator, requested_dof: int, init_std: float
    ) -> None:
        super().__init__()
        self.generator = generator
        self.requested_dof = requested_dof
        self.init_std = float(init_std)
        self._placed: list[VirtualWeight] = []
        self._cursor = 0
        self.skipped: dict[str, str] = {}  # what convert left dense, and why
        self.residuals: dict[str, float] = {}  # of a least-squares start, per layer

    @classmethod
    def from_table(cls, weight: Tensor, table: Tensor) -> ParameterBank:
        """A bank whose generating matrix is an explicit table.

        Args:
            weight: floating point ``[dof]``; copied.
            table: int32 ``[entries]`` over all layers, each in virtual-matrix order
                (``[out, kh·kw·in]``, in-channels innermost): index in bits 0 to 30, sign in
                bit 31. Not copied.

        Raises:
            TypeError, ValueError: wrong rank, dtype or device, or an index beyond the bank.

        Example:
            >>> bank = ParameterBank.from_table(torch.tensor([1.0, 2.0]),
            ...                                 torch.tensor([1, 0 - 2**31], dtype=torch.int32))
            >>> bank.place((1, 2)).unpack()
            tensor([[ 2., -1.]], grad_fn=...)
        """
        for name, value in (("weight", weight), ("table", table)):
            _checks.tensor(name, value)
        _floating(weight.dtype, "weight")
        if weight.dim() != 1 or weight.numel() == 0:
            got = f"{weight.dtype} {list(weight.shape)}"
            raise _checks.fail("weight", got, "a non-empty floating-point tensor [dof]")
        if table.dim() != 1 or table.dtype != torch.int32 or table.numel() == 0:
            got = f"{table.dtype} {list(table.shape)}"
            raise _checks.fail("table", got, "a non-empty torch.int32 tensor [entries]")
        if table.device != weight.device:
            raise _checks.fail("table", f"device {table.device}", f"device {weight.device}")
        last = int(table.bitwise_and(_checks.INT32_MAX).max())
        if last >= weight.numel():
            raise _checks.fail("table", f"index {last}", f"indices below dof {weight.numel()}")
        generator = TableGenerator(
            slots=weight.numel(), entries=table.numel(), sha256=_sha256(table)
        )
        bank = cls.__new__(cls)
        std = float(weight.detach().float().std(correction=0))
        bank._setup(generator, weight.numel(), std if std > 0 else PAPER_INIT_STD)
        bank.weight = nn.Parameter(weight.detach().clone().unsqueeze(1))
        bank.register_buffer("table", table.detach())
        return bank

    @property
    def dof(self) -> int:
        """Degrees of freedom: elements of the bank."""
        return self.generator.dof

    @property
    def slots(self) -> int:
        """Slots on the ring."""
        return self.generator.slots

    @property
    def granularity(self) -> int:
        """Elements per slot."""
        return self.generator.granularity

    @property
    def layers(self) -> int:
        """Virtual weights placed so far."""
        return len(self._placed)

    def placed(self, placement: Placement) -> VirtualWeight | None:
        """The weight that a placement is, or is a part of; None when this bank placed none such."""
        if placement.layer < self.layers:
            weight = self._placed[placement.layer]
            mine = weight.placement
            if (mine.shape, mine.start) == (placement.shape, placement.start):
                return weight
        return None

    def reset_parameters(self) -> None:
        """Draw the bank anew from N(0, init_std²)."""
        nn.init.normal_(self.weight, std=self.init_std)

    def place(self, shape: Sequence[int], *, scale: float = 1.0) -> VirtualWeight:
        """The next layer's virtual weight, on the next segment of the ring.

        Segments follow each other and wrap around. Each begins at a multiple of its own block,
        so a layer with a larger block than the one before may skip less than one block. Over a
        model the use counts of bank elements, padding counted, therefore differ by at most one
        plus the number of such skips (design: even sampling, paper section 3). With windows
        addresses are not wrapped and starts are aligned to up to 64 blocks; the bound on use
        counts is in ``docs/window_law.md``, section 6.

        Args:
            shape: torch's shape of the weight.
            scale: the layer's multiplier, finite and not zero.

        Returns:
            A virtual weight with the next layer number.

        Raises:
            TypeError, ValueError: as VirtualMatrix and Placement; a table with too few entries.
        """
        generator = self.generator
        if isinstance(shape, str) or not isinstance(shape, Sequence):
            raise TypeError(f"shape: got {shape!r}, wanted a sequence of ints")
        start = self._cursor
        if isinstance(generator, Generator):
            trial = Placement(generator, self.layers, 0, tuple(shape), scale)
            if generator.window is not None:
                start, _ = window_law.place(shape, generator.granularity, start)
            else:
                block = trial.matrix.block
                start = -(-start // block) * block % generator.dof
        placement = Placement(generator, self.layers, start, tuple(shape), scale)
        if not isinstance(generator, Generator):
            self._cursor = start + placement.matrix.numel
        elif generator.window is not None:
            self._cursor = start + placement.matrix.span
        else:
            self._cursor = (start + placement.matrix.span) % generator.dof
        weight = VirtualWeight(self, placement)
        self._placed.append(weight)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x itself: a bank registered with an nn.Sequential is one of the modules it runs."""
        return x

    @property
    def map(self) -> BankMap:
        """What the values mean: the generator, and every layer's segment, shape and scale."""
        return BankMap(self.generator, tuple(weight.placement for weight in self._placed))

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
        if not table.is_meta and (got := _sha256(table)) != self.generator.sha256:
            raise _checks.fail("table", f"sha256 {got}", self.generator.sha256)

    def get_extra_state(self) -> Tensor:
        """The map as uint8 ``[bytes]``, which state dicts hold beside the values.

        A tensor, so that ``torch.load(weights_only=True)`` and safetensors take it; on the bank's
        device, as tools that move whole state dicts expect, or on the CPU for a bank on meta.
        """
        device = self.weight.device
        return self.map.to_tensor("cpu" if device.type == "meta" else device)

    def set_extra_state(self, state: object) -> None:
        """Take over the scales of a bank with the same map.

        Raises:
            ValueError: not what get_extra_state returns, or another map; nothing has changed.
        """
        theirs = BankMap.from_tensor(state)
        self.check(theirs, self.table)
        for weight, placement in zip(self._placed, theirs.placements, strict=True):
            weight.rescale(placement.scale)

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
        """Refuse the values of another map before any changes; take scales only with values."""
        key = prefix + EXTRA_STATE
        # Without values of ours in the state dict its map does not concern this bank.
        given = key in state_dict and f"{prefix}weight" in state_dict
        try:
            theirs = BankMap.from_tensor(state_dict[key]) if given else None
            self.check(theirs, state_dict.get(f"{prefix}table", self.table))
        except ValueError as error:
            error_msgs.append(f"{prefix[:-1] or 'bank'}: {error}")
            return
        errors, incoming = len(error_msgs), state_dict
        if key in state_dict:
            # torch sets the extra state even when the values do not fit, so it gets our own.
            state_dict = {**state_dict, key: self.get_extra_state()}
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if given and len(error_msgs) == errors:
            self.set_extra_state(incoming[key])

    def extra_repr(self) -> str:
        """dof (and what was asked for), then the generator."""
        asked = "" if self.requested_dof == self.dof else f" (asked for {self.requested_dof})"
        return f"dof={self.dof}{asked}, {self.generator}, init_std={self.init_std:.4g}"


def _floating(dtype: torch.dtype | None, argument: str = "dtype") -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in DTYPES:
        raise _checks.fail(argument, dtype, "float64, float32, bfloat16 or float16")
    return dtype


def _sha256(table: Tensor) -> str:
    host = table.detach().cpu().contiguous()
    return hashlib.sha256(memory(host)).hexdigest()
