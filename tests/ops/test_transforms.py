"""torch.func and torch.vmap of the operators, against loops and against dense weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import brute_force as brute
import naive_calls
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp

import rpg_kernels as rpg
from rpg_kernels.backends.call import OPERATORS
from rpg_kernels.functional import conv2d, embedding, linear

op = torch.ops.rpg_kernels
F64 = torch.float64
SUPPORTED = "use torch.autograd.functional.jvp"


class Net(nn.Module):
    """A convolution, a linear layer and, for indices, a table, all of one bank."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.bank = brute.bank_of(500, granularity=8, seed=3)
        torch.manual_seed(seed)
        nn.init.normal_(self.bank.weight)
        fields = {"bank": self.bank, "dtype": F64}
        self.convolution = rpg.nn.Conv2d(3, 4, 3, padding=1, stride=2, **fields)
        self.table = rpg.nn.Embedding(11, 16, bank=self.bank, dtype=F64)
        self.head = rpg.nn.Linear(16, 5, **fields)

    def forward(self, image: Tensor, word: Tensor) -> Tensor:
        """[B, 3, 4, 4] and [B] -> [B, 5]."""
        return self.head(self.convolution(image).flatten(1).tanh() + self.table(word))

    def dense(self, parameters: dict[str, Tensor], image: Tensor, word: Tensor) -> Tensor:
        """The same from weights that are written out."""
        bank = parameters["bank.weight"]
        kernel, table, matrix = (
            brute.unpack(layer.virtual_weight, bank.view(-1))
            for layer in (self.convolution, self.table, self.head)
        )
        hidden = F.conv2d(image, kernel, parameters["convolution.bias"], 2, 1).flatten(1).tanh()
        return F.linear(hidden + F.embedding(word, table), matrix, parameters["head.bias"])


def data(batch: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 3, 4, 4, dtype=F64), torch.randint(11, (batch,))


def same(got: Any, wanted: Any) -> None:
    """Equal but for the rounding of sums in float64."""
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def parameters_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in net.named_parameters()}


def losses(net: Net) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours and the dense one, of the parameters and a batch."""

    def ours(parameters: dict[str, Tensor], image: Tensor, word: Tensor) -> Tensor:
        return functional_call(net, parameters, (image, word)).square().sum()

    def dense(parameters: dict[str, Tensor], image: Tensor, word: Tensor) -> Tensor:
        return net.dense(parameters, image, word).square().sum()

    return ours, dense


@pytest.mark.parametrize("order", [0, 1, 2])
def test_grad_of_functional_call(order: int) -> None:
    """Gradients, their gradients, and the gradients of those."""
    net = Net()
    parameters, batch = parameters_of(net), data(3)

    def differentiated(loss: Callable[..., Tensor], order: int) -> Callable[..., Any]:
        gradients = grad(loss)
        if not order:
            return gradients
        lower = differentiated(loss, order - 1)

        def squares(parameters: dict[str, Tensor], *batch: Tensor) -> Tensor:
            found = lower(parameters, *batch).values()
            return torch.stack([g.square().sum() for g in found]).sum()

        return grad(squares)

    got, wanted = (differentiated(loss, order)(parameters, *batch) for loss in losses(net))
    assert got.keys() == parameters.keys()
    for name in got:
        scale = wanted[name].abs().max()
        torch.testing.assert_close(got[name] / scale, wanted[name] / scale, rtol=0, atol=1e-9)
    assert all(p.grad is None for p in net.parameters())


def test_ordinary_autograd_around_grad() -> None:
    """The gradient of a gradient's size by the bank, as for a gradient penalty."""
    net = Net()
    image, word = data(3)
    parameters = dict(net.named_parameters())
    found = []
    for function in (net, lambda image, word: net.dense(parameters, image, word)):
        image.requires_grad_()
        gradient = grad(lambda image, f=function: f(image, word).pow(3).sum())(image)
        penalty = gradient.square().sum()
        found.append(torch.autograd.grad(penalty, [image, *parameters.values()]))
    for got, wanted in zip(*found, strict=True):
        same(got / wanted.abs().max(), wanted / wanted.abs().max())


def test_gradients_for_each_sample() -> None:
    net = Net()
    parameters, (image, word) = parameters_of(net), data(5)
    loss = losses(net)[0]
    got = torch.vmap(grad(loss), (None, 0, 0))(parameters, image[:, None], word[:, None])
    for i in range(5):
        wanted = grad(loss)(parameters, image[i : i + 1], word[i : i + 1])
        same({name: value[i] for name, value in got.items()}, wanted)
    # And without torch.func: one backward pass for each.
    net(image[2:3], word[2:3]).square().sum().backward()
    same(
        {name: value[2] for name, value in got.items()},
        {n: p.grad for n, p in net.named_parameters()},
    )


def test_compiled_gradients_for_each_sample() -> None:
    net = Net()
    parameters, (image, word) = parameters_of(net), data(3)
    each = torch.vmap(grad(losses(net)[0]), (None, 0, 0))
    batch = image[:, None], word[:, None]
    compiled = torch.compile(lambda *a: each(*a), backend="aot_eager", fullgraph=True)
    same(compiled(parameters, *batch), each(parameters, *batch))


def test_an_ensemble_of_banks() -> None:
    nets = [Net(seed) for seed in range(3)]
    parameters, buffers = stack_module_state(nets)
    assert parameters["bank.weight"].shape[0] == 3
    image, word = data(4)

    def outputs(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(nets[0], (parameters, buffers), (image, word))

    got = torch.vmap(outputs)(parameters, buffers)
    same(got, torch.stack([net(image, word) for net in nets]))
    wanted = [torch.autograd.grad(net(image, word).sum(), list(net.parameters())) for net in nets]
    found = torch.autograd.grad(got.sum(), list(parameters.values()))
    same(found, tuple(torch.stack(each) for each in zip(*wanted, strict=True)))


def test_an_ensemble_with_batches_of_their_own() -> None:
    nets = [Net(seed) for seed in range(3)]
    parameters, _ = stack_module_state(nets)
    image, word = data(6)
    image, word = image.unflatten(0, (3, 2)), word.unflatten(0, (3, 2))
    loss = losses(nets[0])[0]
    got = torch.vmap(grad(loss))(parameters, image, word)
    for i, net in enumerate(nets):
        wanted = grad(loss)(parameters_of(net), image[i], word[i])
        same({name: value[i] for name, value in got.items()}, wanted)


def batched(tensor: Tensor, dim: int, batch: int) -> Tensor:
    """Different tensors of one shape, stacked along a dimension."""
    if not tensor.is_floating_point():
        return torch.stack([tensor.roll(i) for i in range(batch)], dim)
    return torch.stack([tensor * (i + 1) for i in range(batch)], dim)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_over_every_choice_of_batched_tensors(name: str, batch: int) -> None:
    rng = random.Random(OPERATORS[name] + name)
    shape, groups = ((6, 2, 3, 3), 2) if "conv2d" in name else ((6, 20), 1)
    weight = naive_calls.drawn(rng, shape)
    arguments = [*naive_calls.arguments(weight, rng, F64, groups)[name], ""]
    operator = getattr(op, name)
    at = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
    for chosen in range(1, 1 << len(at)):
        moved = {i: rng.choice([0, -1]) for k, i in enumerate(at) if chosen >> k & 1}
        stacked = list(arguments)
        for i in moved:
            stacked[i] = batched(arguments[i], moved[i], batch)
        tensors = [stacked[i] for i in at]

        def call(*tensors: Tensor, stacked: list[Any] = stacked) -> Tensor:
            own = list(stacked)
            for i, tensor in zip(at, tensors, strict=True):
                own[i] = tensor
            return operator(*own)

        dims = tuple(moved.get(i) for i in at)
        got = torch.vmap(call, dims, randomness="error")(*tensors)
        wanted = [
            call(*(t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)))
            for i in range(batch)
        ]
        same(got, torch.stack(wanted))


def test_vmap_of_vmap_and_other_output_dimensions() -> None:
    weight = brute.bank_of(200, granularity=8).place((6, 20))
    bank = weight.bank.weight.detach()
    x = torch.randn(2, 20, 3, 4, dtype=F64)
    got = torch.vmap(torch.vmap(lambda x: linear(x, weight), 2, 1), 1 + 1, 0)(x)
    wanted = F.linear(x.permute(2, 0, 3, 1), weight.unpack()).movedim(2, 2)
    assert got.shape == (3, 2, 4, 6)
    same(got, wanted.detach())
    banks = torch.stack([bank, 2 * bank])

    def of_both(bank: Tensor) -> Tensor:
        each = torch.vmap(lambda x: op.linear(x, bank, None, None, weight.spec, ""))
        return each(x[0, :, 0].T)

    rows = x[0, :, 0].T
    same(torch.vmap(of_both)(banks), torch.stack([linear(rows, weight), 2 * linear(rows, weight)]))


def test_only_what_must_be_is_called_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from rpg_kernels.backends import dispatch

    calls: list[str] = []
    implementation = dispatch.implementation

    def counted(call: Any) -> Any:
        calls.append(call.op)
        return implementation(call)

    monkeypatch.setattr(dispatch, "implementation", counted)
    net = Net()
    image, word = data(5)
    loss = losses(net)[0]
    gradients = torch.vmap(grad(loss), (None, 0, 0))
    gradients(parameters_of(net), image[:, None], word[:, None])
    once = {"conv2d", "linear", "embedding", "linear_input_grad"}
    assert {name: calls.count(name) for name in once} == dict.fromkeys(once, 1)
    assert calls.count("linear_bank_grad") == calls.count("conv2d_bank_grad") == 5


def test_vjp_and_jacrev() -> None:
    weight = brute.bank_of(200, granularity=8).place((6, 20))
    dense = weight.unpack().detach()
    x = torch.randn(3, 20, dtype=F64)
    y, pullback = vjp(lambda x: linear(x, weight), x)
    dy = torch.randn_like(y)
    same(pullback(dy)[0].detach(), dy @ dense)
    same(jacrev(lambda x: linear(x, weight))(x[0]).detach(), dense)
    hessian = jacrev(jacrev(lambda x: linear(x, weight).pow(3).sum()))(x[0])
    same(hessian.detach(), 6 * dense.T @ (dense @ x[0]).diag() @ dense)


def calls_of_functional() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    bank = brute.bank_of(300, granularity=8)
    matrix, kernel = bank.place((6, 20)), bank.place((4, 3, 3, 3))
    words = torch.tensor([1, 5])
    return {
        "linear": (lambda x: linear(x.sin(), matrix), torch.randn(2, 20, dtype=F64)),
        "conv2d": (lambda x: conv2d(x.sin(), kernel), torch.randn(1, 3, 5, 5, dtype=F64)),
        "embedding": (lambda x: embedding(words, matrix) * x, torch.randn(2, 20, dtype=F64)),
    }


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_products_of_jacobian_and_vector_by_differentiating_backward_twice(name: str) -> None:
    function, x = calls_of_functional()[name]
    v = torch.randn_like(x)
    _, got = torch.autograd.functional.jvp(function, x, v)
    step = 1e-6
    difference = (function(x + step * v) - function(x - step * v)) / (2 * step)
    torch.testing.assert_close(got, difference.detach(), rtol=1e-7, atol=1e-7)
    jacobian = jacrev(function)(x)
    same(got, (jacobian.flatten(-x.dim()) @ v.flatten()).detach())


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding"])
def test_forward_mode_raises_and_says_what_to_use(name: str) -> None:
    function, x = calls_of_functional()[name]
    attempts: list[Callable[[], Any]] = [
        lambda: jvp(function, (x,), (x,)),
        lambda: jacfwd(function)(x),
        lambda: torch.func.hessian(lambda x: function(x).sum())(x),
        lambda: grad(lambda x: jvp(function, (x,), (x,))[1].sum())(x),
    ]
    for attempt in attempts:
        with pytest.raises(RuntimeError, match="forward-mode differentiation of rpg operators"):
            attempt()


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_drop_no_tangent(name: str) -> None:
    rng = random.Random(name)
    weight = naive_calls.drawn(rng, (6, 2, 3, 3) if "conv2d" in name else (6, 20))
    arguments = naive_calls.arguments(weight, rng, F64)[name]
    with forward_ad.dual_level():
        dual = [
            forward_ad.make_dual(a, torch.ones_like(a))
            if isinstance(a, Tensor) and a.is_floating_point()
            else a
            for a in arguments
        ]
        with pytest.raises(RuntimeError, match=SUPPORTED):
            getattr(op, name)(*dual, "")


def test_a_backward_pass_drops_no_tangent() -> None:
    weight = brute.bank_of(200, granularity=8).place((6, 20))
    x = torch.randn(3, 20, dtype=F64, requires_grad=True)
    y = linear(x, weight)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(RuntimeError, match=SUPPORTED):
            torch.autograd.grad(y, x, dy)
