"""linear and its gradients against a dense weight written out entry by entry."""

from __future__ import annotations

import random
from collections.abc import Callable

import brute_force as brute
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels.functional import linear

op = torch.ops.rpg_kernels
REFLECT = ("element", "vector", "none")
LEADING = [(), (1,), (5,), (2, 3), (0,), (2, 0, 3), (2, 1, 2, 2)]


def random_weight(seed: int, dtype: torch.dtype = torch.float64) -> rpg.VirtualWeight:
    """A weight of random size, place and map; every third one a part of a larger weight."""
    rng = random.Random(seed)
    granularity = rng.choice([1, 2, 4, 8, 16, 32, 64, 128])
    bank = brute.bank_of(
        rng.randrange(granularity, 2000),
        dtype,
        granularity=granularity,
        reflect=REFLECT[seed % 3],
        permute=seed % 5 != 0,
        seed=seed,
    )
    bank.place((1, rng.randrange(1, 300)))
    rows, columns = rng.randrange(1, 40), rng.choice([1, 13, 48, 64, 97, 150])
    weight = bank.place((rows, columns), scale=rng.uniform(0.2, 2))
    if seed % 3 == 0 and min(rows, columns) > 2:
        weight = weight.narrow(0, 1, rows - 2).narrow(1, 2, columns - 2)
    return weight


def compare(
    weight: rpg.VirtualWeight, x: Tensor, bias: Tensor | None, dy: Tensor | None = None
) -> None:
    """Output and all gradients in float64."""
    ring = brute.ring(weight.bank)
    dense = F.linear(x, brute.unpack(weight, ring), bias)
    y = linear(x, weight, bias)
    brute.assert_exact(y, dense, "y")
    dy = torch.randn_like(dense) if dy is None else dy
    leaves = [x] if bias is None else [x, bias]
    wanted = torch.autograd.grad(dense, [ring, *leaves], dy)
    got = torch.autograd.grad(y, [weight.bank.weight, *leaves], dy)
    for name, g, w in zip(("bank", "x", "bias"), got, wanted, strict=False):
        brute.assert_exact(g, w.view(g.shape), f"gradient of {name}")


@pytest.mark.parametrize("seed", range(30))
def test_output_and_gradients(seed: int) -> None:
    weight = random_weight(seed)
    rows, columns = weight.shape
    leading = LEADING[seed % len(LEADING)]
    x = torch.randn(*leading, columns, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(rows, dtype=torch.float64, requires_grad=True) if seed % 2 else None
    compare(weight, x, bias)


def test_tables() -> None:
    bank = brute.table_bank(50, entries=11 * 13 + 5)
    bank.place((1, 5))
    weight = bank.place((11, 13), scale=0.7)
    for part in (weight, weight.narrow(1, 3, 7), weight.narrow(0, 2, 5).narrow(1, 1, 4)):
        compare(part, torch.randn(4, part.shape[1], dtype=torch.float64, requires_grad=True), None)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values of [6, columns] in other strides."""
    strided = torch.empty(12, 2 * x.shape[1], dtype=x.dtype)[::2, ::2]
    return {
        "transposed": x.t().contiguous().t(),
        "strided": strided.copy_(x),
        "expanded": x[:1].expand(6, -1),
        "permuted": x.view(2, 3, -1).permute(1, 0, 2),
        "flipped": x.flip(0)[1:],
    }


@pytest.mark.parametrize("name", list(layouts(torch.empty(6, 1))))
def test_non_contiguous_x_and_dy(name: str) -> None:
    weight = random_weight(1)
    rows, columns = weight.shape
    x = layouts(torch.randn(6, columns, dtype=torch.float64))[name].requires_grad_()
    dy = layouts(torch.randn(6, rows, dtype=torch.float64))[name]
    compare(weight, x, None, dy)


def test_expanded_scalar_dy() -> None:
    weight = random_weight(2)
    x = torch.randn(4, weight.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(weight.shape[0], dtype=torch.float64, requires_grad=True)
    dy = torch.ones((), dtype=torch.float64).expand(4, weight.shape[0])
    compare(weight, x, bias, dy)


def test_non_contiguous_bank() -> None:
    bank = brute.bank_of(512, granularity=16)
    bank.weight = torch.nn.Parameter(bank.weight.detach().t().contiguous().t())
    assert not bank.weight.is_contiguous()
    weight = bank.place((20, 50))
    compare(weight, torch.randn(3, 50, dtype=torch.float64, requires_grad=True), None)


def dense_in(
    dtype: torch.dtype, weight: rpg.VirtualWeight, x: Tensor, bias: Tensor, dy: Tensor
) -> tuple[Tensor, ...]:
    """(y, bank gradient, x gradient, bias gradient) of torch with a dense weight in a dtype."""
    ring = brute.ring(weight.bank)
    w = brute.unpack(weight, ring).detach().to(dtype).requires_grad_()
    x, bias = (t.detach().to(dtype).requires_grad_() for t in (x, bias))
    y = F.linear(x, w, bias)
    dw, dx, dbias = torch.autograd.grad(y, (w, x, bias), dy.to(dtype))
    return y, brute.pack(weight, dw), dx, dbias


@pytest.mark.parametrize("limit", [1 << 22, 30_000])
@pytest.mark.parametrize("reflect", REFLECT)
@pytest.mark.parametrize(
    ("bank_dtype", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_accuracy(bank_dtype: torch.dtype, dtype: torch.dtype, reflect: str, limit: int) -> None:
    """As accurate as torch with a dense weight, however many tiles there are."""
    bank = brute.bank_of(3000, bank_dtype, granularity=32, reflect=reflect)
    weight = bank.place((150, 290), scale=0.06)
    x = torch.randn(33, 290).to(dtype).requires_grad_()
    bias = torch.randn(150).to(dtype).requires_grad_()
    dy = torch.randn(33, 150).to(dtype)
    with rpg.scratch_limit(limit):
        y = linear(x, weight, bias)
        got = (y, *torch.autograd.grad(y, (bank.weight, x, bias), dy))
    for t, wanted in zip(got, (dtype, bank_dtype, dtype, dtype), strict=True):
        assert t.dtype == wanted
    exact = dense_in(torch.float64, weight, x, bias, dy)
    torchs = dense_in(dtype, weight, x, bias, dy)
    names = ("y", "bank gradient", "x gradient", "bias gradient")
    for name, g, e, t in zip(names, got, exact, torchs, strict=True):
        rounded = t.to(bank_dtype) if name == "bank gradient" else t
        brute.assert_accurate(g, e, rounded, name)


@pytest.mark.parametrize("granularity", [8, 64])
@pytest.mark.parametrize("reflect", REFLECT)
def test_every_scratch_limit_gives_the_same(reflect: str, granularity: int) -> None:
    bank = brute.bank_of(700, granularity=granularity, reflect=reflect)
    weight = bank.place((7, 910), scale=0.9)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for part in (weight.narrow(0, 1, 5), weight.narrow(0, 2, 5).narrow(1, 5, 903)):
        x = torch.randn(2, part.shape[1], dtype=torch.float64, requires_grad=True)
        dy = torch.randn(2, 5, dtype=torch.float64)
        needed = [
            brute.scratch_limits(lambda part=part, x=x: linear(x, part)),
            brute.scratch_limits(lambda part=part: part.pack(torch.ones_like(part.unpack()))),
        ]
        for limit in map(max, zip(*needed, strict=True)):
            with rpg.scratch_limit(limit):
                compare(part, x, bias, dy)


@pytest.mark.parametrize("reflect", REFLECT)
def test_nan_reaches_what_reads_it_and_nothing_else(reflect: str) -> None:
    bank = brute.bank_of(2048, granularity=16, reflect=reflect)
    weight = bank.place((12, 40))
    index, _ = brute.index_and_sign(weight)
    unread = sorted(set(range(bank.dof)) - set(index.flatten().tolist()))
    with torch.no_grad():
        bank.weight.view(-1)[unread] = torch.nan  # padding and slots that this layer never uses
        bank.weight.view(-1)[index[4, 17]] = torch.nan
    x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    y = linear(x, weight)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    rows = (index == index[4, 17]).any(1)
    columns = (index == index[4, 17]).any(0)
    assert torch.equal(y.isnan(), rows.expand(5, 12))
    assert torch.equal(dx.isnan(), columns.expand(5, 40))


@pytest.mark.parametrize("needs", ["x", "bank", "bias", "none"])
def test_gradient_of_one_input_only(needs: str) -> None:
    weight = random_weight(4)
    x = torch.randn(3, weight.shape[1], dtype=torch.float64)
    bias = torch.randn(weight.shape[0], dtype=torch.float64)
    tensors = {"x": x, "bank": weight.bank.weight, "bias": bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == needs)
    y = linear(x, weight, bias)
    assert y.requires_grad == (needs != "none")
    if needs != "none":
        y.sum().backward()
        assert all((t.grad is not None) == (name == needs) for name, t in tensors.items())


def test_saves_x_and_refers_to_the_bank_and_nothing_else() -> None:
    weight = random_weight(4)
    x = torch.randn(3, weight.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(weight.shape[0], dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(x, weight, bias)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.bank.weight.data_ptr()}


def test_deterministic_algorithms() -> None:
    weight = random_weight(4)
    x = torch.randn(64, weight.shape[1], dtype=torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        grads = [
            torch.autograd.grad(linear(x, weight).square().sum(), weight.bank.weight)[0]
            for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*grads)


def operators(weight: rpg.VirtualWeight) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Every operator as a function of its differentiable tensors."""
    bank, table, spec = weight.bank.weight.detach().clone(), weight.bank.table, weight.spec
    dtype = bank.dtype
    rows, columns = weight.shape
    x, dy, bias = (torch.randn(2, columns), torch.randn(2, rows), torch.randn(rows))
    tensors = {name: t.to(dtype) for name, t in (("x", x), ("dy", dy), ("bias", bias))}
    tensors["bank"] = bank
    for tensor in tensors.values():
        tensor.requires_grad_()
    functions: dict[str, tuple[Callable[..., Tensor], str]] = {
        "linear": (lambda x, w, b: op.linear(x, w, table, b, spec, ""), "x bank bias"),
        "input grad": (lambda dy, w: op.linear_input_grad(dy, w, table, spec, ""), "dy bank"),
        "bank grad": (
            lambda dy, x: op.linear_bank_grad(dy, x, table, spec, dtype, ""),
            "dy x",
        ),
    }
    return {
        name: (function, [tensors[argument] for argument in arguments.split()])
        for name, (function, arguments) in functions.items()
    }


@pytest.mark.parametrize("name", ["linear", "input grad", "bank grad"])
@pytest.mark.parametrize("reflect", REFLECT)
def test_first_and_second_derivatives(name: str, reflect: str) -> None:
    weight = brute.bank_of(16, granularity=4, reflect=reflect).place((3, 6), scale=1.3)
    function, arguments = operators(weight)[name]
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("kind", ["law", "table", "part in bfloat16"])
def test_opcheck(kind: str) -> None:
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float64
    if kind == "table":
        weight = brute.table_bank(20, 77).place((7, 11), scale=0.5)
    else:
        weight = brute.bank_of(64, dtype, granularity=4).place((7, 11), scale=0.5)
    if "part" in kind:
        weight = weight.narrow(0, 1, 5).narrow(1, 3, 6)
    (_, (x, bank, bias)), table = operators(weight)["linear"], weight.bank.table
    dy = torch.randn(2, weight.shape[0]).to(dtype).requires_grad_()
    torch.library.opcheck(op.linear.default, (x, bank, table, bias, weight.spec, ""))
    torch.library.opcheck(op.linear_input_grad.default, (dy, bank, table, weight.spec, ""))
    torch.library.opcheck(op.linear_bank_grad.default, (dy, x, table, weight.spec, dtype, ""))


def test_fp32_bank_with_bfloat16_x_passes_opcheck() -> None:
    weight = brute.bank_of(64, torch.float32, granularity=4).place((7, 11))
    x = torch.randn(2, 11, dtype=torch.bfloat16, requires_grad=True)
    bank = weight.bank.weight.detach().clone().requires_grad_()
    torch.library.opcheck(op.linear.default, (x, bank, None, None, weight.spec, ""))


def test_autocast_keeps_the_bank_and_its_gradient_in_fp32() -> None:
    bank = brute.bank_of(640, torch.float32, granularity=16)
    weight = bank.place((20, 50), scale=0.1)
    x, bias = torch.randn(3, 50, requires_grad=True), torch.randn(20, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for tensor in (x, bias, bank.weight):
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32
    with torch.no_grad():
        direct = linear(x.bfloat16(), weight, bias.bfloat16())
    assert torch.equal(y, direct)


def test_autocast_leaves_float64_alone() -> None:
    weight = random_weight(1)
    x = torch.randn(2, weight.shape[1], dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.float64


def test_inference_mode() -> None:
    weight = random_weight(1)
    x = torch.randn(2, weight.shape[1], dtype=torch.float64)
    with torch.inference_mode():
        y = linear(x, weight)
    assert y.is_inference()
    brute.assert_exact(y.clone(), linear(x, weight).detach())
