"""DistributedDataParallel and FSDP2 over one gloo process: the plain model's numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rpg_kernels as rpg

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

# FSDP's hooks sit on a layer's output: if that were a view, an in-place operation would drop them.
pytestmark = pytest.mark.filterwarnings(
    "error:FSDP2-wrapped module", "ignore:DTensor random operators"
)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.words = nn.Embedding(7, 16)
        self.block = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16, bias=False))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.conv(self.stem(x).relu()).mean((2, 3)) + self.words(labels)
        return self.head(self.block(self.block(x)))


INPUTS = (torch.randn(4, 3, 6, 6), torch.tensor([0, 6, 3, 3]))
LAYERS = ("stem", "conv", "words", "block.0", "block.2", "head")


def build() -> Net:
    torch.manual_seed(0)
    return rpg.convert(Net(), rpg.RPGConfig(dof=256, granularity=8))


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    output = model(*INPUTS)
    output.square().sum().backward()
    plain = getattr(model, "module", model)
    gradients = {}
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradients[name] = full(parameter.grad).clone()
    return output.detach(), gradients


def shard(model: nn.Module, mesh: DeviceMesh, how: str) -> nn.Module:
    if how == "per layer":
        for name in LAYERS:
            fully_shard(model.get_submodule(name), mesh=mesh)
    elif how == "per block":
        fully_shard(model.get_submodule("block"), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def check(model: nn.Module) -> None:
    wanted, wanted_gradients = run(build())
    got, gradients = run(model)
    assert torch.equal(got, wanted)
    assert list(gradients) == list(wanted_gradients)
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}])
def test_ddp_equals_the_plain_model(mesh: DeviceMesh, options: dict[str, bool]) -> None:
    check(DistributedDataParallel(build(), **options))


def test_ddp_accumulates_without_synchronisation(mesh: DeviceMesh) -> None:
    model = DistributedDataParallel(build())
    _, wanted = run(build())
    with model.no_sync():
        run(model)
    _, gradients = run(model)
    torch.testing.assert_close(gradients["rpg_bank.weight"], 2 * wanted["rpg_bank.weight"])


@pytest.mark.parametrize("how", ["root only", "per block", "per layer"])
def test_fsdp_equals_the_plain_model(mesh: DeviceMesh, how: str) -> None:
    model = shard(build(), mesh, how)
    assert isinstance(model.get_parameter("rpg_bank.weight"), DTensor)
    check(model)


@pytest.mark.parametrize("how", ["root only", "per layer"])
def test_fsdp_trains_like_the_plain_model(mesh: DeviceMesh, how: str) -> None:
    plain, sharded = build(), shard(build(), mesh, how)
    for model in (plain, sharded):
        optimiser = torch.optim.AdamW(rpg.param_groups(model, lr=0.01, weight_decay=0.1))
        for _ in range(3):
            optimiser.zero_grad()
            run(model)
            optimiser.step()
    state = {name: full(value) for name, value in sharded.state_dict().items()}
    assert list(state) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


def test_fsdp_from_meta(mesh: DeviceMesh) -> None:
    with torch.device("meta"):
        model = rpg.convert(Net(), rpg.RPGConfig(dof=256, granularity=8))
    shard(model, mesh, "per layer")
    rpg.initialize(model)
    wanted = build()
    wanted.load_state_dict({name: full(value) for name, value in model.state_dict().items()})
    torch.testing.assert_close(model(*INPUTS), wanted(*INPUTS), rtol=0, atol=0)
    bank = full(model.rpg_bank.weight)
    assert bank.std().item() == pytest.approx(wanted.rpg_bank.init_std, rel=0.2)


def test_fsdp_in_mixed_precision_and_inference(mesh: DeviceMesh) -> None:
    model = build()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    wanted = copy.deepcopy(build()).bfloat16()(INPUTS[0].bfloat16(), INPUTS[1])
    output, gradients = run(model)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, wanted.detach(), rtol=0, atol=0)
    assert gradients["rpg_bank.weight"].dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(model(*INPUTS), output, rtol=0, atol=0)


def test_summary_and_groups_of_a_sharded_model(mesh: DeviceMesh) -> None:
    model = shard(build(), mesh, "per layer")
    assert rpg.summary(model).layers == rpg.summary(build()).layers
    groups = rpg.param_groups(model, lr=0.1)
    assert [g["name"] for g in groups] == ["bank", "weights", "no_decay"]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_full_state_dicts_of_a_sharded_model(
    mesh: DeviceMesh, device: str, broadcast: bool
) -> None:
    plain = build()
    plain.block[0].virtual_weight.rescale(0.7)
    with torch.device(device):
        model = shard(rpg.convert(Net(), rpg.RPGConfig(dof=256, granularity=8)), mesh, "per layer")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    set_model_state_dict(model, plain.state_dict(), options=options)
    assert torch.equal(model(*INPUTS), plain(*INPUTS))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    again = build()
    again.load_state_dict(state)
    assert torch.equal(again(*INPUTS), plain(*INPUTS))
    other = rpg.convert(Net(), rpg.RPGConfig(dof=256, granularity=8, seed=1))
    with pytest.raises(RuntimeError, match="seed: got 0, wanted 1"):
        set_model_state_dict(shard(other, mesh, "per layer"), state, options=options)


def test_checkpoints(mesh: DeviceMesh, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    rpg.save(DistributedDataParallel(build()), path)
    model = rpg.convert(Net(), rpg.RPGConfig(dof=256, granularity=8))
    assert torch.equal(rpg.load(model, path)(*INPUTS), build()(*INPUTS))
    rpg.load(DistributedDataParallel(model), path)
    for call in (rpg.save, rpg.load):
        with pytest.raises(
            ValueError, match=r"rpg_bank\.weight: got a DTensor, wanted a plain tensor"
        ):
            call(shard(build(), mesh, "root only"), path)
