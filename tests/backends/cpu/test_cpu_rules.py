"""Dispatch's rules are held against what was measured: files are read, nothing is timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.harness.cases import DTYPES
from benchmarks.harness.cpu import grid, run
from rpg_kernels import native
from rpg_kernels.backends.cpu import rules, tiles, units
from rpg_kernels.bank.parameter_bank import ParameterBank

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
FILES = [path for path in sorted(RESULTS.glob("*.json")) if run.load(path)]
assert FILES, "no results of the CPU suite are committed"
OPERATORS = {
    grid.FORWARD: ("linear",),
    grid.TRAINING: ("linear", "linear_input_grad", "linear_bank_grad"),
}
NOISE = 1.05  # the reference may have been left after a round


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_taken_was_measured_to_be_faster(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run.load(path)
    assert record
    assert record["results"]
    gain = 1.0 if "AVX512-BF16" in record["lacks"] else 2.0 if "AMX" in record["lacks"] else 16.0
    for module in (tiles, units):
        monkeypatch.setattr(
            module, "dense_gain", lambda dtype: 1.0 if dtype == torch.float32 else gain
        )
    threads = record["environment"]["threads"]
    monkeypatch.setattr(native, "threads", lambda: threads)
    banks = {(row["dof"], row["laps"]) for row in record["results"]}
    parameters = {
        (dof, laps): ParameterBank(dof, grid.GRANULARITY, laps=laps) for dof, laps in banks
    }
    for row in record["results"]:
        weight = parameters[row["dof"], row["laps"]].place(tuple(row["weight_shape"]))
        dtype = DTYPES[row["dtype"]][0]
        chosen = [
            "cpu" if rules.faster(op, dtype, row["batch"], weight.spec) else "reference"
            for op in OPERATORS[row["what"]]
        ]
        name = run.name_of(row)
        assert row["backend"] == ", ".join(dict.fromkeys(chosen)), name
        if "cpu" in chosen:
            assert row["ours_s"] <= NOISE * row["reference_s"], name


def test_beside_products_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured on a processor with AMX, 2048x2048, in bfloat16: at 4 rows a product the
    forward was faster than the reference with 64 rows of x, and slower with 256."""
    monkeypatch.setattr(units, "dense_gain", lambda dtype: units.TILE_GAIN)

    def taken(op: str, laps: int, batch: int, pairs: bool = True, threads: int = 1) -> bool:
        rules._family.cache_clear()
        monkeypatch.setattr(native, "threads", lambda: threads)
        monkeypatch.setattr(native, "multiplies_pairs", lambda: pairs)
        spec = ParameterBank(100_000, 64, laps=laps).place((1024, 1024)).spec
        return rules.faster(op, torch.bfloat16, batch, spec)

    assert taken("linear", 4, 64)
    assert not taken("linear", 4, 256)
    assert not taken("linear", 4, 64, pairs=False)
    assert taken("linear", 4, 512, threads=2)
    assert not taken("linear", 4, 1024, threads=2)
    assert taken("linear", 9, 256)
    assert not taken("linear", 9, 1024)
    for laps, batch in ((2, 4096), (4, 256), (9, 1024)):
        assert taken("linear_input_grad", laps, batch)
        assert taken("linear_bank_grad", laps, batch) == (laps == 9)
    rules._family.cache_clear()


def test_a_processor_with_more_is_trusted_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule for 16 bits, on processors that no result file knows."""
    shared = ParameterBank(200_000, 64, laps=4).place((1024, 1024)).spec
    whole = ParameterBank(2_000_000, 64).place((1024, 1024)).spec

    def taken(spec: str, batch: int, gain: float) -> bool:
        rules._family.cache_clear()
        for module in (tiles, units):
            monkeypatch.setattr(module, "dense_gain", lambda dtype: gain)
        return rules.faster("linear", torch.bfloat16, batch, spec)

    for batch, gains in ((8, (1, 2, 4, 16)), (256, (1, 2)), (4096, (1, 2))):
        assert all(taken(shared, batch, gain) for gain in gains)
    assert not taken(shared, 256, 4)
    assert not taken(shared, 256, 16)
    assert taken(whole, 256, 1)
    assert not taken(whole, 256, 2)
    assert taken(whole, 16, 16)
