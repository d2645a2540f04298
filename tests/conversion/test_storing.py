"""quantize, dequantize, compact and expand: whole models, and what they refuse."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import rpg_kernels as rpg
from rpg_kernels.bank.rounding import FORMS


def build(seed: int = 0, **settings: object) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.Conv2d(24, 24, 1),
        nn.Flatten(),
        nn.Linear(24 * 36, 40),
        nn.Linear(40, 5),
    )
    given = {"dof": 3200, "granularity": 16, "laps": 4, **settings}
    return rpg.convert(net, rpg.RPGConfig(**given))  # type: ignore[arg-type]


def bank_of(net: nn.Module) -> rpg.ParameterBank:
    return next(m for m in net.modules() if isinstance(m, rpg.ParameterBank))


X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def state(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k].float().nan_to_num(7), other[k].float().nan_to_num(7)) for k in one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_quantised_and_back(form: str, dtype: torch.dtype) -> None:
    net = build().to(dtype)
    x = X.to(dtype)
    before, plain = net(x), copy.deepcopy(net)
    size = bank_of(net).weight.numel()
    assert rpg.quantize(net, form) is net
    values = bank_of(net).stored
    assert values is not None
    assert values.codes.dtype == FORMS[form]
    assert values.bytes == size + 4 * bank_of(net).slots
    error = float((net(x) - before).float().norm() / before.float().norm())
    assert error < {"int8": 0.02, "float8_e4m3fn": 0.06}[form] + 0.01 * (dtype != torch.float32)
    assert "read" not in str(bank_of(net))
    assert f"stored as {form}" in str(bank_of(net))
    dense = rpg.materialize(net)
    torch.testing.assert_close(
        dense(x), net(x), rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-5
    )
    assert all(p.requires_grad for p in dense.parameters())
    after = net(x)
    assert rpg.dequantize(net) is net
    assert bank_of(net).weight.requires_grad
    assert type(bank_of(net).weight) is nn.Parameter
    assert bank_of(net).weight.dtype == dtype
    torch.testing.assert_close(
        net(x), after, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-5
    )
    top = plain.get_submodule("1").virtual_weight.bank.weight.float().abs().amax(1, keepdim=True)
    moved = (bank_of(net).weight - bank_of(plain).weight).float().abs()
    assert bool((moved <= top * (1 / 254 if form == "int8" else 1 / 15) + top * 2**-8).all())


@pytest.mark.parametrize("quantised", ["", "before", "after"])
def test_compacted_and_back(quantised: str) -> None:
    net = build()
    bank = bank_of(net)
    present = torch.rand(bank.slots, generator=torch.Generator().manual_seed(2)) < 0.4
    with torch.no_grad():
        bank.weight[~present] = 0
    if quantised == "before":
        rpg.quantize(net)
    before = net(X)
    assert rpg.compact(net) is net
    torch.testing.assert_close(net(X), before)
    if quantised == "after":
        rpg.quantize(net)
        before = net(X)
    values = bank.stored
    assert values is not None
    assert len(values.codes) == int(present.sum())
    one = 1 if quantised else 4
    assert values.bytes == len(values.codes) * (16 * one + 4 * bool(quantised)) + 4 * bank.slots
    rpg.expand(net)
    torch.testing.assert_close(net(X), before)
    if quantised:
        rpg.dequantize(net)
    assert type(bank.weight) is nn.Parameter
    assert bank.weight.requires_grad
    torch.testing.assert_close(net(X), before)
    assert not bank.weight[~present].any()


def test_dequantised_banks_stay_compact() -> None:
    net = build()
    with torch.no_grad():
        bank_of(net).weight[::2] = 0
    rpg.dequantize(rpg.quantize(rpg.compact(net)))
    values = bank_of(net).stored
    assert values is not None
    assert values.scales is None
    assert values.codes.dtype == torch.float32
    assert values.places is not None


def test_of_several_banks_those_with_zero_slots_are_compacted() -> None:
    groups = [rpg.Group("low", "[01]", dof=1000), rpg.Group("high", "[24]", dof=1600)]
    net = build(dof=None, laps=2, groups=groups)
    banks = [m for m in net.modules() if isinstance(m, rpg.ParameterBank)]
    assert len(banks) == 2
    with torch.no_grad():
        banks[1].weight[3] = 0
    before = net(X)
    rpg.compact(net)
    assert banks[0].stored is None
    assert banks[1].stored is not None
    torch.testing.assert_close(net(X), before)
    rpg.quantize(net)
    assert all(bank.stored is not None and bank.stored.scales is not None for bank in banks)


def test_state_dicts_hold_the_parts() -> None:
    net, other = rpg.quantize(build()), rpg.quantize(build(3))
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert all(type(value) is Tensor for value in saved.values())
    assert {key.rpartition(".")[2] for key in saved} >= {"codes", "scales"}
    other.load_state_dict(saved)
    assert torch.equal(other(X), net(X))
    whole = io.BytesIO()
    torch.save(net, whole)
    whole.seek(0)
    assert torch.equal(torch.load(whole, weights_only=False)(X), net(X))
    assign = rpg.quantize(build(4))
    assign.load_state_dict(saved, assign=True)
    assert torch.equal(assign(X), net(X))
    for part in ("codes", "scales"):
        damaged = {key: value for key, value in saved.items() if not key.endswith(part)}
        before = state(other)
        with pytest.raises(RuntimeError, match=r"stored|Missing|codes|scales"):
            other.load_state_dict(damaged)
        assert same(state(other), before)


@pytest.mark.parametrize("change", ["far", "next", "below", "nan", "negative"])
def test_state_dicts_with_impossible_parts_change_nothing(change: str) -> None:
    net = build()
    with torch.no_grad():
        bank_of(net).weight[::2] = 0
    rpg.quantize(rpg.compact(net))
    saved, before = state(net), state(net)
    rows = len(saved[next(k for k in saved if k.endswith("codes"))])
    places = {"far": 10**6, "next": rows, "below": -2}
    key = next(k for k in saved if k.endswith("places" if change in places else "scales"))
    saved[key][1] = {**places, "nan": float("nan"), "negative": -1.0}[change]
    with pytest.raises(RuntimeError, match=r"got .*wanted"):
        net.load_state_dict(saved)
    assert same(state(net), before)


@pytest.mark.parametrize("form", FORMS)
def test_models_move_while_a_graph_holds_the_bank(form: str) -> None:
    net = rpg.quantize(build(), form)
    x = X.clone().requires_grad_()
    before = net(x)
    wanted = torch.autograd.grad(before.sum(), x, retain_graph=True)[0]
    assert net.to(torch.float64)(X.double()).dtype == torch.float64
    net.to(torch.float32)
    torch.testing.assert_close(net(X), before)
    values = state(net)
    held = bank_of(net).weight
    assert bank_of(net.cpu()).weight is held
    net.to("meta").to_empty(device="cpu").load_state_dict(values)
    assert isinstance(bank_of(net).weight, nn.Parameter)
    assert torch.equal(torch.autograd.grad(before.sum(), x)[0], wanted)
    torch.testing.assert_close(net(X), before)


def test_tools_find_what_a_state_dict_holds() -> None:
    net = rpg.quantize(build())
    for key, value in net.state_dict().items():
        name, _, attribute = key.rpartition(".")
        found = getattr(net.get_submodule(name), attribute)
        assert found.data_ptr() == value.data_ptr()
    assert not hasattr(bank_of(net), "places")
    assert not hasattr(bank_of(build()), "codes")
    with pytest.raises(AttributeError, match="codes: got a tensor"):
        torch.func.functional_call(net, dict(net.state_dict()), (X,))


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        net = rpg.quantize(build())
        y = net(X)
        wrapped = nn.parallel.DistributedDataParallel(net)
        torch.testing.assert_close(wrapped(X), y)
        wrapped(X).sum().backward()
        assert net[-1].weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_initialize_leaves_a_stored_model_on_meta() -> None:
    net = rpg.quantize(build()).to("meta")
    with pytest.raises(ValueError, match=r"stored bank is data"):
        rpg.initialize(net)
    assert all(each.is_meta for each in net.parameters())


def test_forms_that_differ_are_refused_by_state_dicts() -> None:
    plain, small = build(), rpg.quantize(build())
    for net, saved in ((plain, state(small)), (small, state(plain))):
        before = state(net)
        with pytest.raises(RuntimeError, match=r"got .*wanted"):
            net.load_state_dict(saved)
        assert same(state(net), before)


def unfinite(value: float) -> Callable[[nn.Module], None]:
    def change(net: nn.Module) -> None:
        with torch.no_grad():
            bank_of(net).weight[5, 3] = value

    return change


def masked(net: nn.Module) -> None:
    prune.l1_unstructured(bank_of(net), "weight", 0.5)


def parametrised(net: nn.Module) -> None:
    parametrize.register_parametrization(bank_of(net), "weight", nn.Identity())


def zeros(net: nn.Module) -> None:
    with torch.no_grad():
        bank_of(net).weight.zero_()


def half(net: nn.Module) -> None:
    with torch.no_grad():
        bank_of(net).weight[::2] = 0


def twice(net: nn.Module) -> None:
    half(net)
    rpg.compact(net)


BAD: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object], str]] = {
    "NaN": (unfinite(float("nan")), rpg.quantize, "NaN"),
    "infinity": (unfinite(float("inf")), rpg.quantize, "infinite"),
    "NaN, compacted": (unfinite(float("nan")), rpg.compact, "NaN"),
    "twice": (rpg.quantize, rpg.quantize, "twice"),
    "twice, other": (rpg.quantize, lambda n: rpg.quantize(n, "float8_e4m3fn"), "twice"),
    "twice, training": (rpg.quantize, lambda n: rpg.quantize(n, training=True), "twice"),
    "pruned": (masked, rpg.quantize, "mask"),
    "pruned, compacted": (masked, rpg.compact, "mask"),
    "parametrised": (parametrised, rpg.quantize, "parametrisation"),
    "nothing to leave out": (lambda n: None, rpg.compact, "slots"),
    "everything": (zeros, rpg.compact, "zeros"),
    "compacted twice": (twice, rpg.compact, "already"),
    "not quantised": (lambda n: None, rpg.dequantize, "float"),
    "not compacted": (lambda n: None, rpg.expand, "slots"),
    "int4": (lambda n: None, lambda n: rpg.quantize(n, "int4"), "dtype"),
    "a torch dtype": (lambda n: None, lambda n: rpg.quantize(n, torch.int8), "dtype"),  # type: ignore[arg-type]
    "activations": (
        lambda n: None,
        lambda n: rpg.quantize(n, activations="int4"),
        "activations",
    ),
    "training, compacted": (
        lambda n: rpg.quantize(n, training=True),
        rpg.compact,
        "rounding|slots",
    ),
    "compacted, training": (twice, lambda n: rpg.quantize(n, training=True), "not trained"),
    "meta": (lambda n: n.to("meta"), rpg.quantize, "meta"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_changes_nothing(what: str) -> None:
    prepare, run, message = BAD[what]
    net = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare(net)
        before = state(net) if what != "meta" else {}
        with pytest.raises((ValueError, TypeError), match=message):
            run(net)
    if what != "meta":
        assert same(state(net), before)


def test_models_and_banks_that_cannot() -> None:
    for run in (rpg.quantize, rpg.dequantize, rpg.compact, rpg.expand):
        with pytest.raises(ValueError, match="bank"):
            run(nn.Linear(3, 3))
        with pytest.raises(TypeError, match="model"):
            run("model")  # type: ignore[type-var]
    table = rpg.ParameterBank.from_table(torch.ones(4), torch.arange(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="table"):
        rpg.quantize(table)
    with pytest.raises(ValueError, match="granularity 1 "):
        rpg.quantize(rpg.ParameterBank(100, granularity=1))
    with pytest.raises(ValueError, match="granularity 4 "):
        rpg.quantize(rpg.ParameterBank(100, granularity=4, dtype=torch.bfloat16))
    assert rpg.quantize(rpg.ParameterBank(100, granularity=4)).stored is not None


def test_training_what_is_stored_is_said() -> None:
    net = rpg.quantize(build())
    bank = bank_of(net)
    for run in (lambda: net.requires_grad_(True), lambda: rpg.unfreeze(net)):
        with pytest.raises(RuntimeError, match="no gradient changes"):
            run()
    net(X).sum().backward()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    before = bank.weight.dense()
    with pytest.warns(UserWarning, match="no step of an optimiser changes it"):
        optimiser.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimiser.step()
    assert torch.equal(bank.weight.dense(), before)


def test_unfreezing_changes_nothing_where_a_bank_is_stored() -> None:
    net = rpg.freeze(rpg.quantize(build()))
    before = [p.requires_grad for p in net.parameters()]
    with pytest.raises(RuntimeError, match="no gradient changes"):
        rpg.unfreeze(net)
    assert [p.requires_grad for p in net.parameters()] == before


def test_summary_says_how_banks_are_stored() -> None:
    assert "stored as int8" in str(rpg.summary(rpg.quantize(build())))
    assert "read as int8" in str(rpg.summary(rpg.quantize(build(), training=True)))
