"""Operators on banks in fewer bytes, against the same operators on the values written out."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rpg_kernels as rpg
from rpg_kernels._stored import StoredValues

op = torch.ops.rpg_kernels
FORMS = ("int8", "float8_e4m3fn", "float", "int8 without zeros", "float without zeros", "nothing")


def stored(slots: int, granularity: int, form: str, dtype: torch.dtype, seed: int) -> StoredValues:
    """Random parts of a form."""
    rng = np.random.default_rng(seed)
    places = None
    rows = slots
    if "without" in form or form == "nothing":
        present = rng.random(slots) < (0 if form == "nothing" else 0.6)
        order = rng.permutation(int(present.sum()))  # a place is a number, in whatever order
        places = np.full(slots, -1)
        places[present] = order
        rows = len(order)
    scales = None
    if form.startswith("float8"):
        codes = torch.from_numpy(rng.standard_normal((rows, granularity))).to(torch.float8_e4m3fn)
        scales = torch.from_numpy(rng.random(rows)).float()
    elif form.startswith("int8"):
        codes = torch.from_numpy(rng.integers(-127, 128, (rows, granularity))).to(torch.int8)
        scales = torch.from_numpy(rng.random(rows) / 64).float()
    else:
        codes = torch.from_numpy(rng.standard_normal((rows, granularity))).to(dtype)
    return StoredValues(
        codes, scales, None if places is None else torch.from_numpy(places).int(), dtype
    )


def written_out(values: StoredValues) -> Tensor:
    """The values, slot by slot."""
    out = torch.zeros(values.shape, dtype=values.dtype)
    for slot in range(len(values)):
        row = slot if values.places is None else int(values.places[slot])
        if row >= 0:
            code = values.codes[row].float() if values.scales is not None else values.codes[row]
            out[slot] = code if values.scales is None else code * values.scales[row]
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("granularity", [1, 8, 64])
def test_dense(form: str, granularity: int) -> None:
    values = stored(23, granularity, form, torch.float32, 1)
    torch.testing.assert_close(values.dense(), written_out(values), rtol=0, atol=0)
    blocks = torch.randint(0, 23 * 2, (50,)) if granularity > 1 else torch.randint(0, 23, (50,))
    block = max(1, granularity // 2)
    out = torch.full((50, block), float("nan"), dtype=torch.bfloat16)
    values.read_blocks(blocks, out)
    wanted = written_out(values).view(-1, block)[blocks].bfloat16()
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)


def models(seed: int, laps: int | None, dtype: torch.dtype) -> tuple[nn.ModuleDict, int]:
    rng = random.Random(seed)
    granularity = rng.choice([4, 16, 64])
    slots = rng.randrange(40, 90)
    bank = rpg.ParameterBank(slots * granularity, granularity, laps=laps, seed=seed, dtype=dtype)
    channels = rng.choice([8, 24, 70])
    return nn.ModuleDict(
        {
            "linear": rpg.nn.Linear(rng.choice([5, 64, 131]), rng.randrange(1, 90), bank=bank),
            "conv": rpg.nn.Conv2d(channels, rng.randrange(8, 40), 3, bank=bank),
            "conv1d": rpg.nn.Conv1d(16, 20, 3, stride=2, bank=bank),
            "transposed": rpg.nn.ConvTranspose2d(12, 16, 3, bank=bank),
            "embedding": rpg.nn.Embedding(30, rng.choice([16, 50]), bank=bank),
        }
    ).to(dtype), slots


def results(net: nn.ModuleDict, seed: int) -> Iterator[tuple[str, Tensor]]:
    torch.manual_seed(seed)
    dtype = net["linear"].bias.dtype
    for name, size in (
        ("linear", (7, net["linear"].in_features)),
        ("conv", (2, net["conv"].in_channels, 7, 9)),
        ("conv1d", (2, 16, 11)),
        ("transposed", (2, 12, 5, 4)),
    ):
        x = torch.randn(size).to(dtype).requires_grad_()
        y = net[name](x)
        yield name, y
        yield f"{name} input", torch.autograd.grad(y.float().square().sum(), x)[0]
    yield "embedding", net["embedding"](torch.randint(0, 30, (4, 3)))
    yield "unpacked", net["conv"].virtual_weight.unpack()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("laps", [None, 4])
@pytest.mark.parametrize("form", FORMS)
def test_layers(form: str, laps: int | None, dtype: torch.dtype) -> None:
    seed = FORMS.index(form) * 2 + (laps is None)
    net, slots = models(seed, laps, dtype)
    bank = net["linear"].virtual_weight.bank
    values = stored(slots, bank.granularity, form, dtype, seed)
    bank.hold(written_out(values))
    wanted = dict(results(net, seed))
    bank.hold(values)
    got = dict(results(net, seed))
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    assert got.keys() == wanted.keys()
    for name, result in got.items():
        top = float(wanted[name].abs().max())
        assert float((result - wanted[name]).abs().max()) <= bound * top, name
    with rpg.backend("reference"):
        for name, result in results(net, seed):
            assert float((result - wanted[name]).abs().max()) <= bound * top + bound * float(
                wanted[name].abs().max()
            ), name


def test_the_reference_makes_no_copy_of_the_bank() -> None:
    bank = rpg.ParameterBank(64 * 40_000, laps=4)
    layer = rpg.nn.Linear(256, 64, bank=bank)
    bank.hold(stored(40_000, 64, "int8", torch.float32, 0))
    largest = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else [out]:
                if isinstance(each, Tensor) and each.is_floating_point():
                    largest[0] = max(largest[0], each.numel() * each.element_size())
            return out

    from rpg_kernels.backends.reference.linear import linear

    values = bank.stored
    assert values is not None
    parts = values.codes, values.scales, values.places
    with Watch(), torch.no_grad():
        linear(torch.randn(3, 256), StoredValues(*parts), None, None, layer.virtual_weight.spec)
    assert 0 < largest[0] < 1 << 20  # all of it would be 10 MB


@pytest.mark.parametrize("form", FORMS)
def test_compiled_vmapped_copied_and_cast(form: str) -> None:
    torch.manual_seed(0)
    net, slots = models(3, 4, torch.float32)
    bank = net["linear"].virtual_weight.bank
    bank.hold(stored(slots, bank.granularity, form, torch.float32, 5))
    layer = net["linear"]
    x = torch.randn(6, layer.in_features)
    wanted = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)
    mapped = torch.func.vmap(layer)(x.view(3, 2, -1))
    torch.testing.assert_close(mapped.flatten(0, 1), wanted)
    other = copy.deepcopy(net)
    torch.testing.assert_close(other["linear"](x), wanted, rtol=0, atol=0)
    before = {name: part.data_ptr() for name, part in bank.stored.parts().items()}
    copied = other["linear"].virtual_weight.bank.stored.parts()
    assert all(
        copied[name].data_ptr() != at or not copied[name].numel() for name, at in before.items()
    )
    other.bfloat16()
    values = other["linear"].virtual_weight.bank.stored
    assert values.dtype == torch.bfloat16
    assert values.scales is None or values.scales.dtype == torch.float32
    assert values.codes.dtype == (
        torch.bfloat16 if values.scales is None else bank.stored.codes.dtype
    )
    low = other["linear"](x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert float((low - wanted).abs().max()) <= 0.05 * float(wanted.abs().max()) + 1e-3


def test_gradients_of_x_in_functional_transforms() -> None:
    net, slots = models(4, 4, torch.float64)
    layer = net["linear"]
    bank = layer.virtual_weight.bank
    bank.hold(stored(slots, bank.granularity, "int8", torch.float64, 5))
    x = torch.randn(2, layer.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    grad = torch.func.grad(lambda x: layer(x).square().sum())(x)
    wanted = torch.autograd.grad(layer(x).square().sum(), x)[0]
    torch.testing.assert_close(grad, wanted)


BAD = {
    "codes, one dimension": lambda p: {**p, "codes": p["codes"].flatten()},
    "codes of another dtype": lambda p: {**p, "codes": p["codes"].short()},
    "scales of half the rows": lambda p: {**p, "scales": p["scales"][::2].contiguous()},
    "scales, float64": lambda p: {**p, "scales": p["scales"].double()},
    "scales with gaps": lambda p: {**p, "scales": p["scales"].repeat(2)[::2]},
    "places, int64": lambda p: {**p, "places": p["places"].long()},
    "places, two dimensions": lambda p: {**p, "places": p["places"].unsqueeze(0)},
    "fewer slots": lambda p: {**p, "places": p["places"][:-1].contiguous()},
    "no scales": lambda p: {**p, "scales": None},
    "activations": lambda p: {**p, "activations": "int4"},
}


@pytest.mark.parametrize("what", BAD)
def test_parts_that_do_not_belong_together(what: str) -> None:
    layer = rpg.nn.Linear(64, 10, bank=rpg.ParameterBank(64 * 30, laps=4))
    values = stored(30, 64, "int8 without zeros", torch.float32, 0)
    parts = {**values.parts(), "activations": "kept"}
    given = BAD[what](parts)

    def run(given: dict[str, object]) -> Tensor:
        return op.linear_stored(
            torch.randn(2, 64),
            given["codes"],
            given["scales"],
            given["places"],
            torch.float32,
            given["activations"],
            None,
            layer.virtual_weight.spec,
            "",
        )

    assert run(parts).shape == (2, 10)
    with pytest.raises((TypeError, ValueError), match=r"got .*, wanted "):
        run(given)


def test_nothing_changes_stored_values() -> None:
    values = stored(30, 64, "int8", torch.float32, 0)
    before = values.dense()
    for change in (
        lambda: values.mul_(2),
        lambda: values.zero_(),
        lambda: values.copy_(before),
        lambda: nn.init.normal_(values),
        lambda: values.requires_grad_(True),
        lambda: nn.Parameter(values),
        lambda: torch.add(before, 1, out=values),
    ):
        with pytest.raises(RuntimeError, match=r"got values stored as int8.*wanted float"):
            change()
    assert torch.equal(torch.zeros(30, 64).copy_(values), before)
    assert torch.equal(values.dense(), before)
    assert not values.requires_grad
