"""What other tools do with a pruned model, with masks in place and finished; and rewinding."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import rpg_kernels as rpg


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Sequential(nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.norm(self.first(x)).relu()).mean((2, 3)))


X = torch.randn(4, 3, 7, 9, generator=torch.Generator().manual_seed(0))


def build(seed: int = 0, **config: Any) -> Net:
    torch.manual_seed(seed)
    return rpg.convert(Net(), rpg.RPGConfig(**{"dof": 768, "granularity": 8, **config}))


def grouped(seed: int = 0) -> Net:
    groups = [rpg.Group("a", "body.0"), rpg.Group("b", "body.2", laps=2)]
    return build(seed, groups=groups)


def in_sequence(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(*(nn.Linear(9, 9) for _ in range(4)))
    return rpg.convert(nn.Sequential(nn.Flatten(), nn.Linear(189, 9), net), rpg.RPGConfig(dof=128))


def train(net: nn.Module, steps: int = 2) -> None:
    optimiser = torch.optim.SGD(rpg.param_groups(net, lr=0.01), momentum=0.9)
    for _ in range(steps):
        optimiser.zero_grad()
        net(X).square().mean().backward()
        optimiser.step()


def pruned(make: Any = build, by: str = "slot") -> Any:
    """Trained, pruned and trained, so that values are newer than the attribute ``weight``."""
    net = make()
    train(net)
    rpg.prune(net, 0.4, by)
    train(net)
    return net


def masks(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items() if k.endswith("_mask")}


MAKE = [build, grouped, in_sequence]


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("by", ["element", "slot"])
def test_outputs_stay_when_pruning_is_finished(make: Any, by: str) -> None:
    net = pruned(make, by).eval()
    before, names = net(X), list(make().state_dict())
    assert torch_prune.is_pruned(net)
    assert rpg.finish_pruning(net) is net
    assert torch.equal(net(X), before)
    assert list(net.state_dict()) == names
    assert not torch_prune.is_pruned(net)
    twin = make(seed=1).eval()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(X), before)


@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("make", MAKE)
def test_files(make: Any, finish: bool, tmp_path: Path) -> None:
    net, twin = pruned(make).eval(), make(seed=1).eval()
    if finish:
        rpg.finish_pruning(net)
    rpg.save(net, tmp_path / "a")
    if not finish:
        state = copy.deepcopy(twin.state_dict())
        with pytest.raises(ValueError, match="weight_mask"):
            rpg.load(twin, tmp_path / "a")
        assert all(torch.equal(value, state[key]) for key, value in twin.state_dict().items())
        rpg.prune(twin, 0)  # the same names, with nothing pruned
    assert torch.equal(rpg.load(twin, tmp_path / "a")(X), net(X))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("make", MAKE)
def test_copies_after_a_forward_with_gradients(way: Any, make: Any) -> None:
    net = pruned(make)
    net(X).sum().backward()
    twin = way(net)
    net.eval(), twin.eval()
    assert torch.equal(twin(X), net(X))
    before, of_twin = net(X), masks(twin)
    train(twin)
    assert torch.equal(net.eval()(X), before)
    assert all(torch.equal(value, of_twin[key]) for key, value in masks(twin).items())
    assert torch_prune.is_pruned(twin)
    rpg.finish_pruning(twin)


@pytest.mark.parametrize("make", MAKE)
def test_materialize_and_summary(make: Any) -> None:
    net = pruned(make).eval()
    counts = rpg.summary(make()), rpg.summary(net)
    for key in ("dof", "virtual_weights", "unshared", "compression"):
        assert getattr(counts[0], key) == getattr(counts[1], key)
    dense = rpg.materialize(net)
    assert not torch_prune.is_pruned(dense)
    torch.testing.assert_close(dense(X), net(X))
    assert all(p.requires_grad for p in dense.parameters())
    with torch.no_grad():  # after which the attribute ``weight`` has no gradient
        net(X)
    assert all(p.requires_grad for p in rpg.materialize(net).parameters())


@pytest.mark.parametrize("make", MAKE)
def test_moving_and_casting(make: Any) -> None:
    net = pruned(make).eval()
    wanted = net(X)
    net.double()
    for module in net.modules():
        if isinstance(module, rpg.nn.Linear | rpg.nn.Conv2d):
            assert module.weight.dtype == torch.float64
    torch.testing.assert_close(net(X.double()).float(), wanted)
    rpg.prune(net, 0.1)  # a mask of the new dtype joins the old one
    assert all(value.dtype == torch.float64 for value in masks(net).values())
    assert all(p.device.type == "meta" for p in net.to("meta").parameters())
    assert next(m for m in net.modules() if isinstance(m, rpg.ParameterBank)).weight.is_meta


@pytest.mark.parametrize("make", MAKE)
def test_from_meta(make: Any) -> None:
    net = pruned(make).eval()
    wanted, state = net(X), copy.deepcopy(net.state_dict())
    net.to("meta")
    with pytest.raises(ValueError, match="its mask is data"):
        rpg.initialize(net)
    net.load_state_dict(state, assign=True)
    assert torch.equal(net(X), wanted)
    assert not any(value.is_meta for value in net.state_dict().values())


def test_drawing_a_pruned_bank_anew() -> None:
    net = pruned()
    before, of_net = net.rpg_bank.weight_orig.detach().clone(), masks(net)
    net.rpg_bank.reset_parameters()
    assert not (net.rpg_bank.weight_orig == before).any()
    assert torch.equal(net.rpg_bank() == 0, of_net["rpg_bank.weight_mask"] == 0)


def test_compiled_models_see_the_mask() -> None:
    torch.compiler.reset()
    net = build().eval()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), net(X))
    rpg.prune(compiled, 0.5)
    assert torch.equal(compiled(X), net(X))
    assert int(net.rpg_bank.weight_mask.sum()) == 384


# Rewinding.


@pytest.mark.parametrize("make", [*MAKE, Net])
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_rewinding(make: Any, when: str) -> None:
    torch.manual_seed(0)
    net = make()
    kept = [copy.deepcopy(net.state_dict())]
    target = net if make is not Net else [(net.body[0], "weight"), (net.head, "weight")]
    for amount in (0.3, 0.2):
        train(net)
        rpg.prune(target, amount)
        kept.append(copy.deepcopy(net.state_dict()))
    train(net)
    early = kept[("before", "between", "after").index(when)]
    of_net = masks(net)
    assert rpg.rewind(net, early) is net
    for key, value in net.state_dict().items():
        if key.endswith("_mask"):
            assert torch.equal(value, of_net[key])
        else:
            old = early.get(key, early.get(key.removesuffix("_orig")))
            assert torch.equal(value, old), key
    rpg.finish_pruning(net)
    for key, mask in of_net.items():
        name = key.removesuffix("_mask")
        assert torch.equal(
            net.state_dict()[name], mask * early.get(name, early.get(f"{name}_orig"))
        )


def test_rewinding_restores_scales_and_norms() -> None:
    net = build()
    early = copy.deepcopy(net.state_dict())
    scale = net.body[0].weight.scale
    train(net)
    net.body[0].weight.rescale(3.0)
    rpg.rewind(rpg.prune(net, 0.5), early)
    assert net.body[0].weight.scale == scale
    assert not net.norm.running_mean.any()
    assert int(net.norm.num_batches_tracked) == 0


def test_pruned_rounds_are_what_training_the_survivors_alone_is() -> None:
    """A round is the same as to train a model whose other elements were zero from the start."""
    net = build()
    early = copy.deepcopy(net.state_dict())
    train(net, 3)
    rpg.rewind(rpg.prune(net, 0.5), early)
    train(net, 3)
    alone = build()
    mask = net.rpg_bank.weight_mask
    with torch.no_grad():
        alone.rpg_bank.weight.mul_(mask)
    alone.rpg_bank.weight.register_hook(lambda gradient: gradient * mask)
    train(alone, 3)
    torch.testing.assert_close(rpg.finish_pruning(net).rpg_bank.weight, alone.rpg_bank.weight)
    torch.testing.assert_close(net.eval()(X), alone.eval()(X))


def changed(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A state dict with other values; None takes a name out."""
    made = {**state, **changes}
    return {key: value for key, value in made.items() if value is not None}


def test_states_that_do_not_fit_change_nothing() -> None:
    net = build()
    early = copy.deepcopy(net.state_dict())
    live = net.state_dict()
    train(net)
    rpg.prune(net, 0.5)
    before = copy.deepcopy(net.state_dict())
    small = {"rpg_bank.weight": torch.zeros(8, 8)}
    for state, match in (
        (live, "the model's own tensor"),
        (changed(early, **{"head.bias": live["head.bias"]}), "own tensor as head.bias"),
        (changed(early, **{"rpg_bank.weight": None}), "got no rpg_bank.weight_orig"),
        (changed(early, **{"head.bias": None}), "got no head.bias"),
        (changed(early, more=torch.zeros(5)), "got also more"),
        (changed(early, **{"head.bias": torch.zeros(6)}), r"head.bias of shape \[6\]"),
        (changed(early, **small), r"weight_orig of shape \[8, 8\]"),
    ):
        with pytest.raises(ValueError, match=match):
            rpg.rewind(net, state)
    for state in (early.items(), None, changed(early, **{"head.bias": 3})):
        with pytest.raises(TypeError, match="state: got a"):
            rpg.rewind(net, state)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="seed: got 1, wanted 0"):
        rpg.rewind(net, other_map())
    with pytest.raises(TypeError, match="model: got a dict"):
        rpg.rewind({}, early)  # type: ignore[type-var]
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    with pytest.raises(ValueError, match=r"got no rpg_bank\.weight, wanted"):
        rpg.rewind(build(), before)


def other_map() -> dict[str, Any]:
    torch.manual_seed(1)
    config = rpg.RPGConfig(dof=768, granularity=8, seed=1)
    return dict(rpg.convert(Net(), config).state_dict())
