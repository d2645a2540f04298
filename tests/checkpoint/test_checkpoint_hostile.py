"""rpg.load on files that are damaged, forged or another model's: a ValueError that says so, or the
values that were saved; never a model that has changed in part."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import build, forge, join, split, values
from safetensors.torch import load_file, save_file
from torch import nn

import rpg_kernels as rpg

Change = Callable[[dict[str, Any], bytearray], None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    rpg.save(build(0), path)
    return path


def refused(path: Path, message: str, model: nn.Module | None = None) -> None:
    model = build(1) if model is None else model
    before = values(model)
    with pytest.raises(ValueError, match=message) as caught:
        rpg.load(model, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 1500
    assert values(model) == before


def small(number: int) -> nn.Module:
    torch.manual_seed(number)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.BatchNorm1d(4))
    return rpg.convert(model, rpg.RPGConfig(dof=16, granularity=2), lambda m, n: n in "12")


def test_every_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    saved, model = small(0), small(1)
    rpg.save(saved, path)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(0)
    positions = [(i, bit) for i in range(8) for bit in range(8)]
    positions += [(rng.randrange(8, header), rng.randrange(8)) for _ in range(900)]
    positions += [(rng.randrange(header, len(good)), rng.randrange(8)) for _ in range(100)]
    before, wanted, harmless = values(model), values(saved), 0
    for i, bit in positions:
        bad = bytearray(good)
        bad[i] ^= 1 << bit
        path.write_bytes(bad)
        try:
            rpg.load(model, path)
        except ValueError:
            assert values(model) == before, (i, bit)
        else:
            harmless += 1
            assert values(model) == {**wanted, "where": before["where"]}, (i, bit)
            model = small(1)
            before = values(model)
    assert harmless < 10


def test_truncated_and_continued_files(path: Path) -> None:
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for length in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(good) - 1):
        path.write_bytes(good[:length])
        refused(path, "truncated")
    for tail in (b"\0", b" ", good):
        path.write_bytes(good + tail)
        refused(path, "truncated or continued")


class Weapon:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def test_other_kinds_of_files(path: Path) -> None:
    target = path.parent / "unpickled"
    torch.save({"weight": Weapon(target)}, path)
    refused(path, "not a safetensors file")
    for content in (pickle.dumps(Weapon(target)), b"PK\3\4" * 9, b"{}" * 50, b"\0" * 100):
        path.write_bytes(content)
        refused(path, "safetensors file|rpg.save|truncated")
    assert not target.exists()


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, 10**8 + 1, 2**62 + 8])
def test_impossible_lengths_of_the_header(length: int, path: Path) -> None:
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(path, f"a header of {length} bytes in a file of")


def test_a_foreign_file_and_how_to_load_it_all_the_same(path: Path) -> None:
    model, other = build(0), build(1)
    for metadata in ({"format": "pt"}, None):
        state = {k: v.clone().contiguous() for k, v in model.state_dict().items()}
        save_file(state, path, metadata)
        refused(
            path, r"not written by rpg\.save.*model\.load_state_dict\(safetensors\.torch\.load_f"
        )
    other.load_state_dict(load_file(path))
    assert torch.equal(other.rpg_bank.weight, model.rpg_bank.weight)


def test_forging_nothing_changes_nothing(path: Path) -> None:
    forge(path, lambda header, data: header["mix.bias"].update(more=1))  # a format of tomorrow
    model = rpg.load(build(1), path)
    assert torch.equal(model.rpg_bank.weight, build(0).rpg_bank.weight)


def test_a_change_without_the_digest(path: Path) -> None:
    header, data = split(path.read_bytes())
    header["__metadata__"]["rpg_version"] = "9"
    path.write_bytes(join(header, data))
    refused(path, "damaged: its contents have sha256")
    del header["__metadata__"]["rpg_sha256"]
    path.write_bytes(join(header, data))
    refused(path, "damaged: .*wanted None")


DAMAGED = r"not a safetensors file, or damaged, truncated or continued \(.+\)"
RAW_HEADERS: dict[str, bytes] = {
    "nested deeply": b"[" * 200_000,
    "objects nested deeply": b'{"a":' * 200_000,
    "no UTF-8": b'{"\xff\xfe": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a key twice": b'{"__metadata__": {}, "__metadata__": {}}',
    "5000 digits": b'{"a": 1' + b"0" * 5000 + b"}",
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "a list": b"[]",
    "null": b"null",
    "nothing": b"",
    "two values": b"{} {}",
    "metadata of numbers": b'{"__metadata__": {"rpg_format": 1}}',
    "metadata as text": b'{"__metadata__": "rpg_format"}',
}


@pytest.mark.parametrize("name", RAW_HEADERS)
def test_headers_that_are_no_headers(name: str, path: Path) -> None:
    path.write_bytes(join(RAW_HEADERS[name], split(path.read_bytes())[1]))
    refused(path, DAMAGED)


ENTRIES: dict[str, Any] = {
    "no entry": 3,
    "unknown dtype": {"dtype": "F5"},
    "dtype of half a byte": {"dtype": "F4", "shape": [128]},
    "dtype as a list": {"dtype": ["F32"]},
    "negative shape": {"shape": [-4, -4]},
    "shape of fractions": {"shape": [16.0]},
    "shape of booleans": {"shape": [True, 16]},
    "shape as text": {"shape": "16"},
    "400 digits": {"shape": [10**400]},
    "another shape": {"shape": [15]},
    "another dtype": {"dtype": "F64"},
    "one offset": {"data_offsets": [0]},
    "offsets backwards": {"data_offsets": [64, 0]},
    "negative offsets": {"data_offsets": [-64, 0]},
    "an overlap": {"data_offsets": [0, 64]},
    "terabytes": {"shape": [2**40], "data_offsets": [0, 2**42]},
    "beyond the end": {"data_offsets": [10**6, 10**6 + 64]},
}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_that_no_tensor_has(name: str, path: Path) -> None:
    changes = ENTRIES[name]
    header, data = split(path.read_bytes())
    entry = header["mix.bias"]
    header["mix.bias"] = {**entry, **changes} if isinstance(changes, dict) else changes
    path.write_bytes(join(header, data))
    refused(path, DAMAGED)


@pytest.mark.parametrize(
    "shape", [[0, 2**40, 2**40], [2**40, 2**40, 0], [0, 2**63], [2**64 - 1, 0]]
)
def test_a_shape_that_holds_nothing_and_is_too_large_for_torch(
    shape: list[int], path: Path
) -> None:
    header, data = split(path.read_bytes())
    header["empty"]["shape"] = shape
    path.write_bytes(join(header, data))
    refused(path, DAMAGED)


def in_record(key: str, change: Callable[[Any], Any]) -> Change:
    """Change the JSON that the metadata holds under a key."""

    def apply(header: dict[str, Any], data: bytearray) -> None:
        record = json.loads(header["__metadata__"][key])
        changed = change(record)
        header["__metadata__"][key] = json.dumps(record if changed is None else changed)

    return apply


def raw(key: str, text: str | None) -> Change:
    def apply(header: dict[str, Any], data: bytearray) -> None:
        if text is None:
            del header["__metadata__"][key]
        else:
            header["__metadata__"][key] = text

    return apply


def generator(**changes: Any) -> Change:
    return in_record("rpg_banks", lambda r: r["rpg_bank"]["generator"].update(changes))


def layer(**changes: Any) -> Change:
    return in_record("rpg_banks", lambda r: r["rpg_bank"]["placements"][1].update(changes))


def entry(change: Callable[[dict[str, Any]], Any]) -> Change:
    return lambda header, data: change(header)


def bool_bytes(header: dict[str, Any], data: bytearray) -> None:
    data[header["mask"]["data_offsets"][0]] = 7


FORGERIES: dict[str, tuple[Change, str]] = {
    "format": (raw("rpg_format", "3"), r"format: got 3 \(of rpg-kernels .*\), wanted 1"),
    "law": (generator(law=7), "law: got 7, wanted one of 1, 3"),
    "law as text": (generator(law="window"), "law: got 'window', wanted one of 1, 3"),
    "law of a table": (generator(law="table"), "cannot be read"),
    "seed": (generator(seed=1), r"rpg_bank: .*\(seed: got 1, wanted 0\)"),
    "seed of 400 digits": (generator(seed=10**400), "seed: got 1000"),
    "slots": (generator(slots=64), "slots: got 64, wanted 32"),
    "reflect": (generator(reflect="none"), "reflect: got none, wanted vector"),
    "reflect as a list": (generator(reflect=[]), "reflect: got"),
    "a law of tomorrow": (generator(law=4, tilt=[1]), "law: got 4, wanted one of 1, 3, the"),
    "a law of tomorrow, with more beside it": (
        in_record("rpg_banks", lambda r: {"rpg_bank": {"generator": {"law": 4}, "rings": []}}),
        "law: got 4, wanted one of 1, 3, the laws known",
    ),
    "a law that is gone": (generator(slots=64, window=64, laps=2, law=2),
                           "law: got 2, wanted one of 1, 3, the laws known here; law 2 was never"),
    "a law with laps, whose layers have no taps": (generator(laps=2, law=3),
                                                   "wanted a record of start, shape, scale, taps"),
    "taps without laps": (layer(taps=1), "wanted a record of start, shape, scale"),
    "a field too many": (generator(window2=1), "cannot be read"),
    "window": (generator(window=8), "window: got 8, wanted None"),
    "shape": (layer(shape=[16, 8]), r"shape of layer 1: got \(16, 8\), wanted \(16, 16\)"),
    "shape of 400 digits": (layer(shape=[10**400, 2]), "shape: got 1000"),
    "60,000 dimensions": (layer(shape=[2**40] * 60_000), "dimensions: got 60000"),
    "shape as text": (layer(shape="ab"), "shape: got a str"),
    "start": (layer(start=0), "start of layer 1: got 0, wanted 128"),
    "start beyond": (layer(start=2**70), "start: got"),
    "scale 0": (layer(scale=0), "scale: got 0, wanted a number other than 0"),
    "scale of 400 digits": (layer(scale=10**400), "cannot be read"),
    "scale as text": (layer(scale="1"), "scale: got '1'"),
    "no scale": (in_record("rpg_banks", lambda r: r["rpg_bank"]["placements"][0].pop("scale")
                           and None), "wanted a record of start, shape, scale"),
    "number of layers": (in_record("rpg_banks", lambda r: r["rpg_bank"]["placements"].pop()
                                   and None), "layers: got 1, wanted 2"),
    "name of the bank": (in_record("rpg_banks", lambda r: {"ring": r["rpg_bank"]}),
                         "banks: got none of rpg_bank, and ring, which the model lacks"),
    "no banks": (raw("rpg_banks", "{}"), "banks: got none of rpg_bank"),
    "banks missing": (raw("rpg_banks", None), "rpg_banks: got a NoneType, wanted an object"),
    "banks as a list": (raw("rpg_banks", "[]"), "rpg_banks: got a list, wanted an object"),
    "banks nested": (raw("rpg_banks", "[" * 100_000), "nested too deeply"),
    "banks with NaN": (raw("rpg_banks", '{"rpg_bank": NaN}'), "NaN is not a JSON number"),
    "banks twice": (raw("rpg_banks", '{"rpg_bank": 1, "rpg_bank": 2}'), "given twice"),
    "layers in another order": (
        in_record("rpg_layers", lambda r: {"conv": r["mix"], "mix": r["conv"]}),
        r"conv: got \['rpg_bank', 1, .*\], wanted \['rpg_bank', 0, .*layer number"),
    "another layer": (in_record("rpg_layers", lambda r: r.update(more=r["mix"])),
                      "rpg layers: got more, which the model lacks"),
    "an alias of nothing": (raw("rpg_aliases", '{"head.weight": "nothing"}'), "rpg_aliases: got"),
    "an alias of a list": (raw("rpg_aliases", '{"head.weight": []}'), "rpg_aliases: got"),
    "an alias of itself": (raw("rpg_aliases", '{"head.weight": "head.weight"}'), "rpg_aliases"),
    "an alias that is stored": (raw("rpg_aliases", '{"mix.bias": "head.bias"}'), "rpg_aliases"),
    "no alias": (raw("rpg_aliases", "{}"), r"tensors: got none of head\.weight"),
    "a tensor renamed": (entry(lambda h: h.update(more=h.pop("mix.bias"))),
                         r"tensors: got none of mix\.bias, and more, which the model lacks"),
    "a tensor's shape": (entry(lambda h: h["mix.bias"].update(shape=[4, 4])),
                         r"mix\.bias: got shape \[4, 4\], wanted shape \[16\]"),
    "a shape of 1000 dimensions": (entry(lambda h: h["mask"].update(shape=[1] * 999 + [3])),
                                   r"mask: got shape \[1, 1, 1"),
    "bytes above 1": (bool_bytes, "mask: got bytes above 1, wanted bool"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_files_with_a_right_digest(name: str, path: Path) -> None:
    change, message = FORGERIES[name]
    forge(path, change)
    refused(path, message)
    far = build(1, device="meta")
    with pytest.raises(ValueError, match=message):
        rpg.load(far, path)
    assert all(t.is_meta for t in (*far.parameters(), *far.buffers()))


def test_a_forged_table_never_reads_beyond_the_bank(path: Path) -> None:
    def make() -> nn.Module:
        table = torch.arange(6, dtype=torch.int32) % 3
        bank = rpg.ParameterBank.from_table(torch.randn(3), table)
        layer = rpg.nn.Linear(3, 2, virtual_weight=bank.place((2, 3)))
        return rpg.attach(nn.Sequential(layer), bank)

    def beyond(header: dict[str, Any], data: bytearray) -> None:
        begin = header["0.rpg_bank.table"]["data_offsets"][0]
        data[begin : begin + 4] = (2**30).to_bytes(4, "little")

    rpg.save(make(), path)
    rpg.load(make(), path)
    forge(path, lambda h, d: h["0.rpg_bank.table"].update(dtype="F32"))
    refused(path, r"rpg_bank: table: got torch\.float32 \[6\]", make())
    rpg.save(make(), path)
    forge(path, beyond)
    refused(path, "rpg_bank: table: got sha256 .*, wanted", make())
    bad = make()
    bad.rpg_bank.table[0] = 2**30  # in memory; the generator still names the old one
    rpg.save(bad, path)
    refused(path, "rpg_bank: table: got sha256", make())


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 4}, r"rpg_bank: .*\(seed: got 0, wanted 4\)"),
    "granularity": ({"granularity": 4}, "slots: got 32, wanted 64; granularity: got 8, wanted 4"),
    "reflect": ({"reflect": "element"}, "reflect: got vector, wanted element"),
    "permute": ({"permute": False}, "permute: got True, wanted False"),
    "dof": ({"dof": 264}, "slots: got 32, wanted 33"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_another_configuration(name: str, path: Path) -> None:
    config, message = OTHERS[name]
    refused(path, message, build(1, **config))


def test_other_models(path: Path) -> None:
    refused(path, "banks: got rpg_bank, which the model lacks", nn.Linear(2, 2))
    rpg.save(nn.Linear(2, 2), path)
    refused(path, "banks: got none of rpg_bank")
    refused(path, "tensors: got bias, which the model lacks", nn.Linear(2, 2, bias=False))
    refused(path, r"weight: got shape \[2, 2\], wanted shape \[2, 3\]", nn.Linear(3, 2))
    refused(
        path, "tensors: got none of 0.bias, .* and bias, weight", nn.Sequential(nn.Linear(2, 2))
    )


def test_layers_registered_in_another_order(path: Path) -> None:
    """Two layers of one shape: the bank's map is the same, but each would read the other's."""

    def make(first: str, second: str) -> nn.Module:
        bank = rpg.ParameterBank(dof=64, granularity=8)
        model = nn.Module()
        for name in (first, second):
            model.add_module(name, rpg.nn.Linear(8, 8, bank=bank))
        return rpg.attach(model, bank)

    rpg.save(make("query", "key"), path)
    refused(path, r"key: got \['rpg_bank', 1.*, wanted \['rpg_bank', 0", make("key", "query"))
    rpg.load(make("query", "key"), path)
