"""Pruned models: their files, state dicts and copies."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import prunable
import pytest
import torch
from torch import nn

import rpg_kernels as rpg


def build(shared: bool, seed: int = 0) -> nn.Module:
    net, _ = prunable.network("residual", seed)
    if not shared:
        return net
    config = rpg.RPGConfig(dof=256, granularity=16)
    return rpg.convert(net, config, filter_fn=lambda module, name: name != "stem")


def pruned(shared: bool, share: float = 0.5) -> tuple[nn.Module, torch.Tensor]:
    net, (_, x) = build(shared), prunable.network("residual")
    rpg.prune_channels(net, x, share)
    return net, x


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_file_prunes_a_whole_model_alike(shared: bool, again: bool, tmp_path: Path) -> None:
    net, x = pruned(shared)
    path = tmp_path / "model.safetensors"
    rpg.save(net, path)
    other = build(shared, seed=1)
    if again:  # a model that was pruned alike before
        rpg.keep_channels(other, rpg.kept_channels(net))
    loaded = rpg.load(other, path)
    assert loaded is other
    assert torch.equal(loaded(x), net(x))
    assert rpg.kept_channels(loaded) == rpg.kept_channels(net)
    rpg.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_onto_meta(tmp_path: Path) -> None:
    net, x = pruned(shared=True)
    rpg.save(net, tmp_path / "model.safetensors")
    with torch.device("meta"):
        other = build(shared=True)
    other = rpg.load(other.to_empty(device="meta"), tmp_path / "model.safetensors")
    for name, buffer in net.named_buffers():
        assert torch.equal(other.get_buffer(name), buffer), name
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("shared", [False, True])
def test_files_that_do_not_fit_change_nothing(shared: bool, tmp_path: Path) -> None:
    net, _ = pruned(shared)
    rpg.save(net, tmp_path / "pruned.safetensors")
    rpg.save(build(shared), tmp_path / "whole.safetensors")
    otherwise, x = pruned(shared, 0.7)
    for model, file in (
        (otherwise, "pruned"),
        (otherwise, "whole"),
        (nn.Linear(3, 2), "pruned"),
        (
            nn.ModuleDict({**dict(build(shared).named_children()), "more": nn.Linear(2, 2)}),
            "pruned",
        ),
    ):
        before = copy.deepcopy(model.state_dict())
        text, kept = str(model), rpg.kept_channels(model)
        with pytest.raises(ValueError, match=file):
            rpg.load(model, tmp_path / f"{file}.safetensors")
        assert (str(model), rpg.kept_channels(model)) == (text, kept)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
    assert otherwise(x).shape == (2, 5)


@pytest.mark.parametrize("shared", [False, True])
def test_state_dict(shared: bool) -> None:
    net, x = pruned(shared)
    kept = json.loads(json.dumps(rpg.kept_channels(net)))
    other = build(shared, seed=1)
    with pytest.raises(RuntimeError):
        other.load_state_dict(net.state_dict())
    undo = rpg.keep_channels(other, kept)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    undo()
    assert other.b.weight.shape == (12, 10, 3, 3)
    assert other.norm.num_features == 12
    assert rpg.kept_channels(other) == {}
    assert other(x).shape == (2, 5)


def test_a_state_dict_of_another_selection_is_refused() -> None:
    net, _ = pruned(shared=True)
    kept = rpg.kept_channels(net)
    size = net.a.out_channels
    kept = {name: list(record) for name, record in kept.items()}
    assert kept["a"][0] != [0, size]
    kept["a"][0] = kept["a_norm"][0] = kept["b"][1] = [0, size]
    other = build(shared=True)
    rpg.keep_channels(other, kept)
    with pytest.raises(RuntimeError, match="reads its bank at"):
        other.load_state_dict(net.state_dict())


WRONG: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"nothing": [[0, 2], [0, 2]]}, ValueError),
    ({"a": [[0, 2]]}, ValueError),
    ({"a": [[0, 99], [0, 12]]}, ValueError),
    ({"a": [[0, 0], [0, 12]]}, ValueError),
    ({"a": [{"chosen": [1, 2, 0, 1]}, [0, 12]]}, ValueError),
    ({"a": [{"chosen": [0, 1, 9, 2]}, [0, 12]]}, ValueError),
    ({"a": [["x", 2], [0, 12]]}, TypeError),
    ({"a": 3}, ValueError),
    ({"": [[0, 2], [0, 2]]}, ValueError),
]


@pytest.mark.parametrize(("record", "error"), WRONG)
def test_wrong_records(record: dict[str, Any], error: type[Exception]) -> None:
    net = build(shared=True)
    with pytest.raises(error, match="kept"):
        rpg.keep_channels(net, {"b": [[0, 2], [0, 10]], **record})
    assert net.b.out_channels == 12
    with pytest.raises(TypeError, match="kept"):
        rpg.keep_channels(net, 3)  # type: ignore[arg-type]


def test_no_model_and_a_pruned_one() -> None:
    net, _ = pruned(shared=True)
    with pytest.raises(TypeError, match="model"):
        rpg.kept_channels(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model"):
        rpg.keep_channels(3, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pruned before"):
        rpg.keep_channels(net, rpg.kept_channels(net))


def test_copies() -> None:
    net, x = pruned(shared=True)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))
        assert rpg.kept_channels(twin) == rpg.kept_channels(net)
        assert twin.b.virtual_weight.bank is twin.rpg_bank
    alone = copy.deepcopy(net.b)
    y = torch.randn(2, net.b.in_channels, 4, 4, dtype=torch.float64)
    assert torch.equal(alone(y), net.b(y))


def test_materialized_keeps_the_record(tmp_path: Path) -> None:
    net, x = pruned(shared=True)
    dense = rpg.materialize(net)
    assert rpg.kept_channels(dense) == rpg.kept_channels(net)
    rpg.save(dense, tmp_path / "dense.safetensors")
    other = rpg.load(build(shared=False), tmp_path / "dense.safetensors")
    assert torch.equal(other(x), dense(x))
