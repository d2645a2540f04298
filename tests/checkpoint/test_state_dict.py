"""What a state dict says about a bank's values, and what is refused: never another network."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brute_force as brute
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel

import rpg_kernels as rpg

DIGITS = "0.rpg_bank.map_digits"
BANK: dict[str, Any] = {"dof": 256, "granularity": 16, "reflect": "vector", "seed": 0}
SHAPES = ((24, 8), (8, 24, 3, 3))


def build(
    scale: float = 1.0, shapes: tuple[tuple[int, ...], ...] = SHAPES, **changes: Any
) -> nn.Module:
    """A bank with a layer for each shape."""
    bank = rpg.ParameterBank(**{**BANK, **changes})
    layers: list[nn.Module] = []
    for shape in shapes:
        weight = bank.place(shape, scale=scale)
        if len(shape) == 2:
            layers.append(rpg.nn.Linear(shape[1], shape[0], bias=False, virtual_weight=weight))
        else:
            n, k, size, _ = shape
            layers.append(rpg.nn.Conv2d(k, n, size, bias=False, virtual_weight=weight))
    return rpg.attach(nn.Sequential(*layers), bank)


def weights(model: nn.Module) -> list[Tensor]:
    return [m.virtual_weight.unpack() for m in model if hasattr(m, "virtual_weight")]


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def refused(model: nn.Module, state: dict[str, Any], match: str, **options: Any) -> None:
    """Loading raises, and no weight of the model has changed."""
    before = [w.clone() for w in weights(model)]
    with pytest.raises(RuntimeError, match=match):
        model.load_state_dict(state, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def text(state: Tensor) -> str:
    """The lines that a map's digits say."""
    digits = [int(d) for d in state.tolist()]
    return bytes(16 * a + b for a, b in zip(digits[::2], digits[1::2], strict=True)).decode()


def record_of(state: Tensor) -> dict[str, Any]:
    generator, *placements = map(json.loads, text(state).split("\n"))
    return {"generator": generator, "placements": placements}


def digits_of(data: bytes) -> Tensor:
    return torch.tensor([d for byte in data for d in divmod(byte, 16)], dtype=torch.float32)


def encode(record: dict[str, Any]) -> Tensor:
    lines = [record["generator"], *record["placements"]]
    return digits_of("\n".join(map(json.dumps, lines)).encode())


def test_the_digits_are_json_of_generator_and_placements() -> None:
    state = build(scale=0.3, seed=7).state_dict()[DIGITS]
    assert record_of(state) == {
        "generator": {
            "slots": 16, "granularity": 16, "reflect": "vector", "permute": True, "window": None,
            "seed": 7, "law": 1,
        },
        "placements": [
            {"start": 0, "shape": [24, 8], "scale": 0.3},
            {"start": 24 * 8, "shape": [8, 24, 3, 3], "scale": 0.3},
        ],
    }  # fmt: skip
    # Tools that load in place need the same size for other scales.
    sizes = {build(s).state_dict()[DIGITS].shape for s in (1.0, 1 / 3, -1.2345678901234567e-300)}
    assert sizes == {state.shape}


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"seed": 1}, "seed: got 1, wanted 0"),
    ({"reflect": "none"}, "reflect: got none, wanted vector"),
    ({"permute": False}, "permute: got False, wanted True"),
    ({"granularity": 8}, "slots: got 32, wanted 16; granularity: got 8, wanted 16"),
    ({"dof": 512}, "slots: got 32, wanted 16"),
    ({"shapes": SHAPES[:1]}, "layers: got 1, wanted 2"),
    ({"shapes": SHAPES[::-1]}, r"shape of layer 0: got \(8, 24, 3, 3\), wanted \(24, 8\)"),
    ({"shapes": ((8, 24), SHAPES[1])}, r"shape of layer 0: got \(8, 24\), wanted \(24, 8\)"),
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_another_map_is_refused(change: dict[str, Any], message: str, strict: bool) -> None:
    refused(build(2.0), build(**change).state_dict(), rf"rpg_bank: .*\({message}\)", strict=strict)


def test_another_start_is_refused() -> None:
    model = build()
    state = model.state_dict()
    record = record_of(state[DIGITS])
    record["placements"][1]["start"] = 0
    state[DIGITS] = encode(record)
    refused(model, state, "start of layer 1: got 0, wanted 192")


def test_a_table_is_not_a_law() -> None:
    digits = brute.table_bank(16, 20).state_dict()["map_digits"]
    state = {"weight": torch.zeros(16, 16), "map_digits": digits}
    bank = rpg.ParameterBank(**BANK)
    with pytest.raises(RuntimeError, match=r"bank: .*\(law: got table, wanted 1\)"):
        bank.load_state_dict(state)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]
)
def test_a_state_dict_cast_as_a_whole_is_read(dtype: torch.dtype) -> None:
    theirs, ours = build(0.7), build(2.0)
    ours.load_state_dict({key: value.to(dtype) for key, value in theirs.state_dict().items()})
    assert ours[0].virtual_weight.scale == 0.7
    refused(ours, {k: v.to(dtype) for k, v in build(seed=1).state_dict().items()}, "seed: got 1")


def wrong_map(**changes: Any) -> Tensor:
    record = record_of(build().state_dict()[DIGITS])
    record["placements"][0].update(changes)
    return encode(record)


UNREADABLE: dict[str, Any] = {
    "a number": 3,
    "None": None,
    "text": "{}",
    "bytes": b"{}",
    "empty": torch.tensor([]),
    "a scalar": torch.tensor(3),
    "a matrix": torch.ones(2, 2),
    "fractions": torch.tensor([7.5, 11.5]),
    "below 0": torch.tensor([-1, 11]),
    "above 15": torch.tensor([7, 16]),
    "an odd number": torch.tensor([7, 11, 7]),
    "nan": torch.tensor([7, torch.nan]),
    "infinity": torch.tensor([7, torch.inf]),
    "complex": torch.tensor([7 + 0j, 11]),
    "on meta": torch.zeros(40, device="meta"),
    "no JSON": torch.zeros(8),
    "no UTF-8": torch.full((8,), 15.0),
    "deep": digits_of(b"[" * 100_000),
    "a list": digits_of(b"[]"),
    "an empty object": digits_of(b"{}"),
    "blank": digits_of(b" \n "),
    "bytes of an older version": torch.tensor(list(b'{"generator": {}}')),
    "unknown law": encode({"generator": {"law": 9, "slots": 3}, "placements": []}),
    "scale NaN": wrong_map(scale=float("nan")),
    "scale 0": wrong_map(scale=0),
    "scale of 400 digits": wrong_map(scale=10**400),
    "scale as text": wrong_map(scale="1"),
    "shape as text": wrong_map(shape="ab"),
    "shape of fractions": wrong_map(shape=[24.0, 8]),
    "shape of 400 digits": wrong_map(shape=[10**400, 8]),
    "negative start": wrong_map(start=-1),
    "another field": wrong_map(more=1),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_digits_that_cannot_be_read_are_refused(name: str) -> None:
    model = build(2.0)
    refused(model, {**build().state_dict(), DIGITS: UNREADABLE[name]}, "rpg_bank: .*(read|wanted)")
    assert model[0].virtual_weight.scale == 2.0


def test_missing_digits() -> None:
    state, ours = build(0.7, seed=1).state_dict(), build(2.0)
    del state[DIGITS]
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.rpg_bank\.map_digits"'):
        ours.load_state_dict(state)
    ours.load_state_dict(state, strict=False)
    assert torch.equal(ours.rpg_bank.weight, state["0.rpg_bank.weight"])
    assert ours[0].virtual_weight.scale == 2.0


def test_scales_come_with_the_values_or_not_at_all() -> None:
    ours, state = build(2.0), build(0.7).state_dict()
    refused(ours, {**state, "0.rpg_bank.weight": torch.zeros(3, 3)}, "size mismatch", strict=False)
    without = {key: value for key, value in state.items() if key == DIGITS}
    ours.load_state_dict(without, strict=False)
    refused(ours, without, "Missing key")
    assert ours[0].virtual_weight.scale == 2.0
    ours.load_state_dict(state)
    assert ours[0].virtual_weight.scale == 0.7


def test_parts_follow_the_scale_that_a_state_dict_brings() -> None:
    def net(scale: float) -> tuple[nn.Module, rpg.VirtualWeight]:
        bank = rpg.ParameterBank(dof=256, granularity=16)
        whole = bank.place((40, 24), scale=scale)
        part = rpg.nn.Linear(24, 30, bias=False, virtual_weight=whole.narrow(0, 4, 30))
        return rpg.attach(nn.Sequential(part), bank), whole

    (theirs, _), (ours, whole) = net(1.0), net(3.0)
    twin = rpg.VirtualWeight.from_json(whole.bank, whole.to_json())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 24)
    assert torch.equal(ours(x), theirs(x))
    assert twin.scale == whole.scale == 1.0
    assert torch.equal(twin.unpack(), whole.unpack())


def tampered(change: Callable[[Tensor], Any]) -> tuple[nn.Module, dict[str, Any]]:
    bank = brute.table_bank(10, 20)
    model = rpg.attach(nn.Sequential(), bank)
    bank.place((4, 5))
    state = copy.deepcopy(model.state_dict())
    state["rpg_bank.table"] = change(state["rpg_bank.table"])
    state["rpg_bank.weight"] += 1
    return model, state


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize(
    "change",
    [lambda t: t ^ 1, lambda t: t + 10, lambda t: t[:-1], lambda t: t.view(4, 5),
     lambda t: t.long(), lambda t: t.half(), lambda t: [0] * 20, lambda t: None,
     lambda t: t[:0]],
)  # fmt: skip
def test_another_table_is_refused(
    change: Callable[[Tensor], Any], extra: bool, assign: bool
) -> None:
    model, state = tampered(change)
    if not extra:
        del state["rpg_bank.map_digits"]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"rpg_bank: table: got .*, wanted "):
        model.load_state_dict(state, strict=False, assign=assign)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_table_is_loaded_and_the_table_of_another_bank_refused() -> None:
    model, state = tampered(lambda t: t)
    model.load_state_dict(state)
    assert torch.equal(model.rpg_bank.weight, state["rpg_bank.weight"])
    other = brute.table_bank(10, 20)
    other.place((4, 5))
    with pytest.raises(RuntimeError, match="sha256: got"):
        other.load_state_dict(model.rpg_bank.state_dict())
    far = copy.deepcopy(model).to("meta")
    far.load_state_dict(state, assign=True)
    assert torch.equal(far.rpg_bank.table, state["rpg_bank.table"])


def test_a_bank_on_meta_states_its_map_and_is_loaded_by_assignment() -> None:
    model = build(0.7)
    with torch.device("meta"):
        far = build(2.0)
        state = far.state_dict()
    assert state["0.rpg_bank.weight"].is_meta
    assert state[DIGITS].is_meta
    assert far.rpg_bank.map.generator.slots == 16
    with torch.device("meta"):
        far.load_state_dict(model.state_dict(), assign=True)
    assert same(far, model)


def test_plain_safetensors_keep_the_map(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(build(0.7).state_dict(), path)
    model = build(2.0)
    model.load_state_dict(load_file(path))
    assert model[0].virtual_weight.scale == 0.7
    refused(build(seed=3), load_file(path), "seed: got 0, wanted 3")


def test_compiled_averaged_and_functional_models() -> None:
    model, other = build(0.7), build(2.0)
    compiled = torch.compile(other, backend="aot_eager")
    compiled.load_state_dict({f"_orig_mod.{k}": v for k, v in model.state_dict().items()})
    assert same(other, model)
    assert list(compiled.state_dict()) == [f"_orig_mod.{k}" for k in model.state_dict()]
    average, again = AveragedModel(model), AveragedModel(build(2.0))
    average.update_parameters(model)
    again.load_state_dict(average.state_dict())
    assert same(again.module, model)
    linear = nn.Sequential(model[0])
    rpg.attach(linear, model.rpg_bank)
    x = torch.randn(2, 8)
    called = torch.func.functional_call(linear, linear.state_dict(), (x,))
    assert torch.equal(called, linear(x))


def test_distributed_checkpoints_in_one_process(tmp_path: Path) -> None:
    model, other = build(0.7), build(1 / 3)
    state = get_model_state_dict(model)
    assert list(state) == list(model.state_dict())
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    wanted = get_model_state_dict(other)  # filled in place
    dcp.load(wanted, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(other, wanted)
    assert other[0].virtual_weight.scale == 0.7
    assert same(other, model)
    with pytest.raises(RuntimeError, match="seed: got 0, wanted 5"):
        set_model_state_dict(build(seed=5), state)
