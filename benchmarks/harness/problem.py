"""The tensors of one case, made once: every implementation, pass and measurement uses them.

All implementations compute the same function of the same bank, so one exact result judges them
all. What they keep for it differs: a dense weight, tables, or nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.cases import Case
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight

MAX_COPIES = 256
_CHUNK = 1 << 22  # weights of a map that are read at a time


@dataclass
class Stack:
    """Layers of one shape, as an implementation keeps them: a network that is nothing else.

    Args:
        copies: how many there are.
        forward: y of layer i on the problem's x.
        trained: tensors of layer i that a backward differentiates by.
        tables: what layer 0 holds beside them: index and sign tables.
        trains: ``"bank"``, or ``"weight"`` for a dense one.
        own_map: index, sign and scale of an implementation with another map than ours.
    """

    copies: int
    forward: Callable[[int], Tensor]
    trained: Callable[[int], list[Tensor]]
    tables: Sequence[Tensor] = ()
    trains: str = "bank"
    own_map: tuple[Tensor, Tensor, float] | None = None


@dataclass
class Problem:
    """Inputs and bank of a case on a device; random, the same for the same seed.

    Args:
        case: what is measured.
        device: where.
        seed: of the values.

    Attributes:
        x: the input: random normal ``case.input_shape``, or int64 tokens of an embedding.
        dy: the output's gradient, random normal, in the output's dtype.
        bank: random; the layer's weights have standard deviation 1/sqrt(fan-in).
        weight: the layer's virtual weight, the first on the bank.
        rows: the rows of an embedding that x looks up, ascending; None for other operators.
        turns: inputs to be used in turn; x is the first. An embedding has several, since the
            same tokens would find their rows in the cache.
    """

    case: Case
    device: torch.device
    seed: int = 0
    x: Tensor = field(init=False)
    dy: Tensor = field(init=False)
    bank: ParameterBank = field(init=False)
    weight: VirtualWeight = field(init=False)
    rows: Tensor | None = field(init=False, default=None)
    turns: list[Tensor] = field(init=False)
    _map: tuple[Tensor, Tensor] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        case = self.case
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.bank = self._bank(case.bank_dtype)
            fan_in = math.prod(case.layer.weight[1:])
            self._scale = 1 / (self.bank.init_std * math.sqrt(fan_in))
            self._placed = [self._place()]
            if case.op == "embedding":
                self.x = self._tokens()
                self.rows = self.x.unique()
            else:
                self.x = self._random(case.input_shape, case.x_dtype).requires_grad_()
            self.dy = self._random(case.output_shape, self.y_dtype)
        self.turns = [self.x]
        self.weight = self._placed[0]

    @property
    def y_dtype(self) -> torch.dtype:
        return self.case.bank_dtype if self.case.op == "embedding" else self.case.x_dtype

    @property
    def inputs(self) -> list[Tensor]:
        """Inputs that want a gradient."""
        return [self.x] if self.x.requires_grad else []

    def _bank(self, dtype: torch.dtype) -> ParameterBank:
        return new_bank(self.case, self.device, dtype)

    def _tokens(self) -> Tensor:
        case = self.case
        return torch.randint(case.layer.weight[0], case.input_shape, device=self.device)

    def take_turns(self, count: int) -> None:
        """Have ``count`` inputs in ``turns``, where an embedding's rows are what is read."""
        if self.case.op == "embedding":
            self.turns += [self._tokens() for _ in range(count - len(self.turns))]

    def _place(self) -> VirtualWeight:
        return placed(self.bank, self.case, self._scale)

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, device=self.device, dtype=dtype)
        return images_last(values)

    def placed(self, count: int) -> list[VirtualWeight]:
        """The first virtual weights of the bank, one layer each; more are placed as needed."""
        while len(self._placed) < count:
            self._placed.append(self._place())
        return self._placed[:count]

    def map(self) -> tuple[Tensor, Tensor]:
        """``index_and_sign`` of the rows that matter, read once."""
        if self._map is None:
            self._map = self.index_and_sign(self.rows)
        return self._map

    def index_and_sign(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The map of the layer as tables: for each weight the bank element that it reads, int64,
        and its sign, int8; all weights in torch's layout, or ``[count, dim]`` of an embedding.

        Read off by unpacking a bank that holds the numbers 1 to D, which float64 holds exactly.
        """
        probe = self._bank(torch.float64)
        with torch.no_grad():
            probe.weight.copy_(
                torch.arange(1, probe.dof + 1, device=self.device).view_as(probe.weight)
            )
        whole = VirtualWeight(probe, replace(self.weight.placement, scale=1.0))
        op = torch.ops.rpg_kernels
        with torch.no_grad():
            if rows is not None:
                number = op.embedding(probe.weight, None, rows, whole.spec, "reference")
                return number.abs().long().sub_(1), number.sign().to(torch.int8)
            shape = tuple(whole.shape)
            index = torch.empty(shape, dtype=torch.int64, device=self.device)
            sign = torch.empty(shape, dtype=torch.int8, device=self.device)
            step = max(1, _CHUNK // math.prod(shape[1:]))
            for first in range(0, shape[0], step):
                length = min(step, shape[0] - first)
                part = whole.narrow(0, first, length).spec
                values = op.unpack(probe.weight, None, part, "reference")
                index[first : first + length] = values.abs().long().sub_(1)
                sign[first : first + length] = values.sign().to(torch.int8)
        return index, sign

    @property
    def scale(self) -> float:
        """The layer's multiplier."""
        return self._scale

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The vendor library's product of x with a weight in torch's layout."""
        case = self.case
        if case.op == "embedding":
            return F.embedding(x, weight)
        if case.op == "linear":
            return F.linear(x, weight)
        return F.conv2d(x, weight, None, case.layer.stride, case.layer.padding)


def new_bank(case: Case, device: torch.device, dtype: torch.dtype) -> ParameterBank:
    """A bank as the case asks for, without layers."""
    return ParameterBank.from_generator(case.generator, device=device, dtype=dtype)


def placed(bank: ParameterBank, case: Case, scale: float = 1.0) -> VirtualWeight:
    """The next layer of a bank, with the case's weight."""
    return bank.place(case.layer.weight, scale=scale)


def images_last(values: Tensor) -> Tensor:
    """Images and filters in channels_last, as convolutions are measured; others as they are."""
    return values.contiguous(memory_format=last(values.shape))


def last(shape: Sequence[int]) -> torch.memory_format:
    """The memory format of values of this shape."""
    return torch.channels_last if len(shape) == 4 else torch.contiguous_format


def copies(case: Case, bytes_of_layer: int, cache_bytes: int, limit: int = MAX_COPIES) -> int:
    """Layers to run in turn so that a layer's data has left the cache when it comes round again.

    Between two uses of one layer at least twice the last-level cache is read or written: the
    other layers, x and y.

    Args:
        case: for the bytes of x and y.
        bytes_of_layer: what a layer keeps; the dense weight's bytes for one that keeps nothing.
        cache_bytes: of the last-level cache.
        limit: at most so many.

    Example:
        >>> from benchmarks.harness.cases import select
        >>> case = select(["llama-3-8b.q_proj/1"])[0]
        >>> copies(case, case.weight_bytes, 32 << 20), copies(case, case.weight_bytes, 96 << 20)
        (1, 3)
    """
    missing = 2 * cache_bytes - case.input_bytes - case.output_bytes
    return min(limit, max(1, -(-missing // bytes_of_layer)))


def turns(case: Case, cache_bytes: int) -> int:
    """Inputs to use in turn so that twice the last-level cache of rows passes between two uses.

    Example:
        >>> from benchmarks.harness.cases import select
        >>> (case,) = select(["llama-3-8b.embed_tokens/256"])
        >>> turns(case, 32 << 20), turns(select(["llama-3-8b.q_proj/1"])[0], 32 << 20)
        (17, 1)
    """
    if not case.rows_only:
        return 1
    return min(MAX_COPIES, 1 + 2 * cache_bytes // case.output_bytes)
