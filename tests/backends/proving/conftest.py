"""Fixtures: verdicts of each test are its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import back_ends_on_trial as trials
import brute_force as brute
import pytest
import torch

import rpg_kernels as rpg
from rpg_kernels.backends.proving import trust, verdicts


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(verdicts.ENVIRONMENT_CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv("BACK_ENDS_ON_TRIAL", "1")
    monkeypatch.setattr("rpg_kernels.settings._PROVE", "1")
    monkeypatch.setattr(trials.OnTrial, "wanted", True)
    monkeypatch.setattr(trials.OnTrial, "ran", [])
    trust.forget()
    yield tmp_path / "cache"
    trials.unregister()
    trust.forget()


@pytest.fixture
def layer() -> rpg.nn.Linear:
    bank = brute.bank_of(640, torch.float32, granularity=16)
    return rpg.nn.Linear(20, 9, bias=False, bank=bank)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials in this process."""
    monkeypatch.setattr("rpg_kernels.settings._PROVE", "here")
