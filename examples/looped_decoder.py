"""A looped transformer whose loops differ at no cost in bytes.

    python examples/looped_decoder.py [--steps N] [--loops N]

The blocks of a small decoder are applied several times. With the same weights in every loop that
is a looped transformer; with ``rpg.reuse`` each loop reads the same bank by a permutation and signs
of its own. Beside the two stand decoders whose blocks share nothing: one of equal size, narrower,
and one that is ``loops`` times as large. All read Python's own library, byte by byte.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpg_kernels as rpg
from rpg_kernels.models.decoder import Decoder, DecoderConfig

CONTEXT = 128
BYTES = 128  # the vocabulary: ASCII
KEPT_FOR_TEST = 200_000


def text() -> tuple[Tensor, Tensor]:
    """Training and test bytes, int64: source files of the standard library, in order of names."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    data = b"".join(file.read_bytes() for file in files).decode("ascii", "ignore").encode()
    values = torch.tensor(list(data))
    return values[KEPT_FOR_TEST:], values[:KEPT_FOR_TEST]


def batches(data: Tensor, count: int, size: int, seed: int) -> list[Tensor]:
    """``count`` batches ``[size, CONTEXT + 1]`` from random places, the same for every decoder."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(data) - CONTEXT - 1, (count, size, 1), generator=generator)
    return list(data[starts + torch.arange(CONTEXT + 1)])


def flattened(stack: nn.Module) -> nn.ModuleList:
    """The blocks of all loops in order, as a decoder wants them."""
    return nn.ModuleList(block for loop in stack.children() for block in loop.children())


def is_block_layer(module: nn.Module, name: str) -> bool:
    """Embedding and head stay as they are."""
    return name.startswith("layers.")


def shared(config: DecoderConfig, loops: int) -> Decoder:
    """The same weights in every loop, and norms of each loop's own."""
    model = Decoder(config)
    model.layers = flattened(rpg.reuse(model.layers, loops, remap=False))
    return model


def remapped(config: DecoderConfig, loops: int) -> Decoder:
    """The same bank in every loop, read in another order, with other signs.

    The bank is as large as the blocks, so that one loop would share nothing. All of them together
    use it ``loops`` times, and as many laps save as many multiplications.
    """
    model = Decoder(config)
    size = sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)
    how = rpg.RPGConfig(dof=size, laps=loops)
    rpg.convert(model, how, is_block_layer, uses=loops)
    model.layers = flattened(rpg.reuse(model.layers, loops))
    return model


def unshared(config: DecoderConfig, loops: int) -> Decoder:
    """As deep as the looped ones, with weights of its own in every block."""
    return Decoder(replace(config, layers=loops * config.layers))


def narrower(config: DecoderConfig, loops: int) -> Decoder:
    """As deep as the looped ones and unshared, the widest that is not larger."""
    most = size_of(shared(config, loops))
    step = 2 * config.heads
    fitting = [
        model
        for width in range(step, config.width + 1, step)
        if size_of(model := unshared(_narrowed(config, width), loops)) <= most
    ]
    return fitting[-1]


def _narrowed(config: DecoderConfig, width: int) -> DecoderConfig:
    return replace(config, width=width, hidden=config.hidden * width // config.width)


def size_of(model: nn.Module) -> int:
    """All that is trained."""
    return sum(p.numel() for p in model.parameters())


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy of the next byte, in bits."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) / torch.tensor(2.0).log()


def train(model: nn.Module, data: list[Tensor], lr: float) -> float:
    """Train with AdamW under a one-cycle rate; the seconds of processor time that it took."""
    optimiser = torch.optim.AdamW(rpg.param_groups(model, lr=lr, weight_decay=0.1))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=len(data))
    begin = time.process_time()
    for batch in data:
        loss = loss_of(model, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return time.process_time() - begin


@torch.no_grad()
def test(model: nn.Module, data: list[Tensor]) -> float:
    """Bits for a byte of text that training did not see."""
    model.eval()
    return sum(loss_of(model, batch).item() for batch in data) / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--loops", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=2, help="in a loop (default: 2)")
    parser.add_argument("--width", type=int, default=128, help="a multiple of 8 (default: 128)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args()

    config = DecoderConfig(BYTES, options.width, options.blocks, 4, 4, 3 * options.width)
    training, held_out = text()
    data = batches(training, options.steps, options.batch_size, seed=0)
    kept = batches(held_out, max(1, options.steps // 10), options.batch_size, seed=1)
    kinds: dict[str, Callable[[DecoderConfig, int], Decoder]] = {
        "the same weights in every loop": shared,
        "a permutation and signs for each loop": remapped,
        "unshared, narrower": narrower,
        "unshared": unshared,
    }
    print(f"{options.loops} loops of {options.blocks} blocks, {options.steps} steps")
    for name, build in kinds.items():
        torch.manual_seed(0)
        model = build(config, options.loops)
        seconds = train(model, data, options.lr)
        bits = test(model, kept)
        print(f"{name:38} {size_of(model):>10,} numbers  {bits:.3f} bits a byte  {seconds:.0f} s")


if __name__ == "__main__":
    main()
