"""prune_channels on networks of timm: the whole network without those channels, shared or dense."""

from __future__ import annotations

import copy
from typing import Any

import other_torchvision
import pytest
import torch
from torch import nn

import rpg_kernels as rpg

other_torchvision.declare()
timm: Any = pytest.importorskip("timm")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "densenet121"])
def test_is_the_whole_network_without_the_channels(name: str, shared: bool) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False, num_classes=7).double()
    if shared:
        net = rpg.convert(net, rpg.RPGConfig(dof=40_000))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3)
    net.eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    whole = copy.deepcopy(rpg.materialize(net))
    made = rpg.prune_channels(net, x, 0.7)
    assert 0.6 < made.flops_after / made.flops_before <= 0.7
    for layer, (_, into) in rpg.kept_channels(net).items():
        reader: Any = whole.get_submodule(layer)
        if isinstance(reader, nn.Conv2d | nn.Linear) and getattr(reader, "groups", 1) == 1:
            runs = into["chosen"] if isinstance(into, dict) else into
            gone = torch.ones(reader.weight.shape[1], dtype=torch.bool)
            for offset, length in zip(runs[::2], runs[1::2], strict=True):
                gone[offset : offset + length] = False
            with torch.no_grad():
                reader.weight[:, gone] = 0
    with torch.no_grad():
        torch.testing.assert_close(net(x), whole(x), rtol=1e-9, atol=1e-9)
    net.train()(torch.cat([x, x + 1])).sum().backward()
