"""accelerate: offloading, device maps, and checkpoints that are set tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import save_file
from torch import Tensor, nn

import rpg_kernels as rpg


class Net(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(16, 32),
            nn.ReLU(),
            nn.Linear(32, 32, bias),
            nn.ReLU(),
            nn.Linear(32, 32, bias),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def build(torch_seed: int = 0, scale: float = 1.0, bias: bool = True, **changes: Any) -> Net:
    torch.manual_seed(torch_seed)
    net = rpg.convert(Net(bias), rpg.RPGConfig(**{"dof": 512, **changes})).eval()
    net.encoder[2].weight.rescale(scale)
    return net


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
OFFLOADS: dict[str, Callable[[Net, str], Any]] = {
    "cpu_offload": lambda net, folder: cpu_offload(net, execution_device="cpu"),
    "with buffers": lambda net, folder: cpu_offload(net, "cpu", offload_buffers=True),
    "with a hook": lambda net, folder: cpu_offload_with_hook(net, "cpu")[0],
    "disk_offload": lambda net, folder: disk_offload(net, folder, execution_device="cpu"),
    "disk with buffers": lambda net, folder: disk_offload(net, folder, "cpu", offload_buffers=True),
    "whole layers": lambda net, folder: cpu_offload(net, "cpu", preload_module_classes=["Linear"]),
    "a device map": lambda net, folder: dispatch_model(
        net, {"rpg_bank": "cpu", "encoder": "disk", "head": "cpu"}, "cpu", offload_dir=folder
    ),
    "the bank on disk": lambda net, folder: dispatch_model(
        net, {"rpg_bank": "disk", "encoder": "cpu", "head": "disk"}, "cpu", offload_dir=folder
    ),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", OFFLOADS)
def test_offloaded_models_compute_the_same(name: str, bias: bool, tmp_path: Path) -> None:
    net = build(scale=0.7, bias=bias)
    with torch.no_grad():
        wanted = net(X)
        net = OFFLOADS[name](net, str(tmp_path))
        for _ in range(2):
            assert torch.equal(net(X), wanted)
        remove_hook_from_submodules(net)


def test_device_maps_know_the_bank() -> None:
    net = build()
    small = infer_auto_device_map(net, max_memory={"cpu": 1 << 30})
    assert dict(small) == {"": "cpu"}
    limited = infer_auto_device_map(net, max_memory={"cpu": 6500, "disk": 1 << 30})
    assert set(limited.values()) == {"cpu", "disk"}


@pytest.mark.parametrize("where", ["cpu", "map", "none"])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_checkpoints_are_loaded_and_checked(suffix: str, where: str, tmp_path: Path) -> None:
    net = build(scale=0.7)
    file = tmp_path / f"model.{suffix}"
    state = {k: v.clone() for k, v in net.state_dict().items()}
    torch.save(state, file) if suffix == "bin" else save_file(state, file, {"format": "pt"})
    parts = {"rpg_bank": "cpu", "encoder": "cpu", "head": "cpu"}
    maps: dict[str, Any] = {"cpu": {"": "cpu"}, "map": parts, "none": None}
    other = build(5, scale=3.0)
    load_checkpoint_in_model(other, str(file), device_map=maps[where])
    assert torch.equal(other(X), net(X))
    assert other.encoder[2].weight.scale == 0.7
    wrong = build(seed=1)

    def load_and_run() -> None:
        load_checkpoint_in_model(wrong, str(file), device_map=maps[where])
        wrong(X)

    with pytest.raises((ValueError, RuntimeError), match="seed: got 0, wanted 1"):
        load_and_run()


@pytest.mark.parametrize("include_buffers", [True, False])
def test_from_empty_weights_to_a_dispatched_model(include_buffers: bool, tmp_path: Path) -> None:
    net = build(scale=0.7)
    torch.save(net.state_dict(), tmp_path / "model.bin")
    with init_empty_weights(include_buffers=include_buffers):
        empty = Net(bias=True)
    rpg.convert(empty, rpg.RPGConfig(dof=512)).eval()
    loaded = load_checkpoint_and_dispatch(
        empty, str(tmp_path / "model.bin"), device_map={"": "cpu"}
    )
    assert torch.equal(loaded(X), net(X))
    assert loaded.encoder[2].weight.scale == 0.7


def test_training_with_an_accelerator(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    net = build().train()
    optimiser = torch.optim.SGD(rpg.param_groups(net, lr=0.1))
    net, optimiser = accelerator.prepare(net, optimiser)
    before = net.encoder[2].weight.unpack().detach()
    accelerator.backward(net(X).square().sum())
    optimiser.step()
    assert not torch.equal(net.encoder[2].weight.unpack(), before)
    accelerator.save_model(net, str(tmp_path))
    other = build(6)
    load_checkpoint_in_model(other, str(tmp_path))
    assert torch.equal(other(X), net(X))
