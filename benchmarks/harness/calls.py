"""The operator calls that a case makes, as questions to dispatch: nothing is computed.

Tensors are fake ones: they have a device, a shape, a dtype and strides, and no memory. A back end
that is asked about them sees what it will see in the call itself, on a GPU that need not be there.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness.cases import Case
from benchmarks.harness.problem import last, new_bank, placed
from rpg_kernels.backends import dispatch
from rpg_kernels.backends.call import Call
from rpg_kernels.ops import _library


def of(case: Case, device: torch.device, forced: str = "") -> list[Call]:
    """Every operator call of a forward and its backward, the forward first.

    Args:
        case: what is computed.
        device: where.
        forced: the back end that is asked for by name, or "".

    Example:
        >>> from benchmarks.harness.cases import select
        >>> (case,) = select(["llama-3-8b.q_proj/16"], dtype="bf16")
        >>> [(call.op, call.rows, str(call.device)) for call in of(case, torch.device("cuda"))][:2]
        [('linear', 16, 'cuda:0'), ('linear_input_grad', 16, 'cuda:0')]
    """
    with FakeTensorMode():
        bank = new_bank(case, device, case.bank_dtype)
        weight, spec = bank.weight, placed(bank, case).spec
        if case.op == "embedding":
            x = torch.empty(case.input_shape, dtype=torch.int64, device=device)
            dy = torch.empty(case.output_shape, dtype=case.bank_dtype, device=device)
            operands = {
                "embedding": (weight, None, x, spec),
                "embedding_bank_grad": (dy, x, None, spec, case.bank_dtype),
            }
            return [_library.call(op, args, forced) for op, args in operands.items()]
        x, dy = (
            torch.empty(shape, dtype=case.x_dtype, device=device, memory_format=last(shape))
            for shape in (case.input_shape, case.output_shape)
        )
        geometry = case.layer.geometry if case.op == "conv2d" else ()
        size = (list(x.shape),) if case.op == "conv2d" else ()
        products = {
            case.op: (x, weight, None, None, spec, *geometry),
            f"{case.op}_input_grad": (dy, weight, None, *size, spec, *geometry),
            f"{case.op}_bank_grad": (dy, x, None, spec, *geometry, case.bank_dtype),
        }
        return [_library.call(op, args, forced) for op, args in products.items()]


def refused(case: Case, device: torch.device, backend: str) -> tuple[str, str]:
    """(why a back end cannot run the forward, why it cannot run the backward), "" where it can.

    Too little scratch is a reason too. A backward that cannot run does not keep the forward from
    running by itself.
    """
    forward, *backward = of(case, device, backend)
    with FakeTensorMode():
        reason = _reason(forward)
        reasons = dict.fromkeys(filter(None, map(_reason, backward)))
    return reason, "; ".join(reasons)


def _reason(call: Call) -> str:
    try:
        dispatch.explain(call)
    except RuntimeError as error:
        return str(error)
    return ""
