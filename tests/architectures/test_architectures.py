"""Networks of transformers and timm: converted, the same function, trained, saved, generating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architecture import Architecture, Inputs, loss, outputs
from architectures import ALL
from torch import Tensor, nn

import rpg_kernels as rpg

each = pytest.mark.parametrize("architecture", ALL, ids=lambda a: f"{a.library}-{a.name}")


def converted(architecture: Architecture, seed: int = 0) -> nn.Module:
    """A tiny network of the default rule, whose bank is a quarter of what it was."""
    torch.manual_seed(seed)
    model = architecture.build()
    for m in model.modules():
        m.__dict__.pop("_is_hf_initialized", None)
    weights = sum(p.numel() for p in model.parameters())
    return rpg.convert(model, rpg.RPGConfig(dof=weights // 4, granularity=8))


def disturbed(model: nn.Module) -> nn.Module:
    """The model with noise on all that is not shared: a lost bias would not be seen if it is 0."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "rpg_bank" not in name:
                p.add_(0.02 * torch.randn_like(p))
    return model


def same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        close(got[name], value, name)


def close(got: Tensor, wanted: Tensor, name: str) -> None:
    """Equal up to the rounding of fp32, relative to the largest."""
    eps = 1e-4 * float(wanted.detach().abs().max()) + 1e-8
    torch.testing.assert_close(
        got.detach(), wanted.detach(), rtol=0, atol=eps, msg=lambda m: f"{name}: {m}"
    )


def gradients(model: nn.Module, inputs: Inputs) -> Tensor:
    """The loss in training mode; dropout is the same for every model."""
    torch.manual_seed(1)
    value = loss(outputs(model.train(), inputs))
    value.backward()
    return value.detach()


@each
def test_forward_is_that_of_the_dense_network(architecture: Architecture) -> None:
    model = disturbed(converted(architecture))
    dense = rpg.materialize(model)
    inputs = architecture.inputs()
    with torch.no_grad():
        same(outputs(model, inputs), outputs(dense, inputs))


@each
def test_training(architecture: Architecture) -> None:
    model = disturbed(converted(architecture))
    dense = rpg.materialize(model)
    inputs = architecture.inputs()
    before = gradients(model, inputs)
    assert before.isfinite()
    close(gradients(dense, inputs), before, "loss")
    expected = torch.zeros_like(model.rpg_bank.weight)
    for layer in rpg.summary(model).layers:
        if not layer.tied_to:
            virtual = model.get_submodule(layer.name).virtual_weight
            grad = dense.get_submodule(layer.name).weight.grad
            expected += 0 if grad is None else virtual.pack(grad)
    assert expected.abs().max() > 0
    close(model.rpg_bank.weight.grad, expected, "bank")
    for name, parameter in dense.named_parameters():
        other: Any = dict(model.named_parameters()).get(name)
        if other is not None and parameter.grad is not None:
            close(other.grad, parameter.grad, name)
    rate = 1e-3 / max(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)
    torch.optim.SGD(rpg.param_groups(model, lr=rate)).step()
    assert gradients(model, inputs) < before


@each
def test_saved_and_loaded(architecture: Architecture, tmp_path: Path) -> None:
    model, other = disturbed(converted(architecture)), converted(architecture, seed=1)
    rpg.save(model, tmp_path / "model.safetensors")
    rpg.load(other, tmp_path / "model.safetensors")
    inputs = architecture.inputs()
    with torch.no_grad():
        got, wanted = outputs(other, inputs), outputs(model, inputs)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "architecture", [a for a in ALL if a.generates], ids=lambda a: f"{a.library}-{a.name}"
)
def test_generates_what_the_dense_network_generates(architecture: Architecture) -> None:
    model: Any = disturbed(converted(architecture))
    dense: Any = rpg.materialize(model)
    prompt = {name: x for name, x in architecture.inputs().items() if name != "labels"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    generated = model.generate(**prompt, **options)
    assert torch.equal(generated, dense.generate(**prompt, **options))
    assert generated.shape[1] >= 4
