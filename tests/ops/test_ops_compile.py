"""torch.compile, functorch and functional_call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import brute_force as brute
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import rpg_kernels as rpg
from rpg_kernels import functional

F64 = torch.float64


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """One layer of each kind, the bank registered once."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        bank = brute.bank_of(512, dtype, granularity=16)
        self.embedding = rpg.nn.Embedding(11, 18, padding_idx=2, bank=bank, scale=0.5)
        self.conv = rpg.nn.Conv2d(2, 4, 3, padding="same", bank=bank, scale=0.2)
        self.linear = rpg.nn.Linear(36, 7, bank=bank, scale=0.2)
        rpg.attach(self, bank)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.embedding(indices).unflatten(-1, (3, 6))  # [B, 2, 3, 6]
        x = torch.relu(self.conv(x)).mean(2)  # [B, 4, 6]
        return self.linear(torch.cat((x.flatten(1), x.flatten(1)[:, :12]), 1))  # type: ignore[no-any-return]


def gradients(module: nn.Module, y: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(y.square().sum(), parameters), strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_full_graph_forward_and_backward(backend: str) -> None:
    model = Net(torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    indices = torch.randint(11, (4, 2))
    y, wanted = compiled(indices), model(indices)
    torch.testing.assert_close(y, wanted)
    got, exact = gradients(model, y), gradients(model, wanted)
    assert set(got) == {"rpg_bank.weight", "conv.bias", "linear.bias"}
    torch.testing.assert_close(got, exact)


def layer_calls() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Functions of (input, bias) of every layer kind, with geometries that trace differently."""
    bank = brute.bank_of(512, granularity=16, reflect="element")
    matrix = bank.place((9, 20))
    kernel = bank.place((4, 3, 3, 2))
    table = brute.table_bank(40, 9 * 20).place((9, 20))
    x, bias = torch.randn(3, 20, dtype=F64), torch.randn(9, dtype=F64)
    image, shift = torch.randn(2, 6, 8, 9, dtype=F64), torch.randn(4, dtype=F64)
    return {
        "linear": (lambda x, b: functional.linear(x, matrix, b), [x, bias]),
        "part of a linear": (
            lambda x, b: functional.linear(x[:, :7], matrix.narrow(1, 5, 7), b),
            [x, bias],
        ),
        "table": (lambda x, b: functional.linear(x, table, b), [x, bias]),
        "grouped conv2d": (
            lambda x, b: functional.conv2d(x, kernel, b, (2, 1), (1, 0), 1, 2),
            [image, shift],
        ),
        "conv2d same": (
            lambda x, b: functional.conv2d(x[:, :3], kernel, b, padding="same"),
            [image.contiguous(memory_format=torch.channels_last), shift],
        ),
        "embedding": (
            lambda x, b: functional.embedding(x.flatten().argsort() % 9, matrix, 3) * b[0],
            [x, bias],
        ),
        "unpack and pack": (
            lambda x, b: matrix.pack(matrix.unpack() * b[:, None]).sum() * x,
            [x, bias],
        ),
    }


@pytest.mark.parametrize("name", layer_calls())
def test_functions_compile_with_gradients(name: str) -> None:
    function, arguments = layer_calls()[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for tensor in arguments:
        tensor.requires_grad_()
    y, wanted = compiled(*arguments), function(*arguments)
    brute.assert_exact(y, wanted)
    assert y.stride() == wanted.stride()
    dy = torch.randn_like(wanted)
    got = torch.autograd.grad(y, arguments, dy, allow_unused=True)
    exact = torch.autograd.grad(wanted, arguments, dy, allow_unused=True)
    for g, e in zip(got, exact, strict=True):
        assert (g is None) == (e is None)
        if g is not None and e is not None:
            brute.assert_exact(g, e)


@pytest.mark.parametrize("name", ["linear", "grouped conv2d", "conv2d same"])
def test_dynamic_batch_compiles_once(name: str) -> None:
    function, (x, bias) = layer_calls()[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for batch in (2, 3, 5, 17):
        values = torch.randn(batch, *x.shape[1:], dtype=F64)
        if x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else False:
            values = values.contiguous(memory_format=torch.channels_last)
        values.requires_grad_()
        y, wanted = compiled(values, bias), function(values, bias)
        brute.assert_exact(y, wanted)
        (got,) = torch.autograd.grad(y.sum(), values)
        (exact,) = torch.autograd.grad(wanted.sum(), values)
        brute.assert_exact(got, exact)
    assert counter.frame_count == 1


def test_batch_marked_dynamic_does_not_recompile() -> None:
    model = Net()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 7, 13):
            indices = torch.randint(11, (batch, 2))
            torch._dynamo.mark_dynamic(indices, 0)
            brute.assert_exact(compiled(indices), model(indices))
    assert counter.frame_count == 1


def test_automatic_dynamic_batch_recompiles_once() -> None:
    model = Net()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (4, 7, 13, 20):
        compiled(torch.randint(11, (batch, 2)))
    assert counter.frame_count == 2


def test_new_values_need_no_recompilation() -> None:
    model = Net()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    indices = torch.randint(11, (4, 2))
    for _ in range(3):
        with torch.no_grad():
            model.get_parameter("rpg_bank.weight").add_(0.5)
        brute.assert_exact(compiled(indices), model(indices))
        with rpg.scratch_limit(1 << 20):
            compiled(indices)
    assert counter.frame_count <= 2  # once with, once without the cleared gradient mode


def test_back_end_is_part_of_what_was_compiled() -> None:
    model = Net()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    indices = torch.randint(11, (4, 2))
    wanted = compiled(indices)
    with rpg.backend("triton"), pytest.raises(RuntimeError, match="backend: got 'triton'"):
        compiled(indices)
    with rpg.backend("reference"):
        assert torch.equal(compiled(indices), wanted)
    assert torch.equal(compiled(indices), wanted)
    assert counter.frame_count == 3


def test_compiled_under_autocast() -> None:
    model = Net(torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    indices = torch.randint(11, (4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = compiled(indices), model(indices)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)
    assert gradients(model, y)["rpg_bank.weight"].dtype == torch.float32


def test_compiled_without_gradients() -> None:
    model = Net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    indices = torch.randint(11, (4, 2))
    wanted = model(indices)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            brute.assert_exact(compiled(indices).clone(), wanted.detach())


def test_refused_arguments_are_refused_when_compiled() -> None:
    weight = brute.bank_of(512, torch.float32, granularity=16).place((9, 20))
    compiled = torch.compile(functional.linear, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"x: got shape \[2, 21\], wanted shape \[..., 20\]"):
        compiled(torch.randn(2, 21), weight)


def test_export() -> None:
    model = Net().eval()
    indices = torch.randint(11, (4, 2))
    program = torch.export.export(model, (indices,))
    brute.assert_exact(program.module()(indices), model(indices))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "rpg_kernels.linear.default" in operators


def test_functional_call_reads_the_bank_that_it_is_given() -> None:
    model = Net()
    indices = torch.randint(11, (4, 2))
    values = {name: p.detach() * 2 + 0.1 for name, p in model.named_parameters()}
    for value in values.values():
        value.requires_grad_()
    y = torch.func.functional_call(model, values, (indices,))
    got = torch.autograd.grad(y.square().sum(), list(values.values()))
    assert not torch.equal(y, model(indices))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    wanted = model(indices)
    brute.assert_exact(y, wanted)
    for g, e in zip(got, gradients(model, wanted).values(), strict=True):
        brute.assert_exact(g, e)
