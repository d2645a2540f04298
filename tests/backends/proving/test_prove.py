"""rpg.prove: everything that a model calls, tested up front."""

from __future__ import annotations

import sys

import back_ends_on_trial as trials
import brute_force as brute
import pytest
import torch

import rpg_kernels as rpg
from rpg_kernels.backends.proving import trust


def test_prove_up_front(
    layer: rpg.nn.Linear, here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = layer.virtual_weight.bank
    model = torch.nn.Sequential(
        rpg.nn.Conv2d(3, 4, 3, bank=bank), torch.nn.Flatten(), rpg.nn.Linear(64, 5, bank=bank)
    )
    trials.register("right")
    x = torch.randn(2, 3, 6, 6)
    for inputs, images in (((x,), 1), ((), 2)):
        trust.forget()
        said = rpg.prove(model, *inputs, batches=(1, 16))
        products = {"", "_input_grad", "_bank_grad"}
        assert {e.op for e in said} == {f"{o}{p}" for o in ("linear", "conv2d") for p in products}
        assert len(said) == 6 * images
        assert {e.backend for e in said} == {"right"}
        assert all("proved here" in e.reason for e in said)
        trials.OnTrial.ran.clear()
    model(x).sum().backward()
    assert model.training
    assert {line.split()[1] for line in trials.OnTrial.ran} >= {"conv2d", "linear"}
    assert "proving" in capsys.readouterr().err
    for wrong, error in (((3, {}), TypeError), ((model, {"batches": [0]}), ValueError)):
        with pytest.raises(error, match=r"model: got a int|batches: got 0"):
            rpg.prove(wrong[0], **wrong[1])  # type: ignore[arg-type]
    with rpg.backend("right"), pytest.raises(RuntimeError, match="a forced one is not tested"):
        rpg.prove(model)


def test_a_bad_one_is_found_up_front(layer: rpg.nn.Linear, here: None) -> None:
    trials.register("wrong", "right")
    with pytest.warns(UserWarning, match="back end wrong failed"):
        said = rpg.prove(layer, batches=[2], backward=False, progress=False)
    assert [e.backend for e in said] == ["right"]
    assert "wrong failed its test" in said[0].reason


def test_prove_without_a_standard_error(
    layer: rpg.nn.Linear, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials.register("right")
    monkeypatch.setattr(sys, "stderr", None)
    assert len(rpg.prove(layer, batches=(b for b in (1, 2)))) == 6  # type: ignore[arg-type]


def test_banks_in_fewer_bytes(layer: rpg.nn.Linear, here: None) -> None:
    """Are tried with all that reads them, and with no gradient of theirs."""
    trials.register("right")
    for inputs in ((torch.randn(2, layer.in_features),), ()):
        kinds = set()
        for kind in ("int8", "float8_e4m3fn"):
            rpg.quantize(layer, kind)
            trust.forget()
            said = rpg.prove(layer, *inputs, batches=(2,), progress=False)
            rpg.dequantize(layer)
            assert [e.op for e in said] == ["linear", "linear_input_grad"]
            assert all("proved here" in e.reason for e in said)
            kinds |= set(trust._known)
        assert len(kinds) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("stored", ["", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_back_ends_of_this_gpu_prove_themselves(dtype: torch.dtype, stored: str) -> None:
    """In another process; a failure's message is in what explain says."""
    bank = brute.unit_bank(131_072, laps=4, device="cuda", dtype=dtype)
    model = torch.nn.ModuleList(
        [
            rpg.nn.Linear(256, 1024, bank=bank),
            rpg.nn.Conv2d(64, 64, 3, padding=1, bank=bank),
            rpg.nn.Embedding(100, 256, bank=bank),
        ]
    )
    if stored:
        rpg.quantize(model, stored)
    said = rpg.prove(model, batches=(1, 16, 256), progress=False)
    assert {e.backend for e in said} >= {"triton"}
    for explained in said:
        assert "failed its test" not in explained.reason, explained
