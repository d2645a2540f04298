"""Layers add to one gradient of their bank: the same as autograd's sum, whatever asks for it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rpg_kernels as rpg
from rpg_kernels import _bank_sums
from rpg_kernels.backends.cpu import lanes_linear, unit_conv2d
from rpg_kernels.backends.reference import conv2d as reference_conv2d
from rpg_kernels.backends.reference import embedding as reference_embedding
from rpg_kernels.backends.reference import linear as reference_linear
from rpg_kernels.bank import virtual_weight


class Net(nn.Module):
    """Layers of every kind on one bank: convolutions with and without laps' kernels, looked up
    rows, an unpacked weight, and a loss on the bank itself."""

    def __init__(self, dtype: torch.dtype = torch.float32, laps: int | None = 4) -> None:
        super().__init__()
        self.bank = rpg.ParameterBank(64 * 64, 64, laps=laps, init_std=0.05, dtype=dtype)
        how: dict[str, Any] = {"bank": self.bank}
        self.words = rpg.nn.Embedding(50, 64, **how)
        self.first = rpg.nn.Conv1d(64, 64, 3, padding=1, **how)
        self.back = rpg.nn.ConvTranspose1d(64, 64, 2, stride=2, **how)
        self.hidden = rpg.nn.Linear(64, 96, **how)
        self.out = rpg.nn.Linear(96, 10, bias=False, **how)
        self.free = self.bank.place((10, 10))
        self.to(dtype)

    def features(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens).transpose(1, 2)
        x = self.back(torch.relu(self.first(x))).transpose(1, 2)
        return torch.relu(self.hidden(x))

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.out(self.features(tokens)) @ self.free.unpack()
        return y.float().square().mean() + self.bank.weight.float().abs().mean()


@pytest.fixture
def tokens() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(50, (3, 8))


@pytest.fixture(params=[None, 4], ids=["ring", "laps"])
def net(request: pytest.FixtureRequest) -> Net:
    torch.manual_seed(1)
    return Net(laps=request.param)


@pytest.fixture
def by_autograd(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to leave gradients to autograd from then on."""
    return lambda: monkeypatch.setattr(virtual_weight._bank_sums, "values", lambda weight: weight)


def gradients(net: Net, loss: Tensor, **how: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters()), **how))


def same(got: list[Tensor], wanted: list[Tensor], tolerance: float = 2e-6) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_same_gradient(
    dtype: torch.dtype, backend: str, tokens: Tensor, by_autograd: Callable[[], None]
) -> None:
    torch.manual_seed(1)
    net = Net(dtype)
    with rpg.backend(backend):
        got = gradients(net, net(tokens))
        by_autograd()
        wanted = gradients(net, net(tokens))
    # Of low precision autograd rounds each layer's part, and then every sum.
    same(got, wanted, max(8 * torch.finfo(dtype).eps, 1e-13) if dtype != torch.float32 else 2e-6)


def test_low_precision_is_summed_in_float32(
    tokens: Tensor, by_autograd: Callable[[], None]
) -> None:
    torch.manual_seed(1)
    net = Net(torch.bfloat16)
    exact = copy.deepcopy(net).double()
    (wanted,) = torch.autograd.grad(exact(tokens), [exact.bank.weight])
    (got,) = torch.autograd.grad(net(tokens), [net.bank.weight])
    by_autograd()
    (rounded,) = torch.autograd.grad(net(tokens), [net.bank.weight])
    error, before = ((g.double() - wanted).norm() for g in (got, rounded))
    assert error <= before


def test_products_make_no_gradient_of_their_own(
    net: Net, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []

    def seen(dy: Tensor, p: Any, total: Tensor | None) -> Tensor:
        given.append(total is not None)
        return original(dy, p, total)

    original = lanes_linear.bank_sum
    monkeypatch.setattr(lanes_linear, "bank_sum", seen)
    monkeypatch.setattr(unit_conv2d, "bank_sum", seen)
    with rpg.backend("auto"):
        net(tokens).backward()
    assert all(given)
    # Gradients of convolutions without laps are the reference's.
    assert len(given) == (4 if net.bank.generator.laps else 2)


def test_the_reference_makes_no_gradient_of_its_own(
    net: Net, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []

    def seen(*arguments: Any) -> Tensor:
        given.append(arguments[3] is not None)
        return original(*arguments)

    original = reference_linear.bank_accumulator
    for module in (reference_linear, reference_conv2d, reference_embedding):
        monkeypatch.setattr(module, "bank_accumulator", seen)
    with rpg.backend("reference"):
        net(tokens).backward()
    assert given == [True] * 5


def test_one_node_for_a_graph_and_a_new_one_for_changed_values(net: Net, tokens: Tensor) -> None:
    loss = net(tokens)
    values = [layer.virtual_weight.operands()[0] for layer in (net.first, net.hidden)]
    assert values[0] is values[1]
    assert values[0].data_ptr() == net.bank.weight.data_ptr()
    with torch.no_grad():
        net.bank.weight.neg_()
    assert net.first.virtual_weight.operands()[0] is not values[0]
    now = net.first.virtual_weight.operands()[0]
    net.bank.weight.data = net.bank.weight.detach().clone()
    assert net.first.virtual_weight.operands()[0] is not now
    assert net.first.virtual_weight.operands()[0].data_ptr() == net.bank.weight.data_ptr()
    with torch.no_grad():
        assert net.first.virtual_weight.operands()[0] is net.bank.weight
    del loss


def test_graphs_are_let_go(net: Net, tokens: Tensor) -> None:
    net(tokens).backward()
    assert _bank_sums._latest[id(net.bank.weight)]() is None
    other = nn.Parameter(net.bank.weight.detach().double())
    torch.utils.swap_tensors(net.bank.weight, other)  # wants that nobody refers to them
    assert net.bank.weight.dtype == torch.float64


def test_what_is_asked_for(net: Net, tokens: Tensor, by_autograd: Callable[[], None]) -> None:
    x = net.features(tokens).detach().requires_grad_()
    loss = net.out(x).square().mean()
    node = net.out.virtual_weight.operands()[0].grad_fn
    (dx,) = torch.autograd.grad(loss, [x], retain_graph=True)
    assert not node.sums  # nobody asked for the bank's
    both = torch.autograd.grad(loss, [x, net.bank.weight], retain_graph=True)
    (alone,) = torch.autograd.grad(loss, [net.bank.weight], retain_graph=True)
    assert both[0].equal(dx)
    assert both[1].equal(alone)
    loss.backward(inputs=[net.bank.weight])
    assert net.bank.weight.grad is not None
    assert net.bank.weight.grad.equal(alone)
    assert not node.sums
    by_autograd()
    (wanted,) = torch.autograd.grad(net.out(x).square().mean(), [net.bank.weight])
    same([alone], [wanted])


def test_second_derivatives(net: Net, tokens: Tensor, by_autograd: Callable[[], None]) -> None:
    def penalty() -> list[Tensor]:
        first = gradients(net, net(tokens), create_graph=True)
        return gradients(net, torch.stack([g.square().sum() for g in first]).sum())

    got = penalty()
    by_autograd()
    same(got, penalty(), 1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(net: Net, tokens: Tensor, reentrant: bool) -> None:
    wanted = gradients(net, net(tokens))
    x = net.words(tokens)

    def rest(x: Tensor) -> Tensor:
        x = net.back(torch.relu(net.first(x.transpose(1, 2)))).transpose(1, 2)
        return torch.relu(net.hidden(x))

    y = net.out(checkpoint(rest, x, use_reentrant=reentrant)) @ net.free.unpack()
    loss = y.square().mean() + net.bank.weight.abs().mean()
    loss.backward()
    same([p.grad for p in net.parameters() if p.grad is not None], wanted)


def test_losses_add_up(net: Net, tokens: Tensor) -> None:
    """Graphs alive together, one after the other and one within the other's pass."""
    wanted = [2 * g for g in gradients(net, net(tokens))]
    for loss in [net(tokens), net(tokens)]:
        loss.backward()
    got = [p.grad for p in net.parameters() if p.grad is not None]
    same(got, wanted)
    outer, inner = net(tokens), net(tokens)
    net.zero_grad()
    outer.register_hook(lambda grad: inner.backward())
    outer.backward()
    same([p.grad for p in net.parameters() if p.grad is not None], wanted)


def test_threads(net: Net, tokens: Tensor) -> None:
    wanted = gradients(net, net(tokens))
    results: list[list[Tensor]] = [[] for _ in range(4)]
    losses = [net(tokens) for _ in results]

    def run(i: int) -> None:
        results[i] = gradients(net, losses[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in results:
        same(got, wanted)


def test_a_pass_that_breaks_leaves_nothing_to_the_next(net: Net, tokens: Tensor) -> None:
    broken = [True]

    def fail(grad: Tensor) -> None:
        if broken[0]:
            raise ArithmeticError("in the middle")

    h = net.features(tokens)
    h.register_hook(fail)
    y = net.out(h) @ net.free.unpack()
    loss = y.square().mean() + net.bank.weight.abs().mean()
    with pytest.raises(ArithmeticError):
        loss.backward(retain_graph=True)
    broken[0] = False
    net.zero_grad()
    got = gradients(net, loss)
    same(got, gradients(net, net(tokens)))


def test_hooks_see_one_gradient(net: Net, tokens: Tensor) -> None:
    seen: list[Tensor] = []
    net.bank.weight.register_hook(seen.append)
    net(tokens).backward()
    assert len(seen) == 1
    assert net.bank.weight.grad is not None
    assert seen[0].equal(net.bank.weight.grad)


def test_frozen_banks_and_copies(net: Net, tokens: Tensor) -> None:
    loss = net(tokens)
    other = copy.deepcopy(net)
    other(tokens).backward()
    assert net.bank.weight.grad is None
    loss.backward()
    assert other.bank.weight.grad is not None
    assert net.bank.weight.grad is not None
    same([other.bank.weight.grad], [net.bank.weight.grad])
    net.bank.weight.requires_grad_(False)
    assert net.first.virtual_weight.operands()[0] is net.bank.weight


def layer_and_input() -> tuple[rpg.nn.Conv1d, Tensor]:
    torch.manual_seed(2)
    bank = rpg.ParameterBank(64 * 64, 64, laps=4, init_std=0.05)
    return rpg.nn.Conv1d(64, 64, 3, padding=1, bank=bank), torch.randn(3, 64, 9)


def negated(x: Tensor) -> Tensor:
    return torch._neg_view(-x)


def wrapped(x: Tensor) -> Tensor:
    wrapper: Tensor = TwoTensor(x, x.clone())
    return wrapper


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": negated,
    "wrapped": wrapped,
    "zero": lambda x: torch._efficientzerotensor(x.shape),
    "plain": lambda x: x,
}


@pytest.mark.parametrize("kind", list(UNUSUAL))
@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("of", ["x", "dy"])
def test_tensors_that_are_more_than_memory(kind: str, needs_x: bool, of: str) -> None:
    """As activations and as gradients: what autograd makes of plain ones of the same values."""
    layer, x = layer_and_input()
    dy = torch.randn(3, 64, 9)
    strange = UNUSUAL[kind](x if of == "x" else dy)
    plain = torch.zeros_like(x) if kind == "zero" else x if of == "x" else dy
    given = [(strange, dy), (plain, dy)] if of == "x" else [(x, strange), (x, plain)]
    results = []
    for images, grad in given:
        images = images.detach().requires_grad_(needs_x)
        wanted = (
            [layer.virtual_weight.bank.weight, images]
            if needs_x
            else [layer.virtual_weight.bank.weight]
        )
        made = torch.autograd.grad(layer(images), wanted, grad)
        results.append([t.a if isinstance(t, TwoTensor) else t for t in made])
    same(*results)


def test_batched_gradients_and_modes() -> None:
    layer, x = layer_and_input()
    y, many = layer(x), torch.randn(4, 3, 64, 9)
    (got,) = torch.autograd.grad(
        y, [layer.virtual_weight.bank.weight], many, True, is_grads_batched=True
    )
    one = [torch.autograd.grad(y, [layer.virtual_weight.bank.weight], dy, True)[0] for dy in many]
    same([got], [torch.stack(one)])
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y, [layer.virtual_weight.bank.weight], many[0], True)
    assert counter.get_total_flops()
    seen = make_fx(
        lambda dy: torch.autograd.grad(y, [layer.virtual_weight.bank.weight], dy, True)[0]
    )(many[0])
    same([seen(many[1])], [one[1]])


def test_weights_that_are_no_leaves_or_of_inference() -> None:
    layer, x = layer_and_input()
    made = layer.virtual_weight.bank.weight.detach().clone().requires_grad_()
    weight = made * 2
    first = functional_call(layer.virtual_weight.bank, {"weight": weight}, ())
    assert first is weight
    before = _bank_sums.values(weight)
    weight.detach_().requires_grad_()
    assert _bank_sums.values(weight) is not before
    (grad,) = torch.autograd.grad(_bank_sums.values(weight).sum(), [weight])
    assert grad.equal(torch.ones_like(weight))
    with torch.inference_mode():
        bank = rpg.ParameterBank(64 * 64, 64, laps=4)
        inferred = rpg.nn.Linear(64, 64, bank=bank)
    assert inferred(x[0].T).shape == (9, 64)


def test_anomalies_are_seen_where_they_are() -> None:
    layer = rpg.nn.Linear(64, 64, bias=False, bank=rpg.ParameterBank(64 * 64, 64, laps=4))
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.warns(UserWarning, match="Error detected in DerivativeBackward"),
        pytest.raises(RuntimeError, match="'DerivativeBackward' returned nan"),
    ):
        layer(torch.randn(5, 64)).backward(torch.full((5, 64), float("nan")))
