"""What cases/conv2d.py calls: one convolution by three operators, and random ones."""

from __future__ import annotations

import random
from typing import Any

import brute_force as brute
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_process import DEVICE, INTERPRETED

import rpg_kernels as rpg
from rpg_kernels import _tensors
from rpg_kernels.backends.triton import conv2d as kernels
from rpg_kernels.backends.triton.config import Config

REFLECT = ("element", "vector", "none")
GRANULARITY = (1, 2, 4, 8, 16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16) if INTERPRETED else brute.ALL[1:]
LAST = torch.channels_last
# Small tiles, so that small shapes have several; the usual ones are tested too.
TILES = Config(32, 16, 16, 4, 2, 2)


def dense_in(
    dtype: torch.dtype,
    weight: rpg.VirtualWeight,
    x: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    how: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dw) with a dense weight in a dtype, on the CPU."""
    w = brute.unpack(weight, brute.ring(weight.bank)).detach().to(dtype).requires_grad_()
    x = x.detach().to(dtype).requires_grad_()
    y = F.conv2d(x, w, None if bias is None else bias.to(dtype), *how)
    dx, dw = torch.autograd.grad(y, (x, w), dy.to(dtype))
    return y.detach(), dx, brute.pack(weight, dw)


def check(
    weight: rpg.VirtualWeight,
    x: Tensor,
    bias: Tensor | None = None,
    config: Config | None = TILES,
    dy: Tensor | None = None,
    **geometry: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """All three operators, by the accuracy criterion; dy of x's format unless given."""
    stride, padding, dilation = (
        geometry.pop(name, default)
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    pairs = [list(v) if isinstance(v, tuple) else [v, v] for v in (stride, padding, dilation)]
    how = (*pairs, geometry.pop("groups", 1))
    assert not geometry
    bank, spec = weight.bank.weight.detach(), weight.spec
    table = None if weight.bank.table is None else weight.bank.table.to(DEVICE)
    on, a = bank.to(DEVICE), x.to(DEVICE)
    y = kernels.conv2d(a, on, table, None if bias is None else bias.to(DEVICE), spec, *how, config)
    if dy is None:
        dy = torch.randn(y.shape).to(x.dtype)
        if x.is_contiguous(memory_format=LAST):
            dy = dy.contiguous(memory_format=LAST)
    d = dy.to(DEVICE)
    dx = kernels.conv2d_input_grad(d, on, table, list(x.shape), spec, *how, config)
    dw = kernels.conv2d_bank_grad(d, a, table, spec, *how, bank.dtype, config)
    exact = dense_in(torch.float64, weight, x, bias, dy, how)
    torchs = dense_in(x.dtype, weight, x, bias, dy, how)
    wanted = (x.dtype, x.dtype, bank.dtype)
    for name, g, e, t, of in zip(
        ("y", "dx", "dw"), (y, dx, dw), exact, torchs, wanted, strict=True
    ):
        assert g.dtype == of, name
        assert g.shape == e.shape, name
        if g.numel():
            brute.assert_accurate(g.cpu(), e, t.to(of), name)
    assert y.stride() == _tensors.empty_image(a, y.shape).stride()
    assert dx.stride() == _tensors.empty_image(d, dx.shape).stride()
    return y, dx, dw


def random_call(
    seed: int, permute: bool = True
) -> tuple[rpg.VirtualWeight, Tensor, Tensor | None, dict[str, Any]]:
    """(weight, x, bias, geometry) of random sizes; every third weight a part of a larger one."""
    rng = random.Random(seed)
    g, dtype = GRANULARITY[seed % 8], DTYPES[seed % 5 % len(DTYPES)]
    bank_dtype = rng.choice([dtype, torch.float32])
    bank = brute.bank_of(
        rng.randrange(g, 1500),
        bank_dtype,
        granularity=g,
        reflect=REFLECT[seed % 3],
        permute=permute and seed % 7 != 0,
        seed=seed,
    )
    bank.place((1, rng.randrange(1, 300)))
    kernel = rng.choice([(1, 1), (2, 2), (3, 2), (1, 3), (3, 3)])
    groups = rng.choice([1, 1, 1, 2, 3])
    per_group = rng.choice([1, 3, 8, 13, 32, 40] if groups == 1 else [1, 2, 8, 12])
    part = seed % 3 == 0 and per_group > 2
    rows = groups * rng.choice([1, 4, 7] if groups > 1 else [5, 8, 16, 21])
    weight = bank.place((rows + 3 * part, per_group + 2 * part, *kernel), scale=rng.uniform(0.2, 2))
    if part:
        weight = weight.narrow(0, 2, rows).narrow(1, 1, per_group)
    how: dict[str, Any] = {"groups": groups}
    how["padding"] = rng.choice([0, 1, (2, 0), (1, 3)])
    how["stride"] = rng.choice([1, 1, 2, (1, 3), (3, 2)])
    how["dilation"] = rng.choice([1, 1, 2, (2, 1)])
    size = (rng.randrange(5, 8), rng.randrange(5, 8))
    x = torch.randn(rng.choice([1, 2]), groups * per_group, *size).to(dtype)
    if rng.random() < 0.5:
        x = x.contiguous(memory_format=LAST)
    bias = torch.randn(rows).to(rng.choice([dtype, bank_dtype])) if seed % 2 else None
    return weight, x, bias, how
