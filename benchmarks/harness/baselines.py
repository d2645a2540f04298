"""What is compared: a dense layer, the ways to share weights that exist, and our back ends.

All but ``dense`` and ``rz_linear`` read the same map from the same bank, so they compute the same
function. Where the map has runs (granularity above 1) the table baselines gather runs too, which
is kinder to them than the random single elements of the published code.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import calls
from benchmarks.harness.cases import Case
from benchmarks.harness.problem import Problem, Stack, images_last
from rpg_kernels import _checks, functional
from rpg_kernels.backends import dispatch, registry
from rpg_kernels.bank.virtual_weight import VirtualWeight


def _never(case: Case, device: torch.device) -> str:
    return ""


@dataclass(frozen=True)
class Implementation:
    """One way to compute a case.

    Args:
        name: as given on the command line.
        about: one line for people.
        refuse: (case, device) -> why it cannot run, or "".
        layer_bytes: case -> what each layer keeps; the dense weight's bytes where nothing is.
        peak_bytes: case -> the most that one call allocates, roughly and rather too much.
        build: (problem, copies) -> the layers.
        refuse_backward: (case, device) -> why only its forward can run, or "".
    """

    name: str
    about: str
    refuse: Callable[[Case, torch.device], str]
    layer_bytes: Callable[[Case], int]
    peak_bytes: Callable[[Case], int]
    build: Callable[[Problem, int], Stack]
    refuse_backward: Callable[[Case, torch.device], str] = _never

    def expected_bytes(self, case: Case, copies: int) -> int:
        """What running it takes: the layers, x and y with their gradients, a call's peak."""
        images = 3 * (case.input_bytes + case.output_bytes)
        return copies * self.layer_bytes(case) + images + self.peak_bytes(case)


def _cast(weight: Tensor, x: Tensor) -> Tensor:
    """A weight in the dtype of the product, as autocast does."""
    return weight.to(x.dtype) if x.is_floating_point() else weight


def _dense(problem: Problem, copies: int) -> Stack:
    """Layer 0 has the weight that the bank stands for, the others have copies of it."""
    case = problem.case
    index, sign = problem.map()
    ring = problem.bank.weight.detach().view(-1)
    values = (ring.double()[index] * sign * problem.scale).to(case.bank_dtype)
    if problem.rows is not None:
        whole = values.new_zeros(case.layer.weight)
        whole[problem.rows] = values
        values = whole
    values = images_last(values)
    weights = [values.requires_grad_()]
    weights += [values.detach().clone().requires_grad_() for _ in range(copies - 1)]
    return Stack(
        copies,
        lambda i: problem.apply(problem.x, _cast(weights[i], problem.x)),
        lambda i: [weights[i]],
        trains="weight",
    )


def _published(problem: Problem, copies: int, compiled: bool = False) -> Stack:
    """An int64 index and a floating-point sign for each weight, materialised in every forward."""
    index, sign = problem.map() if problem.rows is None else problem.index_and_sign()
    tables = [(index, sign.to(problem.case.bank_dtype))]
    # Other layers read other places: the same tables, rows shifted.
    for i in range(1, copies):
        tables.append((tables[0][0].roll(i, 0), tables[0][1].roll(i, 0)))

    def layer(x: Tensor, bank: Tensor, index: Tensor, sign: Tensor) -> Tensor:
        weight = bank.view(-1)[index] * sign * problem.scale
        return problem.apply(x, _cast(weight, x))

    if compiled:
        torch.compiler.reset()  # what other cases compiled counts against the same limit
        layer = torch.compile(layer, fullgraph=True, dynamic=False)
    bank = problem.bank.weight
    return Stack(
        copies,
        lambda i: layer(problem.x, bank, *tables[i]),
        lambda i: [bank],
        tables[0],
    )


def _unpack(problem: Problem, copies: int) -> Stack:
    """Our unpack operator, then the vendor library."""
    weights = problem.placed(copies)
    return Stack(
        copies,
        lambda i: problem.apply(problem.x, _cast(functional.unpack(weights[i]), problem.x)),
        lambda i: [problem.bank.weight],
    )


def _call(problem: Problem, weight: VirtualWeight) -> Tensor:
    case, x = problem.case, problem.x
    if case.op == "embedding":
        return functional.embedding(x, weight)
    if case.op == "linear":
        return functional.linear(x, weight)
    return functional.conv2d(x, weight, None, case.layer.stride, case.layer.padding)


def _ours(backend: str) -> Implementation:
    def refuse(case: Case, device: torch.device) -> str:
        return calls.refused(case, device, backend)[0]

    def refuse_backward(case: Case, device: torch.device) -> str:
        return calls.refused(case, device, backend)[1]

    def build(problem: Problem, copies: int) -> Stack:
        weights = problem.placed(copies)

        def forward(i: int) -> Tensor:
            with dispatch.backend(backend):
                return _call(problem, weights[i])

        return Stack(copies, forward, lambda i: [problem.bank.weight])

    return Implementation(
        f"rpg-{backend}",
        f"rpg-kernels, the {backend} back end",
        refuse,
        lambda case: case.weight_bytes,
        lambda case: 3 * case.bank_bytes + 12 * case.dof,
        build,
        refuse_backward,
    )


def _refuse_rz(case: Case, device: torch.device) -> str:
    if importlib.util.find_spec("rz_linear") is None:
        return "rz_linear is not installed (github.com/apd10/RzLinear)"
    if case.op != "linear" or case.dtype != "fp32" or device.type != "cuda":
        return "rz_linear has linear layers in fp32 on CUDA only"
    if any(size % 32 for size in (case.batch, *case.layer.weight)):
        return "rz_linear needs batch, rows and columns that are multiples of 32"
    return "" if case.dof <= 1 << 24 else "rz_linear's map is read off in fp32: at most 2^24 DoF"


def _rz(problem: Problem, copies: int) -> Stack:
    """ROAST's linear layer: its own map, without signs, of a bank of the same size."""
    rz_linear = importlib.import_module("rz_linear")
    # The package's attribute of this name is a class; its module holds the switch.
    switches = importlib.import_module("rz_linear.RzLinearFunction")
    getattr(switches, "controls", {})["triton_allow_tf32"] = False
    rows, columns = problem.case.layer.weight
    bank = problem.bank.weight.detach().view(-1).clone()

    def layer(seed: int, values: Tensor) -> torch.nn.Module:
        with torch.random.fork_rng():  # it seeds torch's global generator
            made: torch.nn.Module = rz_linear.RzLinear(
                columns, rows, hashed_weight=values, seed=seed
            ).to(problem.device)
        return made

    layers = [layer(1024 + i, bank) for i in range(copies)]
    # A bank that counts, times the identity, shows which element each weight reads.
    probe = layer(1024, torch.arange(bank.numel(), device=problem.device, dtype=torch.float32))
    with torch.no_grad():
        index = probe(torch.eye(columns, device=problem.device)).t().round().long()
    return Stack(
        copies,
        lambda i: layers[i](problem.x),
        lambda i: list(layers[i].parameters()),
        own_map=(index, torch.ones_like(index, dtype=torch.int8), 1.0),
    )


def _weights(case: Case) -> int:
    return case.layer.virtual_weights


BASELINES = (
    Implementation(
        "dense",
        "the vendor library with a stored weight",
        _never,
        lambda case: case.weight_bytes,
        lambda case: 2 * case.weight_bytes,
        _dense,
    ),
    Implementation(
        "published",
        "int64 index and float sign tables, every weight materialised, then the vendor library",
        _never,
        lambda case: 8 * _weights(case) + case.weight_bytes,
        lambda case: 5 * case.weight_bytes + 8 * _weights(case) + 3 * case.bank_bytes,
        _published,
    ),
    Implementation(
        "published-compiled",
        "the same through torch.compile",
        _never,
        lambda case: 8 * _weights(case) + case.weight_bytes,
        lambda case: 5 * case.weight_bytes + 8 * _weights(case) + 3 * case.bank_bytes,
        lambda problem, copies: _published(problem, copies, compiled=True),
    ),
    Implementation(
        "unpack",
        "our unpack operator, then the vendor library",
        _never,
        lambda case: case.weight_bytes,
        lambda case: 4 * case.weight_bytes + 3 * case.bank_bytes + 12 * case.dof,
        _unpack,
    ),
    Implementation(
        "rz_linear",
        "ROAST's RzLinear, where it is installed",
        _refuse_rz,
        lambda case: case.weight_bytes,
        lambda case: 4 * case.bank_bytes + 8 * _weights(case),
        _rz,
    ),
)
OURS = tuple(_ours(backend) for backend in registry.names())
IMPLEMENTATIONS = {made.name: made for made in (*BASELINES, *OURS)}
# What is run when nothing is chosen: compiling takes longer than a quick run has, and simt is
# thousands of times slower than what it imitates.
_FAST = [made.name for made in OURS if made.name != "rpg-simt"]
USUAL = ("dense", "published", "unpack", "rz_linear", *_FAST)


def choose(names: Sequence[str], case: Case, device: torch.device) -> list[Implementation]:
    """The implementations of these names; none gives the usual ones, less our back ends that
    cannot run the case.

    Raises:
        ValueError: an unknown name, with the list of what exists.
    """
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise _checks.fail("impl", repr(name), "one of\n" + listing())
    if names:
        return [IMPLEMENTATIONS[name] for name in dict.fromkeys(names)]
    chosen = [IMPLEMENTATIONS[name] for name in USUAL]
    return [i for i in chosen if i not in OURS or not i.refuse(case, device)]


def listing() -> str:
    """Every implementation, one a line."""
    return "\n".join(f"  {made.name:20} {made.about}" for made in IMPLEMENTATIONS.values())
