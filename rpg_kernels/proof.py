"""Proving up front what a model will run on, see ``rpg_kernels.backends.proving``."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rpg_kernels import _checks, settings
from rpg_kernels._stored import StoredValues
from rpg_kernels._wrappers import unwrap
from rpg_kernels.backends import dispatch
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.proving import waiting
from rpg_kernels.explanation import reached
from rpg_kernels.ops import _library as lib

BATCHES = (1, 16, 64, 256, 4096)
IMAGE = 32  # height and width of images, length of sequences, where no inputs say


def prove(
    model: nn.Module,
    *inputs: Any,
    batches: Sequence[int] = BATCHES,
    backward: bool = True,
    progress: bool = True,
) -> list[dispatch.Explanation]:
    """Test the back ends with every kind of call that a model makes, before it makes them.

    On a GPU a back end is tested when it is first needed: some seconds at the first call, less at
    other kinds of calls, and never again on a machine that keeps the verdicts (in the folder
    RPG_KERNELS_CACHE, or ``~/.cache/rpg-kernels``). This does it at once: before a measurement, a
    CUDA graph, or a GPU that is full. What is computed does not change. On a CPU there is nothing
    to test. Under autocast the dtype is autocast's.

    Args:
        model: whose weights lie where it will run.
        inputs: positional ones of the model; it is run once with them, in eval mode, without
            gradients and by the reference, to see its calls. Sizes of images and their memory
            format decide what kind a convolution's call is, so networks of convolutions want
            this. Without inputs each layer is asked by itself, with ``batches``, in the bank's
            dtype: ``[batch, in]``, int64 indices ``[batch]``, or contiguous images
            ``[batch, channels, 32, 32]`` and sequences ``[batch, channels, 32]``.
        batches: rows of a linear layer, indices of an embedding, images of a convolution.
        backward: test the gradients too.
        progress: show a bar on the standard error.

    Returns:
        What runs each kind of call, and why: one ``Explanation`` each.

    Raises:
        TypeError, ValueError: model is no module, or batches are no positive ints.
        RuntimeError: a back end is forced, or RPG_KERNELS_PROVE is 0, so that none is tested; or a
            CUDA graph is captured, in which no test can be made.

    Example:
        >>> import rpg_kernels as rpg
        >>> layer = rpg.nn.Linear(8, 8, bank=rpg.ParameterBank(dof=64))
        >>> [said.op for said in rpg.prove(layer, batches=[4], progress=False)]
        ['linear', 'linear_input_grad', 'linear_bank_grad']
        >>> (said,) = rpg.prove(layer, torch.ones(2, 8), backward=False, progress=False)
        >>> said.backend
        'reference'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, wanted a torch.nn.Module")
    batches = tuple(batches)
    for batch in batches:
        _checks.integer("batches", batch, 1, _checks.INT32_MAX)
    if settings.forced_backend():
        forced = settings.forced_backend()
        raise RuntimeError(f"backend: got {forced!r}, wanted 'auto': a forced one is not tested")
    if settings.proving() == "0":
        raise RuntimeError(f"{settings.ENVIRONMENT_PROVE}: got 0, wanted 1 or here, to test with")
    model = unwrap(model)
    found = _calls_with(model, inputs) if inputs else _calls_by_layer(model, batches)
    kinds: dict[Any, Call] = {}
    for forward, y in found:
        for call in (forward, *(_backward(forward, y) if backward else ())):
            kinds.setdefault(_kind(call), call)
    with contextlib.nullcontext() if progress else waiting.hidden():
        dispatch.compile_ahead(list(kinds.values()))
    with waiting.hidden():
        for call in _shown(list(kinds.values()), progress):
            dispatch.implementation(call)
    return [dispatch.explain(call) for call in kinds.values()]


def _kind(call: Call) -> Any:
    def of(operand: Any) -> Any:
        if not isinstance(operand, Tensor):
            return str(operand)
        said = (tuple(operand.shape), operand.stride(), operand.dtype, operand.device)
        if not isinstance(operand, StoredValues):
            return said
        return said, [(name, of(part)) for name, part in operand.parts().items()]

    return str([of(operand) for operand in (call.op, *call.operands)])


def _calls_by_layer(model: nn.Module, batches: Sequence[int]) -> Iterator[tuple[Call, Tensor]]:
    """Each layer's call with inputs that are described only, and its result likewise."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for layer in model.modules():
            op = getattr(layer, "rpg_operator", None)
            if not isinstance(op, str):
                continue
            for batch in batches:
                call = reached(layer, _input(layer, op, batch))
                yield call, _result(call, mode)


def _input(layer: Any, op: str, batch: int) -> Tensor:
    bank = layer.virtual_weight.bank.weight
    if op == "embedding":
        return torch.zeros(batch, dtype=torch.int64, device=bank.device)
    if op == "linear":
        size = [layer.in_features]
    else:
        size = [layer.in_channels, *[IMAGE] * len(layer.kernel_size)]
    return torch.empty(batch, *size, dtype=bank.dtype, device=bank.device)


def _result(call: Call, mode: FakeTensorMode) -> Tensor:
    operands = [mode.from_tensor(o) if isinstance(o, Tensor) else o for o in call.operands]
    result: Tensor = getattr(torch.ops.rpg_kernels, call.op)(*operands, "")
    return result


class _Seen(TorchDispatchMode):
    """Notes the calls of our forward operators, as described tensors; the reference runs them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Call, Tensor]] = []
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace == lib.NAMESPACE and name in _GRADIENTS:
            operands = [
                self._mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args[:-1]
            ]
            self.calls.append((lib.call(name, operands, ""), self._mode.from_tensor(result)))
        return result


def _calls_with(model: nn.Module, inputs: Sequence[Any]) -> list[tuple[Call, Tensor]]:
    training = [module for module in model.modules() if module.training]
    devices = [d.index for p in model.parameters() if (d := p.device).type == "cuda"]
    seen = _Seen()
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices=sorted(set(devices))),
            torch.no_grad(),
            dispatch.backend("reference"),
            seen,
        ):
            model(*inputs)
    finally:
        for module in training:
            module.training = True
    return seen.calls


def _of_linear(call: Call, dy: Tensor) -> Iterator[tuple[str, list[Any]]]:
    x, bank, table, _, placement = call.operands
    yield "linear_input_grad", [dy, bank, table, placement]
    yield "linear_bank_grad", [dy, x, table, placement, bank.dtype]


def _of_conv2d(call: Call, dy: Tensor) -> Iterator[tuple[str, list[Any]]]:
    x, bank, table, _, placement, *geometry = call.operands
    yield "conv2d_input_grad", [dy, bank, table, [*x.shape], placement, *geometry]
    yield "conv2d_bank_grad", [dy, x, table, placement, *geometry, bank.dtype]


def _of_transposed(call: Call, dy: Tensor) -> Iterator[tuple[str, list[Any]]]:
    x, bank, table, _, placement, *geometry = call.operands
    yield "conv2d", [dy, bank, table, None, placement, *geometry]
    yield "conv2d_bank_grad", [x, dy, table, placement, *geometry, bank.dtype]


def _of_embedding(call: Call, dy: Tensor) -> Iterator[tuple[str, list[Any]]]:
    bank, table, indices, placement = call.operands
    yield "embedding_bank_grad", [dy, indices, table, placement, bank.dtype]


def _of_unpack(call: Call, dy: Tensor) -> Iterator[tuple[str, list[Any]]]:
    bank, table, placement = call.operands
    yield "pack", [dy, table, placement, bank.dtype]


_GRADIENTS: dict[str, Callable[[Call, Tensor], Iterator[tuple[str, list[Any]]]]] = {
    "linear": _of_linear,
    "conv2d": _of_conv2d,
    "conv2d_input_grad": _of_transposed,  # forward, as a transposed convolution
    "embedding": _of_embedding,
    "unpack": _of_unpack,
}


def _backward(call: Call, y: Tensor) -> Iterator[Call]:
    """The calls of a call's derivatives; dy is as y. Stored values have none of their own."""
    for op, operands in _GRADIENTS[call.op](call, y):
        if call.stored is None or not (op.endswith("bank_grad") or op == "pack"):
            yield lib.call(op, operands, "")


def _shown(calls: list[Call], progress: bool) -> Iterator[Call]:
    """The calls, with a bar: tqdm's where it is installed; none without a standard error."""
    progress = progress and sys.stderr is not None
    with contextlib.suppress(ImportError):
        if progress:
            tqdm = importlib.import_module("tqdm")
            yield from tqdm.tqdm(calls, desc="proving", unit="call", file=sys.stderr)
            return
    for number, call in enumerate(calls, 1):
        if progress:
            end = "\n" if number == len(calls) else "\r"
            print(f"proving: {number} of {len(calls)}", end=end, file=sys.stderr, flush=True)
        yield call
