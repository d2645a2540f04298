"""Models with several banks: state dicts, copies, moves, optimisers, files, other tools."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from group_models import GROUPS, Net, converted
from torch import Tensor, nn

import rpg_kernels as rpg

BANKS = ["rpg_bank_enc", "rpg_bank_mid"]
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


def stack() -> nn.Sequential:
    """A sequence, which registers no banks among its steps."""
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    groups = [rpg.Group("even", "[024]"), rpg.Group("odd", "[13]")]
    return rpg.convert(net, rpg.RPGConfig(dof=256, granularity=8, groups=groups))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


def test_banks_are_the_first_children_and_parts_hold_theirs() -> None:
    net = converted()
    assert [name for name, _ in net.named_children()][:2] == BANKS
    names = [name for name, _ in net.named_parameters()]
    assert names[:2] == ["rpg_bank_enc.weight", "rpg_bank_mid.weight"]
    assert len(names) == len(set(names)) == 2 + 3 + 2 * 3
    assert list(net.enc.state_dict()) == [
        "0.bias", "0.rpg_bank.weight", "0.rpg_bank.map_digits", "2.bias",
    ]  # fmt: skip
    assert [p is net.rpg_bank_mid.weight for p in net.mid.parameters()] == [False, True]
    steps = nn.Sequential(*list(net.children())[:-1])
    torch.testing.assert_close(net.head(steps(X)), net(X))


def test_a_sequence_has_its_banks_at_their_first_readers() -> None:
    net = stack()
    assert len(net) == 5
    assert [n for n, _ in net.named_parameters() if "bank" in n] == [
        "0.rpg_bank.weight", "1.rpg_bank.weight",
    ]  # fmt: skip
    assert net.rpg_bank_even is net[0].rpg_bank is net[4].rpg_bank
    assert net.rpg_bank_odd is net[3].rpg_bank
    part, x = net[2:], torch.randn(2, 16)
    held = [n for n, _ in part.named_parameters() if "bank" in n]
    assert held == ["2.rpg_bank.weight", "3.rpg_bank.weight"]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.rpg_bank_even is twin[2].rpg_bank is not net.rpg_bank_even
        assert torch.equal(twin(x), net(x))
        twin.load_state_dict(net.state_dict())
    torch.testing.assert_close(part(net[:2](x)), net(x))
    assert [x.bank for x in rpg.summary(part).layers] == [
        f"rpg_bank_{n}" for n in ("even", "odd", "even")
    ]
    dense = rpg.materialize(net)
    assert not any(name.startswith("rpg_bank") for name in dense.__dict__)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_whole_and_checks_what_it_loads(how: str) -> None:
    net = converted()
    twin = COPIES[how](net)
    assert torch.equal(twin(X), net(X))
    assert [b.group for b in twin.modules() if isinstance(b, rpg.ParameterBank)] == ["enc", "mid"]
    twin(X).sum().backward()
    assert net.rpg_bank_enc.weight.grad is None
    assert twin.rpg_bank_enc.weight.grad is not None
    del net
    before = values(twin)
    with pytest.raises(RuntimeError, match="rpg_bank: got a bank that the model lacks"):
        twin.load_state_dict(converted(1, groups=()).state_dict())
    assert same(values(twin), before)
    twin.load_state_dict(converted(1).state_dict())
    assert torch.equal(twin(X), converted(1)(X))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "no groups": ({"groups": ()}, "rpg_bank: got a bank that the model lacks"),
    "another name": (
        {"groups": [rpg.Group("enc", "enc"), rpg.Group("middle", "mid")]},
        "rpg_bank_middle: got a bank that the model lacks",
    ),
    "one more": (
        {"groups": [*GROUPS, rpg.Group("more", "head", dof=64)]},
        "rpg_bank_more: got a bank that the model lacks",
    ),
    "another dof": ({"dof": 256}, "rpg_bank_enc: .*slots: got"),
    "another seed": (
        {"groups": [GROUPS[0], rpg.Group("mid", "mid", seed=1)]},
        "rpg_bank_mid: .*seed: got 1, wanted 0",
    ),
    "other layers": (
        {"groups": [rpg.Group("enc", "enc.?"), rpg.Group("mid", "frozen")]},
        "mid: got values of a layer with a weight of its own, wanted one that reads rpg_bank_mid",
    ),
    "exchanged": (
        {"groups": [rpg.Group("enc", lambda m, n: n in ("enc.0", "mid")),
                    rpg.Group("mid", "enc.2")]},
        "enc.2: got values of a layer that reads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_a_state_dict_of_other_groups_is_refused_before_anything_changes(what: str) -> None:
    given, message = OTHERS[what]
    net, other = converted(0), converted(1, **given)
    for model, state in ((net, other.state_dict()), (other, net.state_dict())):
        before = values(model)
        with pytest.raises(RuntimeError, match=message if model is net else "."):
            model.load_state_dict(state)
        assert same(values(model), before)
    if what not in ("other layers", "exchanged"):  # which torch's metadata tells, below no model
        outer = nn.Sequential(net)
        with pytest.raises(RuntimeError, match=message.replace("rpg_bank", "0.rpg_bank", 1)):
            outer.load_state_dict({f"0.{k}": v for k, v in other.state_dict().items()})


def test_parts_and_pieces_of_state_dicts_load() -> None:
    net, other = converted(0), converted(1)
    other.enc.load_state_dict(net.enc.state_dict())
    assert torch.equal(other.enc(X.repeat(1, 4)), net.enc(X.repeat(1, 4)))
    one_bank = {k: v for k, v in net.state_dict().items() if not k.startswith("rpg_bank_mid")}
    other = converted(1)
    found = other.load_state_dict(one_bank, strict=False)
    assert found.missing_keys == ["rpg_bank_mid.weight", "rpg_bank_mid.map_digits"]
    assert torch.equal(other.rpg_bank_enc.weight, net.rpg_bank_enc.weight)
    state = {k: v.half() for k, v in net.state_dict().items()}
    converted(1).load_state_dict(state)


def test_a_layer_refuses_the_values_of_another_groups_layer() -> None:
    groups = [rpg.Group("mid", "enc.0"), rpg.Group("enc", "mid")]
    theirs = converted(1, groups=groups).mid.state_dict()
    with pytest.raises(RuntimeError, match="in group 'enc', wanted 'mid'"):
        converted().mid.load_state_dict(theirs)


def test_files_hold_all_banks_and_only_the_same_groups_take_them(tmp_path: Path) -> None:
    net, path = converted(), tmp_path / "model.safetensors"
    rpg.save(net, path)
    with torch.device("meta"):
        empty = Net()
    config = rpg.RPGConfig(dof=512, granularity=8, scale="fan_in", groups=GROUPS)
    for other in (converted(1), rpg.convert(empty, config)):
        rpg.load(other, path)
        assert torch.equal(other(X), net(X))
    for given, _ in OTHERS.values():
        other = converted(1, **given)
        before = values(other)
        with pytest.raises(ValueError, match=r"model\.safetensors: "):
            rpg.load(other, path)
        assert same(values(other), before)


def test_materialize_leaves_nothing_behind() -> None:
    net = converted()
    dense = rpg.materialize(net)
    torch.testing.assert_close(dense(X), net(X))
    assert [name for name, _ in dense.named_children()] == [n for n, _ in Net().named_children()]
    assert not dense._load_state_dict_pre_hooks
    dense.load_state_dict(Net().state_dict())
    assert net._load_state_dict_pre_hooks


def test_moves_casts_and_initialize_reach_every_bank() -> None:
    net = converted().double()
    wanted = net(X.double())
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    torch.testing.assert_close(wanted, converted()(X).double(), rtol=1e-5, atol=1e-6)
    converted().mid.half()
    part = converted()
    part.mid.double()
    assert part.rpg_bank_mid.weight.dtype == torch.float64
    assert part.rpg_bank_enc.weight.dtype == torch.float32
    with torch.device("meta"):
        empty = Net()
    empty = rpg.convert(empty, rpg.RPGConfig(dof=512, granularity=8, groups=GROUPS))
    assert empty.to("meta").rpg_bank_mid.weight.is_meta
    rpg.initialize(empty)
    assert empty(X).isfinite().all()
    for name in BANKS:
        assert float(getattr(empty, name).weight.detach().std()) == pytest.approx(0.0208, rel=0.3)


def test_freeze_stops_one_groups_gradients() -> None:
    net = converted()
    rpg.freeze(net.enc)
    net(X).sum().backward()
    assert net.rpg_bank_enc.weight.grad is None
    assert net.rpg_bank_mid.weight.grad.any()
    rpg.unfreeze(net.enc)
    net(X).sum().backward()
    assert net.rpg_bank_enc.weight.grad.any()


def test_each_bank_is_an_optimiser_group() -> None:
    net = converted()
    groups = rpg.param_groups(
        net, lr=0.1, weight_decay=0.01, bank_lr={"mid": 0.5}, bank_weight_decay=0.02
    )
    said = {g["name"]: (g["lr"], g["weight_decay"], len(g["params"])) for g in groups}
    assert said == {
        "bank enc": (0.1, 0.02, 1),
        "bank mid": (0.5, 0.02, 1),
        "weights": (0.1, 0.01, 3),
        "no_decay": (0.1, 0.0, 6),
    }
    assert groups[0]["params"] == [net.rpg_bank_enc.weight]
    decay = rpg.param_groups(net.mid, 0.1, bank_weight_decay={"mid": 0.0})
    assert [(g["name"], g["weight_decay"]) for g in decay] == [("bank mid", 0.0), ("no_decay", 0.0)]
    for name in ("bank_lr", "bank_weight_decay"):
        with pytest.raises(
            ValueError, match=rf"{name}: got a value for 'x', wanted .*\(enc, mid\)"
        ):
            rpg.param_groups(net, 0.1, **{name: {"x": 1.0}})
    with pytest.raises(ValueError, match="it has none"):
        rpg.param_groups(converted(groups=()), 0.1, bank_lr={"x": 1.0})


@pytest.mark.filterwarnings("error")
def test_training_with_an_optimiser_for_each_bank_warns_of_nothing() -> None:
    net = converted()
    before = values(net)
    groups = rpg.param_groups(net, lr=0.1)
    optimisers = [torch.optim.SGD([group], lr=0.1) for group in groups]
    for _ in range(2):
        net(X).square().sum().backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    assert all(not torch.equal(values(net)[f"{n}.weight"], before[f"{n}.weight"]) for n in BANKS)


def test_summary_names_banks_where_there_are_several() -> None:
    record = rpg.summary(converted(dof=512))
    assert [(x.name, x.bank) for x in record.layers] == [
        ("enc.0", "rpg_bank_enc"), ("enc.2", "rpg_bank_enc"), ("mid", "rpg_bank_mid"),
    ]  # fmt: skip
    assert (record.dof, record.virtual_weights, record.compression) == (512, 3 * 1024, 6)
    assert record.skipped["head"] == record.skipped["stem"] == "in no group"
    assert [bank.split(":")[0] for bank in record.banks] == BANKS
    header, row, *_ = str(record).splitlines()
    assert header.split()[:3] == ["layer", "bank", "shape"]
    assert row.split()[:3] == ["enc.0", "rpg_bank_enc", "32x32"]
    alone = rpg.summary(converted(groups=()))
    assert {x.bank for x in alone.layers} == {"rpg_bank"}
    assert "bank" not in str(alone).splitlines()[0].split()
    assert alone.banks[0].startswith("ParameterBank(")
    other = rpg.summary(nn.Sequential(rpg.nn.Linear(8, 8), rpg.nn.Linear(8, 8)))
    assert [x.bank for x in other.layers] == ["0.rpg_bank", "1.rpg_bank"]


def test_banks_made_by_hand_are_attached_by_group() -> None:
    class Hand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.banks = {n: rpg.ParameterBank(4096, laps=n) for n in (1, 2)}
            self.one = rpg.nn.Linear(16, 16, bank=self.banks[1])
            self.two = rpg.nn.Linear(16, 16, bank=self.banks[2])

    net = Hand()
    one, two = net.banks.values()
    for bank, group in ((one, "a"), (two, "b")):
        assert rpg.attach(net, bank, group=group) is net
        rpg.attach(net, bank)  # again, which changes nothing
    assert [name for name, _ in net.named_children()] == ["rpg_bank_a", "rpg_bank_b", "one", "two"]
    assert [i.split(":")[0] for i in rpg.summary(net).idle] == ["rpg_bank_b"]
    with pytest.raises(ValueError, match="group: got 'c', wanted 'a'"):
        rpg.attach(net, one, group="c")
    with pytest.raises(ValueError, match="model: got a model with another rpg_bank_a"):
        rpg.attach(net, rpg.ParameterBank(64), group="a")
    with pytest.raises(ValueError, match="group: got 'a-b', wanted letters"):
        rpg.attach(net, rpg.ParameterBank(64), group="a-b")
    with pytest.raises(ValueError, match="a model that has a bank already"):
        rpg.convert(net, rpg.RPGConfig(dof=64))


def test_explain_prove_and_functional_calls_know_the_layers() -> None:
    net = converted()
    assert rpg.explain(net.mid, torch.randn(2, 32)).backend
    assert len(rpg.prove(net, X, progress=False)) > 0
    state = {k: v.clone() for k, v in net.state_dict().items()}
    state["rpg_bank_mid.weight"].zero_()
    called = torch.func.functional_call(net, state, X)
    with torch.no_grad():
        net.rpg_bank_mid.weight.zero_()
    torch.testing.assert_close(called, net(X))


OFFLOADS: dict[str, Callable[[nn.Module, str], Any]] = {
    "cpu": lambda net, folder: cpu_offload(net, execution_device="cpu"),
    "disk": lambda net, folder: disk_offload(net, folder, execution_device="cpu"),
    "a device map": lambda net, folder: dispatch_model(
        net,
        {"rpg_bank_enc": "disk", "rpg_bank_mid": "cpu", "stem": "cpu", "enc": "disk", "mid": "cpu",
         "frozen": "cpu", "head": "disk"},
        "cpu",
        offload_dir=folder,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFLOADS)
def test_offloaded_models_compute_the_same(name: str, tmp_path: Path) -> None:
    net = converted().eval()
    with torch.no_grad():
        wanted = net(X)
        net = OFFLOADS[name](net, str(tmp_path))
        for _ in range(2):
            assert torch.equal(net(X), wanted)
        remove_hook_from_submodules(net)


def test_a_sequence_refuses_a_bank_too_many_that_is_like_one_of_its_own() -> None:
    def build(*groups: rpg.Group) -> nn.Sequential:
        net = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2)))
        return rpg.convert(net, rpg.RPGConfig(granularity=8, groups=groups))

    both = build(rpg.Group("a", "0", dof=128), rpg.Group("b", "1", dof=128))
    one = build(rpg.Group("a", "0", dof=128))
    before = {key: value.clone() for key, value in one.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="a bank that the model lacks"):
            one.load_state_dict(both.state_dict(), strict=strict)
        assert all(torch.equal(v, before[k]) for k, v in one.state_dict().items())
    # One of two banks under other names may be the model's, the other cannot.
    moved = {key.replace("0.0.", "7.0.", 1): value for key, value in both.state_dict().items()}
    with pytest.raises(RuntimeError, match="a bank that the model lacks"):
        one.load_state_dict(moved)


def test_a_part_that_stands_twice_in_a_sequence_has_its_bank_twice_in_a_state_dict() -> None:
    def build() -> nn.Sequential:
        part = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        return rpg.convert(nn.Sequential(part, part), rpg.RPGConfig(128, 8), lambda m, name: True)

    first, second = build(), build()
    assert sum("map_digits" in key for key in first.state_dict()) == 2
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 16)
    assert torch.equal(second(x), first(x))
