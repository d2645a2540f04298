"""Nested tensors: jagged ones go through linear and embedding, all others raise."""

from __future__ import annotations

import brute_force as brute
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels.functional import conv2d, embedding, linear

F64 = torch.float64
LENGTHS = (3, 1, 0, 4)


def jagged(*inner: int, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    parts = [torch.randn(n, *inner, dtype=F64) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def holes() -> Tensor:
    """Two tensors of 2 and 5 rows, with rows between them that belong to neither."""
    offsets, lengths = torch.tensor([0, 4, 10]), torch.tensor([2, 5])
    values = torch.randn(10, 20, dtype=F64)
    return torch.nested.nested_tensor_from_jagged(values, offsets, lengths)


KINDS = {
    "rows": lambda: jagged(20),
    "one tensor": lambda: jagged(20, lengths=(5,)),
    "more dimensions": lambda: jagged(2, 20),
    "transposed": lambda: jagged(2, 20).transpose(1, 2),
    "holes": holes,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_jagged(kind: str, bias: bool) -> None:
    layer = rpg.nn.Linear(20, 6, bias, bank=brute.bank_of(300, granularity=8), dtype=F64)
    ring = brute.ring(layer.virtual_weight.bank)
    dense = brute.unpack(layer.virtual_weight, ring)
    x = KINDS[kind]().detach().requires_grad_()
    y = layer(x)
    assert y.layout == torch.jagged
    assert y.shape == (*x.shape[:-1], 6)  # of the same ragged size
    parts, leaves = y.unbind(), [t.detach().requires_grad_() for t in x.unbind()]
    wanted = [F.linear(t, dense, layer.bias) for t in leaves]
    for part, other in zip(parts, wanted, strict=True):
        brute.assert_exact(part.detach(), other.detach())
    dbank, dx = torch.autograd.grad(
        sum(part.pow(3).sum() for part in parts), [layer.virtual_weight.bank.weight, x]
    )
    dring, *dparts = torch.autograd.grad(
        sum(other.pow(3).sum() for other in wanted), [ring, *leaves]
    )
    brute.assert_exact(dbank, dring.view(dbank.shape))
    for part, other in zip(dx.unbind(), dparts, strict=True):
        brute.assert_exact(part, other)


def test_linear_of_jagged_adds_to_its_input_and_attends() -> None:
    weight = brute.bank_of(300, granularity=8).place((20, 20))
    x = jagged(20)
    heads = linear(x, weight).unflatten(-1, [2, 10]).transpose(1, 2)
    y = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(-2)
    assert (x + y).shape == x.shape
    dense = [linear(part, weight).view(-1, 2, 10).transpose(0, 1) for part in x.unbind()]
    for part, h in zip(y.unbind(), dense, strict=True):
        if part.numel():
            attended = F.scaled_dot_product_attention(h, h, h)
            brute.assert_exact(part.detach(), attended.transpose(0, 1).flatten(-2).detach())


def test_embedding_of_jagged() -> None:
    layer = rpg.nn.Embedding(11, 12, 3, bank=brute.bank_of(300, granularity=8), dtype=F64)
    parts = [torch.randint(11, (n,)) for n in LENGTHS]
    words = torch.nested.nested_tensor(parts, layout=torch.jagged)
    y = layer(words)
    assert y.shape == (*words.shape, 12)
    for part, rows in zip(parts, y.unbind(), strict=True):
        assert torch.equal(layer(part), rows)
    y.values().sum().backward()
    got = layer.virtual_weight.bank.weight.grad
    layer.virtual_weight.bank.weight.grad = None
    layer(torch.cat(parts)).sum().backward()
    brute.assert_exact(got, layer.virtual_weight.bank.weight.grad)


def test_what_cannot_run_says_what_to_use() -> None:
    bank = brute.bank_of(300, granularity=8)
    matrix, kernel = bank.place((6, 20)), bank.place((4, 3, 3, 3))
    strided = torch.nested.nested_tensor([torch.randn(n, 20, dtype=F64) for n in (2, 3)])
    with pytest.raises(ValueError, match=r"x: got .* strided layout, wanted .*torch\.jagged"):
        linear(strided, matrix)
    with pytest.raises(ValueError, match=r"indices: got .* strided layout"):
        embedding(torch.nested.nested_tensor([torch.tensor([1]), torch.tensor([2, 3])]), matrix)
    with pytest.raises(ValueError, match=r"x: got .* ragged in its last dimension, 1, wanted"):
        linear(jagged(), matrix)
    images = torch.nested.nested_tensor([torch.randn(3, n, 7, dtype=F64) for n in (5, 6)])
    with pytest.raises(ValueError, match=r"x: got a nested tensor .*wanted images of one size"):
        conv2d(images, kernel)
