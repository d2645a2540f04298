"""Networks of transformers and timm: converted, the same function, trained, saved, generating."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture import Architecture, Inputs, loss, outputs
from architectures import ALL
from torch import Tensor, nn

import rpg_kernels as rpg

Filter = Callable[[nn.Module, str], bool]
SHARED = [a for a in ALL if not a.refused]


def each(architectures: list[Architecture]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "architecture", architectures, ids=lambda a: f"{a.library}-{a.name}"
    )


def everything(module: nn.Module, name: str) -> bool:
    return True


def converted(
    architecture: Architecture, seed: int = 0, filter_fn: Filter | None = None
) -> nn.Module:
    """A tiny network, by default of the default rule, whose bank is a quarter of its weights.

    What is not shared has noise on it: a bias that was lost would not be missed while it is 0.
    """
    torch.manual_seed(seed)
    model = architecture.build()
    weights = sum(p.numel() for p in model.parameters())
    rpg.convert(model, rpg.RPGConfig(dof=weights // 4, granularity=8), filter_fn)
    with torch.no_grad():
        for p in model.parameters():
            if p is not bank_of(model).weight:
                p.add_(0.02 * torch.randn_like(p))
    return model


def bank_of(model: nn.Module) -> rpg.ParameterBank:
    (bank,) = (m for m in model.modules() if isinstance(m, rpg.ParameterBank))
    return bank


def forward(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    with torch.no_grad():
        return outputs(model.eval(), inputs)


def train(model: nn.Module, inputs: Inputs) -> Tensor:
    """The loss in training mode, once it has been differentiated; dropout is always the same."""
    torch.manual_seed(1)
    value = loss(outputs(model.train(), inputs))
    value.backward()
    return value.detach()


def close(got: Tensor, wanted: Tensor, name: str, scale: float = 0.0) -> None:
    """Equal up to the rounding of fp32; scale is of numbers whose differences may be added up."""
    atol = 1e-4 * float(wanted.abs().max()) + 1e-6 * scale
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


# Of everything, something cannot be shared in most: subclasses, tables with a padding row.
@pytest.mark.filterwarnings("ignore:not shared, though asked for")
@pytest.mark.parametrize("filter_fn", [None, everything], ids=["default", "everything"])
@each(SHARED)
def test_forward_is_that_of_the_dense_network(
    architecture: Architecture, filter_fn: Filter | None
) -> None:
    model = converted(architecture, filter_fn=filter_fn)
    inputs = architecture.inputs()
    got, wanted = forward(model, inputs), forward(rpg.materialize(model), inputs)
    assert got.keys() == wanted.keys()
    for name in wanted:
        close(got[name], wanted[name], name)


@each(SHARED)
def test_gradients_are_those_of_the_dense_network_and_a_step_follows_them(
    architecture: Architecture,
) -> None:
    model = converted(architecture)
    dense = rpg.materialize(model)
    inputs = architecture.inputs()
    before = train(model, inputs)
    close(train(dense, inputs), before, "loss")

    gradients = {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in gradients.values())
    bank = torch.zeros_like(bank_of(model).weight)
    for layer in rpg.summary(model).layers:
        if not layer.tied_to and f"{layer.name}.weight" in gradients:
            virtual = model.get_submodule(layer.name).virtual_weight
            bank += virtual.pack(gradients.pop(f"{layer.name}.weight"))
    assert bank.any()
    close(bank_of(model).weight.grad, bank, "bank", largest)
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    trained = {name: grad for name, grad in trained.items() if "rpg_bank" not in name}
    assert trained.keys() == gradients.keys()
    for name in gradients:
        close(trained[name], gradients[name], name, largest)

    length = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    torch.optim.SGD(rpg.param_groups(model, lr=1e-3 / float(length))).step()
    assert train(model, inputs) < before


@each(SHARED)
def test_saved_and_loaded(architecture: Architecture, tmp_path: Path) -> None:
    model, other = converted(architecture), converted(architecture, seed=1)
    rpg.save(model, tmp_path / "model.safetensors")
    rpg.load(other, tmp_path / "model.safetensors")
    inputs = architecture.inputs()
    got, wanted = forward(other, inputs), forward(model, inputs)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@each([a for a in SHARED if a.generates])
def test_generates_what_the_dense_network_generates(architecture: Architecture) -> None:
    model: Any = converted(architecture)
    dense: Any = rpg.materialize(model)
    prompt = {name: x for name, x in architecture.inputs().items() if name != "labels"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    generated = model.generate(**prompt, **options)
    assert torch.equal(generated, dense.generate(**prompt, **options))
    assert generated.shape[1] >= 4


@each([a for a in ALL if a.refused])
def test_networks_without_a_layer_to_share_are_refused(architecture: Architecture) -> None:
    with pytest.raises(ValueError, match=f"no layer to share.*{architecture.refused}"):
        converted(architecture)
