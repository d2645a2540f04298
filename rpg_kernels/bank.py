"""ParameterBank: the trainable vector that every virtual weight of a model is read from."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rpg_kernels import _checks
from rpg_kernels._tensors import DTYPES
from rpg_kernels.config import PAPER_INIT_STD
from rpg_kernels.generator import Generator, TableGenerator
from rpg_kernels.placement import Placement, parse
from rpg_kernels.virtual_weight import VirtualWeight

_PLACEMENTS = "rpg_placements"


class ParameterBank(nn.Module):
    """The *model ring* w of Ŵ = scale · G · w, and the book of who reads which segment of it.

    ``weight`` is a parameter ``[slots, granularity]``; a bank made by ``from_table`` also has
    the buffer ``table``, int32 ``[entries]``. Layers hold the bank unregistered; the model
    registers it once (``convert`` does, or ``attach``).

    Args:
        dof: elements of the bank; rounded *down* to whole slots. When it is less than one slot,
            the granularity becomes the largest power of two that fits.
        granularity: elements per slot, a power of two from 1 to 128.
        reflect: ``"element"``, ``"vector"`` or ``"none"``.
        permute: False reads the ring in order.
        window: None, the whole ring.
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
        seed: int = 0,
        init_std: float = PAPER_INIT_STD,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checks.integer("dof", dof, 1, 2**62)
        _checks.granularity(granularity)
        granularity = min(granularity, 1 << (dof.bit_length() - 1))
        generator = Generator(
            slots=dof // granularity,
            granularity=granularity,
            reflect=reflect,
            permute=permute,
            window=window,
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
        host = table.detach().cpu().contiguous()
        data = ctypes.string_at(host.data_ptr(), 4 * host.numel())
        digest = hashlib.sha256(data).hexdigest()
        generator = TableGenerator(slots=weight.numel(), entries=table.numel(), sha256=digest)
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
        plus the number of such skips (design: even sampling, paper section 3).

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
            block = trial.matrix.block
            start = -(-start // block) * block % generator.dof
        placement = Placement(generator, self.layers, start, tuple(shape), scale)
        if isinstance(generator, Generator):
            self._cursor = (start + placement.matrix.span) % generator.dof
        else:
            self._cursor = start + placement.matrix.numel
        weight = VirtualWeight(self, placement)
        self._placed.append(weight)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x itself: a bank registered with an nn.Sequential is one of the modules it runs."""
        return x

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """One key for the values; the map goes into the state dict's metadata, beside versions."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata[prefix[:-1]][_PLACEMENTS] = [weight.spec for weight in self._placed]

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
        """Take over the scales of a state dict; refuse the values of another map.

        Either would otherwise silently mean another network.
        """
        # Without values of ours in the state dict its map does not concern this bank.
        given = f"{prefix}weight" in state_dict
        theirs = local_metadata.get(_PLACEMENTS) if given else None
        if theirs is not None:
            difference = _difference(theirs, self._placed)
            if difference:
                error_msgs.append(f"{prefix[:-1]}: {difference}")
                return
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if theirs is not None and len(error_msgs) == errors:
            for text, weight in zip(theirs, self._placed, strict=True):
                weight.rescale(parse(text).scale)

    def extra_repr(self) -> str:
        """dof (and what was asked for), then the generator."""
        asked = "" if self.requested_dof == self.dof else f" (asked for {self.requested_dof})"
        return f"dof={self.dof}{asked}, {self.generator}, init_std={self.init_std:.4g}"


def _floating(dtype: torch.dtype | None, argument: str = "dtype") -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in DTYPES:
        raise _checks.fail(argument, dtype, "float64, float32, bfloat16 or float16")
    return dtype


def _difference(theirs: object, ours: Sequence[VirtualWeight]) -> str:
    """How the map of a state dict differs from a bank's own; "" when only scales do."""
    if not isinstance(theirs, list):
        return f"got a state dict whose placements are a {type(theirs).__name__}, wanted a list"
    if len(theirs) != len(ours):
        return f"got a state dict of {len(theirs)} virtual weights, wanted {len(ours)}"
    for text, mine in zip(theirs, ours, strict=True):
        try:
            other = parse(text)
        except (TypeError, ValueError) as error:
            return f"got a state dict whose placement cannot be read ({error})"
        for name in ("generator", "layer", "shape", "start"):
            got, wanted = getattr(other, name), getattr(mine.placement, name)
            if got != wanted:
                where = f"of layer {mine.placement.layer}"
                return f"got a state dict with {name} {got} {where}, wanted {wanted}"
    return ""
