"""rpg.nn layers against torch.nn layers that hold the same weight, unpacked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpg_kernels as rpg

DOUBLE = torch.float64


def make_bank(dof: int = 48, granularity: int = 8, **options: Any) -> rpg.ParameterBank:
    options.setdefault("dtype", DOUBLE)
    return rpg.ParameterBank(dof=dof, granularity=granularity, **options)


def generating_matrix(weight: rpg.VirtualWeight) -> Tensor:
    """scale · G as a dense matrix [numel, dof], one basis vector of the bank at a time."""
    bank = weight.bank.weight
    kept = bank.detach().clone()
    columns = []
    with torch.no_grad():
        for i in range(bank.numel()):
            bank.zero_().view(-1)[i] = 1
            columns.append(weight.unpack().flatten())
        bank.copy_(kept)
    return torch.stack(columns, dim=1)


def check_against(dense: nn.Module, layer: rpg.nn.VirtualLayer, x: Tensor) -> None:
    """Same output, input gradient, bias gradient, and Gᵀ times the weight's gradient."""
    dense = dense.to(DOUBLE)
    with torch.no_grad():
        dense.weight.copy_(layer.virtual_weight.unpack())
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    differentiable = x.is_floating_point()
    xs = [x.detach().clone().requires_grad_(differentiable) for _ in range(2)]
    wanted, got = dense(xs[0]), layer(xs[1])
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    dy = torch.randn_like(wanted)
    wanted.backward(dy)
    got.backward(dy)
    if differentiable:
        torch.testing.assert_close(xs[1].grad, xs[0].grad, rtol=1e-10, atol=1e-12)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-10, atol=1e-12)
    bank = layer.virtual_weight.bank.weight
    adjoint = generating_matrix(layer.virtual_weight).t() @ dense.weight.grad.flatten()
    assert bank.grad is not None
    torch.testing.assert_close(bank.grad.flatten(), adjoint, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(5,), (2, 3), (), (0,)])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 12), (13, 7), (1, 5), (5, 1)])
def test_linear_equals_torch(inputs: int, outputs: int, batch: tuple[int, ...], bias: bool) -> None:
    layer = rpg.nn.Linear(inputs, outputs, bias=bias, bank=make_bank())
    x = torch.randn(*batch, inputs, dtype=DOUBLE)
    check_against(nn.Linear(inputs, outputs, bias=bias), layer, x)


# torch says that an even kernel with padding="same" may cost it a copy.
@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": (2, 1), "stride": 2},
        {"padding": "same", "kernel_size": (3, 4)},
        {"padding": "same", "kernel_size": (4, 2), "dilation": (1, 2)},
        {"padding": "valid", "kernel_size": (1, 3)},
    ],
    ids=str,
)
def test_conv2d_padding_equals_torch(mode: str, options: dict[str, Any]) -> None:
    options = {"kernel_size": 3, "padding_mode": mode, **options}
    layer = rpg.nn.Conv2d(4, 6, bank=make_bank(), **options)
    check_against(nn.Conv2d(4, 6, **options), layer, torch.randn(2, 4, 7, 6, dtype=DOUBLE))


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        ((3, 5), {"kernel_size": 1}),
        ((3, 5), {"kernel_size": 3, "stride": (2, 1), "bias": False}),
        ((16, 8), {"kernel_size": 3, "dilation": (2, 1), "padding": 2}),
        ((8, 12), {"kernel_size": (2, 3), "groups": 4, "stride": 2}),
        ((6, 6), {"kernel_size": 3, "groups": 6, "padding": 1}),
        ((6, 12), {"kernel_size": 3, "groups": 6, "padding": 1, "bias": False}),
        ((2, 3), {"kernel_size": (7, 1), "padding": (3, 0)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["batch", "single", "empty", "channels_last"])
def test_conv2d_geometry_equals_torch(
    channels: tuple[int, int], options: dict[str, Any], form: str
) -> None:
    layer = rpg.nn.Conv2d(*channels, bank=make_bank(), **options)
    size = {"single": (), "empty": (0,)}.get(form, (2,))
    x = torch.randn(*size, channels[0], 8, 9, dtype=DOUBLE)
    if form == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    check_against(nn.Conv2d(*channels, **options), layer, x)


@pytest.mark.parametrize("padding_idx", [None, 0, 3, -1])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (), (0,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embedding_equals_torch(
    padding_idx: int | None, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = rpg.nn.Embedding(10, 12, padding_idx=padding_idx, bank=make_bank())
    dense = nn.Embedding(10, 12, padding_idx=padding_idx).to(DOUBLE)
    indices = torch.randint(0, 10, shape).to(dtype)
    if indices.dim() == 1 and indices.numel():
        indices[:4] = torch.tensor([0, 3, 9, 9])
    with torch.no_grad():
        dense.weight.copy_(layer.virtual_weight.unpack())
        if padding_idx is not None:  # torch keeps this row as zeros
            dense.weight[padding_idx] = 0
    wanted, got = dense(indices), layer(indices)
    assert torch.equal(got, wanted)
    dy = torch.randn_like(wanted)
    wanted.backward(dy)
    got.backward(dy)
    adjoint = generating_matrix(layer.virtual_weight).t() @ dense.weight.grad.flatten()
    torch.testing.assert_close(layer.virtual_weight.bank.weight.grad.flatten(), adjoint)


def test_stored_padding_idx_is_counted_from_the_start() -> None:
    assert rpg.nn.Embedding(10, 4, padding_idx=-1).padding_idx == 9


@pytest.mark.parametrize("make", [
    lambda **k: rpg.nn.Linear(33, 5, bias=False, **k),
    lambda **k: rpg.nn.Linear(100, 10, bias=False, **k),
    lambda **k: rpg.nn.Linear(3, 2, bias=False, **k),
    lambda **k: rpg.nn.Conv2d(3, 7, 3, bias=False, **k),
    lambda **k: rpg.nn.Conv2d(10, 10, 3, groups=10, bias=False, **k),
    lambda **k: rpg.nn.Embedding(7, 65, **k),
])  # fmt: skip
def test_a_private_bank_is_registered_and_shares_nothing(make: Any) -> None:
    layer = make(dtype=DOUBLE)
    assert list(layer.state_dict()) == ["rpg_bank.weight", "rpg_bank.map_digits"]
    bank = layer.virtual_weight.bank
    assert bank is layer.rpg_bank
    assert bank.dof >= layer.virtual_weight.numel()
    with torch.no_grad():
        bank.weight.copy_(torch.arange(1, bank.dof + 1).view_as(bank.weight))
        element = layer.virtual_weight.unpack().div(layer.virtual_weight.scale).abs().round()
    assert element.unique().numel() == element.numel()


def test_private_bank_takes_device_and_dtype() -> None:
    layer = rpg.nn.Linear(8, 4, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def test_a_shared_bank_is_not_registered_by_its_layers() -> None:
    bank = make_bank()
    layers = [
        rpg.nn.Linear(16, 8, bank=bank),
        rpg.nn.Conv2d(8, 4, 3, bank=bank),
        rpg.nn.Embedding(5, 16, bank=bank),
    ]
    assert not any(layer._modules for layer in layers)
    keys = ["rpg_bank.weight", "rpg_bank.map_digits"]  # of a layer by itself
    assert [list(layer.state_dict()) for layer in layers] == [["bias", *keys]] * 2 + [keys]
    assert [name for name, _ in nn.Sequential(*layers).named_parameters()] == [
        "0.bias", "0.rpg_bank.weight", "1.bias",
    ]  # fmt: skip
    assert [layer.virtual_weight.placement.layer for layer in layers] == [0, 1, 2]
    assert bank.layers == 3
    starts = [layer.virtual_weight.placement.start for layer in layers]
    assert starts == [0, 128 % bank.dof, (128 + 4 * 8 * 9) % bank.dof]
    a, b = make_bank(), make_bank()
    for other in (a, b):
        other.weight.data.fill_(1)
    twins = [rpg.nn.Linear(16, 8, bank=other).virtual_weight.unpack() for other in (a, a, b)]
    assert torch.equal(twins[0], twins[2])
    assert not torch.equal(twins[0], twins[1]), "a second layer must have a map of its own"


def test_bias_has_the_banks_dtype_and_device_unless_told() -> None:
    bank = make_bank(dtype=torch.float32)
    assert rpg.nn.Linear(8, 4, bank=bank).bias.dtype == torch.float32
    assert rpg.nn.Linear(8, 4, bank=bank, dtype=torch.bfloat16).bias.dtype == torch.bfloat16
    assert rpg.nn.Linear(8, 4, bank=make_bank(device="meta")).bias.is_meta


def test_one_virtual_weight_for_lookup_and_output() -> None:
    bank = make_bank()
    table = rpg.nn.Embedding(11, 8, bank=bank)
    head = rpg.nn.Linear(8, 11, bias=False, virtual_weight=table.virtual_weight)
    assert head.virtual_weight is table.virtual_weight
    assert bank.layers == 1
    weight = table.virtual_weight.unpack().detach().requires_grad_()
    indices = torch.tensor([[1, 10, 4], [4, 0, 2]])
    wanted = nn.functional.linear(nn.functional.embedding(indices, weight), weight)
    got = head(table(indices))
    torch.testing.assert_close(got, wanted)
    wanted.square().sum().backward()
    got.square().sum().backward()
    torch.testing.assert_close(bank.weight.grad, table.virtual_weight.pack(weight.grad))


def test_a_layer_may_hold_a_part_of_a_weight() -> None:
    whole = rpg.nn.Linear(24, 16, bank=make_bank())
    part = whole.virtual_weight.narrow(0, 4, 9).narrow(1, 3, 20)
    layer = rpg.nn.Linear(20, 9, bias=False, virtual_weight=part)
    x = torch.randn(3, 20, dtype=DOUBLE)
    dense = whole.virtual_weight.unpack()[4:13, 3:23]
    torch.testing.assert_close(layer(x), x @ dense.t())


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda b: rpg.nn.Linear(8, 5, bank=b), torch.randn(3, 8)),
        (lambda b: rpg.nn.Linear(8, 5, bias=False, bank=b), torch.randn(2, 3, 8)),
        (lambda b: rpg.nn.Linear(8, 5, bank=b), torch.randn(8)),
        (lambda b: rpg.nn.Conv2d(4, 5, 3, bank=b), torch.randn(2, 4, 5, 5)),
        (lambda b: rpg.nn.Conv2d(4, 5, 3, bank=b), torch.randn(4, 5, 5)),
        (lambda b: rpg.nn.Embedding(8, 5, bank=b), torch.tensor([[1, 7, 1]])),
        (lambda b: rpg.nn.Embedding(8, 5, padding_idx=1, bank=b), torch.tensor([1, 7])),
    ],
)
def test_output_may_be_changed_in_place(make: Any, x: Tensor) -> None:
    layer = make(make_bank())
    bank = layer.virtual_weight.bank.weight
    x = x.to(DOUBLE) if x.is_floating_point() else x
    (wanted,) = torch.autograd.grad(layer(x).relu().square().sum(), bank)
    y = layer(x)
    y.relu_()
    (got,) = torch.autograd.grad(y.square().sum(), bank)
    assert torch.equal(got, wanted)


def test_reset_parameters_draws_the_bias_and_leaves_the_bank() -> None:
    bank = make_bank()
    layers = [rpg.nn.Linear(25, 40, bank=bank), rpg.nn.Conv2d(50, 40, 2, groups=2, bank=bank)]
    before = bank.weight.detach().clone()
    for layer, bound in zip(layers, (1 / 5, 1 / 10), strict=True):
        for draw in ("constructor", "reset"):
            if draw == "reset":
                layer.bias.data.fill_(9)
                layer.reset_parameters()
            assert layer.bias.abs().max() <= bound
            assert layer.bias.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.3)
    assert torch.equal(bank.weight, before)
    rpg.nn.Embedding(5, 8, bank=bank).reset_parameters()
    bank.reset_parameters()
    assert not torch.equal(bank.weight, before)


def test_extra_repr() -> None:
    bank = make_bank(init_std=0.5)
    linear = rpg.nn.Linear(16, 4, bank=bank, scale=0.25)
    assert repr(linear) == (
        "Linear(in_features=16, out_features=4, bias=True, layer=0, scale=0.25)"
    )
    conv = rpg.nn.Conv2d(4, 8, 3, bank=bank, scale=2, padding="same", bias=False)
    assert repr(conv) == (
        "Conv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding='same', bias=False, "
        "layer=1, scale=2)"
    )
    conv = rpg.nn.Conv2d(4, 8, 3, 2, 1, 2, 4, bank=bank, scale=2.0, padding_mode="circular")
    assert conv.extra_repr() == (
        "4, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(2, 2), groups=4, "
        "padding_mode='circular', bias=True, layer=2, scale=2"
    )
    table = rpg.nn.Embedding(9, 4, padding_idx=-9, bank=bank)
    assert repr(table) == "Embedding(9, 4, padding_idx=0, layer=3, scale=2)"
    assert "rpg_bank" in repr(rpg.nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda b: rpg.nn.Linear(0, 4), ValueError, "in_features: got 0"),
        (lambda b: rpg.nn.Linear(4, -1, bank=b), ValueError, "out_features: got -1"),
        (lambda b: rpg.nn.Linear(2.0, 4, bank=b), TypeError, r"in_features: got 2.0"),
        (lambda b: rpg.nn.Linear(4, 4, bank=3), TypeError, "bank: got an? int"),
        (lambda b: rpg.nn.Linear(4, 4, virtual_weight=3), TypeError, "virtual_weight: got an? int"),
        (lambda b: rpg.nn.Linear(4, 4, bank=b, scale="kaiming"), ValueError, "scale: got 'kaim"),
        (lambda b: rpg.nn.Linear(4, 4, bank=b, scale=0.0), ValueError, "scale: got 0.0"),
        (lambda b: rpg.nn.Linear(4, 4, bank=b, scale=math.nan), ValueError, "scale: got nan"),
        (lambda b: rpg.nn.Linear(4, 4, dtype=torch.int64), ValueError, "dtype: got torch.int64"),
        (lambda b: rpg.nn.Conv2d(4, 6, 3, groups=4, bank=b), ValueError, "groups: got 4"),
        (lambda b: rpg.nn.Conv2d(4, 6, 3, groups=0, bank=b), ValueError, "groups: got 0"),
        (lambda b: rpg.nn.Conv2d(4, 6, 0, bank=b), ValueError, "kernel_size: got"),
        (lambda b: rpg.nn.Conv2d(4, 6, (3,), bank=b), ValueError, "kernel_size: got"),
        (lambda b: rpg.nn.Conv2d(4, 6, (3, 3, 3), bank=b), ValueError, "kernel_size: got"),
        (lambda b: rpg.nn.Conv2d(4, 6, 3, padding="full", bank=b), ValueError, "padding: got"),
        (lambda b: rpg.nn.Conv2d(4, 6, 3, padding_mode="wrap"), ValueError, "padding_mode: got"),
        (
            lambda b: rpg.nn.Conv2d(4, 6, 3, stride=2, padding="same", bank=b),
            ValueError,
            r"stride: got \(2, 2\), wanted 1",
        ),
        (lambda b: rpg.nn.Embedding(0, 4, bank=b), ValueError, "num_embeddings: got 0"),
        (lambda b: rpg.nn.Embedding(9, 4, padding_idx=9, bank=b), ValueError, "padding_idx: got 9"),
        (lambda b: rpg.nn.Embedding(9, 4, padding_idx=-10), ValueError, "padding_idx: got -10"),
        (
            lambda b: rpg.nn.Linear(4, 5, virtual_weight=b.place((4, 5))),
            ValueError,
            r"virtual_weight: got shape \[4, 5\], wanted shape \[5, 4\]",
        ),
        (
            lambda b: rpg.nn.Linear(4, 5, bank=make_bank(), virtual_weight=b.place((5, 4))),
            ValueError,
            "bank: got another bank",
        ),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    bank = make_bank()
    with pytest.raises(error, match=message):
        make(bank)


@pytest.mark.parametrize(
    ("layer", "x", "error", "message"),
    [
        (lambda b: rpg.nn.Linear(4, 3, bank=b), torch.ones(2, 5), ValueError, r"x: got shape"),
        (lambda b: rpg.nn.Linear(4, 3, bank=b), torch.ones(2, 4).double(), TypeError, "x: got tor"),
        (lambda b: rpg.nn.Linear(4, 3, bank=b), torch.ones(2, 4, device="meta"), ValueError, "dev"),
        (lambda b: rpg.nn.Conv2d(4, 3, 1, bank=b), torch.ones(4, 4), ValueError, "x: got shape"),
        (lambda b: rpg.nn.Conv2d(4, 3, 1, bank=b), torch.ones(1, 3, 4, 4), ValueError, "x: got sh"),
        (lambda b: rpg.nn.Embedding(4, 8, bank=b), torch.tensor([4]), IndexError, "indices: got 4"),
        (lambda b: rpg.nn.Embedding(4, 8, bank=b), torch.ones(2), TypeError, "indices: got torch"),
    ],
)
def test_bad_inputs(layer: Any, x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer(make_bank(dtype=torch.float32))(x)


def test_a_refused_layer_takes_no_place_on_the_ring() -> None:
    bank = rpg.ParameterBank(dof=256)
    with pytest.raises(ValueError, match=r"dtype: got torch.int64"):
        rpg.nn.Linear(8, 8, bank=bank, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"device: got meta"):
        rpg.nn.Linear(8, 8, bank=bank, device="meta")
    for name in ("stride", "dilation", "kernel_size"):
        sizes = {"kernel_size": 3, name: 0}
        with pytest.raises(ValueError, match=f"{name}: got 0"):
            rpg.nn.Conv2d(4, 4, bank=bank, **sizes)
    assert bank.layers == 0
    weight = bank.place((8, 8))
    with pytest.raises(ValueError, match="scale: got fan_in"):
        rpg.nn.Linear(8, 8, virtual_weight=weight, scale="fan_in")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_of_a_low_precision_bank_keeps_its_dtype(dtype: torch.dtype) -> None:
    layer = rpg.nn.Linear(24, 8, bank=rpg.ParameterBank(dof=256, dtype=dtype))
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    with torch.autocast("cpu", other):
        y = layer(torch.randn(2, 24))
    assert y.dtype == dtype
