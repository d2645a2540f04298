"""Every operator and the law, computed on every device and judged against something independent.

An operator is judged by ``max|out - ref64| <= 2 * max|torch - ref64| + eps``: ref64 is torch's own
function in float64 on the CPU with an explicit weight, torch the same in the operator's dtype on
its device. The explicit weight is written out from the law and the bank here, position by
position; neither the back ends nor the native module have a part in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg_kernels import functional
from rpg_kernels._tensors import DTYPES
from rpg_kernels.backends.call import OPERATORS
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.bank.virtual_weight import VirtualWeight
from rpg_kernels.doctor import law_check
from rpg_kernels.doctor.environment import torch_devices
from rpg_kernels.doctor.report import one_line
from rpg_kernels.law.placement import Placement

DOF, GRANULARITY = 1280, 64
REFLECT = ("vector", "element")
FORWARD, INPUT, BANK = "forward", "input gradient", "bank gradient"


@dataclass(frozen=True)
class Operation:
    """A function of x and a weight, by torch and by us, and the operators that compute it.

    Args:
        weight: its shape; odd, so that blocks are padded.
        x: shape of the input, or the row numbers to look up; None where there is none.
        torchs, ours: the function.
        operators: forward, input gradient, bank gradient -> operator.
    """

    weight: tuple[int, ...]
    x: tuple[int, ...] | list[int] | None
    torchs: Callable[[Tensor, Tensor], Tensor]
    ours: Callable[[Tensor, VirtualWeight], Tensor]
    operators: dict[str, str]


def _bias(x: Tensor, size: int) -> Tensor:
    """``[size]``, representable in every dtype."""
    return torch.arange(size, dtype=x.dtype, device=x.device) / 64 - 0.5


OPERATIONS = (
    Operation(
        (70, 150),
        (5, 150),
        lambda x, w: F.linear(x, w, _bias(x, 70)),
        lambda x, w: functional.linear(x, w, _bias(x, 70)),
        {FORWARD: "linear", INPUT: "linear_input_grad", BANK: "linear_bank_grad"},
    ),
    Operation(
        (24, 20, 3, 3),
        (2, 40, 7, 6),
        lambda x, w: F.conv2d(x, w, _bias(x, 24), stride=(2, 1), padding=1, groups=2),
        lambda x, w: functional.conv2d(x, w, _bias(x, 24), stride=(2, 1), padding=1, groups=2),
        {FORWARD: "conv2d", INPUT: "conv2d_input_grad", BANK: "conv2d_bank_grad"},
    ),
    Operation(
        (60, 90),
        [0, 59, 7, 7, 31],
        F.embedding,
        functional.embedding,
        {FORWARD: "embedding", BANK: "embedding_bank_grad"},
    ),
    Operation(
        (18, 20, 3, 3),
        None,
        lambda x, w: w.clone(),
        lambda x, w: functional.unpack(w),
        {FORWARD: "unpack", BANK: "pack"},
    ),
)


def self_tests() -> list[dict[str, Any]]:
    """One record for each operator, device and dtype, and for each implementation of the law."""
    records = []
    devices = torch_devices()
    for name, device, evaluate in law_check.implementations(devices):
        try:
            message = law_check.difference(evaluate, device)
        except Exception as error:
            message = one_line(error)
        records.append(_record(name, device, None, message))
    worst: dict[tuple[str, torch.device, torch.dtype], dict[str, Any]] = {}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        for operation in OPERATIONS:
            for reflect in REFLECT:
                problem = Problem(operation, reflect)
                for device in devices:
                    for dtype in DTYPES:
                        for record in _judge(problem, device, dtype):
                            key = (record["test"], device, dtype)
                            worst[key] = max(worst.get(key, record), record, key=_badness)
    order = [(op, device, dtype) for device in devices for op in OPERATORS for dtype in DTYPES]
    return records + [worst[key] for key in order if key in worst]


def _record(
    test: str,
    device: torch.device,
    dtype: torch.dtype | None,
    message: str,
    error: float = math.nan,
    bound: float = math.nan,
) -> dict[str, Any]:
    return {
        "test": test,
        "device": str(device),
        "dtype": None if dtype is None else str(dtype).split(".")[1],
        "passed": not message,
        "error": error if math.isfinite(error) else None,
        "bound": bound if math.isfinite(bound) else None,
        "message": message,
    }


def _badness(record: dict[str, Any]) -> tuple[bool, float]:
    """Of two records of one test the greater is the one to show."""
    if record["error"] is None or record["bound"] is None:
        return True, math.inf
    return not record["passed"], record["error"] / record["bound"]


class Problem:
    """One operation on one map: values in float64 and, from them, its exact results.

    Bank, x and dy hold numbers that every dtype represents, so that all are asked the same.
    """

    def __init__(self, operation: Operation, reflect: str) -> None:
        self.operation, self.reflect = operation, reflect
        self.ring = _values(DOF)
        self.scale = 0.7 / math.sqrt(math.prod(operation.weight[1:]))
        self.index, self.sign = explicit_map(self.weight(torch.device("cpu")).placement)
        x = operation.x
        self.x = torch.tensor(x) if isinstance(x, list) else _values(*(x or (1,)))
        shape = operation.torchs(self.x, torch.zeros(operation.weight, dtype=torch.float64)).shape
        self.dy = _values(*shape)
        self.exact = self.by_torch(torch.device("cpu"), torch.float64)

    def weight(self, device: torch.device, dtype: torch.dtype = torch.float64) -> VirtualWeight:
        """Ours: the second layer of its bank, so that its segment begins within the ring."""
        bank = ParameterBank(
            DOF, GRANULARITY, self.reflect, seed=7, init_std=1.0, device=device, dtype=dtype
        )
        with torch.no_grad():
            bank.weight.copy_(self.ring.view_as(bank.weight))
        bank.place((13, 70))
        return bank.place(self.operation.weight, scale=self.scale)

    def by_torch(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Forward, input gradient and bank gradient with an explicit weight."""
        weight = (self.scale * self.sign * self.ring[self.index]).to(device, dtype)
        x = self.input(device, dtype)
        y = self.operation.torchs(x, weight.requires_grad_())
        wanted = [weight, *([x] if x.requires_grad else [])]
        dense, *dx = torch.autograd.grad(y, wanted, self.dy.to(device, dtype))
        bank = torch.zeros(DOF, dtype=torch.float64)
        bank.index_add_(0, self.index.flatten(), (self.sign * dense.cpu().double()).flatten())
        gradient = (self.scale * bank).view(-1, GRANULARITY).to(dtype)
        return {FORWARD: y.detach(), BANK: gradient, **({INPUT: dx[0]} if dx else {})}

    def by_us(self, what: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """One of them with the virtual weight, through the operators and autograd."""
        weight, x = self.weight(device, dtype), self.input(device, dtype)
        y = self.operation.ours(x, weight)
        if what == FORWARD:
            return y.detach()
        wanted = x if what == INPUT else weight.bank.weight
        return torch.autograd.grad(y, wanted, self.dy.to(device, dtype))[0]

    def input(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """x, wanting a gradient where there is one."""
        if not self.x.is_floating_point():
            return self.x.to(device)
        leaf = self.x.to(device, dtype, copy=True)
        return leaf.requires_grad_(INPUT in self.operation.operators)


def _values(*shape: int) -> Tensor:
    """Random, of order 1, float64, exact in bfloat16: multiples of 2^-6 from -2 to 2."""
    return torch.randint(-128, 129, shape).double() / 64


def explicit_map(p: Placement) -> tuple[Tensor, Tensor]:
    """For each virtual weight, in torch's layout: its bank element, int64, and sign, float64."""
    law = p.law
    n, b = torch.arange(law.rows)[:, None], torch.arange(law.blocks)
    element = torch.arange(law.granularity)
    index = law.slot(n, b)[..., None] * law.granularity + element
    sign = 1.0 - 2.0 * law.negative(n, b).double()
    return _torch_layout(index, p), _torch_layout(sign, p)


def _torch_layout(blocks: Tensor, p: Placement) -> Tensor:
    """``[rows, blocks, elements]`` -> the weight's shape, padding dropped."""
    runs = blocks.reshape(p.matrix.rows, p.matrix.runs, -1)[..., : p.matrix.run]
    taps = runs.reshape(p.matrix.rows, p.matrix.taps, p.matrix.channels)
    return taps.transpose(1, 2).reshape(p.shape)


def _judge(problem: Problem, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One record for each operator of the problem's operation."""
    operators = problem.operation.operators
    try:
        torchs = problem.by_torch(device, dtype)
    except Exception as error:
        message = f"torch itself: {one_line(error)}"
        return [_record(op, device, dtype, message) for op in operators.values()]
    records = []
    for what, op in operators.items():
        try:
            got = problem.by_us(what, device, dtype)
            figures = compare(got, problem.exact[what], torchs[what], dtype)
            records.append(_record(op, device, dtype, *figures))
        except Exception as error:
            records.append(_record(op, device, dtype, one_line(error)))
    return records


def compare(
    got: Tensor, exact: Tensor, torchs: Tensor, dtype: torch.dtype
) -> tuple[str, float, float]:
    """(what is wrong or "", error, bound) of a result of an operator in a dtype."""
    if got.shape != exact.shape or got.dtype != dtype:
        wanted = f"{dtype} {list(exact.shape)}"
        return f"got {got.dtype} {list(got.shape)}, wanted {wanted}", math.nan, math.nan
    error, other = (float((t.cpu().double() - exact).abs().max()) for t in (got, torchs))
    # Beyond torch's own error: the order of the sums, in fp32 where the dtype is lower.
    eps = 1024 * 2**-52 if dtype == torch.float64 else 2 * 2**-23
    bound = 2 * other + eps * max(1.0, float(exact.abs().max()))
    message = "" if error <= bound else "the error exceeds the bound"
    if not math.isfinite(bound):
        message = "torch's own result holds values that are not finite"
    if not math.isfinite(error):
        message = "the result holds values that are not finite"
    return message, error, bound
