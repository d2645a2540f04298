"""A converted model as PyTorch's machinery sees it: state, copies, moves, transforms, compile."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rpg_kernels as rpg

DOUBLE = torch.float64


class Net(nn.Module):
    """Convolution, embedding and linear layers between a stem and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.embed = nn.Embedding(6, 16, padding_idx=1)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.norm(self.conv(self.stem(x).relu())).relu().mean((2, 3))
        return self.head(self.mix(x + self.embed(labels)).tanh())


def build(torch_seed: int = 0, dof: int = 256, device: str = "cpu") -> Net:
    torch.manual_seed(torch_seed)
    with torch.device(device):
        return rpg.convert(Net(), rpg.RPGConfig(dof=dof, granularity=8))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 6, 6, generator=generator, dtype=DOUBLE).to(dtype)
    return x, torch.tensor([1, 5, 0])


def gradients(model: nn.Module, run: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    forward = model if run is None else run  # a compiled model has no truth value
    forward(*inputs(next(model.parameters()).dtype)).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, **tolerance)


def test_the_state_dict_has_one_tensor_for_all_virtual_weights_and_their_map() -> None:
    model = build()
    dense = list(Net().state_dict())
    gone = {"conv.weight", "embed.weight", "mix.weight"}
    bank = ["rpg_bank.weight", "rpg_bank.map_digits"]
    assert list(model.state_dict()) == [*bank, *(k for k in dense if k not in gone)]
    assert model.state_dict()["rpg_bank.weight"].shape == (32, 8)
    digits = model.state_dict()["rpg_bank.map_digits"]
    assert (digits.dtype, digits.dim()) == (torch.float16, 1)
    assert digits.numel() < 2 * (150 + 3 * 80)


def test_save_and_load_with_weights_only(tmp_path: Path) -> None:
    model = build(torch_seed=0)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = build(torch_seed=9)
    assert not torch.equal(other(*inputs()), model(*inputs()))
    other.load_state_dict(state)
    assert torch.equal(other(*inputs()), model(*inputs()))
    assert_same(gradients(other), gradients(model), rtol=0, atol=0)


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = build(0), build(9)
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(*inputs()), model(*inputs()))


def test_a_bank_of_another_size_is_refused_and_changes_no_bank() -> None:
    small, large = build(dof=128), build(dof=256)
    before = large.rpg_bank.weight.detach().clone()
    bare = {k: v for k, v in small.state_dict().items() if "map_digits" not in k}
    refusals = ((small.state_dict(), "slots: got 16, wanted 32"), (bare, "size mismatch"))
    for state, message in refusals:
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=f"rpg_bank.*{message}|{message}.*rpg_bank"):
                large.load_state_dict(state, strict=strict)
    assert torch.equal(large.rpg_bank.weight, before)
    with pytest.raises(RuntimeError, match=r"Missing key.*rpg_bank\.weight"):
        large.load_state_dict(Net().state_dict())


def test_a_bank_of_another_size_put_in_by_hand_is_named() -> None:
    model = build()
    model.rpg_bank.weight = nn.Parameter(torch.zeros(31, 8))
    with pytest.raises(ValueError, match=r"bank: got shape \[31, 8\], wanted shape \[32, 8\]"):
        model(*inputs())


@pytest.mark.parametrize("change", ["nothing", "unusual init", "close rules", "seed", "reflect"])
def test_a_state_dict_never_silently_means_another_network(change: str, tmp_path: Path) -> None:
    """Loading into a model built again either gives the same outputs or is refused."""

    def make(number: int) -> nn.Module:
        torch.manual_seed(number)
        model = nn.Sequential(nn.Linear(8, 768), nn.Linear(768, 8), nn.Linear(8, 3))
        config = {"dof": 512, "granularity": 8}
        if change == "unusual init":
            nn.init.trunc_normal_(model[1].weight, std=0.05, a=-0.1, b=0.1)
        elif change == "close rules":
            nn.init.normal_(model[1].weight, std=0.02)
        elif change == "seed":
            config["seed"] = number
        elif change == "reflect":
            config["reflect"] = ("vector", "element", "none")[number % 3]
        return rpg.convert(model, rpg.RPGConfig(**config))

    x = torch.randn(4, 8)
    first = make(0)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for number in range(1, 13):
        other = make(number)
        refusal = ""
        try:
            other.load_state_dict(state)
        except RuntimeError as error:
            refusal = str(error)
        assert torch.equal(other(x), first(x)) or "rpg_bank" in refusal
        assert not refusal or change != "nothing"


def test_loading_into_meta_by_assignment() -> None:
    model = build()
    far = build(device="meta")
    far.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert not any(t.is_meta for t in far.state_dict().values())
    assert torch.equal(far(*inputs()), model(*inputs()))
    assert_same(gradients(far), gradients(model), rtol=0, atol=0)


def test_a_deep_copy_follows_its_own_bank() -> None:
    model = build()
    wanted = model(*inputs()).detach()
    twin = copy.deepcopy(model)
    assert twin.mix.virtual_weight.bank is twin.rpg_bank
    assert twin.rpg_bank is not model.rpg_bank
    assert torch.equal(twin(*inputs()), wanted)
    with torch.no_grad():
        twin.rpg_bank.weight.zero_()
    assert not torch.equal(twin(*inputs()), wanted)
    assert twin.mix.virtual_weight.unpack().eq(0).all()
    assert torch.equal(model(*inputs()), wanted)
    gradients(twin)
    assert model.rpg_bank.weight.grad is None


@pytest.mark.parametrize("memory", [pickle.dumps, None])
def test_a_whole_model_is_pickled(memory: Any) -> None:
    model = build()
    if memory is None:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = pickle.loads(memory(model))
    assert torch.equal(twin(*inputs()), model(*inputs()))
    assert str(rpg.summary(twin)) == str(rpg.summary(model))


@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16, torch.float16])
def test_moves_to_another_dtype(dtype: torch.dtype) -> None:
    model = build()
    wanted = model(*inputs()).detach()
    before = model.mix.virtual_weight.unpack().detach()
    assert model.to(dtype) is model
    assert model.rpg_bank.weight.dtype == model.mix.virtual_weight.dtype == dtype
    error = {DOUBLE: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    got = model(*inputs(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=error, atol=error)
    unpacked = model.mix.virtual_weight.unpack().to(before.dtype)
    torch.testing.assert_close(unpacked, before, rtol=1e-2, atol=1e-6)
    assert {g.dtype for g in gradients(model).values()} == {dtype}


def test_moves_to_meta_and_back() -> None:
    model = build()
    state = copy.deepcopy(model.state_dict())
    wanted = model(*inputs()).detach()
    model.to(device="meta")
    assert model.mix.virtual_weight.device.type == "meta"
    x, labels = inputs()
    assert model(x.to("meta"), labels.to("meta")).shape == (3, 4)
    with pytest.raises(ValueError, match="got device"):
        model.mix(torch.randn(2, 16))
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert torch.equal(model(*inputs()), wanted)


def test_functional_call() -> None:
    model = build()
    wanted = model(*inputs()).detach()
    other = {k: v.detach().clone().requires_grad_() for k, v in build(7).named_parameters()}
    got = torch.func.functional_call(model, other, inputs())
    assert torch.equal(got, build(7)(*inputs()))
    got.square().sum().backward()
    assert_same({k: v.grad for k, v in other.items()}, gradients(build(7)), rtol=0, atol=0)
    assert model.rpg_bank.weight.grad is None
    assert torch.equal(model(*inputs()), wanted)
    bank = {"rpg_bank.weight": torch.zeros(32, 8)}
    half = torch.func.functional_call(model, bank, inputs())
    # One row and three are multiplied by different kernels, whose sums round differently.
    torch.testing.assert_close(half, model.head(model.mix.bias.tanh()).expand(3, 4))


def test_compiled_model_equals_eager() -> None:
    torch.compiler.reset()
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    wanted = gradients(model)
    assert_same(gradients(model, compiled), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled(*inputs()), model(*inputs()))
    # The graph reads the bank there is, not the one it was traced with.
    with torch.no_grad():
        model.rpg_bank.weight.mul_(3)
    torch.testing.assert_close(compiled(*inputs()), model(*inputs()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant: bool) -> None:
    model = build()
    wanted = gradients(model)

    def run(x: Tensor, labels: Tensor) -> Tensor:
        # Re-entrant checkpointing needs an input that requires a gradient.
        result = checkpoint(model, x.requires_grad_(), labels, use_reentrant=use_reentrant)
        assert isinstance(result, Tensor)
        return result

    got = gradients(model, run)
    # Layers add to one sum of their bank, in an order that checkpointing changes.
    bank, other = (grads.pop("rpg_bank.weight") for grads in (got, wanted))
    rounding = torch.finfo(torch.float32).eps * other.abs().max().item()
    torch.testing.assert_close(bank, other, rtol=0, atol=4 * rounding)
    assert_same(got, wanted, rtol=0, atol=0)


def test_checkpointing_part_of_a_model() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))).double()
    rpg.convert(model, rpg.RPGConfig(dof=64, granularity=8))
    x = torch.randn(4, 8, dtype=DOUBLE)

    def bank_gradient(first: Callable[[Tensor], Tensor]) -> Tensor:
        model.zero_grad()
        model[4](model[3](first(x))).square().sum().backward()
        return model.rpg_bank.weight.grad.clone()

    plain = bank_gradient(model[:3])
    part = bank_gradient(lambda x: checkpoint(model[:3], x, use_reentrant=False))
    torch.testing.assert_close(part, plain, rtol=1e-12, atol=1e-14)


def test_gradients_accumulate_over_calls() -> None:
    model = build().double()
    x, labels = inputs(DOUBLE)
    wanted = gradients(model)
    model.zero_grad()
    for i in range(3):
        model(x[i : i + 1], labels[i : i + 1]).square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    assert_same(got, wanted, rtol=1e-10, atol=1e-12)


def test_retained_graphs_and_partial_gradients() -> None:
    model = build().double()
    wanted = gradients(model)
    model.zero_grad()
    loss = model(*inputs(DOUBLE)).square().sum()
    loss.backward(retain_graph=True)
    first = model.rpg_bank.weight.grad.clone()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(model.rpg_bank.weight.grad, 2 * first)
    bank, bias = torch.autograd.grad(
        loss, (model.rpg_bank.weight, model.mix.bias), retain_graph=True
    )
    torch.testing.assert_close(bank, wanted["rpg_bank.weight"])
    torch.testing.assert_close(bias, wanted["mix.bias"])
    (stem,) = torch.autograd.grad(loss, model.stem.weight)
    torch.testing.assert_close(stem, wanted["stem.weight"])
    torch.testing.assert_close(model.rpg_bank.weight.grad, 2 * first)


def test_a_frozen_bank_gets_no_gradient_and_lets_others_through() -> None:
    model = build()
    wanted = gradients(model)
    model.rpg_bank.requires_grad_(False)
    got = gradients(model)
    assert "rpg_bank.weight" not in got
    wanted.pop("rpg_bank.weight")
    assert_same(got, wanted, rtol=0, atol=0)


def test_inference_and_autocast() -> None:
    model = build()
    wanted = model(*inputs()).detach()
    with torch.inference_mode():
        assert torch.equal(model(*inputs()), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(*inputs())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)
    got.float().square().sum().backward()
    assert model.rpg_bank.weight.grad.dtype == torch.float32


def test_nan_in_the_bank_passes_through() -> None:
    model = build()
    with torch.no_grad():
        model.rpg_bank.weight[0, 0] = torch.nan
    weight = model.conv.virtual_weight.unpack()
    assert 0 < weight.isnan().sum() < weight.numel()
    assert model(*inputs()).isnan().any()


def test_double_backward_through_a_model() -> None:
    model = build().double()
    x, labels = inputs(DOUBLE)
    x.requires_grad_()
    dense = rpg.materialize(model)

    def penalty(net: nn.Module) -> Tensor:
        (g,) = torch.autograd.grad(net(x, labels).square().sum(), x, create_graph=True)
        return g.square().sum()

    (got,) = torch.autograd.grad(penalty(model), model.rpg_bank.weight)
    names = ("conv", "embed", "mix")
    weights = [dense.get_submodule(n).weight for n in names]
    parts = torch.autograd.grad(penalty(dense), weights)
    wanted = sum(
        model.get_submodule(n).virtual_weight.pack(g) for n, g in zip(names, parts, strict=True)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
