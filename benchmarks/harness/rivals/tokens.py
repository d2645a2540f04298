"""Tokens per second of a decoder on a bank, beside the roof of a dense one of four bits.

The roof is the time in which the dense network's weights, at 4.25 bits each with their scales, can
be read from memory: nothing that has to read them all for every token is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import rpg_kernels as rpg
from benchmarks.harness.cpu.decoder import PROMPT, token_seconds
from benchmarks.harness.cpu.grid import Bank
from benchmarks.harness.rivals.families import ours
from benchmarks.harness.rivals.flush import Flush
from rpg_kernels.models import Decoder, DecoderConfig

BITS = 4.25  # of a weight and its share of a scale
BANKS = (Bank(2_000_000, 4), Bank(2_000_000, 16), Bank(20_000_000, 4), Bank(20_000_000, 16))
# As wide as Llama 3 with 8 billion, of which it has four layers.
CONFIG = DecoderConfig(width=4096, layers=4, heads=32, kv_heads=8, hidden=14336)
# Of the logits, relative to the largest: what rounding may make of some layers.
ALLOWED = {ours.BF16: 1e-1, ours.STORED: 2e-1, ours.ROUNDED: 3e-1}


def model_of(config: DecoderConfig, bank: Bank, seed: int) -> Decoder:
    """A decoder whose linear layers, all of them, read one bank, in fp32 for inference."""
    with torch.device("meta"):
        model = Decoder(config)
    shared = rpg.convert(
        model, rpg.RPGConfig(dof=bank.dof, laps=bank.laps), lambda m, name: isinstance(m, nn.Linear)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = rpg.initialize(shared, "cpu")
    assert isinstance(made, Decoder)
    return made.eval().requires_grad_(False)


def measure(
    config: DecoderConfig,
    banks: Sequence[Bank],
    flush: Flush,
    clock: Callable[[], float],
    *,
    tokens: int,
    series: int,
    seed: int,
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Sizes of the network, and a row of ``schema.TOKENS`` for each bank and what it holds.

    Args:
        config: of the network.
        banks: to read.
        flush: memory whose reading is timed beside every series.
        clock: to read.
        tokens: generated in a series, one at a time.
        series: of each network, in turn.
        seed: of weights and prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(config.vocabulary, (1, PROMPT), generator=generator)
    networks: dict[str, Decoder] = {}
    rows: dict[str, dict[str, Any]] = {}
    weights = 0
    for bank in banks:
        exact: Tensor | None = None
        for of in ours.values():
            network = model_of(config, bank, seed)
            weights = rpg.summary(network).virtual_weights
            with torch.no_grad():
                exact = network(prompt) if exact is None else exact
                ours.quantized(network, of)
                error = float((network(prompt).float() - exact).abs().max() / exact.abs().max())
            name = f"{bank}, {of}"
            networks[name] = network
            held = network.rpg_bank
            assert isinstance(held, rpg.ParameterBank)
            rows[name] = {
                "name": name, "ours_s": [], "roof_s": [], "nbytes": ours.stored_bytes(held),
                "error": error if error < float("inf") else None, "allowed": ALLOWED[of],
            }  # fmt: skip
    nbytes = weights * BITS / 8
    for _ in range(series):
        for name, network in networks.items():
            rows[name]["roof_s"].append(nbytes / _rate(flush, clock))
            rows[name]["ours_s"].append(token_seconds(network, prompt, tokens, clock))
    model = asdict(config) | {"virtual_weights": weights, "roof_bytes": round(nbytes)}
    sizes = {name: value for name, value in model.items() if isinstance(value, int)}
    return sizes | {"tokens": tokens, "prompt": PROMPT}, list(rows.values())


def _rate(flush: Flush, clock: Callable[[], float]) -> float:
    """Bytes per second of memory, the best of three readings: nothing else may disturb a roof."""
    seconds = []
    for _ in range(3):
        begin = clock()
        flush()
        seconds.append(clock() - begin)
    return flush.nbytes / min(seconds)
