"""prune: which elements and slots go, against a sort in numpy; composition; what is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import rpg_kernels as rpg
from rpg_kernels import ParameterBank


def everything(module: nn.Module, name: str) -> bool:
    return True


def build(seed: int = 0, **config: Any) -> nn.Sequential:
    """Three layers of 24, 40 and 24 rows that read banks of several sizes and granularities."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 24))
    given = {"dof": 512, "granularity": 8, "seed": seed, **config}
    filter_fn = None if "groups" in config else everything
    return rpg.convert(net, rpg.RPGConfig(**given), filter_fn=filter_fn)


def with_groups(seed: int = 0) -> nn.Sequential:
    groups = [rpg.Group("a", "0", dof=320, granularity=4), rpg.Group("b", "[13]", dof=704)]
    return build(seed, dof=None, groups=groups)


def banks(net: nn.Module) -> list[ParameterBank]:
    return [module for module in net.modules() if isinstance(module, ParameterBank)]


def smallest(scores: list[np.ndarray], left: list[np.ndarray], count: int) -> list[np.ndarray]:
    """What is left of several arrays after the ``count`` smallest of those left are gone."""
    places = [(scores[i][at], i, at) for i in range(len(scores)) for at in np.ndindex(left[i].shape)
              if left[i][at]]  # fmt: skip
    after = [each.copy() for each in left]
    for _, i, at in sorted(places, key=lambda place: place[0])[:count]:
        after[i][at] = False
    return after


def numbers(bank: ParameterBank) -> np.ndarray:
    values: Tensor = next(iter(bank.parameters()))
    return values.detach().double().numpy()


@pytest.mark.parametrize("amount", [0, 1, 37, 0.0, 0.123, 0.5, 0.9])
@pytest.mark.parametrize("make", [build, with_groups])
def test_the_smallest_elements_of_all_banks_go(make: Any, amount: float) -> None:
    net = make(seed=3)
    values = [numbers(bank) for bank in banks(net)]
    total = sum(each.size for each in values)
    count = amount if isinstance(amount, int) else round(amount * total)
    wanted = smallest([abs(v) for v in values], [np.ones(v.shape, bool) for v in values], count)
    assert rpg.prune(net, amount) is net
    for bank, mask, before in zip(banks(net), wanted, values, strict=True):
        np.testing.assert_array_equal(bank.weight_mask.numpy(), mask)
        np.testing.assert_array_equal(bank().detach().numpy(), before * mask)
        assert torch_prune.is_pruned(bank)


@pytest.mark.parametrize("amount", [1, 20, 0.31, 0.8])
@pytest.mark.parametrize("make", [build, with_groups])
def test_slots_go_by_the_mean_square_of_their_elements(make: Any, amount: float) -> None:
    net = make(seed=5)
    values = [numbers(bank) for bank in banks(net)]
    scores = [(v**2).mean(1) for v in values]
    count = amount if isinstance(amount, int) else round(amount * sum(s.size for s in scores))
    wanted = smallest(scores, [np.ones(s.shape, bool) for s in scores], count)
    rpg.prune(net, amount, by="slot")
    for bank, slots in zip(banks(net), wanted, strict=True):
        mask = bank.weight_mask.numpy()
        np.testing.assert_array_equal(mask, np.broadcast_to(slots[:, None], mask.shape))


def test_further_calls_prune_what_is_left() -> None:
    net, generator = build(seed=1), torch.Generator().manual_seed(1)
    (bank,) = banks(net)
    left = np.ones(bank.weight.shape, bool)
    for amount, by in ((0.2, "element"), (0.25, "slot"), (30, "element"), (5, "slot")):
        with torch.no_grad():  # as training would, which makes the attribute ``weight`` stale
            parameter = next(iter(bank.parameters()))
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        values = numbers(bank) * left
        if by == "element":
            count = amount if isinstance(amount, int) else round(amount * left.sum())
            (left,) = smallest([abs(values)], [left], count)
        else:
            slots = left.any(1)
            count = amount if isinstance(amount, int) else round(amount * slots.sum())
            (slots,) = smallest([(values**2).mean(1)], [slots], count)
            left = left & slots[:, None]
        rpg.prune(net, amount, by=by)
        np.testing.assert_array_equal(bank.weight_mask.numpy(), left)
    assert len(bank._forward_pre_hooks) == 1
    assert isinstance(next(iter(bank._forward_pre_hooks.values())), torch_prune.PruningContainer)


def test_calls_of_torchs_own_are_of_one_kind_with_ours() -> None:
    ours, theirs = build(seed=2), build(seed=2)
    rpg.prune(rpg.prune(ours, 0.3), 0.5)
    for _ in range(2):
        amount = 0.5 if torch_prune.is_pruned(theirs) else 0.3
        torch_prune.l1_unstructured(banks(theirs)[0], "weight", amount)
    assert torch.equal(banks(ours)[0].weight_mask, banks(theirs)[0].weight_mask)
    rpg.prune(theirs, 10)
    assert int(banks(theirs)[0].weight_mask.sum()) == int(banks(ours)[0].weight_mask.sum()) - 10


def test_dense_parameters_as_of_torchs_global_pruning() -> None:
    torch.manual_seed(4)
    ours = nn.Sequential(nn.Linear(9, 11), nn.Conv2d(3, 5, 3))
    theirs = copy.deepcopy(ours)
    pairs = [(module, "weight") for module in ours]
    assert rpg.prune(iter([*pairs, pairs[0]]), 0.4) is not None
    rpg.prune(pairs, 0.5)
    for amount in (0.4, 0.5):
        torch_prune.global_unstructured(
            [(module, "weight") for module in theirs], torch_prune.L1Unstructured, amount=amount
        )
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.weight_mask, other.weight_mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = build().to(dtype)
    (bank,) = banks(net)
    before = numbers(bank)
    rpg.prune(net, 0.5, by="slot")
    mask = bank.weight_mask
    assert mask.dtype == dtype
    scores = (before**2).mean(1)
    kept = mask.bool().any(1).numpy()
    assert kept.sum() == len(kept) // 2
    assert scores[kept].min() >= scores[~kept].max()


def test_what_is_pruned_has_no_gradient_and_stays_zero() -> None:
    net = build(seed=6)
    (bank,) = banks(net)
    groups = rpg.param_groups(net, lr=0.1, weight_decay=0.1)
    optimiser = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(6))

    def step() -> None:
        optimiser.zero_grad()
        net(x).square().mean().backward()
        optimiser.step()

    step()  # momentum is there before anything is pruned
    rpg.prune(net, 0.6)
    gone = bank.weight_mask == 0
    before = bank.weight_orig.detach().clone()
    for _ in range(3):
        step()
        assert bank.weight_orig.grad is not None
        assert not bank.weight_orig.grad[gone].any()
        assert not bank()[gone].any()
    assert not torch.equal(bank.weight_orig[~gone], before[~gone])
    rpg.finish_pruning(net)
    assert not bank.weight[gone].any()
    assert bank.weight[~gone].all()
    assert bank.weight in set(groups[0]["params"])  # the optimiser holds it all along


# Bad input: a sentence, and nothing has changed.


def refused(
    target: Any, amount: Any, match: str, by: Any = "element", error: type = ValueError
) -> None:
    with pytest.raises(error, match=match):
        rpg.prune(target, amount, by)


@pytest.mark.parametrize("by", ["element", "slot"])
@pytest.mark.parametrize(
    ("amount", "error", "match"),
    [
        (1.0, ValueError, "amount: got 1.0"),
        (1.5, ValueError, "amount: got 1.5"),
        (-0.1, ValueError, "amount: got -0.1"),
        (float("nan"), ValueError, "amount: got nan"),
        (float("inf"), ValueError, "amount: got inf"),
        (-1, ValueError, "amount: got -1"),
        (512, ValueError, "amount: got 512"),
        (10**30, ValueError, "amount: got 10"),
        (0.9999, ValueError, "leaves at least one"),
        (True, TypeError, "amount: got a bool"),
        ("0.5", TypeError, "amount: got a str"),
        (None, TypeError, "amount: got a NoneType"),
        (torch.tensor(0.5), TypeError, "amount: got a Tensor"),
    ],
)
def test_amounts(by: str, amount: Any, error: type, match: str) -> None:
    net = build()
    state = copy.deepcopy(net.state_dict())
    refused(net, amount, match, by, error)
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key])
    assert not torch_prune.is_pruned(net)


@pytest.mark.filterwarnings("ignore:the values of the parameter bank were changed")
@pytest.mark.parametrize("by", ["element", "slot"])
@pytest.mark.parametrize(
    ("fill", "match"),
    [
        (0.0, "magnitude 0,"),
        (-0.25, "magnitude 0.25,"),
        (float("nan"), "NaN or infinities"),
        (float("inf"), "NaN or infinities"),
    ],
)
def test_values(by: str, fill: float, match: str) -> None:
    net = with_groups()
    first, second = banks(net)
    with torch.no_grad():
        first.weight.fill_(fill)
        if np.isfinite(fill):  # one constant bank beside another says enough
            second.weight.fill_(fill)
    refused(net, 0.5, match, by)
    assert not torch_prune.is_pruned(net)
    assert list(net.state_dict()) == list(with_groups().state_dict())


def test_one_value_that_is_not_finite_refuses_an_already_pruned_bank() -> None:
    net = rpg.prune(build(), 0.5)
    (bank,) = banks(net)
    mask = bank.weight_mask.clone()
    with torch.no_grad():
        bank.weight_orig[3, 2] = float("nan")
    refused(net, 0.5, "NaN or infinities")
    assert torch.equal(bank.weight_mask, mask)


def test_a_bank_of_several_keeps_something() -> None:
    net = with_groups()
    first, _ = banks(net)
    with torch.no_grad():
        first.weight.mul_(1e-6)
    refused(net, 330, "leaves nothing of the bank a")
    refused(net, 80, "leaves nothing of the bank a", "slot")
    assert not torch_prune.is_pruned(net)
    rpg.prune(net, 319)
    assert int(first.weight_mask.sum()) == 1


def test_targets() -> None:
    dense, net = nn.Linear(4, 4), build()
    refused(dense, 0.5, "target: got a Linear without a bank")
    refused(3, 0.5, "target: got a int", error=TypeError)
    refused("weight", 0.5, "target: got a str", error=TypeError)
    refused(dense.weight, 0.5, "target: got a Parameter", error=TypeError)
    refused([], 0.5, "target: got no pairs")
    refused([dense], 0.5, "wanted pairs", error=TypeError)
    refused([(dense, 3)], 0.5, "wanted pairs", error=TypeError)
    refused([(dense, "nothing")], 0.5, "got 'nothing' of a Linear")
    refused([(dense, "weight"), (dense, "nothing")], 0.5, "got 'nothing' of a Linear")
    refused([(dense, "weight")], 0.5, "only banks have slots", "slot")
    refused([(net[0], "weight")], 0.5, "got 'weight' of a Linear")  # a virtual one has none
    refused(net, 0.5, "by: got 'row', wanted one of 'element', 'slot'", "row")
    refused(net, 0.5, "by: got None", None)
    with torch.device("meta"):
        refused(nn.Sequential(rpg.nn.Linear(8, 8)), 0.5, "on meta")
    empty = nn.Module()
    empty.weight = nn.Parameter(torch.empty(0, 4))
    refused([(dense, "weight"), (empty, "weight")], 0.5, "without elements")
    assert not torch_prune.is_pruned(dense)
    assert not torch_prune.is_pruned(net)


def test_a_parametrised_bank_is_refused() -> None:
    net = build()
    (bank,) = banks(net)
    nn.utils.parametrizations.weight_norm(bank)
    refused(net, 0.5, "got 'weight' of a Parametrized")


def test_finishing_needs_something_pruned() -> None:
    with pytest.raises(ValueError, match="nothing is pruned"):
        rpg.finish_pruning(build())
    with pytest.raises(TypeError, match="model: got a list"):
        rpg.finish_pruning([])  # type: ignore[type-var]
