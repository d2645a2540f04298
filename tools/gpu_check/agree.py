"""Every back end on small calls of every operator and dtype, judged against float64.

    python -m tools.gpu_check.agree --out DIR [--jobs N]

DIR/agree.jsonl has a line for each back end, operator, dtype and setting. The bound is that of the
benchmarks' gate: twice the error of torch in the same dtype, and the rounding of its sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from tools.gpu_check import items

RESULTS = "agree.jsonl"
GOOD = ("agrees", "does not apply")
BACKENDS = ("cuda", "triton", "reference")
DTYPES = ("bf16", "fp32", "fp16", "amp")
_FAR = 0.2  # of the largest result; beyond that torch's own error is no bound for anybody
# (weight, image or 0, batch, dof, granularity, reflect, window, laps); odd sizes, few tokens.
_Setting = tuple[tuple[int, ...], int, int, int, int, str, int | None, int | None]
LINEAR: tuple[_Setting, ...] = (
    ((200, 320), 0, 5, 5_000, 64, "vector", 64, 2),
    ((130, 192), 0, 40, 9_000, 32, "none", 128, 3),
    ((200, 320), 0, 1, 9_000, 64, "element", 64, 4),
    ((200, 328), 0, 16, 5_000, 64, "vector", None, None),
    ((200, 328), 0, 1, 50_000, 64, "element", None, None),
    ((70, 150), 0, 3, 1_280, 8, "vector", None, None),
    ((66, 50), 0, 67, 1_000, 1, "element", None, None),
)
CONV2D: tuple[_Setting, ...] = (
    ((72, 64, 3, 3), 9, 2, 5_000, 64, "vector", 64, 4),
    ((72, 40, 3, 3), 13, 3, 5_000, 16, "vector", None, None),
    ((40, 24, 1, 1), 7, 5, 900, 1, "element", None, None),
)
EMBEDDING: tuple[_Setting, ...] = (
    ((300, 128), 0, 50, 5_000, 64, "vector", 64, 2),
    ((300, 72), 0, 150, 2_000, 8, "element", None, None),
)
OPERATIONS = {"linear": LINEAR, "conv2d": CONV2D, "embedding": EMBEDDING}
OPERATORS = {
    "linear": ("linear", "linear_input_grad", "linear_bank_grad", "unpack", "pack"),
    "conv2d": ("conv2d", "conv2d_input_grad", "conv2d_bank_grad", "unpack", "pack"),
    "embedding": ("embedding", "embedding_bank_grad"),
}


def every() -> list[str]:
    """All items: back end, operator, dtype, operation and number of its setting."""
    return [
        f"{backend} {operator} {dtype} {operation} {number}"
        for backend in BACKENDS
        for operation, settings in OPERATIONS.items()
        for operator in OPERATORS[operation]
        for dtype in DTYPES
        for number in range(len(settings))
        if not (dtype == "amp" and operator in ("unpack", "pack", "embedding"))
    ]


def prepare() -> None:
    """In every worker, before anything is computed: fp32 means fp32."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def answer(item: str, device: str = "cuda") -> dict[str, Any]:
    """The verdict on one operator of one back end."""
    import torch

    from benchmarks.harness.cases import Case, Layer
    from rpg_kernels.backends import dispatch

    backend, operator, dtype, operation, number = item.split()
    setting = OPERATIONS[operation][int(number)]
    weight, image, batch, dof, granularity, reflect, window, laps = setting
    layer = Layer(operation, (f"agree.{operation}",), weight, image)
    case = Case(layer, batch, dof, granularity, reflect, "fp32", window, laps)
    said = {"setting": case.setting.replace("fp32", dtype)}
    problem, wanted = _problem(replace(case, dtype=dtype), torch.device(device))
    operands, quantity = _call(problem, wanted, operator)
    from rpg_kernels.ops import _library

    try:
        dispatch.explain(_library.call(operator, operands, backend))
    except RuntimeError as error:
        return said | {"outcome": "does not apply", "message": str(error)}
    torch.full_like(quantity.exact, float("nan"), dtype=problem.bank.weight.dtype)
    with torch.no_grad():
        got = getattr(torch.ops.rpg_kernels, operator)(*operands, backend)
    verdict = quantity.judge(got.reshape(quantity.exact.shape))
    if not quantity.allowed <= _FAR * max(1.0, float(quantity.exact.abs().max())):
        return said | {"outcome": "no measure", "message": "torch's own result is far off"}
    return said | {
        "outcome": "agrees" if verdict.passed else "disagrees",
        "message": f"error {verdict.error:.3g}, allowed {verdict.allowed:.3g}",
    }


@cache
def _problem(case: Any, device: Any) -> tuple[Any, Any]:
    """(inputs, exact results) of a case, which several operators and back ends are asked for."""
    from benchmarks.harness import gate
    from benchmarks.harness.problem import Problem

    problem = Problem(case, device)
    return problem, gate.exact(problem)


def _call(problem: Any, wanted: Any, operator: str) -> tuple[tuple[Any, ...], Any]:
    """(operands less the back end, what should come of them) of an operator."""
    case, spec = problem.case, problem.weight.spec
    x, dy, bank = problem.x.detach(), problem.dy, problem.bank.weight.detach()
    if operator in ("unpack", "pack"):
        return _move(problem, operator)
    if case.op == "embedding":
        if operator == "embedding":
            return (bank, None, x, spec), wanted.output
        return (dy, x, None, spec, bank.dtype), wanted.bank_grad
    geometry = case.layer.geometry if case.op == "conv2d" else ()
    size = (list(x.shape),) if case.op == "conv2d" else ()
    return {
        case.op: ((x, bank, None, None, spec, *geometry), wanted.output),
        f"{case.op}_input_grad": ((dy, bank, None, *size, spec, *geometry), wanted.input_grad),
        f"{case.op}_bank_grad": ((dy, x, None, spec, *geometry, bank.dtype), wanted.bank_grad),
    }[operator]


def _move(problem: Any, operator: str) -> tuple[tuple[Any, ...], Any]:
    """unpack, rounded once, and pack, whose sums torch makes in fp32 for comparison."""
    import torch

    from benchmarks.harness import gate

    bank, spec, scale = problem.bank.weight.detach(), problem.weight.spec, problem.scale
    index, sign = problem.map()
    if operator == "unpack":
        exact = bank.view(-1).double()[index] * sign * scale
        return (bank, None, spec), gate.quantity(exact, exact.to(bank.dtype))
    # Of standard deviation 1, as an output's gradient is.
    dense = (bank.view(-1)[index].float() * sign / bank.float().std()).to(bank.dtype)
    sums = []
    for dtype in (torch.float64, torch.float32):
        signed = (dense.to(dtype) * sign * scale).flatten()
        zeros = torch.zeros(bank.numel(), dtype=dtype, device=bank.device)
        sums.append(zeros.index_add_(0, index.flatten(), signed).view_as(bank))
    exact, torchs = sums
    return (dense, None, spec, bank.dtype), gate.quantity(exact, torchs.to(bank.dtype))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    return items.main(__name__, arguments)


if __name__ == "__main__":
    items.run(main)
