"""A small model with two groups of layers, for tests of groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rpg_kernels as rpg

GROUPS = (rpg.Group("enc", "enc"), rpg.Group("mid", "mid"))


class Net(nn.Module):
    """``enc`` has two layers of 32 x 32, ``mid`` is one; stem, frozen and head are in no group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 32)
        self.enc = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        self.mid = nn.Linear(32, 32)
        self.frozen = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(self.mid(self.enc(self.stem(x)))))


def converted(seed: int = 0, **fields: Any) -> Net:
    """The net with a bank for each group, drawn from a seed."""
    torch.manual_seed(seed)
    fields = {"dof": 512, "granularity": 8, "groups": GROUPS, **fields}
    return rpg.convert(Net(), rpg.RPGConfig(**fields))
