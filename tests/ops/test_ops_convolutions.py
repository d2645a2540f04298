"""Convolutions of sequences, and transposed ones, against dense weights written entry by entry."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import brute_force as brute
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad
from torch.utils.flop_counter import FlopCounterMode

import rpg_kernels as rpg
from rpg_kernels import functional

F64 = torch.float64
REFLECT = ("element", "vector", "none")
NAMES = ("conv1d", "conv_transpose1d", "conv_transpose2d")


def ours(name: str) -> Callable[..., Tensor]:
    return getattr(functional, name)


def torchs(name: str) -> Callable[..., Tensor]:
    return getattr(F, name)


def axes_of(name: str) -> int:
    return int(name[-2])


def compare(
    name: str, weight: rpg.VirtualWeight, x: Tensor, bias: Tensor | None, **how: Any
) -> Tensor:
    """Output, all gradients and the gradients of a penalty on that of x, in float64."""
    ring = brute.ring(weight.bank)
    found = []
    for function, w, bank in (
        (ours(name), weight, weight.bank.weight),
        (torchs(name), brute.unpack(weight, ring), ring),
    ):
        y = function(x, w, bias, **how)
        dy = torch.linspace(-1, 2, y.numel(), dtype=F64).view(y.shape)
        leaves = [x, bank] if bias is None else [x, bank, bias]
        grads = torch.autograd.grad(y, leaves, dy * y, create_graph=True)
        if x.numel():
            grads += torch.autograd.grad(grads[0].square().sum(), [x, bank])
        found.append([y, *grads])
    for got, wanted in zip(*found, strict=True):
        if got.shape == weight.bank.weight.shape:
            wanted = wanted.view(got.shape)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    return found[0][0]


def laid_out(rng: random.Random, x: Tensor) -> Tensor:
    """Contiguous, channels innermost, or a part of something larger."""
    kind = rng.randrange(3)
    if kind == 1:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == 2:
        return torch.stack([x, x + 1], -1)[..., 0]
    return x


def random_call(
    name: str, seed: int
) -> tuple[rpg.VirtualWeight, Tensor, Tensor | None, dict[str, Any]]:
    """(weight, x, bias, geometry) of random sizes; some weights are parts of larger ones."""
    rng = random.Random(name + str(seed))
    torch.manual_seed(seed)
    axes, transposed = axes_of(name), "transpose" in name
    laps = rng.choice([None, 4])
    bank = brute.bank_of(
        rng.randrange(500, 1500),
        granularity=rng.choice([1, 4, 8, 16, 32]),
        reflect=rng.choice(REFLECT),
        laps=laps,
        seed=seed,
    )
    bank.place((1, rng.randrange(1, 300)))
    groups, per_group = rng.choice([1, 1, 2, 3]), rng.choice([1, 3, 7, 12])
    rows = groups * rng.randrange(1, 4)
    kernel = [rng.randrange(1, 6) for _ in range(axes)]
    part = rng.random() < 0.3
    shape = (rows + 2 * part, per_group + 2 * part, *kernel)
    weight = bank.place(shape, scale=rng.uniform(0.2, 2))
    if part:
        weight = weight.narrow(0, 1, rows).narrow(1, 2, per_group)

    def drawn(low: int, high: int) -> Any:
        each = tuple(rng.randrange(low, high) for _ in range(axes))
        return each if rng.random() < 0.6 else each[0]

    how: dict[str, Any] = {"groups": groups, "dilation": drawn(1, 4), "padding": drawn(0, 3)}
    if not transposed:
        how["padding"] = rng.choice([how["padding"], "same", "valid"])
    if how["padding"] != "same":
        how["stride"] = drawn(1, 4)
    least = 20 if not transposed else 5
    if transposed:
        steps = [how["stride"], how["dilation"]]
        each = zip(*([s] * axes if isinstance(s, int) else s for s in steps), strict=True)
        how["output_padding"] = tuple(rng.randrange(max(pair)) for pair in each)
    size = [rng.randrange(least, least + 4) for _ in range(axes)]
    channels = rows if transposed else groups * per_group
    batch = rng.choice([(), (0,), (1,), (3,)])
    x = torch.randn(*batch, channels, *size, dtype=F64)
    x = laid_out(rng, x) if batch else x
    out = groups * per_group if transposed else rows
    bias = torch.randn(out, dtype=F64, requires_grad=True) if rng.random() < 0.5 else None
    return weight, x.detach().requires_grad_(), bias, how


# torch says that an even kernel with padding="same" may cost it a copy.
@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("name", NAMES)
def test_output_and_derivatives(name: str, seed: int) -> None:
    weight, x, bias, how = random_call(name, seed)
    compare(name, weight, x, bias, **how)


@pytest.mark.parametrize("name", NAMES)
def test_tables_and_rescaled_parts(name: str) -> None:
    axes = axes_of(name)
    weight = brute.table_bank(50, entries=500).place((6, 4, *[3] * axes), scale=0.7)
    part = weight.narrow(1, 1, 3)
    weight.rescale(-1.5)  # of which the part is to hear
    for each in (weight, part):
        channels = each.shape[1 if name == "conv1d" else 0]
        x = torch.randn(2, channels, *[7] * axes, dtype=F64, requires_grad=True)
        compare(name, each, x, None)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_of_results(name: str) -> None:
    """Channels innermost stay innermost, and a sequence costs no copy."""
    axes = axes_of(name)
    weight = brute.bank_of(640, granularity=16).place((8, 8, *[3] * axes))
    x = torch.randn(2, *[5, 6][:axes], 8, dtype=F64).movedim(-1, 1).requires_grad_()
    y = ours(name)(x, weight, torch.zeros(8, dtype=F64))
    assert y.movedim(1, -1).is_contiguous()
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.movedim(1, -1).is_contiguous()
    assert ours(name)(x.detach().contiguous(), weight).is_contiguous()
    assert not y._is_view()
    assert not ours(name)(x[0], weight)._is_view()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(name)(x, weight)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.bank.weight.data_ptr()}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_accuracy(name: str, dtype: torch.dtype, backend: str) -> None:
    """As accurate as torch with a dense weight, on kernels that share products too."""
    axes, how = axes_of(name), {"stride": 2, "padding": 1}
    bank = brute.bank_of(64 * 64, torch.float32, granularity=64, laps=4)
    weight = bank.place((64, 128, *[3] * axes), scale=0.05, taps=1)
    channels = 128 if name == "conv1d" else 64
    x = torch.randn(2, channels, *[7] * axes).to(dtype).requires_grad_()
    bias = torch.randn(192 - channels).to(dtype)
    with rpg.backend(backend):
        y = ours(name)(x, weight, bias, **how)
        dy = torch.randn_like(y)
        got = (y, *torch.autograd.grad(y, (x, bank.weight), dy))
    found = []
    # Torch's sums in channels-last, which ours may choose, may be less exact than its others.
    formats = [torch.contiguous_format] + [torch.channels_last] * (axes == 2)
    for kind, layout in ((F64, formats[0]), *((dtype, layout) for layout in formats)):
        w = brute.unpack(weight, brute.ring(bank)).detach().to(kind).requires_grad_()
        z = x.detach().to(kind, memory_format=layout).requires_grad_()
        wanted = torchs(name)(z, w, bias.to(kind), **how)
        dz, dw = torch.autograd.grad(wanted, (z, w), dy.to(kind))
        found.append([t.detach() for t in (wanted, dz, brute.pack(weight, dw))])
    exact, *dense = found
    for number, (what, g) in enumerate(zip(("y", "dx", "bank"), got, strict=True)):
        sought = exact[number]
        farthest = max(
            (of_format[number] for of_format in dense),
            key=lambda t, wanted=sought: float((t.double() - wanted).abs().max()),
        )
        brute.assert_accurate(g.detach(), sought, farthest, what)
    assert y.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_a_bias_of_another_dtype(name: str) -> None:
    axes = axes_of(name)
    weight = brute.bank_of(640, torch.float32, granularity=16).place((8, 8, *[3] * axes))
    x, bias = torch.randn(2, 8, *[7] * axes, dtype=torch.bfloat16), torch.randn(8)
    y = ours(name)(x, weight, bias)
    assert y.dtype == torch.bfloat16
    wanted = torchs(name)(x.float(), weight.unpack(), bias)
    torch.testing.assert_close(y.float(), wanted, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str) -> None:
    axes = axes_of(name)
    weight = brute.bank_of(640, torch.float32, granularity=16).place((8, 8, *[3] * axes))
    x = torch.randn(2, 8, *[7] * axes, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(name)(x, weight, bias)
        twice = ours(name)(x.double(), brute.bank_of(640).place((8, 8, *[3] * axes)))
        half = ours(name)(x, brute.bank_of(640, torch.float16).place((8, 8, *[3] * axes)), bias)
    assert (y.dtype, twice.dtype, half.dtype) == (torch.bfloat16, F64, torch.float16)
    y.float().sum().backward()
    for tensor in (x, bias, weight.bank.weight):
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_compiled_counted_and_for_each_sample(name: str) -> None:
    axes = axes_of(name)
    weight = brute.bank_of(640, granularity=16).place((8, 4, *[3] * axes))
    x = torch.randn(3, 4 if name == "conv1d" else 8, *[7] * axes, dtype=F64, requires_grad=True)
    bias = torch.randn(8 if name == "conv1d" else 4, dtype=F64, requires_grad=True)

    def call(x: Tensor, bias: Tensor) -> Tensor:
        return ours(name)(x, weight, bias, stride=2)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    y, wanted = compiled(x, bias), call(x, bias)
    brute.assert_exact(y, wanted)
    assert y.stride() == wanted.stride()
    for got, exact in zip(
        *(torch.autograd.grad(t.sum(), (x, bias), retain_graph=True) for t in (y, wanted)),
        strict=True,
    ):
        brute.assert_exact(got, exact)
    torch._dynamo.reset()

    brute.assert_exact(torch.vmap(call, (0, None))(x, bias), wanted)
    biases = torch.stack([bias, 2 * bias])
    brute.assert_exact(torch.vmap(call, (None, 0))(x, biases)[1], call(x, 2 * bias))
    each = torch.vmap(grad(lambda x: call(x, bias).pow(2).sum()))(x)
    brute.assert_exact(each, torch.autograd.grad(wanted.pow(2).sum(), x)[0])

    counts = []
    for function, w in ((ours(name), weight), (torchs(name), weight.unpack())):
        with FlopCounterMode(display=False) as counter:
            function(x, w, bias, stride=2).sum().backward(inputs=[x, weight.bank.weight])
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", NAMES)
def test_torchs_functions_take_virtual_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = axes_of(name)
    weight = brute.bank_of(640, granularity=16).place((8, 8, *[3] * axes))
    x = torch.randn(2, 8, *[7] * axes, dtype=F64)
    wanted = torchs(name)(x, weight.unpack(), stride=2, padding=1)
    monkeypatch.setattr(rpg.VirtualWeight, "unpack", None)
    brute.assert_exact(torchs(name)(x, weight, stride=2, padding=1), wanted)
    brute.assert_exact(torchs(name)(x, weight, None, (2,) * axes, (1,) * axes), wanted)


WEIGHTS = {"conv1d": (4, 3, 3), "conv_transpose1d": (4, 3, 3), "conv_transpose2d": (4, 3, 3, 3)}


@pytest.mark.parametrize(
    ("name", "shape", "how", "error", "message"),
    [
        ("conv1d", (2, 3, 1), {}, ValueError, r"x: got padded size \[1, 1\], wanted at least"),
        ("conv1d", (2, 3, 0), {}, ValueError, r"x: got padded size \[1, 0\], wanted at least"),
        ("conv1d", (3, 3, 3, 9), {}, ValueError, r"x: got shape \[3, 3, 3, 9\], wanted \[B, 3, L"),
        ("conv1d", (9,), {}, ValueError, r"x: got shape \[9\], wanted \[B, 3, L\] or \[3, L\]"),
        ("conv1d", (2, 4, 9), {}, ValueError, r"x: got shape \[2, 4, 9\], wanted \[B, 3, L\]"),
        ("conv1d", (2, 3, 9), {"stride": (1, 1)}, ValueError, "stride: got .* tuple of one int"),
        ("conv1d", (2, 3, 9), {"stride": 0}, ValueError, "stride: got 0, wanted an int from 1"),
        ("conv1d", (2, 3, 9), {"groups": 3}, ValueError, "groups: got 3, .*the 4 out-channels"),
        ("conv1d", (2, 3, 9), {"padding": "full"}, ValueError, "padding: got 'full'"),
        ("conv1d", (2, 3, 9), {"padding": "same", "stride": 2}, ValueError, r"stride: got \(2,\)"),
        ("conv_transpose1d", (4, 0), {}, ValueError, r"x: got shape \[4, 0\], wanted at least one"),
        ("conv_transpose1d", (4, 1), {"padding": 2}, ValueError, r"x: got .*\(result: \[-1\]\)"),
        ("conv_transpose1d", (2, 3, 9), {}, ValueError, r"x: got shape .* wanted \[B, 4, L\]"),
        ("conv_transpose2d", (4, 9), {}, ValueError, r"x: got shape .* or \[4, H, W\]"),
        ("conv_transpose2d", (4, 9, 9), {"groups": 3}, ValueError, "groups: got 3, .* in-channels"),
        ("conv_transpose2d", (4, 9, 9), {"output_padding": 1}, ValueError, "output_padding: got 1"),
        ("conv_transpose2d", (4, 9, 9), {"padding": "same"}, ValueError, "padding: got same"),
        ("conv_transpose2d", (4, 9, 9), {"stride": 1.5}, ValueError, "stride: got 1.5, wanted an"),
    ],
)
def test_errors(
    name: str, shape: tuple[int, ...], how: dict[str, Any], error: type[Exception], message: str
) -> None:
    weight = brute.bank_of(128, granularity=16).place(WEIGHTS[name])
    with pytest.raises(error, match=message):
        ours(name)(torch.randn(shape, dtype=F64), weight, **how)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_operands_are_named(name: str) -> None:
    axes = axes_of(name)
    bank = brute.bank_of(128, granularity=16)
    weight, x = bank.place((4, 4, *[3] * axes)), torch.randn(2, 4, *[9] * axes, dtype=F64)
    with pytest.raises(ValueError, match=r"weight: got shape \[4, 4\], wanted a virtual weight \["):
        ours(name)(x, bank.place((4, 4)))
    with pytest.raises(TypeError, match="weight: got a Tensor, wanted a VirtualWeight"):
        ours(name)(x, weight.unpack())
    with pytest.raises(TypeError, match=r"x: got torch.float32, wanted torch.float64"):
        ours(name)(x.float(), weight)
    with pytest.raises(ValueError, match=r"x: got device meta"):
        ours(name)(x.to("meta"), weight)
    with pytest.raises(ValueError, match=r"bias: got shape \[3\], wanted shape \[4\]"):
        ours(name)(x, weight, torch.zeros(3, dtype=F64))
    with pytest.raises(TypeError, match=r"bias: got torch.float16, wanted torch.float64"):
        ours(name)(x, weight, torch.zeros(4, dtype=torch.float16))
