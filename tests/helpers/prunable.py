"""Small networks with all that binds channels, for the tests of pruning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """A stem, two residual blocks, one of them with a strided shortcut, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.a = nn.Conv2d(12, 10, 3, padding=1, bias=False)
        self.a_norm = nn.BatchNorm2d(10)
        self.b = nn.Conv2d(10, 12, 3, padding=1)
        self.short = nn.Conv2d(12, 18, 1, stride=2)
        self.c = nn.Conv2d(12, 18, 3, stride=2, padding=1)
        self.fc = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.b(torch.relu(self.a_norm(self.a(x)))))
        x = F.relu(self.short(x) + self.c(x), inplace=True)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Depthwise(nn.Module):
    """An inverted residual with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.wide = nn.Conv2d(8, 20, 1)
        self.deep = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.norm = nn.BatchNorm2d(20)
        self.squeeze = nn.Conv2d(20, 6, 1)
        self.excite = nn.Conv2d(6, 20, 1)
        self.narrow = nn.Conv2d(20, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = F.relu6(self.norm(self.deep(self.wide(x))))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head(x + self.narrow(y * scale)).mean((2, 3))


class Joined(nn.Module):
    """Concatenation, a pooled flatten that gives several features for a channel, and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 9, 1)
        self.both = nn.Conv2d(15, 7, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(7, 5, 2, stride=2)
        self.pool = nn.AvgPool2d(2)
        self.hidden = nn.Linear(5 * 16, 11)
        self.out = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.gelu(self.left(x)), self.right(x)], 1)
        x = self.pool(F.relu(self.up(F.relu(self.both(x)))))
        return self.out(F.silu(self.hidden(x.view(x.size(0), -1))))


class Sequence(nn.Module):
    """Convolutions of sequences, and linear layers on the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 10, 3, padding=1)
        self.norm = nn.BatchNorm1d(10)
        self.second = nn.Conv1d(10, 6, 1)
        self.up = nn.Linear(8, 14)
        self.down = nn.Linear(14, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.leaky_relu(self.norm(self.first(x))))
        return x + self.down(F.gelu(self.up(x)))


NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (2, 3, 8, 8)),
    "depthwise": (Depthwise, (2, 3, 6, 6)),
    "joined": (Joined, (2, 3, 8, 8)),
    "sequence": (Sequence, (2, 4, 8)),
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network in float64 whose norms do something, in eval mode, and what it is called with."""
    torch.manual_seed(seed)
    kind, shape = NETWORKS[name]
    net = kind().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval(), torch.randn(shape, dtype=torch.float64)
