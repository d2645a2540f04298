"""Train a network of your own with shared parameters, from conversion to a dense model again.

    python examples/train_own_model.py

It takes scikit-learn's handwritten digits (1797 images of 8x8) and a few seconds on a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import rpg_kernels as rpg


def network() -> nn.Module:
    """Any network will do; nothing in it knows of rpg_kernels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * 4 * 4, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


def shared_network(dof: int) -> nn.Module:
    """The same network; its hidden layers read their weights from one bank of ``dof`` elements.

    The first and the last layer, norms and biases stay as they are. The seed fixes the map
    from the bank to the weights: whoever builds the model again must use the same one.
    """
    return rpg.convert(network(), rpg.RPGConfig(dof=dof, granularity=64, seed=0))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return x[train], y[train], x[test], y[test]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of correct answers, the model in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dof", type=int, default=4096, help="size of the bank")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()

    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    model = shared_network(options.dof)
    print(rpg.summary(model))

    # One group for the bank, one for the other weights, one without weight decay. The bank has
    # the dense network's learning rate: the layers' scales take care of the rest.
    groups = rpg.param_groups(model, lr=0.05, weight_decay=1e-4)
    optimiser = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    steps = options.epochs * len(range(0, len(x), 64))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=[g["lr"] for g in groups], total_steps=steps
    )
    for epoch in range(options.epochs):
        model.train()
        total = 0.0
        for batch in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(batch)
        found = accuracy(model, x_test, y_test)
        print(f"epoch {epoch + 1}: loss {total / len(x):.3f}, accuracy {found:.1%}")

    # The bank is one entry of the state dict; the weights that it stands for are not stored.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.pt"
        torch.save(model.state_dict(), path)
        print(f"saved {path.stat().st_size:,} bytes")
        again = shared_network(options.dof)
        again.load_state_dict(torch.load(path, weights_only=True))
    model.eval()
    again.eval()
    assert torch.equal(again(x_test), model(x_test))
    print("loaded: the same outputs")

    # For programs that want plain torch.nn, at the price of storing every weight.
    dense = rpg.materialize(model)
    torch.testing.assert_close(dense(x_test), model(x_test), rtol=1e-4, atol=1e-4)
    stored = sum(p.numel() for p in dense.parameters())
    kept = sum(p.numel() for p in model.parameters())
    print(f"materialised: {stored:,} parameters instead of {kept:,}, the same function")


if __name__ == "__main__":
    main()
