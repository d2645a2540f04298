"""Files of banks in 8 bits and without their zero slots: what load makes of them, or refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import forge, split
from torch import nn

import rpg_kernels as rpg

Change = Callable[[dict[str, Any], bytearray], None]
X = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))


def build(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(*(nn.Linear(48, 48) for _ in range(4)), nn.BatchNorm1d(48))
    config = rpg.RPGConfig(dof=2048, granularity=16, laps=2)
    return rpg.convert(net, config, lambda m, n: isinstance(m, nn.Linear)).to(dtype).eval()


def bank_of(net: nn.Module) -> rpg.ParameterBank:
    return next(m for m in net.modules() if isinstance(m, rpg.ParameterBank))


def of_form(form: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    net = build(seed, dtype)
    if "compact" in form:
        with torch.no_grad():
            bank_of(net).weight[torch.arange(128) % 3 > 0] = 0
        rpg.compact(net)
    for name in ("int8", "float8_e4m3fn"):
        if name in form:
            rpg.quantize(net, name, activations="int8" if "rows" in form else "kept")
    return net


FORMS = ("float", "int8", "int8 rows", "float8_e4m3fn", "compact", "compact int8")


@pytest.mark.parametrize("mine", FORMS)
@pytest.mark.parametrize("theirs", FORMS)
def test_a_model_takes_the_form_of_the_file(mine: str, theirs: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    saved, net = of_form(theirs), of_form(mine, 1)
    rpg.save(saved, path)
    held = bank_of(net).weight
    assert rpg.load(net, path) is net
    assert torch.equal(net(X), saved(X))
    one, other = bank_of(net).stored, bank_of(saved).stored
    assert (one is None) == (other is None)
    if one is None or other is None:
        assert bank_of(net).weight.requires_grad
    else:
        assert (one.form, one.activations, one.dtype) == (
            other.form,
            other.activations,
            other.dtype,
        )
    if mine == theirs:
        assert bank_of(net).weight is held  # optimisers and graphs keep it
    again = tmp_path / "again"
    rpg.save(net, again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_models_on_meta(form: str, tmp_path: Path) -> None:
    saved, path = of_form(form), tmp_path / "model"
    rpg.save(saved, path)
    with torch.device("meta"):
        net = build(1)
    assert torch.equal(rpg.load(net, path)(X), saved(X))


def test_a_quarter_of_the_bytes_and_a_version_that_older_ones_refuse(tmp_path: Path) -> None:
    sizes, formats = {}, {}
    for form in FORMS:
        path = tmp_path / form
        rpg.save(of_form(form), path)
        header, _ = split(path.read_bytes())
        sizes[form] = sum(
            header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
            for name in header
            if name.rpartition(".")[2] in ("codes", "scales", "places")
            or (name.endswith("rpg_bank.weight") and form == "float")
        )
        formats[form] = header["__metadata__"]["rpg_format"]
    assert sizes["float"] == 4 * 2048
    assert sizes["int8"] == 2048 + 4 * 128
    assert sizes["compact"] == 4 * 16 * 43 + 4 * 128
    assert sizes["compact int8"] == (16 + 4) * 43 + 4 * 128
    # A version that knows only "1" says: format: got 2, wanted 1.
    assert formats == {form: "1" if form == "float" else "2" for form in FORMS}


def test_bfloat16_models(tmp_path: Path) -> None:
    path, saved = tmp_path / "model", of_form("compact int8", dtype=torch.bfloat16)
    rpg.save(saved, path)
    net = rpg.load(build(1, torch.bfloat16), path)
    assert torch.equal(net(X.bfloat16()), saved(X.bfloat16()))


def at(header: dict[str, Any], part: str) -> dict[str, Any]:
    return header[next(name for name in header if name.endswith(part))]


def put(part: str, value: float, code: str) -> Change:
    """Another second element of a part."""

    def change(header: dict[str, Any], data: bytearray) -> None:
        import struct

        begin = at(header, part)["data_offsets"][0]
        struct.pack_into(f"<{code}", data, begin + struct.calcsize(code), value)

    return change


def record(**fields: Any) -> Change:
    def change(header: dict[str, Any], data: bytearray) -> None:
        metadata = header["__metadata__"]
        stored = json.loads(metadata["rpg_stored"])
        for each in stored.values():
            each.update(fields)
            for name in [name for name, value in fields.items() if value is None]:
                del each[name]
        metadata["rpg_stored"] = json.dumps(stored)

    return change


def renamed(header: dict[str, Any], data: bytearray) -> None:
    metadata = header["__metadata__"]
    metadata["rpg_stored"] = json.dumps({"other": {"dtype": "float32", "activations": "kept"}})


def without(part: str) -> Change:
    def change(header: dict[str, Any], data: bytearray) -> None:
        entry = at(header, part)
        name = next(n for n in header if header[n] is entry)
        header[f"{name}x"] = header.pop(name)

    return change


def reshaped(part: str) -> Change:
    def change(header: dict[str, Any], data: bytearray) -> None:
        at(header, part)["shape"] = [1, *at(header, part)["shape"]]

    return change


BAD: dict[str, Change] = {
    "a place beyond the rows": put("places", 43, "i"),
    "a place far away": put("places", 2**31 - 1, "i"),
    "a place below": put("places", -2, "i"),
    "a scale that is NaN": put("scales", float("nan"), "f"),
    "a negative scale": put("scales", -1.0, "f"),
    "an infinite scale": put("scales", float("inf"), "f"),
    "no codes": without("codes"),
    "no scales": without("scales"),
    "no places": without("places"),
    "codes of other shape": reshaped("codes"),
    "scales of other shape": reshaped("scales"),
    "places of other shape": reshaped("places"),
    "another bank": renamed,
    "no such dtype": record(dtype="int64"),
    "a number for a dtype": record(dtype=3),
    "no such activations": record(activations="int2"),
    "a field too many": record(more=1),
    "a field too few": record(dtype=None),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("form", ["float", "compact int8"])
def test_forged_files_change_nothing(what: str, form: str, tmp_path: Path) -> None:
    path, net = tmp_path / "model", of_form(form, 1)
    rpg.save(of_form("compact int8"), path)
    forge(path, BAD[what])
    before, held = net(X), bank_of(net).weight
    with pytest.raises(ValueError, match=str(path)):
        rpg.load(net, path)
    assert bank_of(net).weight is held
    assert torch.equal(net(X), before)


def test_float8_codes_that_are_nan(tmp_path: Path) -> None:
    path, net = tmp_path / "model", build(1)
    rpg.save(of_form("float8_e4m3fn"), path)
    forge(path, put("codes", 0x7F, "B"))
    with pytest.raises(ValueError, match="NaN"):
        rpg.load(net, path)
    assert bank_of(net).stored is None


def test_a_pruned_model_and_a_stored_file(tmp_path: Path) -> None:
    from torch.nn.utils import prune

    path, net = tmp_path / "model", build(1)
    rpg.save(of_form("int8"), path)
    prune.l1_unstructured(bank_of(net), "weight", 0.5)
    with pytest.raises(ValueError, match="weight_orig"):
        rpg.load(net, path)
    assert prune.is_pruned(bank_of(net))
