"""reuse: several uses of one module, against networks written out by hand."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rpg_kernels as rpg


class Block(nn.Module):
    """A residual block with everything that a use may share: bias, a scale, a dense layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.norm = nn.BatchNorm1d(2 * width)
        self.second = nn.Linear(2 * width, width, bias=False)
        self.last = nn.LayerNorm(width)
        self.gain = nn.Parameter(torch.full((width,), 0.5))
        self.register_buffer("shift", torch.linspace(-1, 1, width))

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        y = self.second(F.relu(self.norm(self.first(x))))
        y = self.last(x + self.gain * y + self.shift)
        return y if more is None else y + more


def config(seed: int, width: int, laps: int | None) -> rpg.RPGConfig:
    return rpg.RPGConfig(dof=2 * width * width, granularity=8, laps=laps, seed=seed)


def state_of(module: nn.Module) -> list[tuple[int, str, bytes]]:
    """Which modules there are, of which types, and all their values."""
    modules = [(id(m), type(m).__name__, b"") for m in module.modules()]
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return [*modules, (0, "", buffer.getvalue())]


@pytest.mark.parametrize("laps", [None, 3])
@pytest.mark.parametrize("norm", ["separate", "shared"])
@pytest.mark.parametrize("seed", range(3))
def test_uses_are_those_of_a_bank_written_out(seed: int, norm: str, laps: int | None) -> None:
    torch.manual_seed(seed)
    width, times = 24 + 8 * seed, 3
    stages = rpg.reuse(Block(width), times, config(seed, width, laps), norm=norm)
    bank = stages[0].first.rpg_bank
    for module in stages.modules():
        if isinstance(module, nn.BatchNorm1d | nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    # Every placement once more, in the order of uses, in a bank of the same values.
    twin = rpg.ParameterBank.from_generator(bank.generator)
    twin.load_state_dict({"weight": bank.weight}, strict=False)
    scales = [m.virtual_weight.scale for m in (stages[0].first, stages[0].second)]
    shapes = [(2 * width, width), (width, 2 * width)]
    placed = [
        [twin.place(shape, scale=scale) for shape, scale in zip(shapes, scales, strict=True)]
        for _ in range(times)
    ]
    x = torch.randn(16, width)
    expected = x.double()
    values = twin.weight
    for use, (first, second) in zip(stages, placed, strict=True):
        owner = use if norm == "separate" else stages[0]
        shared = stages[0]
        y = expected @ first.unpack().double().T + shared.first.bias.double()
        mean, deviation = y.mean(0), y.var(0, correction=0)
        y = (y - mean) / (deviation + owner.norm.eps).sqrt()
        y = (y * owner.norm.weight.double() + owner.norm.bias.double()).clamp(min=0)
        y = y @ second.unpack().double().T
        y = expected + shared.gain.double() * y + shared.shift.double()
        y = (y - y.mean(1, keepdim=True)) / (
            y.var(1, correction=0, keepdim=True) + owner.last.eps
        ).sqrt()
        expected = y * owner.last.weight.double() + owner.last.bias.double()
    got = stages(x)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(got)
    (got * weights).sum().backward()
    wanted = torch.autograd.grad((expected.float() * weights).sum(), [values])[0]
    torch.testing.assert_close(bank.weight.grad, wanted, rtol=1e-3, atol=1e-3)


def test_what_is_shared_and_what_is_not() -> None:
    stages = rpg.reuse(Block(16), 3, config(0, 16, None))
    first, second, third = stages
    assert first.gain is second.gain is third.gain
    assert first.first.bias is third.first.bias
    assert len({id(use.norm.weight) for use in stages}) == 3
    assert len({id(use.norm.running_mean) for use in stages}) == 3
    assert len({id(use.first.rpg_bank) for use in stages}) == 1
    assert len({use.first.virtual_weight.spec for use in stages}) == 3
    names = [name for name, _ in stages.named_parameters()]
    assert [name for name in names if "rpg_bank" in name] == ["0.rpg_bank.weight"]
    shared = rpg.reuse(Block(16), 3, config(0, 16, None), norm="shared")
    assert len({id(use.norm) for use in shared}) == 1
    same = rpg.reuse(Block(16), 3, norm="shared", remap=False)
    assert len({id(use) for use in same}) == 1
    own = rpg.reuse(Block(16), 3, remap=False)
    assert len({id(use.first) for use in own}) == 1
    assert len({id(use.norm) for use in own}) == 3


def test_uses_of_a_part_of_a_converted_model() -> None:
    """The model keeps the bank; further placements follow those it has."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "block": Block(16), "b": nn.Linear(16, 4)})
    holder = nn.Module()
    holder.parts = model
    rpg.convert(holder, rpg.RPGConfig(dof=512, granularity=8), lambda m, name: True)
    before = holder.rpg_bank.layers
    holder.parts["block"] = rpg.reuse(model["block"], 4)
    assert holder.rpg_bank.layers == before + 3 * 2
    assert holder.parts["block"](torch.randn(4, 16)).shape == (4, 16)
    names = [name for name, _ in holder.named_parameters() if "rpg_bank" in name]
    assert names == ["rpg_bank.weight"]


def test_ties_parts_and_frozen_layers_stay_so() -> None:
    bank = rpg.ParameterBank(dof=2048, granularity=8)
    whole = bank.place((48, 16), scale=0.5)
    tied = rpg.nn.Linear(16, 48, bias=False, virtual_weight=whole)
    net = nn.ModuleList(
        [
            tied,
            rpg.nn.Linear(16, 48, bias=False, virtual_weight=whole),
            rpg.nn.Linear(16, 16, bias=False, virtual_weight=whole.narrow(0, 16, 16)),
        ]
    )
    rpg.freeze(net[2])
    whole.no_weight_decay = True
    again = rpg.reuse(net, 2)[1]
    assert again[0].virtual_weight is again[1].virtual_weight
    assert again[0].virtual_weight.no_weight_decay
    assert bank.layers == 2
    expected = again[0].virtual_weight.unpack()
    assert not torch.equal(expected, whole.unpack())
    part = again[2].virtual_weight
    torch.testing.assert_close(part.unpack(), expected[16:32], rtol=0, atol=0)
    assert part.frozen
    assert not again[0].virtual_weight.frozen


def test_laps_may_be_what_all_uses_compress() -> None:
    wide = rpg.RPGConfig(dof=4096, granularity=8, laps=4)
    with pytest.raises(ValueError, match="laps"):
        rpg.reuse(Block(32), 1, wide)
    stages = rpg.reuse(Block(32), 4, wide)
    assert rpg.summary(stages).idle == ()
    assert stages(torch.randn(8, 32)).shape == (8, 32)


def make(seed: int = 0) -> rpg.conversion.Reused:
    torch.manual_seed(seed)
    return rpg.reuse(Block(16), 3, config(0, 16, 2))


def test_tools(tmp_path: Path) -> None:
    stages, x = make(), torch.randn(8, 16)
    stages(x)  # running statistics differ from use to use now
    stages.eval()
    expected = stages(x)
    rpg.save(stages, tmp_path / "a.safetensors")
    other = rpg.load(make(1), tmp_path / "a.safetensors").eval()
    assert torch.equal(other(x), expected)
    other = make(2).eval()
    other.load_state_dict(stages.state_dict())
    assert torch.equal(other(x), expected)
    twin = copy.deepcopy(stages)
    assert torch.equal(twin(x), expected)
    assert twin[0].first.rpg_bank is twin[2].first.rpg_bank is not stages[0].first.rpg_bank
    assert twin[0].gain is twin[1].gain
    assert torch.equal(pickle.loads(pickle.dumps(stages))(x), expected)
    dense = rpg.materialize(stages)
    torch.testing.assert_close(dense(x), expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, rpg.ParameterBank) for m in dense.modules())
    assert dense[0].first.weight is not dense[1].first.weight
    more = torch.randn(8, 16)
    y = x
    for use in stages:
        y = use(y, more=more)
    assert torch.equal(stages(x, more=more), y)
    with pytest.raises(RuntimeError, match="reads its bank at"):
        stages[0].load_state_dict(stages[1].state_dict())


def test_gradients_under_checkpointing_and_compile() -> None:
    stages, x = make().eval(), torch.randn(8, 16, requires_grad=True)
    bank = stages[0].first.rpg_bank.weight
    wanted = torch.autograd.grad(stages(x).square().sum(), [x, bank])
    y: Any = x
    for use in stages:
        y = checkpoint(use, y, use_reentrant=False)
    got = torch.autograd.grad(y.square().sum(), [x, bank])
    torch.testing.assert_close(got, wanted)
    compiled = torch.compile(stages, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x).square().sum(), [x, bank])
    torch.testing.assert_close(got, wanted)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


def closure() -> nn.Module:
    module = Holder()
    inner = module.inner
    module.extra = lambda x: inner(x)
    return module


def hooked() -> nn.Module:
    module = Holder()
    norm = module.norm
    module.register_forward_hook(lambda m, args, out: norm(out))
    return module


def tied_norm() -> nn.Module:
    module = Holder()
    module.weight = module.norm.weight
    return module


def not_copied() -> nn.Module:
    module = Holder()
    module.file = io.StringIO()
    module.lock = (i for i in range(3))
    return module


def compiled_part() -> nn.Module:
    module = Holder()
    module.inner = torch.compile(module.inner)
    return module


def listed_function() -> nn.Module:
    module = Holder()
    inner = [module.inner]
    module.extra = [{"a": lambda x: inner[0](x)}]
    return module


def default_of_a_function() -> nn.Module:
    module = Holder()

    def extra(x: Tensor, norm: nn.Module = module.norm) -> Tensor:
        return norm(x)

    module.extra = functools.partial(extra)
    return module


def keyword_default() -> nn.Module:
    module = Holder()

    def extra(x: Tensor, *, norm: nn.Module = module.norm) -> Tensor:
        return norm(x)

    module.extra = lambda x: extra(x)
    return module


def weak() -> nn.Module:
    module = Holder()
    module.norm.extra = weakref.ref(module)
    return module


def made_by_autograd() -> nn.Module:
    module = Holder()
    module.register_buffer("made", nn.Parameter(torch.ones(16)) * 2)
    return module


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (listed_function, "extra"),
        (default_of_a_function, "extra"),
        (keyword_default, "extra"),
        (weak, "extra"),
        (made_by_autograd, "Holder"),
        (closure, "extra"),
        (hooked, "_forward_hooks"),
        (tied_norm, "norm.weight"),
        (not_copied, "Holder"),
        (compiled_part, "inner"),
    ],
)
def test_state_that_cannot_be_separated_is_named(build: Any, named: str) -> None:
    module = build()
    before = [(id(m), type(m)) for m in module.modules()]
    random = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=named):
        rpg.reuse(module, 2, rpg.RPGConfig(dof=64, granularity=8))
    assert [(id(m), type(m)) for m in module.modules()] == before
    assert torch.equal(torch.random.get_rng_state(), random)


def test_what_can_be_separated_is() -> None:
    """Bound methods and partial functions of the module go along with the copy."""
    module = converted()[0]
    module.way = [module.second, module.last]  # the same modules, in a plain list
    module.again = module.forward
    module.partly = functools.partial(F.linear, bias=None)
    first, second = rpg.reuse(module.eval(), 2)
    assert second.again.__self__ is second
    assert second.way[0] is second.second is not first.second
    assert second.way[1] is second.last is not first.last
    x = torch.randn(2, 16)
    assert not torch.equal(first.again(x), second.again(x))
    assert torch.equal(second.again(x), second(x))


def test_what_is_not_the_modules_own_is_the_same_for_all() -> None:
    """Nobody lists a copy of it, so nobody would train one."""
    module, outside = Holder(), nn.Linear(16, 16)
    module.mix, module.number = [outside], [nn.Parameter(torch.ones(1))]
    module.norm.weight.no_weight_decay = True
    first, second = rpg.reuse(module, 2, rpg.RPGConfig(dof=64, granularity=8))
    assert second.mix[0] is first.mix[0] is outside
    assert second.number[0] is first.number[0]
    assert second.norm.weight is not first.norm.weight
    assert second.norm.weight.no_weight_decay


def test_taps_of_a_strided_convolution_stay() -> None:
    net = nn.Sequential(nn.Conv2d(64, 64, 3, stride=2), nn.Conv2d(64, 64, 3))
    uses = rpg.reuse(net, 3, rpg.RPGConfig(dof=64 * 64, laps=4))
    taps = [[layer.virtual_weight.placement.taps for layer in use] for use in uses]
    assert taps == [[1, 3]] * 3


def test_without_remapping_laps_are_those_of_one_use() -> None:
    net = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match="laps: got 4"):
        rpg.reuse(net, 4, rpg.RPGConfig(dof=256, granularity=8, laps=4), remap=False)


def test_what_is_a_norm() -> None:
    class PreNorm(Holder):
        pass

    class OwnNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            return x - self.mean

    first, second = rpg.reuse(nn.Sequential(PreNorm(), OwnNorm()), 2, remap=False)
    assert second[0].inner is first[0].inner
    assert second[0].norm is not first[0].norm
    assert second[1].mean is not first[1].mean


def table_bank() -> nn.Module:
    table = torch.arange(256, dtype=torch.int32)
    bank = rpg.ParameterBank.from_table(torch.randn(256), table)
    return nn.Sequential(rpg.nn.Linear(16, 16, bias=False, bank=bank))


def converted() -> nn.Module:
    return rpg.convert(nn.Sequential(Block(16)), config(0, 16, None), lambda m, name: True)


@pytest.mark.parametrize(
    ("module", "arguments", "error", "match"),
    [
        (converted, {"times": 0}, ValueError, "times: got 0"),
        (converted, {"times": -3}, ValueError, "times: got -3"),
        (converted, {"times": 2.0}, TypeError, "times"),
        (converted, {"times": True}, TypeError, "times"),
        (converted, {"times": 2, "norm": "own"}, ValueError, "norm: got 'own'"),
        (converted, {"times": 2, "norm": None}, ValueError, "norm"),
        (converted, {"times": 2, "remap": 1}, TypeError, "remap"),
        (converted, {"times": 2, "config": 512}, TypeError, "config"),
        (converted, {"times": 2, "config": rpg.RPGConfig(512)}, ValueError, "bank already"),
        (lambda: Block(16), {"times": 2}, ValueError, "without virtual layers"),
        (lambda: nn.Linear(2, 2), {"times": 2, "config": rpg.RPGConfig(4)}, TypeError, "single"),
        (table_bank, {"times": 2}, ValueError, "table"),
        (lambda: torch.compile(converted()), {"times": 2}, ValueError, "plain module"),
        (
            lambda: Block(16),
            {"times": 2, "config": rpg.RPGConfig(512, 8, laps=5)},
            ValueError,
            "laps: got 5",
        ),
    ],
)
def test_bad_input_changes_nothing(
    module: Any, arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    module = module()
    before = state_of(module)
    with pytest.raises(error, match=match):
        rpg.reuse(module, **arguments)
    assert state_of(module) == before


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match="module: got a list"):
        rpg.reuse([nn.Linear(2, 2)], 2)  # type: ignore[arg-type]
