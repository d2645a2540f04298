"""ParameterBank: the trainable vector that every virtual weight of a model is read from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rpg_kernels import _checks
from rpg_kernels._tensors import DTYPES
from rpg_kernels.bank.bank_map import DIGITS, no_map
from rpg_kernels.bank.bank_state import BankState
from rpg_kernels.bank.buffers import sha256_of
from rpg_kernels.bank.config import PAPER_INIT_STD, RPGConfig
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.law.generator import Generator, TableGenerator
from rpg_kernels.law.placement import Placement, place


class ParameterBank(BankState):
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
        window: slots that the units aim at, a multiple of 8 from 8 to 4096: for experts, and only
            with laps. None lets the law choose.
        laps: times that the slots of a unit are read close together (law 3), 1 to 64; None reads
            the whole ring (law 1). Where the finished model compresses less than that, nothing
            reads some slots: ``rpg.summary``.
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
        >>> ParameterBank(dof=1000, granularity=64, laps=4).generator.law
        3

    Source: Wang et al. (WACV 2023), section 3.
    """

    weight: nn.Parameter

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
        _checks.integer("dof", dof, 1, 2**62)  # which a config may leave to groups
        config = RPGConfig(
            dof=dof,
            granularity=granularity,
            reflect=reflect,
            permute=permute,
            laps=laps,
            window=window,
            seed=seed,
            init_std=init_std,
        )
        self._draw(config.generator, dof, init_std, device, dtype)

    def _draw(
        self,
        generator: Generator,
        requested_dof: int,
        init_std: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._setup(generator, requested_dof, init_std)
        shape = (generator.slots, generator.granularity)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=_floating(dtype)))
        self.register_buffer("table", None)
        self.register_buffer(DIGITS, no_map(self.weight.device))
        self.reset_parameters()

    def _setup(
        self, generator: Generator | TableGenerator, requested_dof: int, init_std: float
    ) -> None:
        super().__init__(generator)
        self.requested_dof = requested_dof
        self.init_std = float(init_std)
        self._cursor = 0
        self.skipped: dict[str, str] = {}  # what convert left dense, and why
        self.residuals: dict[str, float] = {}  # of a least-squares start, per layer

    @classmethod
    def from_generator(
        cls,
        generator: Generator,
        *,
        init_std: float = PAPER_INIT_STD,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ParameterBank:
        """A bank ``[slots, granularity]`` whose generating matrix is given, of any packing law.

        A checkpoint's record holds the generator of its bank.

        Args:
            generator: what G is.
            init_std, device, dtype: as for ``ParameterBank``.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or out of range. Tables are for
                ``from_table``.

        Example:
            >>> generator = Generator(1024, 64, "vector", laps=4)
            >>> bank = ParameterBank.from_generator(generator)
            >>> tuple(bank.weight.shape), bank.place((32, 100)).unpack().shape
            ((1024, 64), torch.Size([32, 100]))
        """
        if not isinstance(generator, Generator):
            raise TypeError(f"generator: got a {type(generator).__name__}, wanted a Generator")
        if _checks.finite("init_std", init_std) <= 0:
            raise _checks.fail("init_std", init_std, "a number above 0")
        bank = cls.__new__(cls)
        bank._draw(generator, generator.dof, init_std, device, dtype)
        return bank

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
            slots=weight.numel(), entries=table.numel(), sha256=sha256_of(table)
        )
        bank = cls.__new__(cls)
        std = float(weight.detach().float().std(correction=0))
        bank._setup(generator, weight.numel(), std if std > 0 else PAPER_INIT_STD)
        bank.weight = nn.Parameter(weight.detach().clone().unsqueeze(1))
        bank.register_buffer("table", table.detach())
        bank.register_buffer(DIGITS, no_map(weight.device))
        bank.write_map()
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
            wanted = placement.shape, placement.start, placement.taps
            if (mine.shape, mine.start, mine.taps) == wanted:
                return weight
        return None

    def reset_parameters(self) -> None:
        """Draw the bank anew from N(0, init_std²); write its map, which has no memory on meta.

        Of a pruned bank the original values; its mask stays.
        """
        weight = self._parameters.get("weight_orig")
        nn.init.normal_(self.weight if weight is None else weight, std=self.init_std)
        self.write_map()
        self.watch_for_other_rules()

    def place(
        self, shape: Sequence[int], *, scale: float = 1.0, taps: int | None = None
    ) -> VirtualWeight:
        """The next layer's virtual weight, on the next segment of the ring.

        Segments follow each other and wrap around. Each begins at a multiple of its own block,
        so a layer with a larger block than the one before may skip less than one block. Over a
        model the use counts of bank elements, padding counted, therefore differ by at most one
        plus the number of such skips (design: even sampling, paper section 3). With laps addresses
        are not wrapped, and layers start where an octet of slots is read first; the bound on use
        counts is in ``docs/unit_law.md``.

        Args:
            shape: torch's shape of the weight.
            scale: the layer's multiplier, finite and not zero.
            taps: of a unit, of a convolution's kernel: a divisor of its taps, at most the laps;
                None for the largest. Only with laps.

        Returns:
            A virtual weight with the next layer number.

        Raises:
            TypeError, ValueError: as VirtualMatrix and Placement; a table with too few entries.
        """
        if isinstance(shape, str) or not isinstance(shape, Sequence):
            raise TypeError(f"shape: got {shape!r}, wanted a sequence of ints")
        placement, self._cursor = place(
            self.generator, self.layers, self._cursor, shape, scale, taps
        )
        self.look_at_map()
        weight = VirtualWeight(self, placement)
        self._placed.append(weight)
        self.map_changed(weight)
        return weight

    def extra_repr(self) -> str:
        """dof (and what was asked for), then the generator."""
        asked = "" if self.requested_dof == self.dof else f" (asked for {self.requested_dof})"
        text = f"dof={self.dof}{asked}, {self.generator}, init_std={self.init_std:.4g}"
        if self.stored is not None:
            return f"{text}, stored as {self.stored.form}: {self.stored.bytes:,} bytes"
        return text if self.rounding is None else f"{text}, read as {self.rounding.form}"


def _floating(dtype: torch.dtype | None, argument: str = "dtype") -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in DTYPES:
        raise _checks.fail(argument, dtype, "float64, float32, bfloat16 or float16")
    return dtype
