"""A whole model: seconds per token of a decoder, dense and with every linear layer on one bank."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import harness, machine
from benchmarks.harness import schema as format_
from benchmarks.harness.cases import DTYPES
from benchmarks.harness.cpu import grid, schema
from benchmarks.harness.timing import cpu_headline
from rpg_kernels import RPGConfig, _checks, convert, materialize, summary
from rpg_kernels.models import Cache, Decoder, DecoderConfig

DENSE, OURS = "dense", "rpg-kernels"
BANK = RPGConfig(dof=2_000_000, laps=4)
PROMPT, TOKENS, SERIES = 8, 32, 5
# Of the logits, relative to the largest: what rounding may make of a dozen layers.
_ALLOWED = {"fp32": 1e-4, "bf16": 5e-2}
_SIZES = ("vocabulary", "width", "layers", "heads", "kv_heads", "hidden")
Record = dict[str, Any]


def shared(config: DecoderConfig, bank: RPGConfig, dtype: torch.dtype) -> Decoder:
    """A decoder whose linear layers, all of them, read one bank; random, for inference."""
    model = Decoder(config).to(dtype)
    model = convert(model, bank, lambda module, name: isinstance(module, nn.Linear))
    return model.eval().requires_grad_(False)


def run(
    config: DecoderConfig | None = None,
    bank: RPGConfig = BANK,
    *,
    dtypes: Sequence[str] = (),
    tokens: int = TOKENS,
    series: int = SERIES,
    threads: int | None = None,
    seed: int = 0,
    commit: str | None = None,
    out: Path | None = None,
    show: Callable[[str], None] | None = None,
) -> Record:
    """Measure and return what ``schema.DECODER_FILE`` describes.

    The dense network has the weights that the bank stands for, so both compute the same function,
    which is checked: logits of the prompt and of what is generated from it.

    Args:
        config: sizes; None for those of ``DecoderConfig``.
        bank: of the shared network.
        dtypes: ``"fp32"``, ``"bf16"``; none gives both.
        tokens: to generate in a series, one at a time.
        series: of each network, in turn.
        threads: of the processor; None for torch's present number.
        seed: of weights and prompt.
        commit: to record outside a git checkout.
        out: where to write; None writes nothing.
        show: called with a line for people; None prints them.

    Raises:
        ValueError: an unknown dtype, a number that is out of range.
        OSError: ``out`` cannot be written; it is tried before anything is measured.
    """
    threads = torch.get_num_threads() if threads is None else threads
    _checks.integer("threads", threads, 1, 4096)
    _checks.integer("series", series, 1, 1000)
    for name in dtypes:
        _checks.choice("dtype", name, grid.DTYPES)
    harness.check_writable(out)
    show = show or harness.to_stderr
    config = DecoderConfig() if config is None else config
    load = machine.load()
    with harness.torch_settings(threads), torch.random.fork_rng():
        torch.manual_seed(seed)
        prompt = torch.randint(config.vocabulary, (1, PROMPT))
        results: list[dict[str, Any]] = []
        virtual = 0
        for name in dtypes or grid.DTYPES:
            show(f"decoder of width {config.width}, {config.layers} layers, {name}")
            ours = shared(config, bank, DTYPES[name][0])
            virtual = summary(ours).virtual_weights
            dense = materialize(ours).eval()
            assert isinstance(dense, Decoder)
            networks = {DENSE: dense, OURS: ours}
            results += _measure(networks, prompt, name, tokens, series)
            del ours, dense, networks
        record: Record = {
            "schema": schema.DECODER,
            "version": schema.VERSION,
            "complete": True,
            "created": machine.now(),
            "command": machine.command(),
            "clock": cpu_headline(threads),
            "environment": machine.environment(torch.device("cpu"), commit),
            "load": {"before": load, "busy": []},
            "options": {"prompt": PROMPT, "tokens": tokens, "series": series, "seed": seed},
            "model": {
                **{size: getattr(config, size) for size in _SIZES},
                "virtual_weights": virtual,
                "dof": bank.dof,
                "window": bank.window,
                "laps": bank.laps,
            },
            "results": results,
        }
    # One thread's process time leaves other work out; what that does to caches shows as spread.
    counted = load if threads > 1 else 0.0
    record["load"]["busy"] = machine.busy_reasons(
        counted, [], [(f"{r['network']} {r['dtype']}", spread(r)) for r in results], threads
    )
    format_.validate(record, schema.DECODER_FILE)
    if out is not None:
        machine.write_json(out, record)
    return record


def _measure(
    networks: dict[str, Decoder], prompt: Tensor, dtype: str, tokens: int, series: int
) -> list[dict[str, Any]]:
    """Rows of both networks in one dtype: compared first, then timed in turn."""
    threads = torch.get_num_threads()
    read = time.process_time if cpu_headline(threads) == "process" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    made = {name: network.generate(prompt, tokens) for name, network in networks.items()}
    whole = torch.cat((prompt, made[DENSE]), 1)
    with torch.no_grad():
        logits = {name: network(whole).float() for name, network in networks.items()}
    for _ in range(series):
        for name, network in networks.items():
            seconds[name].append(token_seconds(network, prompt, tokens, read))
    return [
        {
            "network": name,
            "dtype": dtype,
            "weight_bytes": sum(p.nbytes for p in network.parameters()),
            "linear_bytes": _linear_bytes(network),
            "series_s": seconds[name],
            "median_s": statistics.median(seconds[name]),
            "error": _difference(logits[name], logits[DENSE]),
            "same_tokens": bool(torch.equal(made[name], made[DENSE])),
        }
        for name, network in networks.items()
    ]


def token_seconds(
    network: Decoder, prompt: Tensor, tokens: int, read: Callable[[], float]
) -> float:
    """Seconds of a token that is generated alone; the prompt and the first token are left out."""
    with torch.no_grad():
        cache = Cache(network.config, 1, prompt.shape[1] + tokens + 1, network.norm.weight)
        token = network(prompt, cache)[:, -1:].argmax(-1)
        token = network(token, cache).argmax(-1)
        begin = read()
        for _ in range(tokens - 1):
            token = network(token, cache).argmax(-1)
        return (read() - begin) / (tokens - 1)


def _linear_bytes(network: nn.Module) -> int:
    """Of linear layers, or of the bank that they read."""
    bank = getattr(network, "rpg_bank", None)
    if bank is not None:
        return int(bank.weight.nbytes)
    return sum(m.weight.nbytes for m in network.modules() if isinstance(m, nn.Linear))


def _difference(values: Tensor, of: Tensor) -> float:
    return float((values - of).abs().max() / of.abs().max())


def wrong(record: Record) -> list[str]:
    """A sentence for each network whose logits are not the dense network's."""
    return [
        f"decoder {row['dtype']}: logits differ by {row['error']:.3g} of the largest, "
        f"allowed {_ALLOWED[row['dtype']]:g}"
        for row in record["results"]
        if not row["error"] <= _ALLOWED[row["dtype"]]
    ]


def spread(row: dict[str, Any]) -> float:
    """What the series of a row lie apart, relative to their median."""
    return float((max(row["series_s"]) - min(row["series_s"])) / row["median_s"])


def load(path: Path) -> Record | None:
    """A result file of this benchmark, or None where it is of another kind.

    Raises:
        ValueError: it does not keep to the format.
    """
    held = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(held, dict) or held.get("schema") != schema.DECODER:
        return None
    return format_.load(path, schema.DECODER_FILE)
