"""Wrappers around a model: seen through, or refused with what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import rpg_kernels as rpg

CONFIG = rpg.RPGConfig(dof=256, granularity=8)
SEEN_THROUGH: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda net: torch.compile(net, backend="eager"),
    "DataParallel": DataParallel,
    "AveragedModel": AveragedModel,
    "two": lambda net: DataParallel(torch.compile(net, backend="eager")),
}


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))


def inner(net: Any) -> Any:
    while not isinstance(net, nn.Sequential):
        net = net.module if hasattr(net, "module") else net._orig_mod
    return net


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", SEEN_THROUGH)
def test_a_wrapped_model_is_converted_inside(name: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    x = torch.randn(2, 8)
    wrapped = SEEN_THROUGH[name](stack())
    wrapped(x)
    assert rpg.convert(wrapped, CONFIG) is wrapped
    plain = rpg.convert(stack(), CONFIG)
    plain.load_state_dict(inner(wrapped).state_dict())
    torch.testing.assert_close(wrapped(x), plain(x))
    assert str(rpg.summary(wrapped)) == str(rpg.summary(plain))
    rpg.save(wrapped, tmp_path / "a")
    rpg.save(plain, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    rpg.load(wrapped, tmp_path / "b")
    rpg.freeze(wrapped)
    assert not wrapped(x).requires_grad
    rpg.unfreeze(wrapped)
    wrapped(x).sum().backward()
    assert inner(wrapped).rpg_bank.weight.grad is not None
    assert [g["name"] for g in rpg.param_groups(wrapped, 0.1)] == ["bank", "weights", "no_decay"]


def test_a_wrapped_layer_is_explained_and_a_compiled_part_converted() -> None:
    torch.compiler.reset()
    layer = rpg.nn.Linear(8, 8)
    x = torch.randn(2, 8)
    for wrap in SEEN_THROUGH.values():
        assert rpg.explain(wrap(layer), x) == rpg.explain(layer, x)
    net = nn.Sequential(nn.Linear(8, 8), torch.compile(stack(), backend="eager"), nn.Linear(8, 8))
    rpg.convert(net, CONFIG)
    assert [each.name for each in rpg.summary(net).layers] == [f"1._orig_mod.{i}" for i in range(4)]
    torch.testing.assert_close(net(x), rpg.materialize(net)(x))


def test_single_layers_in_wrappers_are_refused_as_without() -> None:
    for wrap in (DataParallel, AveragedModel):
        with pytest.raises(TypeError, match="model: got a single Linear"):
            rpg.convert(wrap(nn.Linear(8, 8)), CONFIG)
        with pytest.raises(TypeError, match="model: got a ModuleList"):
            rpg.convert(wrap(nn.ModuleList(stack())), CONFIG)
        with pytest.raises(ValueError, match="model: got a model that has a bank already"):
            rpg.convert(wrap(rpg.convert(stack(), CONFIG)), CONFIG)


def sharded(net: nn.Module) -> nn.Module:
    """FSDP's first wrapper around a model, which it refuses to make without an accelerator."""
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper._fsdp_wrapped_module = net
    return wrapper


@pytest.mark.parametrize("where", ["around", "inside"])
def test_what_has_taken_the_parameters_over_is_refused(process_group: None, where: str) -> None:
    mesh = init_device_mesh("cpu", (1,))
    wrappers = (
        ("DistributedDataParallel", DistributedDataParallel),
        ("FullyShardedDataParallel", sharded),
        ("fully_shard", lambda net: fully_shard(net, mesh=mesh)),
    )
    for name, wrap in wrappers:
        wrapped = wrap(stack())
        net = wrapped if where == "around" else nn.Sequential(wrapped, nn.Linear(8, 8))
        kinds = [type(m) for m in net.modules()]
        with pytest.raises(ValueError, match=f"model: got .*{name}.*convert it first and wrap"):
            rpg.convert(net, CONFIG, lambda module, name: True)
        assert [type(m) for m in net.modules()] == kinds


def test_a_converted_model_is_wrapped_afterwards(process_group: None) -> None:
    net = rpg.convert(stack(), CONFIG)
    x, wanted = torch.randn(2, 8), str(rpg.summary(net))
    wrapped = DistributedDataParallel(net)
    wrapped(x).sum().backward()
    assert net.rpg_bank.weight.grad is not None
    assert str(rpg.summary(wrapped)) == wanted
