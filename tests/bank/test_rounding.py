"""Rounding slots to 8 bits, against the formula written out in numpy, and training with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import rpg_kernels as rpg
from rpg_kernels._stored import StoredValues
from rpg_kernels.bank.rounding import FORMS, round_slots

# Every number of float8_e4m3fn, written out from its fields: sign, 4 bits of exponent, 3 of
# mantissa, no infinity.
_FLOAT8 = sorted(
    {
        sign * (m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))
        for sign in (1, -1)
        for e in range(16)
        for m in range(8)
        if (e, m) != (15, 7)
    }
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_int8_codes_are_the_nearest(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.standard_normal((37, int(rng.choice([2, 8, 64, 128])))))
    values = (values * torch.from_numpy(10.0 ** rng.integers(-3, 3, (37, 1)))).to(dtype)
    values[5] = 0
    codes, scales = round_slots(values, torch.int8)
    w = values.float().double().numpy()
    wanted = np.abs(w).max(axis=1) / 127
    np.testing.assert_allclose(scales.double().numpy(), wanted, rtol=1e-6)
    assert int(codes.abs().max()) == 127
    error = np.abs(codes.double().numpy() * scales.double().numpy()[:, None] - w)
    assert (error <= (0.5 + 1e-4) * wanted[:, None]).all()
    assert not codes[5].any()
    assert scales[5] == 0


@pytest.mark.parametrize("seed", range(4))
def test_float8_codes_are_the_nearest(seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(11, 32) * 10.0 ** torch.randint(-6, 6, (11, 1))
    codes, scales = round_slots(values, torch.float8_e4m3fn)
    table = torch.tensor(_FLOAT8, dtype=torch.float64)
    wanted = values.double() / scales.double().unsqueeze(1)
    nearest = (wanted.unsqueeze(-1) - table).abs().min(-1).values
    got = (codes.double() - wanted).abs()
    assert bool((got <= nearest * (1 + 1e-6) + 1e-5).all())
    assert float(codes.float().abs().max()) == 448


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 3.4e38, -1.0])
def test_constant_slots(form: str, value: float) -> None:
    values = torch.full((3, 16), value)
    stored = StoredValues(*round_slots(values, FORMS[form]))
    assert bool(stored.dense().isfinite().all())
    if abs(value) > 1e-37:
        torch.testing.assert_close(stored.dense(), values)
    else:  # at most half a step of the smallest scale is lost
        assert float((stored.dense() - values).abs().max()) <= 1e-44 * 127


def _net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(*(nn.Linear(48, 48) for _ in range(5)))
    return rpg.convert(net, rpg.RPGConfig(dof=1024, granularity=16, laps=4))


def test_training_with_rounding_reads_rounded_values_and_passes_gradients_straight() -> None:
    net, plain = _net(), _net()
    rpg.quantize(net, "int8", training=True)
    bank = net[1].rpg_bank
    x = torch.randn(7, 48)
    with torch.no_grad():
        stored = StoredValues(*round_slots(bank.weight, torch.int8)).dense()
        plain[1].rpg_bank.weight.copy_(stored)
    y, wanted = net(x), plain(x)
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(bank.weight.grad, plain[1].rpg_bank.weight.grad)
    with torch.no_grad():
        torch.testing.assert_close(net(x), y)


def test_every_change_of_the_values_is_seen() -> None:
    net = rpg.quantize(_net(), "int8", training=True)
    bank, x = net[1].rpg_bank, torch.randn(3, 48)

    def rounded() -> torch.Tensor:
        return StoredValues(*round_slots(bank.weight, torch.int8)).dense()

    torch.testing.assert_close(bank.read(), rounded())
    net(x).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    torch.testing.assert_close(bank.read(), rounded())
    net(x).sum().backward()
    bank.weight.data.mul_(-2)  # which torch does not count
    torch.testing.assert_close(bank.read(), rounded())
    with torch.no_grad():
        bank.weight.mul_(3)
    torch.testing.assert_close(bank.read(), rounded())


def test_training_then_storing_changes_nothing() -> None:
    net, x = rpg.quantize(_net(), "float8_e4m3fn", training=True), torch.randn(3, 48)
    before = net(x)
    torch.testing.assert_close(rpg.quantize(net, "float8_e4m3fn")(x), before)
    assert net[1].rpg_bank.rounding is None


def test_layers_of_one_pass_share_what_was_rounded() -> None:
    net = rpg.quantize(_net(), "int8", training=True)
    bank = net[1].rpg_bank
    assert bank.read() is bank.read()
    with torch.no_grad():
        assert bank.read() is not bank.read()
